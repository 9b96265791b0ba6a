//! `OpenLineage` events; `scripts/check_lineage.py` reads them with the classes of the standard itself.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::StatusCode;
use secateur::job::report::{Failure, FailureKind};
use secateur::service::db::{Limits, Tenant};
use secateur::service::sinks::{Lineage, Reach, Sink};
use serde_json::{Value, json};

use crate::support::app::{App, receive};

type Events = Arc<Mutex<Vec<Value>>>;

/// Refuses one call, takes all others.
async fn listen(app: &App, events: Events) {
    let (kept, refused) = (events, Arc::new(Mutex::new(false)));
    let url = receive(move |_, uri, headers, body| {
        assert_eq!(
            (uri.path(), headers["authorization"].to_str().unwrap()),
            ("/api/v1/lineage", "Bearer word")
        );
        if !std::mem::replace(&mut *refused.lock().unwrap(), true) {
            return (StatusCode::INTERNAL_SERVER_ERROR, json!({"message": "not now"}));
        }
        kept.lock().unwrap().push(serde_json::from_slice(body).unwrap());
        (StatusCode::CREATED, json!({}))
    })
    .await;
    app.database.sink_seen("openlineage").await.unwrap();
    let (url, authorization) = (format!("{url}/api/v1/lineage"), Some("Bearer word".into()));
    app.drain(Reach::Public, vec![Sink::Lineage(Lineage { url, namespace: "shears".into(), authorization })]);
}

/// Kinds of the events of a job, in the order of their times.
fn kinds(events: &Events, job: uuid::Uuid) -> Vec<String> {
    let events = events.lock().unwrap();
    let of_job = events.iter().filter(|event| event["run"]["runId"] == job.to_string());
    let mut kinds: Vec<_> =
        of_job.map(|event| (event["eventTime"].clone().to_string(), event["eventType"].clone())).collect();
    kinds.sort_by_key(|(time, _)| time.clone());
    kinds.into_iter().map(|(_, kind)| kind.as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_run_begins_once_and_ends_once_with_what_it_read_and_left() {
    let app = App::start().await;
    let events = Events::default();
    listen(&app, events.clone()).await;

    let fine = app.enqueue("fine").await.id;
    app.database.release(app.claim().await, "the worker leaves").await.unwrap();
    app.finish(app.claim().await, &[("pruned/config.json", b"{}"), ("pruned/model.safetensors", b"weights")])
        .await;
    let failing = app.enqueue("failing").await.id;
    let failure = Failure { kind: FailureKind::Model, stage: None, message: "no such repository".into() };
    app.database.fail(app.claim().await, &failure, Limits::default()).await.unwrap();
    let never = app.enqueue("never").await.id;
    app.database.job_cancel(Tenant::DEFAULT, never).await.unwrap();

    for _ in 0..600 {
        if (kinds(&events, fine).len(), kinds(&events, failing).len()) == (4, 2) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(kinds(&events, fine), ["START", "OTHER", "RUNNING", "COMPLETE"]);
    assert_eq!(kinds(&events, failing), ["START", "FAIL"]);
    assert!(kinds(&events, never).is_empty(), "what never ran is no run");

    let events = events.lock().unwrap();
    let of = |job: uuid::Uuid, kind: &str| {
        events.iter().find(|e| e["run"]["runId"] == job.to_string() && e["eventType"] == kind).unwrap()
    };
    let complete = of(fine, "COMPLETE");
    assert_eq!(complete["job"]["name"], "fine");
    let input = &complete["inputs"][0];
    assert_eq!((&input["namespace"], &input["name"]), (&json!("https://huggingface.co"), &json!("org/name")));
    let names: Vec<_> =
        complete["outputs"].as_array().unwrap().iter().map(|output| &output["name"]).collect();
    assert_eq!(names, [&json!(format!("{fine}/checkpoint")), &json!(format!("{fine}/pruned"))]);
    let statistics = &complete["outputs"][0]["outputFacets"]["outputStatistics"];
    assert_eq!((&statistics["fileCount"], &statistics["size"]), (&json!(2), &json!(9)));
    assert_eq!(of(failing, "FAIL")["run"]["facets"]["errorMessage"]["message"], "no such repository");
}
