//! Requests that come twice, that wait, and that look back.

use std::time::Duration;

use reqwest::{Method, Response};
use secateur::job::report::{Failure, FailureKind};
use secateur::service::db::{Limits, WorkerSelf};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::app::{App, problem};
use crate::support::postgres::worker;

async fn create(app: &App, key: &str, spec: &Value) -> Response {
    app.post("/v1/jobs").header("idempotency-key", key).json(spec).send().await.unwrap()
}

#[tokio::test]
async fn fifty_equal_requests_at_once_make_one_job() {
    let app = App::start().await;
    let spec = app.spec(6);
    let mut requests = JoinSet::new();
    for _ in 0..50 {
        let request = app.post("/v1/jobs").header("idempotency-key", "one").json(&spec);
        requests.spawn(async move { request.send().await.unwrap() });
    }
    let (mut ids, mut replayed) = (Vec::new(), 0);
    while let Some(response) = requests.join_next().await {
        let response = response.unwrap();
        assert_eq!(response.status(), 201);
        replayed += usize::from(response.headers().contains_key("idempotency-replayed"));
        let location = response.headers()["location"].to_str().unwrap().to_owned();
        let job: Value = response.json().await.unwrap();
        assert_eq!(location, format!("/v1/jobs/{}", job["id"].as_str().unwrap()));
        ids.push(job["id"].as_str().unwrap().to_owned());
    }
    ids.sort();
    ids.dedup();
    assert_eq!((ids.len(), replayed), (1, 49));
    assert_eq!(app.json("/v1/jobs").await["data"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_key_stands_for_what_was_asked_and_not_for_how_it_was_written() {
    let app = App::start().await;
    let spec = app.spec(6);
    let first: Value = create(&app, "k", &spec).await.json().await.unwrap();
    let (model, prune) = (&spec["model"], &spec["prune"]);
    let reordered = json!({"seed": 0, "prune": prune, "model": model});
    let again = create(&app, "k", &reordered).await;
    assert_eq!(again.headers()["idempotency-replayed"], "true");
    assert_eq!(again.json::<Value>().await.unwrap()["id"], first["id"]);
    let other = json!({"seed": 1, "prune": prune, "model": model});
    problem(create(&app, "k", &other).await, 422, "idempotency-key-reused").await;
    let new: Value = create(&app, "k2", &spec).await.json().await.unwrap();
    assert_ne!(new["id"], first["id"]);
    for bad in ["", "ü", &"k".repeat(256)] {
        problem(create(&app, bad, &spec).await, 400, "invalid-header").await;
    }
    let twice =
        app.post("/v1/jobs").header("idempotency-key", "a").header("idempotency-key", "b").json(&spec);
    problem(twice.send().await.unwrap(), 400, "invalid-header").await;
}

#[tokio::test]
async fn a_request_that_was_refused_may_be_mended_under_the_same_key() {
    let app = App::start().await;
    let mut spec = app.spec(6);
    spec["prune"]["amount"]["layers"] = json!(60);
    problem(create(&app, "k", &spec).await, 422, "invalid-spec").await;
    spec["prune"]["amount"]["layers"] = json!(2);
    assert_eq!(create(&app, "k", &spec).await.status(), 201);
    // The model is gone; the job that the request made is not.
    std::fs::remove_dir_all(app.root().join("model")).unwrap();
    assert_eq!(create(&app, "k", &spec).await.status(), 201);
}

#[tokio::test]
async fn a_deleted_job_is_gone_and_its_request_does_not_make_another() {
    let app = App::start().await;
    let spec = app.spec(6);
    let job: Value = create(&app, "k", &spec).await.json().await.unwrap();
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    app.post(&format!("{path}/cancel")).send().await.unwrap();
    assert_eq!(app.request(Method::DELETE, &path).send().await.unwrap().status(), 204);
    for tail in ["", "/events", "/stages", "/metrics", "/artifacts", "/bundle.tar"] {
        problem(app.get(&format!("{path}{tail}")).send().await.unwrap(), 410, "job-deleted").await;
    }
    for tail in ["cancel", "pause", "resume", "retry"] {
        problem(app.post(&format!("{path}/{tail}")).send().await.unwrap(), 410, "job-deleted").await;
    }
    problem(app.request(Method::DELETE, &path).send().await.unwrap(), 410, "job-deleted").await;
    problem(create(&app, "k", &spec).await, 410, "job-deleted").await;
}

#[tokio::test]
async fn only_a_job_that_failed_or_was_cancelled_is_tried_again_and_by_a_new_one() {
    let app = App::start().await;
    let mut spec = app.spec(6);
    spec["name"] = json!("again");
    let job: Value = app.post("/v1/jobs").json(&spec).send().await.unwrap().json().await.unwrap();
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    let retry = || app.post(&format!("{path}/retry")).header("idempotency-key", "r").send();
    problem(retry().await.unwrap(), 409, "state-conflict").await;
    let lease = app.claim().await;
    problem(retry().await.unwrap(), 409, "state-conflict").await;
    let failure = Failure { kind: FailureKind::Data, stage: None, message: "too short".into() };
    app.database.fail(lease, &failure, Limits::default()).await.unwrap();
    let mut made = Vec::new();
    for _ in 0..2 {
        let response = retry().await.unwrap();
        assert_eq!(response.status(), 201);
        made.push(response.json::<Value>().await.unwrap());
    }
    let again = &made[0];
    assert_eq!(made[1]["id"], again["id"], "asked twice is asked once");
    assert_ne!(again["id"], job["id"]);
    assert_eq!(
        (&again["retry_of"], &again["state"], &again["spec"]),
        (&job["id"], &json!("queued"), &job["spec"])
    );
    assert_eq!(app.json(&path).await["state"], "failed", "what has ended stays as it is");
    let lease = app.claim().await;
    app.finish(lease, &[("a.txt", b"words")]).await;
    let response = app.post(&format!("/v1/jobs/{}/retry", lease.job)).send().await.unwrap();
    problem(response, 409, "state-conflict").await;
}

#[tokio::test]
async fn who_prefers_to_wait_hears_of_the_next_change_or_of_the_end() {
    let app = App::start().await;
    let id = app.enqueue("waits").await.id;
    let path = format!("/v1/jobs/{id}");
    let etag = app.get(&path).send().await.unwrap().headers()["etag"].to_str().unwrap().to_owned();
    let change = app.get(&path).header("prefer", "wait=50").header("if-none-match", &etag);
    let end = app.get(&path).header("prefer", "respond-async, wait=\"50\"");
    let (change, end) = (tokio::spawn(change.send()), tokio::spawn(end.send()));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let lease = app.claim().await;
    let change = change.await.unwrap().unwrap();
    assert_eq!(
        (change.status().as_u16(), &change.headers()["preference-applied"]),
        (200, &"wait=50".parse().unwrap())
    );
    assert_eq!(change.json::<Value>().await.unwrap()["state"], "running");
    app.finish(lease, &[("a.txt", b"words")]).await;
    assert_eq!(end.await.unwrap().unwrap().json::<Value>().await.unwrap()["state"], "succeeded");

    // Nothing will come: the answer does, all the same.
    let etag = app.get(&path).send().await.unwrap().headers()["etag"].to_str().unwrap().to_owned();
    let in_vain =
        app.get(&path).header("prefer", "wait=1").header("if-none-match", &etag).send().await.unwrap();
    assert_eq!(
        (in_vain.status().as_u16(), &in_vain.headers()["preference-applied"]),
        (304, &"wait=1".parse().unwrap())
    );
    for unread in ["wait=soon", "wait", "handling=strict", "wait=-1"] {
        let response = app.get(&path).header("prefer", unread).send().await.unwrap();
        assert!(
            response.status() == 200 && !response.headers().contains_key("preference-applied"),
            "{unread}"
        );
    }
}

#[tokio::test]
async fn whoever_waits_is_answered_when_the_service_shuts_down() {
    let app = App::start().await;
    let id = app.enqueue("waits").await.id;
    let waiting = tokio::spawn(app.get(&format!("/v1/jobs/{id}")).header("prefer", "wait=50").send());
    tokio::time::sleep(Duration::from_millis(300)).await;
    app.shutdown.cancel();
    assert_eq!(waiting.await.unwrap().unwrap().json::<Value>().await.unwrap()["state"], "queued");
    tokio::time::timeout(Duration::from_secs(20), app.server).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn the_list_is_walked_both_ways_and_cut_by_time() {
    let app = App::start().await;
    let mut jobs = Vec::new();
    for name in ["a", "b", "c", "d", "e"] {
        jobs.push(app.enqueue(name).await);
    }
    let names = async |query: &str| -> (String, bool) {
        let page = app.json(&format!("/v1/jobs?{query}")).await;
        let names = page["data"].as_array().unwrap().iter().map(|j| j["name"].as_str().unwrap()).collect();
        (names, page["has_more"].as_bool().unwrap())
    };
    let id = |i: usize| jobs[i].id;
    assert_eq!(names(&format!("limit=2&after={}", id(4))).await, ("dc".into(), true));
    assert_eq!(names(&format!("limit=2&before={}", id(1))).await, ("dc".into(), true));
    assert_eq!(names(&format!("limit=2&before={}", id(3))).await, ("e".into(), false));
    assert_eq!(names(&format!("before={}", id(4))).await, (String::new(), false));
    let at = |i: usize| jobs[i].created_at.format(&time::format_description::well_known::Rfc3339).unwrap();
    assert_eq!(names(&format!("created_from={}", at(2))).await.0, "edc");
    assert_eq!(names(&format!("created_before={}", at(2))).await.0, "ba");
    assert_eq!(names(&format!("created_from={}&created_before={}", at(1), at(3))).await.0, "cb");
    for bad in [
        format!("after={}&before={}", id(0), id(1)),
        format!("before={0}&before={0}", id(0)),
        "created_from=yesterday".into(),
        "created_before=2026-11-25".into(),
    ] {
        let response = app.get(&format!("/v1/jobs?{bad}")).send().await.unwrap();
        problem(response, 400, "invalid-query").await;
    }
}

#[tokio::test]
async fn the_workers_are_listed_with_what_they_have_and_do() {
    let app = App::start().await;
    assert_eq!(app.json("/v1/workers").await["data"], json!([]));
    let labels = [("gpu".to_string(), "a100".to_string())].into();
    let me = WorkerSelf { labels, ..worker(Uuid::now_v7(), "cpu") };
    app.database.worker_started(&me).await.unwrap();
    let shown = app.json("/v1/workers").await["data"][0].clone();
    assert_eq!(
        (&shown["id"], &shown["device"], &shown["core_count"], &shown["memory_bytes"], &shown["busy"]),
        (&json!(me.id), &json!("cpu"), &json!(2), &json!(16_u64 << 30), &json!(false))
    );
    assert_eq!(
        (&shown["job_memory_bytes"], &shown["labels"]),
        (&json!(12_u64 << 30), &json!({"gpu": "a100"}))
    );
    let id = app.enqueue("works").await.id;
    app.database.claim(me.id, Duration::from_secs(60)).await.unwrap().unwrap();
    let shown = app.json("/v1/workers").await["data"][0].clone();
    assert_eq!((&shown["busy"], &shown["job_id"]), (&json!(true), &json!(id)));
}
