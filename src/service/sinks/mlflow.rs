//! `MLflow`: one run per job, by its REST API.
//!
//! A message only says that a job has changed. The job as it stands now is then brought over, so that messages may come
//! in any order and again. Measured values come when a job has ended, for only then no step is computed anew.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::call::{Refusal, Result, accepted, agent, beside};
use crate::job::progress::Event;
use crate::job::report::FILES;
use crate::job::state::JobState;
use crate::service::db::{ArtifactRow, Database, Entry, JobRow, Message, SweepRow, Tenant, best_checkpoint};
use crate::service::store::{Local, Store};

/// As the database calls this sink.
pub const NAME: &str = "mlflow";
/// As the database calls what became versions of models.
const MODELS: &str = "mlflow-model";
/// One call.
const TIMEOUT: Duration = Duration::from_mins(2);
/// Sending one file.
const UPLOAD_TIMEOUT: Duration = Duration::from_hours(1);
/// Where the files of a model are among the artifacts of its run.
const CHECKPOINT: &str = "checkpoint";
/// What one `log-batch` may hold.
const MOST_METRICS: usize = 1000;
const MOST_PARAMS: usize = 100;
/// Values longer than this are cut.
const MOST_CHARS: usize = 500;
/// They go over, too. The weights stay where they are, and a tag says where.
const PLOTS: &str = "plots/";

/// Where runs are kept.
#[derive(Clone)]
pub struct Mlflow {
    /// Such as `http://127.0.0.1:5000`.
    pub url: String,
    pub experiment: String,
    /// The registered model whose versions the checkpoints become; their files go over, too.
    pub model: Option<String>,
    /// The `Authorization` header, when the server wants one.
    pub authorization: Option<String>,
}

impl std::fmt::Debug for Mlflow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mlflow({}, {})", self.url, self.experiment)
    }
}

/// A run to find by a tag, or to make.
struct Find {
    tag: &'static str,
    id: Uuid,
    name: String,
    /// Milliseconds.
    start: i64,
    tags: Vec<Value>,
}

impl Find {
    fn job(job: &JobRow, tags: &[Value]) -> Self {
        let name = job.name.clone().unwrap_or_else(|| job.id.to_string());
        let start = millis(job.started_at.unwrap_or(job.created_at));
        Self { tag: "secateur.job_id", id: job.id, name, start, tags: tags.to_vec() }
    }

    fn sweep(sweep: &SweepRow) -> Self {
        let name = sweep.name.clone().unwrap_or_else(|| sweep.id.to_string());
        let tags = vec![
            tag("secateur.sweep_id", &sweep.id.to_string()),
            tag("secateur.url", &format!("/v1/sweeps/{}", sweep.id)),
            tag("mlflow.source.name", "secateur"),
        ];
        Self { tag: "secateur.sweep_id", id: sweep.id, name, start: millis(sweep.created_at), tags }
    }
}

/// All of a job that goes over.
struct Told {
    job: JobRow,
    params: Vec<Value>,
    tags: Vec<Value>,
    metrics: Vec<Value>,
    files: Vec<(String, Local)>,
    /// Its checkpoint, where it is to be a version of a model.
    checkpoint: Vec<(String, Local)>,
}

impl Mlflow {
    /// Brings the job of a message over.
    pub async fn deliver(&self, database: &Database, store: &Store, message: &Message) -> Result<()> {
        match message.job_id {
            // Boxed, for it holds a whole job.
            Some(job) => Box::pin(self.bring(database, store, message.tenant, job)).await,
            None => Ok(()),
        }
    }

