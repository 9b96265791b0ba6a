//! `OpenLineage` (openlineage.io): run events that say which model and texts a job read and which checkpoints it left.
//!
//! The run is the job, by its own id. An event is made of the job and of the message that tells of its state: it is the same
//! at each try.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::call::{Result, accepted, agent, beside};
use crate::job::spec::{Corpus, ModelSource};
use crate::job::state::JobState;
use crate::service::db::{ArtifactRow, Database, Entry, EventRow, JobEvent, JobRow, Message};

const TIMEOUT: Duration = Duration::from_secs(15);
/// Of state of one job: more than any job has.
const MOST_CHANGES: u32 = 10_000;
const PRODUCER: &str = concat!("urn:secateur:", env!("CARGO_PKG_VERSION"));
/// The version of the standard, and of each facet, that is spoken here.
const SCHEMA: &str = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent";
const FACETS: &str = "https://openlineage.io/spec/facets";

/// Where events go.
#[derive(Clone)]
pub struct Lineage {
    /// The whole URL, such as `http://marquez:5000/api/v1/lineage`.
    pub url: String,
    /// The namespace of jobs and of what they leave.
    pub namespace: String,
    /// The `Authorization` header, when the receiver wants one.
    pub authorization: Option<String>,
}

impl std::fmt::Debug for Lineage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lineage({}, {})", self.url, self.namespace)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
enum EventType {
    Start,
    Running,
    Complete,
    Abort,
    Fail,
    Other,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct RunEvent {
    event_type: EventType,
    event_time: String,
    run: Run,
    job: Named,
    inputs: Vec<Named>,
    outputs: Vec<Named>,
    producer: &'static str,
    #[serde(rename = "schemaURL")]
    schema_url: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Run {
    run_id: Uuid,
    facets: Value,
}

/// A job, or a data set.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    namespace: String,
    name: String,
    facets: Value,
    /// Of what a run left only.
    #[serde(skip_serializing_if = "Option::is_none")]
    output_facets: Option<Value>,
}

impl Named {
    fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into(), facets: json!({}), output_facets: None }
    }
}

impl Lineage {
    /// Tells of the state that a message tells of. Gives the status of the answer, or `None` when there is nothing to tell.
    pub async fn deliver(&self, database: &Database, message: &Message) -> Result<Option<u16>> {
        let Some(id) = message.job_id else { return Ok(None) };
        // A deleted job has nothing more to tell.
        let Some(job) = database.job(message.tenant, id).await? else { return Ok(None) };
        let files = match message.kind.as_str() {
            "job.succeeded" => database.artifacts(message.tenant, id).await?,
            _ => Vec::new(),
        };
        let changes =
            database.events_after(message.tenant, id, 0, &["state_changed".into()], MOST_CHANGES).await?;
        let running = |row: &&EventRow| {
            matches!(row.body, Entry::Job(JobEvent::StateChanged { state: JobState::Running, .. }))
        };
        // Before its first attempt a job is no run.
        let Some(first) = changes.iter().find(running) else { return Ok(None) };
        let Some(event) = self.event(&job, &files, message, first.seq) else { return Ok(None) };
        let this = self.clone();
        beside(move || this.send(&event)).await.map(Some)
    }

    fn send(&self, event: &RunEvent) -> Result<u16> {
        let mut call = agent(TIMEOUT).post(&self.url);
        if let Some(word) = &self.authorization {
            call = call.header("authorization", word);
        }
        Ok(accepted("the receiver", call.send_json(event))?.status().as_u16())
    }

