//! `/v1/jobs`: create, list, look, change one's mind.

use secateur::job::report::{Failure, FailureKind};
use secateur::service::db::Limits;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::app::{App, problem};

#[tokio::test]
async fn a_created_job_comes_back_whole_and_is_found_at_its_location() {
    let app = App::start().await;
    let mut spec = app.spec(6);
    spec["name"] = json!("first");
    spec["labels"] = json!({"team": "nlp"});
    let response = app.post("/v1/jobs").json(&spec).send().await.unwrap();
    assert_eq!(response.status(), 201);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let etag = response.headers()["etag"].to_str().unwrap().to_owned();
    let job: Value = response.json().await.unwrap();
    assert_eq!(location, format!("/v1/jobs/{}", job["id"].as_str().unwrap()));
    assert_eq!(
        (&job["state"], &job["name"], &job["object"]),
        (&json!("queued"), &json!("first"), &json!("job"))
    );
    assert_eq!((&job["attempt"], &job["jobs_ahead"], &job["stages"]), (&json!(0), &json!(0), &json!([])));
    assert_eq!(job["spec"]["model"], spec["model"]);
    assert_eq!(job["spec"]["calibration"]["samples"], 128, "defaults are shown");
    assert_eq!(app.json(&location).await, job);
    for link in job["links"].as_object().unwrap().values() {
        let status = app.get(link.as_str().unwrap()).send().await.unwrap().status();
        assert!(status == 200 || status == 404, "{link}: {status}");
    }

    let unchanged = app.get(&location).header("if-none-match", &etag).send().await.unwrap();
    assert_eq!(unchanged.status(), 304);
    assert_eq!(unchanged.headers()["etag"], etag.as_str());
    app.post(&format!("{location}/cancel")).send().await.unwrap();
    let changed = app.get(&location).header("if-none-match", &etag).send().await.unwrap();
    assert_eq!(changed.status(), 200);
}

#[tokio::test]
async fn a_cursor_pages_through_all_jobs_newest_first_without_repeating_one() {
    let app = App::start().await;
    let mut expected = Vec::new();
    for i in 0..5 {
        expected.insert(0, app.enqueue(&format!("j{i}")).await.id.to_string());
    }
    let (mut seen, mut path) = (Vec::new(), "/v1/jobs?limit=2".to_string());
    loop {
        let page = app.json(&path).await;
        assert_eq!(page["object"], "list");
        let ids: Vec<String> =
            page["data"].as_array().unwrap().iter().map(|j| j["id"].as_str().unwrap().into()).collect();
        assert_eq!(
            (page["first_id"].as_str(), page["last_id"].as_str()),
            (Some(ids[0].as_str()), ids.last().map(String::as_str))
        );
        seen.extend(ids);
        // A job that comes while we page belongs to no later page.
        app.enqueue("late").await;
        if page["has_more"] == false {
            break;
        }
        path = format!("/v1/jobs?limit=2&after={}", page["last_id"].as_str().unwrap());
    }
    assert_eq!(seen, expected);
    let empty = app.json(&format!("/v1/jobs?after={}", expected[4])).await;
    assert_eq!(
        (&empty["data"], &empty["last_id"], &empty["has_more"]),
        (&json!([]), &json!(null), &json!(false))
    );
}

#[tokio::test]
async fn the_list_is_narrowed_by_state_name_and_labels() {
    let app = App::start().await;
    let jobs = [app.enqueue("a").await, app.enqueue("b").await, app.enqueue("c").await];
    app.post(&format!("/v1/jobs/{}/cancel", jobs[1].id)).send().await.unwrap();
    app.claim().await;
    for (query, names) in [
        ("", vec!["c", "b", "a"]),
        ("?state=queued", vec!["c"]),
        ("?state=cancelled&state=running", vec!["b", "a"]),
        ("?name=b", vec!["b"]),
        ("?label=team=nlp", vec!["c", "b", "a"]),
        ("?label=team%3Dnlp&label=run%3Da", vec!["a"]),
        ("?label=team=vision", vec![]),
    ] {
        let page = app.json(&format!("/v1/jobs{query}")).await;
        let found: Vec<&str> =
            page["data"].as_array().unwrap().iter().map(|j| j["name"].as_str().unwrap()).collect();
        assert_eq!(found, names, "{query}");
    }
    for query in [
        "?limit=0",
        "?limit=101",
        "?limit=x",
        "?after=x",
        "?state=done",
        "?label=team",
        "?colour=red",
        "?name=%00",
    ] {
        let response = app.get(&format!("/v1/jobs{query}")).send().await.unwrap();
        problem(response, 400, "invalid-query").await;
    }
}