    async fn bring(&self, database: &Database, store: &Store, tenant: Tenant, id: Uuid) -> Result<()> {
        // A deleted job has nothing more to tell.
        while let Some(job) = database.job(tenant, id).await? {
            let state = job.state;
            let sweep = database.sweep_of(tenant, id).await?;
            let parent = match &sweep {
                // The run of a sweep, which its jobs' runs hang from.
                Some(sweep) => Some(self.run(database, sweep.id, Find::sweep(sweep)).await?),
                None => None,
            };
            let told = self.gather(database, store, job, parent.as_deref()).await?;
            let run = self.run(database, id, Find::job(&told.job, &told.tags)).await?;
            self.clone().send(database, run, told).await?;
            if let (Some(sweep), Some(parent)) = (&sweep, parent) {
                self.tell_parent(database, sweep, &parent).await?;
            }
            // Somebody else may have told of a newer state meanwhile, before this older one.
            if database.job(tenant, id).await?.is_none_or(|job| job.state == state) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The run of `id`, a job or a sweep.
    async fn run(&self, database: &Database, id: Uuid, wanted: Find) -> Result<String> {
        let this = self.clone();
        let make = || beside(move || this.find_or_make(&wanted));
        database.external_run(NAME, id, make).await?
    }

    /// A run: one that an attempt before this one made and did not live to note, or a new one.
    fn find_or_make(&self, wanted: &Find) -> Result<String> {
        let experiment = self.experiment()?;
        let filter = format!("tags.`{}` = '{}'", wanted.tag, wanted.id);
        let asked = json!({"experiment_ids": [experiment], "filter": filter, "max_results": 1});
        let found = self.call("runs/search", &asked)?;
        if let Some(id) = found["runs"][0]["info"]["run_id"].as_str() {
            return Ok(id.to_owned());
        }
        let new = json!({
            "experiment_id": experiment, "run_name": wanted.name, "start_time": wanted.start, "tags": wanted.tags,
        });
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
    async fn send(self, database: &Database, run: String, told: Told) -> Result<()> {
        let (id, state, ended) = (told.job.id, told.job.state, told.job.finished_at);
        let (this, to) = (self.clone(), run.clone());
        let (told, artifacts) = beside(move || {
            this.log(&to, &told)?;
            let artifacts = this.send_files(&to, &told)?;
            Ok((told, artifacts))
        })
        .await?;
        if let (Some(model), Some(artifacts)) = (self.model.clone(), artifacts)
            && !told.checkpoint.is_empty()
        {
            let (this, of) = (self.clone(), run.clone());
            let version =
                || beside(move || this.version(&model, &of, &format!("{artifacts}/{CHECKPOINT}"), &told));
            database.external_run(MODELS, id, version).await??;
        }
        beside(move || self.update(&run, status(state), ended)).await
    }

    fn log(&self, run: &str, told: &Told) -> Result<()> {
        for params in told.params.chunks(MOST_PARAMS) {
            self.call("runs/log-batch", &json!({"run_id": run, "params": params}))?;
        }
        for tags in told.tags.chunks(MOST_PARAMS) {
            self.call("runs/log-batch", &json!({"run_id": run, "tags": tags}))?;
        }
        for metrics in told.metrics.chunks(MOST_METRICS) {
            self.call("runs/log-batch", &json!({"run_id": run, "metrics": metrics}))?;
        }
        Ok(())
    }

    /// Brings the files over. Gives where they are; nothing when there are none, or the server takes none.
    fn send_files(&self, run: &str, told: &Told) -> Result<Option<String>> {
        if told.files.is_empty() {
            return Ok(None);
        }
        let info = self.get(&format!("runs/get?run_id={}", percent(run)))?;
        let at = text(&info["run"]["info"]["artifact_uri"])?;
        let Some(within) = at.strip_prefix("mlflow-artifacts:/") else {
            tracing::warn!(run, at, "the MLflow server takes no artifacts; start it with --serve-artifacts");
            return Ok(None);
        };
        let checkpoint = told.checkpoint.iter().map(|(path, file)| (format!("{CHECKPOINT}/{path}"), file));
        for (path, file) in told.files.iter().map(|(path, file)| (path.clone(), file)).chain(checkpoint) {
            self.put(within.trim_start_matches('/'), &path, &file.path)?;
        }
        Ok(Some(at))
    }

    /// Makes the checkpoint of a run a version of the model, unless it is one. Gives its number.
    fn version(&self, model: &str, run: &str, source: &str, told: &Told) -> Result<String> {
        match self.call("registered-models/create", &json!({"name": model})) {
            Err(refusal) if refusal.code != "RESOURCE_ALREADY_EXISTS" => return Err(refusal),
            Err(_) | Ok(_) => {}
        }
        let of_run = percent(&format!("run_id='{run}'"));
        let found = self.get(&format!("model-versions/search?filter={of_run}"))?;
        let known = found["model_versions"].as_array().into_iter().flatten().find(|v| v["name"] == model);
        if let Some(known) = known {
            return Ok(plain(&known["version"]));
        }
        let new = json!({"name": model, "source": source, "run_id": run, "tags": told.tags});
        let made = self.call("model-versions/create", &new)?;
        Ok(plain(&made["model_version"]["version"]))
    }

    /// How a sweep stands, by its jobs: told again when it changes meanwhile, as with a job.
    async fn tell_parent(&self, database: &Database, sweep: &SweepRow, run: &str) -> Result<()> {
        loop {
            let states = database.sweep_states(sweep.tenant, &[sweep.id]).await?;
            let over = states.iter().all(|(_, state, _)| state.is_none_or(JobState::is_terminal));
            let tags = states.iter().filter_map(|(_, state, count)| {
                Some(tag(&format!("secateur.jobs.{}", (*state)?.name()), &count.to_string()))
            });
            let (tags, ended) = (tags.collect::<Vec<_>>(), over.then(OffsetDateTime::now_utc));
            let (this, run) = (self.clone(), run.to_owned());
            beside(move || {
                this.call("runs/log-batch", &json!({"run_id": run, "tags": tags}))?;
                this.update(&run, if over { "FINISHED" } else { "RUNNING" }, ended)
            })
            .await?;
            if database.sweep_states(sweep.tenant, &[sweep.id]).await? == states {
                return Ok(());
            }
        }
    }

    fn update(&self, run: &str, status: &str, ended: Option<OffsetDateTime>) -> Result<()> {
        let mut update = json!({"run_id": run, "status": status});
        if let Some(at) = ended {
            update["end_time"] = millis(at).into();
        }
        self.call("runs/update", &update)?;
        Ok(())
    }

    fn put(&self, at: &str, path: &str, file: &Path) -> Result<()> {
        let target: Vec<String> = path.split('/').map(percent).collect();
        let url = format!("{}/api/2.0/mlflow-artifacts/artifacts/{at}/{}", self.base(), target.join("/"));
        let file = std::fs::File::open(file).map_err(|e| format!("artifact {path}: {e}"))?;
        let mut request = agent(UPLOAD_TIMEOUT).put(&url).header("content-type", "application/octet-stream");
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

impl Mlflow {
    async fn gather(
        &self,
        database: &Database,
        store: &Store,
        job: JobRow,
        parent: Option<&str>,
    ) -> Result<Told> {
        let spec = serde_json::to_value(&job.spec).map_err(|e| e.to_string())?;
        let tags = tags(&job).into_iter().chain(parent.map(|parent| tag("mlflow.parentRunId", parent)));
        let mut told = Told {
            tags: tags.collect(),
            job,
            params: Vec::new(),
            metrics: Vec::new(),
            files: Vec::new(),
            checkpoint: Vec::new(),
        };
        flatten(String::new(), &spec, &mut told.params);
        if !told.job.state.is_terminal() {
            return Ok(told);
        }
        let (tenant, id) = (told.job.tenant, told.job.id);
        for row in database.series(tenant, id, None).await? {
            if let Entry::Run(Event::Measured { stage, name: key, step, value }) = row.body {
                let key = name(&format!("{stage}/{key}"));
                let at = millis(row.at);
                told.metrics.push(json!({"key": key, "value": value, "timestamp": at, "step": step}));
            }
        }
        let rows = database.artifacts(tenant, id).await?;
        let local = async |row: &ArtifactRow| {
            let file = store.local(&row.location, row.size_bytes as u64).await;
            file.map_err(|e| format!("artifact {}: {e}", row.path))
        };
        for row in &rows {
            if FILES.contains(&row.path.as_str()) || row.path.starts_with(PLOTS) {
                told.files.push((row.path.clone(), local(row).await?));
            }
        }
        if self.model.is_some() {
            for (path, row) in best_checkpoint(&rows) {
                told.checkpoint.push((path.to_owned(), local(row).await?));
            }
        }
        if let Some((_, file)) = told.files.iter().find(|(path, _)| path == "report.json") {
            let report = std::fs::read(&file.path).map_err(|e| format!("report.json: {e}"))?;
            let report: Value = serde_json::from_slice(&report).map_err(|e| format!("report.json: {e}"))?;
            let at = millis(told.job.finished_at.unwrap_or(told.job.created_at));
            scores(&report["eval"], at, &mut told.metrics);
            verdict(&report["verdict"], &mut told.tags);
        }
        Ok(told)
    }
}

/// How `MLflow` calls the state.
const fn status(state: JobState) -> &'static str {
    match state {
        JobState::Queued | JobState::Paused => "SCHEDULED",
        JobState::Running => "RUNNING",
        JobState::Succeeded => "FINISHED",
        JobState::Failed => "FAILED",
        JobState::Cancelled => "KILLED",
    }
}

/// A number that may stand as text.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), String::from)
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
