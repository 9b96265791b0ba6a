//! What holds for every answer: problems, ids, headers, health, shutdown.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;

use crate::support::app::{App, problem};

#[tokio::test]
async fn bodies_that_are_no_json_are_refused_with_line_and_column() {
    let app = App::start().await;
    let send = |body: &'static str| {
        app.post("/v1/jobs").header("content-type", "application/json").body(body).send()
    };
    let body = problem(send("{\n  \"model\": }").await.unwrap(), 400, "invalid-json").await;
    assert!(body["detail"].as_str().unwrap().contains("line 2 column 12"), "{body}");
    problem(send("").await.unwrap(), 400, "invalid-json").await;
    problem(send("{} {}").await.unwrap(), 400, "invalid-json").await;
    problem(send("[1]").await.unwrap(), 422, "invalid-spec").await;
    let deep = "[".repeat(100_000);
    let response =
        app.post("/v1/jobs").header("content-type", "application/json").body(deep).send().await.unwrap();
    problem(response, 400, "invalid-json").await;
}

#[tokio::test]
async fn a_body_must_be_declared_as_json_and_not_be_too_large() {
    let app = App::start().await;
    let spec = app.spec(6);
    for kind in ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""] {
        let request = app.post("/v1/jobs").header("content-type", kind).body(spec.to_string());
        problem(request.send().await.unwrap(), 415, "unsupported-media-type").await;
    }
    for kind in ["application/json; charset=utf-8", "Application/JSON", "application/vnd.secateur+json"] {
        let request = app.post("/v1/jobs").header("content-type", kind).body(spec.to_string());
        assert_eq!(request.send().await.unwrap().status(), 201, "{kind}");
    }
    let huge =
        app.post("/v1/jobs").header("content-type", "application/json").body(vec![b' '; (16 << 20) + 1]);
    problem(huge.send().await.unwrap(), 413, "body-too-large").await;
}

#[tokio::test]
async fn unknown_routes_and_methods_are_problems_too() {
    let app = App::start().await;
    for path in ["/nowhere", "/v1", "/v1/jobs/", "/v2/jobs", "/docs/nothing.js", "/problems/nonsense"] {
        problem(app.get(path).send().await.unwrap(), 404, "route-not-found").await;
    }
    for (method, path, allow) in [
        (Method::PUT, "/v1/jobs", "GET,HEAD,POST"),
        (Method::PATCH, "/v1/jobs/019ab7c2-1f2e-7c3a-9d5e-0123456789ab", "GET,HEAD,DELETE"),
        (Method::POST, "/livez", "GET,HEAD"),
    ] {
        let response = app.request(method, path).send().await.unwrap();
        let mut allowed: Vec<&str> =
            response.headers()["allow"].to_str().unwrap().split(',').map(str::trim).collect();
        let mut expected: Vec<&str> = allow.split(',').collect();
        allowed.sort_unstable();
        expected.sort_unstable();
        assert_eq!(allowed, expected, "{path}");
        problem(response, 405, "method-not-allowed").await;
    }
}

#[tokio::test]
async fn every_problem_has_a_page_of_its_own() {
    let app = App::start().await;
    let all = app.get("/problems").send().await.unwrap().text().await.unwrap();
    let pages: Vec<&str> = all
        .split("href=\"")
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
        .filter(|l| l.contains('/'))
        .collect();
    assert!(pages.len() > 15);
    for page in pages {
        let response = app.get(page).send().await.unwrap();
        assert_eq!(response.status(), 200, "{page}");
        assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/html"));
    }
}

#[tokio::test]
async fn every_answer_has_a_request_id_and_takes_over_a_harmless_one() {
    let app = App::start().await;
    for path in ["/", "/livez", "/v1/jobs", "/nowhere", "/metrics", "/docs/"] {
        let response = app.get(path).send().await.unwrap();
        assert!(response.headers()["x-request-id"].len() == 36, "{path}");
        assert_eq!(response.headers()["x-content-type-options"], "nosniff", "{path}");
        assert!(response.headers().contains_key("content-security-policy"), "{path}");
    }
    let own = app.get("/nowhere").header("x-request-id", "trace-7:a.b").send().await.unwrap();
    assert_eq!(problem(own, 404, "route-not-found").await["request_id"], "trace-7:a.b");
    for bad in ["a b", "<script>", "", &"x".repeat(129)] {
        let response = app.get("/livez").header("x-request-id", bad).send().await.unwrap();
        assert_eq!(response.headers()["x-request-id"].len(), 36, "{bad}");
    }
}

