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
                    wanted == format!("tags.`secateur.job_id` = '{}'", run.tags["secateur.job_id"])
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

fn drain(app: &App, url: String) {
    let mlflow = Mlflow { url, experiment: "pruning".into(), authorization: None };
    app.drain(Reach::Public, vec![Sink::Mlflow(mlflow)]);
}

#[tokio::test]
async fn each_job_has_one_run_with_everything_once_though_the_server_was_away() {
    let app = App::start().await;
    let server = Server::default();
    server.0.lock().unwrap().refuse = 9;
    app.database.sink_seen("mlflow").await.unwrap();
    drain(&app, server.start().await);
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
async fn a_service_without_mlflow_writes_no_messages_for_it() {
    let app = App::start().await;
    app.enqueue("alone").await;
    assert!(app.database.messages_due("mlflow", &[], 10, Duration::ZERO).await.unwrap().is_empty());
    assert_eq!(app.database.backlog().await.unwrap().len(), 1, "webhooks only");
}
