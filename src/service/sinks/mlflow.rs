//! `MLflow`: one run per job, by its REST API.
//!
//! A message only says that a job has changed. The job as it stands now is then brought over, so that messages may come
//! in any order and again. Measured values come when a job has ended, for only then no step is computed anew.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::call::{Refusal, Result, accepted, agent, beside};
use crate::job::progress::Event;
use crate::job::state::JobState;
use crate::service::db::{Database, Entry, JobRow, Message, Tenant};
use crate::service::store::Store;

/// As the database calls this sink.
pub const NAME: &str = "mlflow";
/// One call, an upload of a file among them.
const TIMEOUT: Duration = Duration::from_mins(2);
/// What one `log-batch` may hold.
const MOST_METRICS: usize = 1000;
const MOST_PARAMS: usize = 100;
/// Values longer than this are cut.
const MOST_CHARS: usize = 500;
/// What goes over as artifacts: what people look at. The weights stay where they are, and a tag says where.
const ARTIFACTS: [&str; 5] = ["profile.json", "selection.json", "eval.json", "report.json", "report.html"];
const PLOTS: &str = "plots/";

/// Where runs are kept.
#[derive(Clone)]
pub struct Mlflow {
    /// Such as `http://127.0.0.1:5000`.
    pub url: String,
    pub experiment: String,
    /// The `Authorization` header, when the server wants one.
    pub authorization: Option<String>,
}

impl std::fmt::Debug for Mlflow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mlflow({}, {})", self.url, self.experiment)
    }
}

/// All of a job that goes over.
struct Told {
    job: JobRow,
    params: Vec<Value>,
    tags: Vec<Value>,
    metrics: Vec<Value>,
    files: Vec<(String, PathBuf)>,
}

impl Mlflow {
    /// Brings the job of a message over.
    pub async fn deliver(&self, database: &Database, store: &Store, message: &Message) -> Result<()> {
        match message.job_id {
            Some(job) => self.bring(database, store, message.tenant, job).await,
            None => Ok(()),
        }
    }

