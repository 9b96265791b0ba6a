//! Texts that callers bring in parts.

use reqwest::{Method, Response};
use secateur::service::db::Tenant;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

use crate::support::app::{App, pointers, problem};

const PART: usize = 16 << 20;

/// Two parts, the second one short.
fn text() -> Vec<u8> {
    b"A text to calibrate on.\n".iter().copied().cycle().take(PART + 1000).collect()
}

async fn announce(app: &App, name: &str, bytes: &[u8]) -> Value {
    let sha256 = hex::encode(Sha256::digest(bytes));
    let body = json!({"name": name, "size_bytes": bytes.len(), "sha256": sha256});
    let response = app.post("/v1/uploads").json(&body).send().await.unwrap();
    assert_eq!(response.status(), 201);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let upload: Value = response.json().await.unwrap();
    assert_eq!(location, format!("/v1/uploads/{}", upload["id"].as_str().unwrap()));
    upload
}

fn path(upload: &Value) -> String {
    format!("/v1/uploads/{}", upload["id"].as_str().unwrap())
}

async fn put(app: &App, upload: &Value, number: usize, bytes: &[u8]) -> Response {
    let path = format!("{}/parts/{number}", path(upload));
    app.request(Method::PUT, &path).body(bytes.to_vec()).send().await.unwrap()
}

async fn complete(app: &App, upload: &Value) -> Response {
    app.post(&format!("{}/complete", path(upload))).send().await.unwrap()
}

#[tokio::test]
async fn a_text_brought_in_parts_side_by_side_is_whole_and_a_job_may_name_it() {
    let app = App::start().await;
    let bytes = text();
    let upload = announce(&app, "my corpus.txt", &bytes).await;
    assert_eq!((&upload["part_size_bytes"], &upload["part_count"]), (&json!(PART), &json!(2)));
    let mut spec = app.spec(6);
    spec["calibration"] = json!({"corpus": {"from": "upload", "upload_id": upload["id"]}});
    let early = app.post("/v1/jobs").json(&spec).send().await.unwrap();
    let body = problem(early, 422, "invalid-spec").await;
    assert_eq!(pointers(&body), ["/calibration/corpus/upload_id"]);

    let body = problem(complete(&app, &upload).await, 409, "upload-incomplete").await;
    assert!(body["detail"].as_str().unwrap().contains("1, 2"), "{body}");
    let mut puts = JoinSet::new();
    for (i, part) in bytes.chunks(PART).enumerate().rev() {
        let path = format!("{}/parts/{}", path(&upload), i + 1);
        let request = app.request(Method::PUT, &path).body(part.to_vec());
        puts.spawn(async move { request.send().await.unwrap().status().as_u16() });
    }
    assert_eq!(puts.join_all().await, [204, 204]);
    let parts = app.json(&path(&upload)).await["parts"].clone();
    assert_eq!(parts[1], json!({"number": 2, "sha256": hex::encode(Sha256::digest(&bytes[PART..]))}));
    for _ in 0..2 {
        let done: Value = complete(&app, &upload).await.json().await.unwrap();
        assert_eq!((&done["complete"], &done["parts"]), (&json!(true), &json!([])));
    }
    problem(put(&app, &upload, 2, &bytes[PART..]).await, 409, "state-conflict").await;
    let row = app.database.upload(Tenant::DEFAULT, upload["id"].as_str().unwrap().parse().unwrap()).await;
    let row = row.unwrap().unwrap();
    assert!(row.location.ends_with("/corpus.txt"), "nothing of the caller's words: {}", row.location);
    assert_eq!(app.store.bytes(&row.location, row.size_bytes as u64).await.unwrap(), bytes);

    let job = app.post("/v1/jobs").json(&spec).send().await.unwrap();
    assert_eq!(job.status(), 201);
    let job: Value = job.json().await.unwrap();
    let delete = || app.request(Method::DELETE, &path(&upload)).send();
    let body = problem(delete().await.unwrap(), 409, "state-conflict").await;
    assert!(body["detail"].as_str().unwrap().contains(job["id"].as_str().unwrap()), "{body}");
    app.post(&format!("/v1/jobs/{}/cancel", job["id"].as_str().unwrap())).send().await.unwrap();
    assert_eq!(delete().await.unwrap().status(), 204);
    assert!(app.store.local(&row.location, 0).await.is_err(), "its file went with it");
    problem(delete().await.unwrap(), 404, "upload-not-found").await;
}

