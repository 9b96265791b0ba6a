//! `/v1/sweeps`: many jobs from one request, and what came out of them side by side.

use std::time::Duration;

use secateur::job::sweep::SweepReport;
use secateur::worker::{self, Settings, Shutdown};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::app::{App, problem};

/// Of `amounts` layers, on a model of six.
fn sweep(app: &App, amounts: &[u32]) -> Value {
    let mut base = app.spec(6);
    base["prune"] = json!({"strategy": "block_endpoint"});
    base["heal"] = json!([]);
    let text = "the sea is calm and the night is long, and nobody on the shore has slept. ".repeat(40);
    base["calibration"] = json!({"corpus": {"from": "text", "text": text}, "samples": 4, "seq_len": 16});
    base["eval"] = json!({
        "perplexity": [{"from": "text", "text": format!("another text. {text}")}], "seq_len": 32, "speed": false,
        "generation": null,
    });
    let amounts: Vec<Value> = amounts.iter().map(|n| json!({"layers": n})).collect();
    json!({"name": "tiny", "base": base, "axes": {"amount": amounts}})
}

async fn made(app: &App, spec: &Value) -> Value {
    let response = app.post("/v1/sweeps").json(spec).send().await.unwrap();
    assert_eq!(response.status(), 201, "{}", response.text().await.unwrap());
    response.json().await.unwrap()
}

