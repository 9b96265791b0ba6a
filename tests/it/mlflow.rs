//! Runs of `MLflow`, against a made-up server; `scripts/check_mlflow.py` proves the same against the real one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::{Method, StatusCode, Uri};
use secateur::job::progress::{Event, Stage};
use secateur::service::sinks::{Mlflow, Reach, Sink};
use serde_json::{Value, json};

use crate::support::app::{App, receive};

/// What the server holds, by run.
#[derive(Debug, Clone, Default)]
struct Run {
    name: String,
    status: String,
    ended: bool,
    params: BTreeMap<String, String>,
    tags: BTreeMap<String, String>,
    /// Key, step, time and value: one that comes again is one.
    metrics: BTreeSet<String>,
    files: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug, Default)]
struct Held {
    runs: Vec<Run>,
    experiment: Option<String>,
    /// Calls to refuse before any is taken.
    refuse: u32,
    models: Vec<Value>,
    /// The next version of a model is made, and its answer gets lost.
    lose_answer: bool,
}

#[derive(Clone, Default)]
struct Server(Arc<Mutex<Held>>);

impl Server {
    async fn start(&self) -> String {
        let this = self.clone();
        receive(move |method, uri, _, body| this.answer(method, uri, body)).await
    }

    fn answer(&self, method: &Method, uri: &Uri, body: &[u8]) -> (StatusCode, Value) {
        let mut held = self.0.lock().unwrap();
        if held.refuse > 0 {
            held.refuse -= 1;
            return (StatusCode::SERVICE_UNAVAILABLE, json!({}));
        }
        if method == Method::PUT {
            let (_, at) = uri.path().split_once("/artifacts/1/").unwrap();
            let (run, path) = at.split_once("/artifacts/").unwrap();
            held.runs[run.parse::<usize>().unwrap()].files.insert(path.into(), body.to_vec());
            return (StatusCode::OK, json!({}));
        }
        let sent: Value = serde_json::from_slice(body).unwrap_or_default();
        let what = uri.path().strip_prefix("/api/2.0/mlflow/").unwrap();
        let told = match what {
            "experiments/get-by-name" if held.experiment.is_none() => {
                return (StatusCode::NOT_FOUND, json!({"error_code": "RESOURCE_DOES_NOT_EXIST"}));
            }
            "experiments/get-by-name" => json!({"experiment": {"experiment_id": "1"}}),
            "experiments/create" => {
                held.experiment = Some(sent["name"].as_str().unwrap().into());
                json!({"experiment_id": "1"})
            }
            "runs/search" => {
                let wanted = sent["filter"].as_str().unwrap();
                let has = |run: &Run| {
                    let by = |key: &str| {
                        run.tags.get(key).is_some_and(|id| wanted == format!("tags.`{key}` = '{id}'"))
                    };
                    by("secateur.job_id") || by("secateur.sweep_id")
                };
                json!({"runs": held.runs.iter().position(has).map(|i| json!({"info": {"run_id": i.to_string()}})).into_iter().collect::<Vec<_>>()})
            }
            "runs/create" => {
                let mut run = Run { name: sent["run_name"].as_str().unwrap().into(), ..Run::default() };
                put(&mut run.tags, &sent["tags"]);
                held.runs.push(run);
                json!({"run": {"info": {"run_id": (held.runs.len() - 1).to_string()}}})
            }
            "runs/get" => {
                let run = uri.query().unwrap().strip_prefix("run_id=").unwrap();
                json!({"run": {"info": {"artifact_uri": format!("mlflow-artifacts:/1/{run}/artifacts")}}})
            }
            "runs/log-batch" | "runs/update" => {
                let run = &mut held.runs[sent["run_id"].as_str().unwrap().parse::<usize>().unwrap()];
                log(run, &sent);
                json!({})
            }
            "registered-models/create" if !held.models.is_empty() => {
                return (StatusCode::BAD_REQUEST, json!({"error_code": "RESOURCE_ALREADY_EXISTS"}));
            }
            "registered-models/create" => json!({"registered_model": {"name": sent["name"]}}),
            "model-versions/search" => {
                let filter = uri.query().unwrap().strip_prefix("filter=run_id%3D%27").unwrap();
                let of_run = |model: &&Value| model["run_id"].as_str() == filter.strip_suffix("%27");
                json!({"model_versions": held.models.iter().filter(of_run).collect::<Vec<_>>()})
            }
            "model-versions/create" => {
                let version = json!((held.models.len() + 1).to_string());
                let mut made = sent.clone();
                made["version"] = version;
                held.models.push(made.clone());
                if std::mem::take(&mut held.lose_answer) {
                    return (StatusCode::BAD_GATEWAY, json!({}));
                }
                json!({"model_version": made})
            }
            other => panic!("{other}"),
        };
        (StatusCode::OK, told)
    }