#[tokio::test]
async fn a_damaged_part_is_found_at_once_by_its_digest_and_at_last_by_that_of_the_whole() {
    let app = App::start().await;
    let bytes = b"the right text";
    let upload = announce(&app, "a.txt", bytes).await;
    let digest = |value: &str| {
        let path = format!("{}/parts/1", path(&upload));
        app.request(Method::PUT, &path).header("content-digest", value).body(bytes.to_vec()).send()
    };
    let wrong = digest("sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:").await.unwrap();
    problem(wrong, 400, "digest-mismatch").await;
    problem(complete(&app, &upload).await, 409, "upload-incomplete").await;
    assert_eq!(put(&app, &upload, 1, b"the wrong text").await.status(), 204);
    problem(complete(&app, &upload).await, 400, "digest-mismatch").await;
    // By openssl and base64.
    let right = digest("sha-256=:655IrKW9hR5GMGI3/WSh6j51/wcC4MQSiRHZNCa7E5U=:").await.unwrap();
    assert_eq!(right.status(), 204);
    assert_eq!(complete(&app, &upload).await.status(), 200);
}

#[tokio::test]
async fn parts_that_do_not_fit_are_refused_and_do_not_count() {
    let app = App::start().await;
    let upload = announce(&app, "a.jsonl.gz", b"four").await;
    problem(put(&app, &upload, 1, b"fives").await, 413, "body-too-large").await;
    problem(put(&app, &upload, 1, b"two").await, 422, "invalid-upload").await;
    for number in [0, 2, 99_999_999_999_999] {
        problem(put(&app, &upload, number, b"four").await, 422, "invalid-upload").await;
    }
    assert_eq!(app.json(&path(&upload)).await["parts"], json!([]));
    // A part that was right and is brought again, but breaks off, is not there any more.
    assert_eq!(put(&app, &upload, 1, b"four").await.status(), 204);
    problem(put(&app, &upload, 1, b"fo").await, 422, "invalid-upload").await;
    problem(complete(&app, &upload).await, 409, "upload-incomplete").await;
}

#[tokio::test]
async fn an_upload_that_cannot_be_taken_is_refused_with_every_complaint() {
    let app = App::start().await;
    let sha256 = "0".repeat(64);
    for (body, at) in [
        (json!({"name": "a.bin", "size_bytes": 0, "sha256": "x"}), vec!["/name", "/size_bytes", "/sha256"]),
        (json!({"name": "a.pkl.gz", "size_bytes": 1, "sha256": sha256}), vec!["/name"]),
        (json!({"name": "txt", "size_bytes": 1, "sha256": sha256}), vec!["/name"]),
        (json!({"name": "a.txt", "size_bytes": (16_u64 << 30) + 1, "sha256": sha256}), vec!["/size_bytes"]),
    ] {
        let response = app.post("/v1/uploads").json(&body).send().await.unwrap();
        let told = problem(response, 422, "invalid-upload").await;
        assert_eq!(pointers(&told), at, "{body}");
    }
    for body in [
        json!([]),
        json!({"name": "a.txt"}),
        json!({"name": "a.txt", "size_bytes": 1, "sha256": sha256, "x": 1}),
    ] {
        let response = app.post("/v1/uploads").json(&body).send().await.unwrap();
        problem(response, 422, "invalid-upload").await;
    }
}

#[tokio::test]
async fn all_uploads_of_a_tenant_together_have_a_bound() {
    let app = App::start().await;
    let announce = |size_bytes: u64| {
        let body = json!({"name": "a.txt", "size_bytes": size_bytes, "sha256": "0".repeat(64)});
        app.post("/v1/uploads").json(&body).send()
    };
    let mut statuses = Vec::new();
    for answer in futures_util::future::join_all((0..6).map(|_| announce(16 << 30))).await {
        statuses.push(answer.unwrap().status().as_u16());
    }
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 201, 201, 201, 413, 413], "sixteen times four, also when asked for at once");
    problem(announce(1).await.unwrap(), 413, "quota-exceeded").await;
}

#[tokio::test]
async fn the_uploads_are_listed_newest_first() {
    let app = App::start().await;
    for name in ["a.txt", "b.txt", "c.txt"] {
        announce(&app, name, b"text").await;
    }
    let page = app.json("/v1/uploads?limit=2").await;
    let names: Vec<&str> =
        page["data"].as_array().unwrap().iter().map(|u| u["name"].as_str().unwrap()).collect();
    assert_eq!((names, &page["has_more"]), (vec!["c.txt", "b.txt"], &json!(true)));
    let rest = app.json(&format!("/v1/uploads?after={}", page["last_id"].as_str().unwrap())).await;
    assert_eq!((&rest["data"][0]["name"], &rest["has_more"]), (&json!("a.txt"), &json!(false)));
}