    /// `first`: the number of the event with which the first attempt began.
    fn event(&self, job: &JobRow, files: &[ArtifactRow], message: &Message, first: i64) -> Option<RunEvent> {
        let told: Value = serde_json::from_str(&message.body).ok()?;
        let state: JobState = message.kind.strip_prefix("job.")?.parse().ok()?;
        let data = &told["data"];
        let seq = data["seq"].as_i64().filter(|seq| *seq >= first)?;
        let event_type = match state {
            JobState::Running if seq == first => EventType::Start,
            JobState::Running => EventType::Running,
            JobState::Succeeded => EventType::Complete,
            JobState::Failed => EventType::Fail,
            JobState::Cancelled => EventType::Abort,
            JobState::Queued | JobState::Paused => EventType::Other,
        };
        let mut inputs = vec![self.model(&job.spec.model)];
        let mut spec = job.spec.clone();
        for (_, corpus) in spec.corpora_mut() {
            let text = self.text(corpus).filter(|text| {
                inputs.iter().all(|known| (&known.namespace, &known.name) != (&text.namespace, &text.name))
            });
            inputs.extend(text);
        }
        let mut run = json!({
            "processing_engine": facet("1-1-1/ProcessingEngineRunFacet", json!({
                "version": env!("CARGO_PKG_VERSION"), "name": "secateur"})),
        });
        if let Some(text) = data["failure"]["message"].as_str().filter(|_| state == JobState::Failed) {
            let error = json!({"message": text, "programmingLanguage": "Rust"});
            run["errorMessage"] = facet("1-0-1/ErrorMessageRunFacet", error);
        }
        let mut named = Named::new(&self.namespace, job.spec.title());
        let kind = json!({"processingType": "BATCH", "integration": "SECATEUR", "jobType": "JOB"});
        named.facets = json!({"jobType": facet("2-0-4/JobTypeJobFacet", kind)});
        Some(RunEvent {
            event_type,
            event_time: told["timestamp"].as_str()?.to_owned(),
            run: Run { run_id: job.id, facets: run },
            job: named,
            inputs,
            outputs: self.outputs(job, files),
            producer: PRODUCER,
            schema_url: SCHEMA,
        })
    }

    fn model(&self, source: &ModelSource) -> Named {
        match source {
            ModelSource::Hub { repo, revision } => on_hub(repo, revision),
            ModelSource::Path { path } => Named::new("file", path),
            ModelSource::S3 { uri } => {
                let (bucket, key) = uri.trim_start_matches("s3://").split_once('/').unwrap_or((uri, "/"));
                Named::new(format!("s3://{bucket}"), key)
            }
            ModelSource::Job { job_id } => Named::new(&self.namespace, format!("{job_id}/checkpoint")),
        }
    }

    /// A text that the job reads; what stands in its spec, or is written by the model, is no data set.
    fn text(&self, corpus: &Corpus) -> Option<Named> {
        match corpus {
            Corpus::Path { path } => Some(Named::new("file", path)),
            Corpus::Hub { repo, file, revision } => {
                let of = on_hub(&format!("datasets/{repo}"), revision);
                Some(Named { name: format!("{}/{file}", of.name), ..of })
            }
            Corpus::Upload { upload_id } => Some(Named::new(&self.namespace, format!("uploads/{upload_id}"))),
            Corpus::Text { .. } | Corpus::Model { .. } | Corpus::Mix { .. } => None,
        }
    }

    /// The checkpoints that are there, each a data set; the better one also by the name that later jobs call it.
    fn outputs(&self, job: &JobRow, files: &[ArtifactRow]) -> Vec<Named> {
        let of = |directory: &'static str| {
            let inside = move |file: &&ArtifactRow| file.path.starts_with(&format!("{directory}/"));
            let (count, size) = files
                .iter()
                .filter(inside)
                .fold((0, 0), |(count, size), file| (count + 1, size + file.size_bytes));
            (count > 0).then_some((directory, count, size))
        };
        let left: Vec<_> = ["healed", "pruned", "gguf"].into_iter().filter_map(of).collect();
        let best = left
            .first()
            .filter(|(directory, ..)| *directory != "gguf")
            .map(|(_, count, size)| ("checkpoint", *count, *size));
        let named = |(name, count, size): (&str, i64, i64)| {
            let statistics = json!({"fileCount": count, "size": size});
            Named {
                output_facets: Some(json!({
                    "outputStatistics": facet("1-0-2/OutputStatisticsOutputDatasetFacet", statistics)})),
                ..Named::new(&self.namespace, format!("{}/{name}", job.id))
            }
        };
        best.into_iter().chain(left).map(named).collect()
    }
}

fn on_hub(repo: &str, revision: &str) -> Named {
    let version = facet("1-0-1/DatasetVersionDatasetFacet", json!({"datasetVersion": revision}));
    Named { facets: json!({"version": version}), ..Named::new("https://huggingface.co", repo) }
}

/// A facet of the standard: `what` is its version and name.
fn facet(what: &str, mut content: Value) -> Value {
    let name = what.rsplit('/').next().unwrap_or_default();
    content["_producer"] = PRODUCER.into();
    content["_schemaURL"] = format!("{FACETS}/{what}.json#/$defs/{name}").into();
    content
}