#[tokio::test]
async fn a_sweep_is_one_request_and_as_many_jobs_as_it_has_combinations() {
    let app = App::start().await;
    let spec = sweep(&app, &[1, 2, 3]);
    let send = || app.post("/v1/sweeps").header("idempotency-key", "s").json(&spec).send();
    let first: Value = send().await.unwrap().json().await.unwrap();
    let again = send().await.unwrap();
    assert_eq!(
        (again.status().as_u16(), &again.headers()["idempotency-replayed"]),
        (201, &"true".parse().unwrap())
    );
    let again: Value = again.json().await.unwrap();
    assert_eq!(again["id"], first["id"]);
    assert_eq!((&first["counts"], &first["done"]), (&json!({"queued": 3}), &json!(false)));
    let names: Vec<&str> =
        first["jobs"].as_array().unwrap().iter().map(|j| j["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["01-layers", "02-layers", "03-layers"]);
    assert_eq!(app.json("/v1/jobs").await["data"].as_array().unwrap().len(), 3);
    let job = app.json(&format!("/v1/jobs/{}", first["jobs"][2]["job_id"].as_str().unwrap())).await;
    assert_eq!(job["spec"]["prune"]["amount"], json!({"layers": 3}));
    // The same key for a job is another request.
    let other = app.post("/v1/jobs").header("idempotency-key", "s").json(&app.spec(6)).send().await.unwrap();
    problem(other, 422, "idempotency-key-reused").await;
    let second = made(&app, &spec).await;
    let page = app.json("/v1/sweeps?limit=1").await;
    assert_eq!((&page["data"][0]["id"], &page["has_more"]), (&second["id"], &json!(true)));
    let page = app.json(&format!("/v1/sweeps?after={}", second["id"].as_str().unwrap())).await;
    assert_eq!((&page["data"][0]["id"], &page["has_more"]), (&first["id"], &json!(false)));
    let nowhere = app.get(&format!("/v1/sweeps/{}", Uuid::nil())).send().await.unwrap();
    problem(nowhere, 404, "sweep-not-found").await;
}

#[tokio::test]
async fn all_that_is_wrong_with_any_job_of_a_sweep_is_said_once_and_nothing_is_made() {
    let app = App::start().await;
    let mut spec = sweep(&app, &[1, 9]);
    spec["base"]["eval"]["perplexity"] = json!([{"from": "path", "path": app.root().join("nowhere.txt")}]);
    let refused = app.post("/v1/sweeps").json(&spec).send().await.unwrap();
    let body = problem(refused, 422, "invalid-spec").await;
    let errors = body["errors"].as_array().unwrap();
    let at = |pointer: &str| errors.iter().filter(|e| e["pointer"] == pointer).count();
    assert_eq!((at("/base/eval/perplexity/0/path"), at("/base/prune/amount")), (1, 1), "{body}");
    let mut spec = sweep(&app, &[1, 2]);
    spec["max_parallel"] = json!(0);
    spec["axes"]["tempo"] = json!([1]);
    let body = problem(app.post("/v1/sweeps").json(&spec).send().await.unwrap(), 422, "invalid-spec").await;
    assert!(body["errors"][0]["pointer"] == "/axes/tempo", "{body}");
    // Thousands of millions are counted, not made: that would take all memory there is.
    let mut spec = sweep(&app, &[1, 2]);
    spec["axes"] = json!({"layers": {"from": 1, "to": u32::MAX, "step": 1}});
    let body = problem(app.post("/v1/sweeps").json(&spec).send().await.unwrap(), 422, "invalid-spec").await;
    assert!(body["detail"].as_str().unwrap().contains("4294967295 jobs"), "{body}");
    assert!(app.json("/v1/jobs").await["data"].as_array().unwrap().is_empty());
}

#[tokio::test]
async fn a_sweep_takes_no_more_devices_than_it_may_and_ends_as_a_whole() {
    let app = App::start().await;
    let mut spec = sweep(&app, &[1, 2, 3, 4]);
    spec["max_parallel"] = json!(2);
    let made = made(&app, &spec).await;
    let claim = || app.database.claim(Uuid::now_v7(), Duration::from_secs(60));
    let first = claim().await.unwrap().unwrap().0;
    claim().await.unwrap().unwrap();
    assert!(claim().await.unwrap().is_none());
    // Others are not held up by it.
    app.enqueue("another").await;
    assert_eq!(claim().await.unwrap().unwrap().1.name.as_deref(), Some("another"));
    app.finish(first, &[("profile.json", b"{}")]).await;
    let third = claim().await.unwrap().unwrap().1;
    assert_eq!(third.name.as_deref(), Some("03-layers"));
    let url = format!("/v1/sweeps/{}", made["id"].as_str().unwrap());
    for _ in 0..2 {
        let cancelled = app.post(&format!("{url}/cancel")).send().await.unwrap();
        assert_eq!(cancelled.status(), 200);
        let cancelled: Value = cancelled.json().await.unwrap();
        // Those that run stop at their next seam.
        assert_eq!(cancelled["counts"], json!({"succeeded": 1, "running": 2, "cancelled": 1}));
    }
    // What is deleted is counted as that, and takes no row away.
    let done = made["jobs"][0]["job_id"].as_str().unwrap();
    let gone = app.request(reqwest::Method::DELETE, &format!("/v1/jobs/{done}")).send().await.unwrap();
    assert_eq!(gone.status(), 204);
    let now = app.json(&url).await;
    assert_eq!(now["counts"], json!({"deleted": 1, "running": 2, "cancelled": 1}));
    assert_eq!(now["jobs"][0], json!({"name": "01-layers", "job_id": null, "state": null}));
}

#[tokio::test]
async fn the_jobs_of_a_sweep_share_one_profile_and_one_look_at_the_base_model() {
    let app = App::start().await;
    let made = made(&app, &sweep(&app, &[1, 2, 3])).await;
    let data = tempfile::tempdir().unwrap();
    let mut settings = Settings::new(data.path().join("data")).unwrap();
    settings.program = vec![env!("CARGO_BIN_EXE_secateur").into()];
    settings.flags = vec!["--threads".into(), "1".into()];
    settings.poll = Duration::from_millis(50);
    let (devices, shutdown) = (["cpu".to_owned()], Shutdown::default());
    let running = worker::run(app.database.clone(), app.store.clone(), settings, &devices, shutdown.clone());
    let mut measured = false;
    let watch = async {
        let url = format!("/v1/sweeps/{}", made["id"].as_str().unwrap());
        let done = loop {
            let now = app.json(&url).await;
            let workers = app.json("/v1/workers").await;
            measured |= workers["data"][0]["flops_per_s"].as_f64().is_some_and(|flops| flops > 0.0);
            if now["done"] == true {
                break now;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        shutdown.drain.cancel();
        (url, done)
    };
    let (running, (url, done)) = tokio::join!(running, watch);
    running.unwrap();
    assert!(measured, "the worker did not tell how fast its device is");
    assert_eq!(done["counts"], json!({"succeeded": 3}), "{done}");
    let report: SweepReport = serde_json::from_value(app.json(&format!("{url}/report")).await).unwrap();
    let cut: Vec<usize> = report.rows.iter().map(|row| row.outcome.as_ref().unwrap().dropped.len()).collect();
    assert_eq!(cut, [1, 2, 3]);
    assert!(report.base.is_some() && report.rows.iter().any(|row| row.on_front));
    for (i, job) in done["jobs"].as_array().unwrap().iter().enumerate() {
        let url = format!("/v1/jobs/{}", job["job_id"].as_str().unwrap());
        let stages = app.json(&format!("{url}/stages")).await;
        assert_eq!(
            (&stages["data"][0]["stage"], &stages["data"][0]["reused"]),
            (&json!("profile"), &json!(i > 0))
        );
        let events = app.json(&format!("{url}/events?limit=1000")).await.to_string();
        assert_eq!(events.contains("base: "), i == 0, "{events}");
    }
    let page = app.get(&format!("{url}/report")).header("accept", "text/html").send().await.unwrap();
    assert!(page.text().await.unwrap().contains("3 of 3 jobs done"));
    let records = std::fs::read_dir(data.path().join("data/records/1")).unwrap();
    let names: Vec<String> = records.map(|r| r.unwrap().file_name().to_string_lossy().into_owned()).collect();
    assert_eq!(names.iter().filter(|n| n.starts_with("profile-")).count(), 1, "{names:?}");
}
