//! The files a job left: ranges, conditions, digests.

use reqwest::Method;
use serde_json::json;

use crate::support::app::{App, problem};

/// 100 bytes: 0 to 99.
fn bytes() -> Vec<u8> {
    (0..100).collect()
}

/// An app with a finished job that left some files, and the path of its artifacts.
async fn finished() -> (App, String) {
    let app = App::start().await;
    let id = app.enqueue("leaves").await.id;
    let lease = app.claim().await;
    let files: [(&str, &[u8]); 5] = [
        ("healed/model.safetensors", &bytes()),
        ("profile.json", br#"{"layer_count": 6}"#),
        ("report.json", br#"{"report": 1}"#),
        ("report.html", b"<!doctype html><script>alert(1)</script>"),
        ("odd name?.bin", b""),
    ];
    app.finish(lease, &files).await;
    (app, format!("/v1/jobs/{id}/artifacts"))
}

#[tokio::test]
async fn the_list_names_every_file_with_digest_and_address() {
    let (app, path) = finished().await;
    let page = app.json(&path).await;
    let files = page["data"].as_array().unwrap();
    let names: Vec<&str> = files.iter().map(|f| f["path"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["healed/model.safetensors", "odd name?.bin", "profile.json", "report.html", "report.json"]
    );
    assert_eq!(files[0]["size_bytes"], 100);
    for file in files {
        let response = app.get(file["url"].as_str().unwrap()).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["etag"], format!("\"{}\"", file["sha256"].as_str().unwrap()));
        assert_eq!(response.headers()["content-length"], file["size_bytes"].to_string());
    }
}

#[tokio::test]
async fn a_file_is_described_by_its_digest_whole_or_in_part() {
    let (app, path) = finished().await;
    let path = format!("{path}/healed/model.safetensors");
    let whole = app.get(&path).send().await.unwrap();
    assert_eq!(whole.status(), 200);
    assert_eq!(whole.headers()["accept-ranges"], "bytes");
    assert_eq!(whole.headers()["content-type"], "application/octet-stream");
    // By sha256sum and base64.
    let described = "sha-256=:vOCv8Zz1qmp0aaMNYdBOQ3bku/Y4EFLunn8zklyVTVI=:";
    assert_eq!(whole.headers()["repr-digest"], described);
    assert_eq!(whole.bytes().await.unwrap(), bytes());
    for (range, expected, content_range) in [
        ("bytes=0-0", 0..1, "bytes 0-0/100"),
        ("bytes=10-19", 10..20, "bytes 10-19/100"),
        ("bytes=90-", 90..100, "bytes 90-99/100"),
        ("bytes=90-500", 90..100, "bytes 90-99/100"),
        ("bytes=-5", 95..100, "bytes 95-99/100"),
        ("bytes=-500", 0..100, "bytes 0-99/100"),
    ] {
        let part = app.get(&path).header("range", range).send().await.unwrap();
        assert_eq!(part.status(), 206, "{range}");
        assert_eq!(part.headers()["content-range"], content_range);
        assert_eq!(part.headers()["content-length"], expected.len().to_string());
        assert_eq!(part.headers()["repr-digest"], described);
        assert_eq!(part.bytes().await.unwrap(), bytes()[expected]);
    }
    for ignored in ["bytes=0-1,3-4", "lines=1-2", "bytes=5-2", "bytes=x"] {
        let response = app.get(&path).header("range", ignored).send().await.unwrap();
        assert_eq!(response.status(), 200, "{ignored}");
        assert_eq!(response.bytes().await.unwrap(), bytes());
    }
}

#[tokio::test]
async fn a_range_beyond_the_end_is_refused_with_the_length() {
    let (app, path) = finished().await;
    for range in ["bytes=100-", "bytes=100-200", "bytes=-0"] {
        let response =
            app.get(&format!("{path}/healed/model.safetensors")).header("range", range).send().await.unwrap();
        assert_eq!(response.headers()["content-range"], "bytes */100");
        problem(response, 416, "range-not-satisfiable").await;
    }
    let empty =
        app.get(&format!("{path}/odd%20name%3F.bin")).header("range", "bytes=0-").send().await.unwrap();
    problem(empty, 416, "range-not-satisfiable").await;
}

#[tokio::test]
async fn if_range_resumes_only_the_very_same_file() {
    let (app, path) = finished().await;
    let path = format!("{path}/healed/model.safetensors");
    let etag = app.get(&path).send().await.unwrap().headers()["etag"].to_str().unwrap().to_owned();
    for (tag, status) in [
        (etag.as_str(), 206),
        ("\"other\"", 200),
        (&format!("W/{etag}"), 200),
        ("Mon, 23 Nov 2026 20:00:00 GMT", 200),
    ] {
        let request = app.get(&path).header("range", "bytes=50-").header("if-range", tag);
        assert_eq!(request.send().await.unwrap().status(), status, "{tag}");
    }
    // What it does not match, a range beyond the end does not matter either.
    let request = app.get(&path).header("range", "bytes=500-").header("if-range", "\"other\"");
    assert_eq!(request.send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn who_has_the_file_gets_nothing_again() {
    let (app, path) = finished().await;
    let path = format!("{path}/healed/model.safetensors");
    let etag = app.get(&path).send().await.unwrap().headers()["etag"].to_str().unwrap().to_owned();
    for tags in [etag.clone(), format!("\"x\", {etag}"), format!("W/{etag}"), "*".into()] {
        let response =
            app.get(&path).header("if-none-match", &tags).header("range", "bytes=0-1").send().await.unwrap();
        assert_eq!(response.status(), 304, "{tags}");
        assert_eq!(response.headers()["etag"], etag.as_str());
        assert!(response.bytes().await.unwrap().is_empty());
    }
    let response = app.get(&path).header("if-none-match", "\"x\"").send().await.unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn head_tells_the_length_without_the_bytes() {
    let (app, path) = finished().await;
    let head = app.request(Method::HEAD, &format!("{path}/healed/model.safetensors")).send().await.unwrap();
    assert_eq!(head.status(), 200);
    assert_eq!(head.headers()["content-length"], "100");
    assert!(head.headers().contains_key("repr-digest"));
    assert!(head.bytes().await.unwrap().is_empty());
}

#[tokio::test]
async fn no_path_leads_out_of_the_files_of_the_job() {
    let (app, path) = finished().await;
    for tail in [
        "nothing",
        "healed",
        "healed/",
        "healed//model.safetensors",
        "./profile.json",
        "..%2f..%2fprofile.json",
        "healed%2f..%2fprofile.json",
        "%252e%252e%252fprofile.json",
        "..%5c..%5cetc%5cpasswd",
        "%2fetc%2fpasswd",
        "profile.json%00",
        "%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    ] {
        // By hand: a client would tidy the path up before it sends it.
        let status = raw_status(&app, &format!("{path}/{tail}")).await;
        assert!(status == 404 || status == 400, "{tail}: {status}");
    }
    let encoded = app.get(&format!("{path}/healed%2Fmodel.safetensors")).send().await.unwrap();
    assert_eq!(encoded.status(), 200, "an encoded slash is a slash");
}

/// The status of a GET of exactly this path.
async fn raw_status(app: &App, path: &str) -> u16 {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let authority = app.url.trim_start_matches("http://");
    let mut stream = tokio::net::TcpStream::connect(authority).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(!answer.contains("root:"), "{answer}");
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn profile_and_report_are_files_of_the_job_and_the_report_comes_as_asked() {
    let (app, path) = finished().await;
    let job = path.strip_suffix("/artifacts").unwrap();
    assert_eq!(app.json(&format!("{job}/profile")).await, json!({"layer_count": 6}));
    assert_eq!(app.json(&format!("{job}/report")).await, json!({"report": 1}));
    let browser = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8";
    let html = app.get(&format!("{job}/report")).header("accept", browser).send().await.unwrap();
    assert_eq!(html.headers()["content-type"], "text/html; charset=utf-8");
    let policy = html.headers()["content-security-policy"].to_str().unwrap();
    assert!(
        policy.contains("default-src 'none'") && policy.contains("sandbox") && !policy.contains("script"),
        "{policy}"
    );

    let running = app.enqueue("has none yet").await.id;
    for what in ["profile", "report"] {
        let response = app.get(&format!("/v1/jobs/{running}/{what}")).send().await.unwrap();
        problem(response, 404, "result-not-ready").await;
    }
    let response = app.get(&format!("/v1/jobs/{running}/artifacts/report.json")).send().await.unwrap();
    problem(response, 404, "artifact-not-found").await;
    assert_eq!(app.json(&format!("/v1/jobs/{running}/artifacts")).await["data"], json!([]));
}

#[tokio::test]
async fn a_file_that_was_lost_or_cut_is_our_failure_and_is_not_served() {
    let (app, path) = finished().await;
    let id = path.split('/').nth(3).unwrap().parse().unwrap();
    let row = app
        .database
        .artifact(secateur::service::db::Tenant::DEFAULT, id, "profile.json")
        .await
        .unwrap()
        .unwrap();
    let file = app.store.local(&row.location, 0).await.unwrap().path.clone();
    std::fs::write(&file, b"{").unwrap();
    problem(app.get(&format!("{path}/profile.json")).send().await.unwrap(), 500, "internal").await;
    std::fs::remove_file(&file).unwrap();
    problem(app.get(&format!("{path}/profile.json")).send().await.unwrap(), 500, "internal").await;
}