    async fn bring(&self, database: &Database, store: &Store, tenant: Tenant, id: Uuid) -> Result<()> {
        // A deleted job has nothing more to tell.
        while let Some(job) = database.job(tenant, id).await? {
            let state = job.state;
            let told = gather(database, store, job).await?;
            let (this, run) = (self.clone(), (told.job.clone(), told.tags.clone()));
            let make = || beside(move || this.find_or_make(&run.0, &run.1));
            let run = database.external_run(NAME, id, make).await??;
            let this = self.clone();
            beside(move || this.send(&run, &told)).await?;
            // Somebody else may have told of a newer state meanwhile, before this older one.
            if database.job(tenant, id).await?.is_none_or(|job| job.state == state) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The job's run: one that an attempt before this one made and did not live to note, or a new one.
    fn find_or_make(&self, job: &JobRow, tags: &[Value]) -> Result<String> {
        let experiment = self.experiment()?;
        let filter = format!("tags.`secateur.job_id` = '{}'", job.id);
        let asked = json!({"experiment_ids": [experiment], "filter": filter, "max_results": 1});
        let found = self.call("runs/search", &asked)?;
        if let Some(id) = found["runs"][0]["info"]["run_id"].as_str() {
            return Ok(id.to_owned());
        }
        let name = job.name.clone().unwrap_or_else(|| job.id.to_string());
        let start = millis(job.started_at.unwrap_or(job.created_at));
        let new = json!({"experiment_id": experiment, "run_name": name, "start_time": start, "tags": tags});
        let made = self.call("runs/create", &new)?;
        text(&made["run"]["info"]["run_id"])
    }

    fn experiment(&self) -> Result<String> {
        let by_name = || {
            let name = percent(&self.experiment);
            self.get(&format!("experiments/get-by-name?experiment_name={name}"))
        };
        let missing = |refusal: &Refusal| refusal.code == "RESOURCE_DOES_NOT_EXIST";
        let exists = |refusal: &Refusal| refusal.code == "RESOURCE_ALREADY_EXISTS";
        match by_name() {
            Ok(found) => text(&found["experiment"]["experiment_id"]),
            Err(refusal) if missing(&refusal) => {
                match self.call("experiments/create", &json!({"name": self.experiment})) {
                    Ok(made) => text(&made["experiment_id"]),
                    Err(refusal) if exists(&refusal) => text(&by_name()?["experiment"]["experiment_id"]),
                    Err(refusal) => Err(refusal),
                }
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// Everything of a job, in an order in which a run that says it is finished has all.
    fn send(&self, run: &str, told: &Told) -> Result<()> {
        for params in told.params.chunks(MOST_PARAMS) {
            self.call("runs/log-batch", &json!({"run_id": run, "params": params}))?;
        }
        for tags in told.tags.chunks(MOST_PARAMS) {
            self.call("runs/log-batch", &json!({"run_id": run, "tags": tags}))?;
        }
        for metrics in told.metrics.chunks(MOST_METRICS) {
            self.call("runs/log-batch", &json!({"run_id": run, "metrics": metrics}))?;
        }
        if !told.files.is_empty() {
            let info = self.get(&format!("runs/get?run_id={}", percent(run)))?;
            let at = text(&info["run"]["info"]["artifact_uri"])?;
            if let Some(at) = at.strip_prefix("mlflow-artifacts:/") {
                for (path, file) in &told.files {
                    self.put(at.trim_start_matches('/'), path, file)?;
                }
            } else {
                tracing::warn!(
                    run,
                    at,
                    "the MLflow server takes no artifacts; start it with --serve-artifacts"
                );
            }
        }
        let status = match told.job.state {
            JobState::Queued | JobState::Paused => "SCHEDULED",
            JobState::Running => "RUNNING",
            JobState::Succeeded => "FINISHED",
            JobState::Failed => "FAILED",
            JobState::Cancelled => "KILLED",
        };
        let mut update = json!({"run_id": run, "status": status});
        if let Some(at) = told.job.finished_at {
            update["end_time"] = millis(at).into();
        }
        self.call("runs/update", &update)?;
        Ok(())
    }

    fn put(&self, at: &str, path: &str, file: &PathBuf) -> Result<()> {
        let target: Vec<String> = path.split('/').map(percent).collect();
        let url = format!("{}/api/2.0/mlflow-artifacts/artifacts/{at}/{}", self.base(), target.join("/"));
        let file = std::fs::File::open(file).map_err(|e| format!("artifact {path}: {e}"))?;
        let mut request = agent(TIMEOUT).put(&url).header("content-type", "application/octet-stream");
        if let Some(word) = &self.authorization {
            request = request.header("authorization", word);
        }
        answer(request.send(&file))?;
        Ok(())
    }

    fn call(&self, what: &str, body: &Value) -> Result<Value> {
        let mut request = agent(TIMEOUT).post(format!("{}/api/2.0/mlflow/{what}", self.base()));
        if let Some(word) = &self.authorization {
            request = request.header("authorization", word);
        }
        answer(request.send_json(body))
    }

    fn get(&self, what: &str) -> Result<Value> {
        let mut request = agent(TIMEOUT).get(format!("{}/api/2.0/mlflow/{what}", self.base()));
        if let Some(word) = &self.authorization {
            request = request.header("authorization", word);
        }
        answer(request.call())
    }

    fn base(&self) -> &str {
        self.url.trim_end_matches('/')
    }
}

fn answer(got: std::result::Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Value> {
    let body = accepted("MLflow", got)?.body_mut().read_to_string().map_err(|e| format!("MLflow: {e}"))?;
    Ok(serde_json::from_str(&body).unwrap_or_default())
}

fn text(value: &Value) -> Result<String> {
    value
        .as_str()
        .map(String::from)
        .ok_or_else(|| "MLflow answered without what was asked for".to_owned().into())
}

fn millis(at: OffsetDateTime) -> i64 {
    (at.unix_timestamp_nanos() / 1_000_000) as i64
}

fn percent(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// What `MLflow` allows in a name.
fn name(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "_-./ :".contains(c);
    text.chars().take(200).map(|c| if plain(c) { c } else { '_' }).collect()
}

async fn gather(database: &Database, store: &Store, job: JobRow) -> Result<Told> {
    let spec = serde_json::to_value(&job.spec).map_err(|e| e.to_string())?;
    let mut params = Vec::new();
    flatten(String::new(), &spec, &mut params);
    let (mut metrics, mut files) = (Vec::new(), Vec::new());
    let mut tags = tags(&job);
    if job.state.is_terminal() {
        for row in database.series(job.tenant, job.id, None).await? {
            if let Entry::Run(Event::Measured { stage, name: key, step, value }) = row.body {
                let key = name(&format!("{stage}/{key}"));
                metrics.push(json!({"key": key, "value": value, "timestamp": millis(row.at), "step": step}));
            }
        }
        for row in database.artifacts(job.tenant, job.id).await? {
            if ARTIFACTS.contains(&row.path.as_str()) || row.path.starts_with(PLOTS) {
                let file = store.path(&row.location).map_err(|e| format!("artifact {}: {e}", row.path))?;
                files.push((row.path, file));
            }
        }
        let report =
            files.iter().find(|(path, _)| path == "report.json").map(|(_, file)| std::fs::read(file));
        if let Some(report) = report {
            let report = report.map_err(|e| format!("report.json: {e}"))?;
            let report: Value = serde_json::from_slice(&report).map_err(|e| format!("report.json: {e}"))?;
            let at = millis(job.finished_at.unwrap_or(job.created_at));
            scores(&report["eval"], at, &mut metrics);
            verdict(&report["verdict"], &mut tags);
        }
    }
    Ok(Told { job, params, tags, metrics, files })
}

fn tag(key: &str, value: &str) -> Value {
    json!({"key": name(key), "value": value.chars().take(MOST_CHARS).collect::<String>()})
}

fn tags(job: &JobRow) -> Vec<Value> {
    let mut tags = vec![
        tag("secateur.job_id", &job.id.to_string()),
        tag("secateur.state", job.state.name()),
        tag("secateur.attempt", &job.attempt.to_string()),
        tag("secateur.url", &format!("/v1/jobs/{}", job.id)),
        tag("mlflow.source.name", "secateur"),
    ];
    tags.extend(job.labels.iter().map(|(key, value)| tag(&format!("secateur.label.{key}"), value)));
    tags.extend(job.retry_of.map(|before| tag("secateur.retry_of", &before.to_string())));
    tags.extend(job.failure.as_ref().map(|failure| tag("secateur.failure", &failure.message)));
    tags
}

fn verdict(verdict: &Value, tags: &mut Vec<Value>) {
    if let Some(decision) = verdict["decision"].as_str() {
        tags.push(tag("secateur.verdict", decision));
        let reasons = verdict["reasons"].as_array().into_iter().flatten().filter_map(Value::as_str);
        tags.push(tag("mlflow.note.content", &reasons.collect::<Vec<_>>().join("\n")));
    }
}

/// The spec as parameters: `prune.amount.layers` = 2.
fn flatten(at: String, value: &Value, params: &mut Vec<Value>) {
    let below = |key: &str| if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| flatten(below(key), value, params)),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, value)| flatten(below(&i.to_string()), value, params));
        }
        Value::Null => {}
        Value::String(text) => params.push(tag(&at, text)),
        Value::Bool(_) | Value::Number(_) => params.push(tag(&at, &value.to_string())),
    }
}

/// What was measured of each checkpoint, as metrics: `healed/perplexity/held_out.txt`.
fn scores(eval: &Value, at: i64, metrics: &mut Vec<Value>) {
    let mut put = |key: String, value: &Value| {
        if let Some(value) = value.as_f64() {
            metrics.push(json!({"key": name(&key), "value": value, "timestamp": at, "step": 0}));
        }
    };
    for checkpoint in ["base", "pruned", "healed"] {
        let scored = &eval[checkpoint];
        for key in ["layer_count", "parameters", "size_bytes", "peak_memory_bytes"] {
            put(format!("{checkpoint}/{key}"), &scored[key]);
        }
        for key in ["prefill_tokens_per_s", "decode_tokens_per_s"] {
            put(format!("{checkpoint}/{key}"), &scored["speed"][key]);
        }
        put(format!("{checkpoint}/broken_texts"), &scored["generation"]["broken"]);
        for measured in scored["perplexity"].as_array().into_iter().flatten() {
            put(
                format!("{checkpoint}/perplexity/{}", measured["corpus"].as_str().unwrap_or_default()),
                &measured["value"],
            );
        }
        for task in scored["tasks"].as_array().into_iter().flatten() {
            put(format!("{checkpoint}/acc/{}", task["task"].as_str().unwrap_or_default()), &task["acc"]);
        }
    }
}