    fn runs(&self) -> Vec<Run> {
        self.0.lock().unwrap().runs.clone()
    }

    async fn until(&self, what: &str, holds: impl Fn(&[Run]) -> bool) -> Vec<Run> {
        for _ in 0..600 {
            if holds(&self.runs()) {
                return self.runs();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("still not: {what}: {:#?}", self.runs());
    }
}

fn put(to: &mut BTreeMap<String, String>, pairs: &Value) {
    for pair in pairs.as_array().into_iter().flatten() {
        to.insert(pair["key"].as_str().unwrap().into(), pair["value"].as_str().unwrap().into());
    }
}

fn log(run: &mut Run, sent: &Value) {
    let before = run.params.clone();
    put(&mut run.params, &sent["params"]);
    assert!(before.iter().all(|(key, value)| run.params[key] == *value), "a parameter never changes");
    put(&mut run.tags, &sent["tags"]);
    run.metrics.extend(sent["metrics"].as_array().into_iter().flatten().map(Value::to_string));
    if let Some(status) = sent["status"].as_str() {
        run.status = status.into();
        run.ended = sent["end_time"].is_i64();
    }
}

fn drain(app: &App, url: String, model: Option<&str>) {
    let model = model.map(String::from);
    let mlflow = Mlflow { url, experiment: "pruning".into(), model, authorization: None };
    app.drain(Reach::Public, vec![Sink::Mlflow(mlflow)]);
}

#[tokio::test]
async fn each_job_has_one_run_with_everything_once_though_the_server_was_away() {
    let app = App::start().await;
    let server = Server::default();
    server.0.lock().unwrap().refuse = 9;
    app.database.sink_seen("mlflow").await.unwrap();
    drain(&app, server.start().await, None);
    for name in ["one", "two"] {
        app.enqueue(name).await;
        let lease = app.claim().await;
        let loss = |step: u64| Event::Measured {
            stage: Stage::Heal,
            name: "loss".into(),
            step,
            value: 1.0 / (step + 1) as f64,
        };
        app.database.record(lease, &(0..2500).map(loss).collect::<Vec<_>>()).await.unwrap();
        // Computed anew by a later attempt: it counts once.
        app.database.record(lease, &[loss(2499)]).await.unwrap();
        let report = json!({
            "eval": {"base": {"layer_count": 6, "perplexity": [{"corpus": "held out!.txt", "value": 4.5}]}},
            "verdict": {"decision": "review", "reasons": ["a reason"]},
        })
        .to_string();
        let files: [(&str, &[u8]); 3] = [
            ("report.json", report.as_bytes()),
            ("plots/heat map.svg", b"<svg/>"),
            ("pruned/model.safetensors", b"big"),
        ];
        app.finish(lease, &files).await;
    }
    let done = |runs: &[Run]| runs.len() == 2 && runs.iter().all(|run| run.status == "FINISHED" && run.ended);
    server.until("two runs that are finished", done).await;
    // Messages of earlier states may still come; they change nothing.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let runs = server.runs();
    assert!(done(&runs), "{:?}", runs.iter().map(|run| &run.status).collect::<Vec<_>>());
    assert_eq!(
        runs.iter().map(|run| run.name.as_str()).collect::<BTreeSet<_>>(),
        BTreeSet::from(["one", "two"])
    );
    for run in &runs {
        assert_eq!(
            (run.params["model.repo"].as_str(), run.params["prune.amount.layers"].as_str()),
            ("org/name", "2")
        );
        assert_eq!(
            (run.tags["secateur.verdict"].as_str(), run.tags["secateur.label.team"].as_str()),
            ("review", "nlp")
        );
        let losses = run.metrics.iter().filter(|m| m.contains("heal/loss")).count();
        assert_eq!(losses, 2500);
        assert!(run.metrics.iter().any(|m| m.contains("base/perplexity/held out_.txt") && m.contains("4.5")));
        assert_eq!(
            run.files.keys().collect::<Vec<_>>(),
            ["plots/heat%20map.svg", "report.json"],
            "weights stay where they are"
        );
    }
    assert_eq!(server.0.lock().unwrap().experiment.as_deref(), Some("pruning"));
}

#[tokio::test]
async fn the_jobs_of_a_sweep_hang_from_one_run_and_each_checkpoint_is_one_version_of_the_model() {
    let app = App::start().await;
    let server = Server::default();
    server.0.lock().unwrap().lose_answer = true;
    app.database.sink_seen("mlflow").await.unwrap();
    drain(&app, server.start().await, Some("shears"));
    let sweep =
        json!({"name": "how deep", "base": app.spec(6), "axes": {"layers": {"from": 1, "to": 2, "step": 1}}});
    let made = app.post("/v1/sweeps").json(&sweep).send().await.unwrap();
    assert_eq!(made.status(), 201);
    for _ in 0..2 {
        let files: [(&str, &[u8]); 4] = [
            ("report.json", b"{}"),
            ("healed/config.json", b"{}"),
            ("healed/model.safetensors", b"healed"),
            ("pruned/config.json", b"{}"),
        ];
        app.finish(app.claim().await, &files).await;
    }
    let done = |runs: &[Run]| runs.len() == 3 && runs.iter().all(|run| run.status == "FINISHED" && run.ended);
    server.until("three runs that are finished", done).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let runs = server.runs();
    assert!(done(&runs), "{runs:#?}");
    let parent = runs.iter().position(|run| run.tags.contains_key("secateur.sweep_id")).unwrap();
    assert_eq!(runs[parent].name, "how deep");
    assert_eq!(runs[parent].tags["secateur.jobs.succeeded"], "2");
    let children = runs.iter().filter(|run| run.tags.get("mlflow.parentRunId") == Some(&parent.to_string()));
    assert_eq!(children.clone().count(), 2);
    for run in children {
        let files: Vec<&str> = run.files.keys().map(String::as_str).collect();
        assert_eq!(files, ["checkpoint/config.json", "checkpoint/model.safetensors", "report.json"]);
        assert_eq!(run.files["checkpoint/model.safetensors"], b"healed");
    }
    let models = server.0.lock().unwrap().models.clone();
    let sources: BTreeSet<_> =
        models.iter().map(|model| model["source"].as_str().unwrap().to_owned()).collect();
    let wanted = |run: usize| format!("mlflow-artifacts:/1/{run}/artifacts/checkpoint");
    assert_eq!(
        sources,
        (0..3).filter(|run| *run != parent).map(wanted).collect(),
        "one version each: {models:?}"
    );
    assert_eq!(models.len(), 2);
}

#[tokio::test]
async fn a_service_without_mlflow_writes_no_messages_for_it() {
    let app = App::start().await;
    app.enqueue("alone").await;
    assert!(app.database.messages_due("mlflow", &[], 10, Duration::ZERO).await.unwrap().is_empty());
    assert_eq!(app.database.backlog().await.unwrap().len(), 1, "webhooks only");
}