#[tokio::test]
async fn the_api_document_and_its_viewer_are_served_without_any_other_host() {
    let app = App::start().await;
    let document = app.json("/openapi.json").await;
    assert_eq!(document["openapi"], "3.1.0");
    let page = app.get("/docs/").send().await.unwrap().text().await.unwrap();
    let mut scripts = 0;
    for asset in page.split("src=\"").skip(1).filter_map(|rest| rest.split('"').next()) {
        let asset = asset.trim_start_matches("./");
        assert!(!asset.contains("//"), "{asset}");
        assert_eq!(app.get(&format!("/docs/{asset}")).send().await.unwrap().status(), 200, "{asset}");
        scripts += 1;
    }
    assert!(scripts > 0);
    let start = app.get("/docs/swagger-initializer.js").send().await.unwrap().text().await.unwrap();
    assert!(start.contains("/openapi.json"));
    assert!(app.get("/").send().await.unwrap().text().await.unwrap().contains("/docs/"));
}

#[tokio::test]
async fn metrics_count_jobs_by_state_and_requests_by_route() {
    let app = App::start().await;
    app.enqueue("a").await;
    app.enqueue("b").await;
    app.claim().await;
    app.json("/v1/jobs").await;
    let text = app.get("/metrics").send().await.unwrap().text().await.unwrap();
    for line in [
        "secateur_jobs{state=\"queued\"} 1",
        "secateur_jobs{state=\"running\"} 1",
        "secateur_jobs{state=\"failed\"} 0",
        "secateur_database_up 1",
        "secateur_leases_reaped_total{cause=\"expired\"} 0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
    }
    let counted =
        |l: &&str| l.starts_with("secateur_http_requests_total") && l.contains("route=\"/v1/jobs\"");
    assert!(text.lines().any(|l| counted(&l) && l.contains("status=\"200\"")), "{text}");
    assert!(text.contains("secateur_http_request_duration_seconds_bucket"));
    assert!(text.lines().any(|l| l.starts_with("secateur_queue_oldest_seconds ")), "{text}");
    assert!(!text.contains("nowhere"), "an unknown path is no label");
}

#[tokio::test]
async fn without_a_database_the_service_lives_but_is_not_ready() {
    let app = App::start().await;
    assert_eq!(app.get("/readyz").send().await.unwrap().status(), 200);
    // Closing waits for the connection that listens; nobody gets a new one from here on.
    let closing = app.database.clone();
    tokio::spawn(async move { closing.close().await });
    while app.database.ping().await.is_ok() {}
    assert_eq!(app.get("/livez").send().await.unwrap().status(), 200);
    for path in ["/readyz", "/v1/jobs"] {
        let response = app.get(path).send().await.unwrap();
        assert!(response.headers().contains_key("retry-after"), "{path}");
        let body = problem(response, 503, "unavailable").await;
        assert_eq!(body["retryable"], true);
    }
    let metrics = app.get("/metrics").send().await.unwrap();
    assert!(metrics.text().await.unwrap().contains("secateur_database_up 0"));
}

#[tokio::test]
async fn a_shutdown_ends_live_event_streams_and_waits_for_nobody_else() {
    let app = App::start().await;
    let id = app.enqueue("streams").await.id;
    let mut stream =
        app.get(&format!("/v1/jobs/{id}/events")).header("accept", "text/event-stream").send().await.unwrap();
    let first = stream.chunk().await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&first).contains("state_changed"));
    app.shutdown.cancel();
    let ended = tokio::time::timeout(Duration::from_secs(20), app.server).await;
    ended.expect("the server must not wait for the stream").unwrap().unwrap();
    let mut rest = String::new();
    while let Ok(Some(chunk)) = stream.chunk().await {
        rest.push_str(&String::from_utf8_lossy(&chunk));
    }
    assert!(!rest.contains("event: end"), "the job has not ended: {rest}");
}

#[tokio::test]
async fn strange_but_harmless_requests_do_not_confuse_the_service() {
    let app = App::start().await;
    let head = app.request(Method::HEAD, "/v1/jobs").send().await.unwrap();
    assert_eq!(head.status(), 200);
    let head = app.request(Method::HEAD, "/nowhere").send().await.unwrap();
    assert_eq!((head.status().as_u16(), head.text().await.unwrap().as_str()), (404, ""));
    let response = app.post("/v1/jobs").json(&json!(null)).send().await.unwrap();
    problem(response, 422, "invalid-spec").await;
    let id = app.enqueue("x").await.id;
    let upper = app.get(&format!("/v1/jobs/{}", id.to_string().to_uppercase())).send().await.unwrap();
    assert_eq!(upper.status(), 200);
}

#[tokio::test]
async fn the_families_of_models_are_listed_with_what_each_supports() {
    let app = App::start().await;
    let models = app.json("/v1/models").await;
    let llama = models["data"].as_array().unwrap().iter().find(|m| m["model_type"] == "llama").unwrap();
    assert_eq!((&llama["heal"], &llama["experts"]), (&json!(true), &json!(false)), "{llama}");
    assert!(llama["heal_targets"].as_array().unwrap().contains(&json!("q_proj")), "{llama}");
}
