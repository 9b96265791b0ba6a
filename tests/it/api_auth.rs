//! Who may call.

use reqwest::{Method, RequestBuilder, StatusCode};
use secateur::service::db::{NewApiKey, Tenant};
use secateur::service::http::ApiKey;
use serde_json::Value;

use crate::support::app::{App, KEY, problem};

/// Every operation of the document that is served, as (method, path).
async fn operations(app: &App) -> Vec<(Method, String)> {
    let document: Value = app.get("/openapi.json").send().await.unwrap().json().await.unwrap();
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        let path = path.replace("{id}", "019ab7c2-1f2e-7c3a-9d5e-0123456789ab").replace("{path}", "a/b");
        for method in item.as_object().unwrap().keys().filter(|k| *k != "parameters") {
            operations.push((method.to_uppercase().parse().unwrap(), path.clone()));
        }
    }
    assert!(operations.len() > 15);
    operations
}

fn is_open(path: &str) -> bool {
    matches!(path, "/livez" | "/readyz" | "/openapi.json")
}

#[tokio::test]
async fn without_the_key_no_route_of_the_document_answers_but_health() {
    let app = App::start_locked().await;
    let with = |method: &Method, path: &str, header: Option<&str>| -> RequestBuilder {
        let request = app.request(method.clone(), path);
        match header {
            Some(value) => request.header("authorization", value),
            None => request,
        }
    };
    let wrong_secret = format!("Bearer sct_testkey1_{}", "f".repeat(32));
    let wrong_id = KEY.replace("testkey1", "testkey2");
    let short = format!("Bearer {}", &KEY[..KEY.len() - 1]);
    let long = format!("Bearer {KEY}0");
    for (method, path) in operations(&app).await {
        for header in [
            None,
            Some(""),
            Some("Bearer"),
            Some("Bearer "),
            Some(KEY),
            Some(wrong_secret.as_str()),
            Some(&format!("Bearer {wrong_id}")),
            Some(&short),
            Some(&long),
            Some(&format!("Basic {KEY}")),
        ] {
            let response = with(&method, &path, header).send().await.unwrap();
            if is_open(&path) {
                assert_eq!(response.status(), 200, "{method} {path}");
                continue;
            }
            assert!(
                response.headers()["www-authenticate"].to_str().unwrap().starts_with("Bearer"),
                "{method} {path}"
            );
            problem(response, 401, "unauthorized").await;
        }
        let response = with(&method, &path, Some(&format!("bearer {KEY}"))).send().await.unwrap();
        assert_ne!(response.status(), StatusCode::UNAUTHORIZED, "{method} {path}");
    }
    for path in ["/nowhere", "/v1/nowhere"] {
        problem(app.get(path).send().await.unwrap(), 401, "unauthorized").await;
    }
    for path in ["/", "/docs/", "/problems"] {
        assert_eq!(app.get(path).send().await.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn a_revoked_or_expired_key_opens_nothing() {
    let app = App::start_locked().await;
    let list = || app.get("/v1/jobs").bearer_auth(KEY).send();
    assert_eq!(list().await.unwrap().status(), 200);
    assert!(app.database.keys(Tenant::DEFAULT).await.unwrap()[0].last_used_at.is_some());
    app.database.key_revoke(Tenant::DEFAULT, "testkey1").await.unwrap();
    problem(list().await.unwrap(), 401, "unauthorized").await;
    let key: ApiKey = KEY.parse().unwrap();
    let past = app.database.ping().await.unwrap() - std::time::Duration::from_secs(1);
    let expired = NewApiKey { expires_at: Some(past), ..key.row(Tenant::DEFAULT, "old") };
    app.database.key_put(&expired).await.unwrap();
    problem(list().await.unwrap(), 401, "unauthorized").await;
}

#[tokio::test]
async fn a_key_for_reading_changes_nothing() {
    let app = App::start_locked().await;
    let id = app.enqueue("stays").await.id;
    let key: ApiKey = KEY.parse().unwrap();
    let reading = NewApiKey { scopes: vec!["read".into()], ..key.row(Tenant::DEFAULT, "reader") };
    app.database.key_put(&reading).await.unwrap();
    assert_eq!(app.get("/v1/jobs").bearer_auth(KEY).send().await.unwrap().status(), 200);
    let cancel = app.post(&format!("/v1/jobs/{id}/cancel")).bearer_auth(KEY).send().await.unwrap();
    problem(cancel, 403, "forbidden").await;
    let create = app.post("/v1/jobs").bearer_auth(KEY).json(&app.spec(6)).send().await.unwrap();
    problem(create, 403, "forbidden").await;
}

#[tokio::test]
async fn the_key_is_never_said_back() {
    let app = App::start_locked().await;
    let wrong = KEY.replace("testkey1", "testkey9");
    let body = app.get("/v1/jobs").bearer_auth(&wrong).send().await.unwrap().text().await.unwrap();
    assert!(!body.contains("0123456789abcdef"), "{body}");
}

#[tokio::test]
async fn without_a_key_only_this_machine_may_call_and_no_web_page_through_it() {
    let app = App::start().await;
    let port = app.url.rsplit(':').next().unwrap();
    for host in ["evil.example", "evil.example:80", "10.1.2.3", &format!("localhost.evil.example:{port}")] {
        let response = app.get("/v1/jobs").header("host", host).send().await.unwrap();
        problem(response, 421, "foreign-host").await;
    }
    for host in [format!("localhost:{port}"), format!("127.0.0.1:{port}"), format!("[::1]:{port}")] {
        assert_eq!(app.get("/v1/jobs").header("host", &host).send().await.unwrap().status(), 200, "{host}");
    }
    let id = app.enqueue("stays").await.id;
    let cancel = format!("/v1/jobs/{id}/cancel");
    for origin in ["http://evil.example", "null", "http://localhost:1", &format!("https://127.0.0.1:{port}")]
    {
        let response = app.post(&cancel).header("origin", origin).send().await.unwrap();
        problem(response, 403, "foreign-origin").await;
    }
    assert_eq!(app.json(&format!("/v1/jobs/{id}")).await["state"], "queued");
    let own = app.post(&cancel).header("origin", &app.url).send().await.unwrap();
    assert_eq!(own.status(), 200);
}