#[tokio::test]
async fn cancelling_twice_is_cancelling_once() {
    let app = App::start().await;
    let waiting = app.enqueue("waits").await.id;
    for _ in 0..2 {
        let job: Value =
            app.post(&format!("/v1/jobs/{waiting}/cancel")).send().await.unwrap().json().await.unwrap();
        assert_eq!(job["state"], "cancelled");
        assert!(job["finished_at"].is_string());
    }
    let running = app.enqueue("runs").await.id;
    let lease = app.claim().await;
    for _ in 0..2 {
        let job: Value =
            app.post(&format!("/v1/jobs/{running}/cancel")).send().await.unwrap().json().await.unwrap();
        assert_eq!((&job["state"], &job["wish"]), (&json!("running"), &json!("cancel")));
    }
    app.database.release(lease, "asked to").await.unwrap();
    let job = app.json(&format!("/v1/jobs/{running}")).await;
    assert_eq!((&job["state"], &job["wish"]), (&json!("cancelled"), &json!(null)));
}

#[tokio::test]
async fn a_paused_job_waits_until_it_is_resumed() {
    let app = App::start().await;
    let id = app.enqueue("pauses").await.id;
    let job: Value = app.post(&format!("/v1/jobs/{id}/pause")).send().await.unwrap().json().await.unwrap();
    assert_eq!(job["state"], "paused");
    let job: Value = app.post(&format!("/v1/jobs/{id}/resume")).send().await.unwrap().json().await.unwrap();
    assert_eq!(job["state"], "queued");
    let lease = app.claim().await;
    assert_eq!(lease.job, id);
    let response = app.post(&format!("/v1/jobs/{id}/resume")).send().await.unwrap();
    problem(response, 409, "state-conflict").await;
}

#[tokio::test]
async fn a_finished_job_changes_no_more_and_only_a_finished_job_is_deleted() {
    let app = App::start().await;
    let id = app.enqueue("ends").await.id;
    let path = format!("/v1/jobs/{id}");
    problem(app.client.delete(format!("{}{path}", app.url)).send().await.unwrap(), 409, "state-conflict")
        .await;
    let lease = app.claim().await;
    problem(app.client.delete(format!("{}{path}", app.url)).send().await.unwrap(), 409, "state-conflict")
        .await;
    app.finish(lease, &[("a.txt", b"words")]).await;
    for change in ["cancel", "pause", "resume"] {
        let response = app.post(&format!("{path}/{change}")).send().await.unwrap();
        let body = problem(response, 409, "state-conflict").await;
        assert!(body["detail"].as_str().unwrap().contains("succeeded"), "{body}");
    }
    let file = app.database.artifact(lease.tenant, id, "a.txt").await.unwrap().unwrap();
    assert!(app.store.local(&file.location, 0).await.is_ok());
    let gone = app.client.delete(format!("{}{path}", app.url)).send().await.unwrap();
    assert_eq!(gone.status(), 204);
    assert!(app.store.local(&file.location, 0).await.is_err(), "its files went with it");
    problem(app.get(&path).send().await.unwrap(), 410, "job-deleted").await;
}

#[tokio::test]
async fn a_failed_job_says_why() {
    let app = App::start().await;
    let id = app.enqueue("fails").await.id;
    let lease = app.claim().await;
    let failure = Failure { kind: FailureKind::Data, stage: None, message: "the corpus is too short".into() };
    app.database.fail(lease, &failure, Limits::default()).await.unwrap();
    let job = app.json(&format!("/v1/jobs/{id}")).await;
    assert_eq!(job["state"], "failed");
    assert_eq!(job["failure"], json!({"kind": "data", "message": "the corpus is too short"}));
}

#[tokio::test]
async fn ids_that_are_wrong_or_unknown_are_told_apart_on_every_route_of_a_job() {
    let app = App::start().await;
    let unknown = Uuid::now_v7();
    for tail in ["", "/events", "/stages", "/metrics", "/profile", "/report", "/artifacts", "/artifacts/a/b"]
    {
        let response = app.get(&format!("/v1/jobs/{unknown}{tail}")).send().await.unwrap();
        problem(response, 404, "job-not-found").await;
        let response = app.get(&format!("/v1/jobs/12{tail}")).send().await.unwrap();
        problem(response, 400, "invalid-id").await;
    }
    for tail in ["cancel", "pause", "resume"] {
        let response = app.post(&format!("/v1/jobs/{unknown}/{tail}")).send().await.unwrap();
        problem(response, 404, "job-not-found").await;
    }
}
