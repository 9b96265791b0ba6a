//! `secateur jobs` as people and scripts call it: the real program against a real service.

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use secateur::job::report::{Failure, FailureKind};
use secateur::service::db::Limits;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use uuid::Uuid;

use crate::support::app::{App, KEY};

fn command(server: &str, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_secateur"));
    command.args(["jobs", "--server", server]).args(words).env_remove("SECATEUR_API_KEY");
    command
}

async fn jobs(server: &str, words: &[&str]) -> Output {
    command(server, words).output().await.unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

async fn done(server: &str, words: &[&str]) -> String {
    let output = jobs(server, words).await;
    assert_eq!(output.status.code(), Some(0), "{words:?}: {}", stderr(&output));
    stdout(&output)
}

/// A line to `app` on which each connection breaks after so many bytes of answers.
async fn breaking_line(app: &App, most_bytes: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let to = app.url.strip_prefix("http://").unwrap().to_owned();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpStream::connect(&to).await.unwrap();
            tokio::spawn(pass(near, far, most_bytes));
        }
    });
    url
}

async fn pass(near: TcpStream, far: TcpStream, mut left: usize) {
    let (mut ask, mut tell) = near.into_split();
    let (mut answers, mut asked) = far.into_split();
    tokio::spawn(async move { tokio::io::copy(&mut ask, &mut asked).await });
    let mut buffer = vec![0; 4096];
    while left > 0 {
        let Ok(count @ 1..) = answers.read(&mut buffer).await else { return };
        let count = count.min(left);
        left -= count;
        if tell.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_job_is_submitted_listed_changed_and_deleted_from_a_terminal() {
    let app = App::start().await;
    let server = app.url.as_str();
    let mut spec = app.spec(6);
    spec["name"] = json!("by hand");
    let file = app.outside().join("spec.json");
    std::fs::write(&file, spec.to_string()).unwrap();
    let file = file.to_str().unwrap();
    let id = done(server, &["submit", file, "--idempotency-key", "k"]).await.trim().to_owned();
    assert_eq!(
        done(server, &["submit", file, "--idempotency-key", "k"]).await.trim(),
        id,
        "still the same job"
    );
    let other = done(server, &["submit", file]).await;
    assert_ne!(other.trim(), id);
    done(server, &["cancel", other.trim()]).await;

    let all: Value = serde_json::from_str(&done(server, &["list", "--json"]).await).unwrap();
    assert_eq!(all.as_array().unwrap().len(), 2);
    let table = done(server, &["list", "--state", "queued", "--name", "by hand"]).await;
    assert!(table.lines().count() == 1 && table.contains(&id) && table.contains("by hand"), "{table}");
    assert!(done(server, &["get", &id]).await.contains("queued"));
    for (change, state) in [("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")] {
        let job: Value = serde_json::from_str(&done(server, &[change, &id, "--json"]).await).unwrap();
        assert_eq!(job["state"], state);
    }
    let logs = done(server, &["logs", &id]).await;
    assert!(logs.contains("paused") && logs.lines().last().unwrap().contains("cancelled"), "{logs}");
    let again: Value = serde_json::from_str(&done(server, &["retry", &id, "--json"]).await).unwrap();
    assert_eq!(again["retry_of"], json!(id));
    done(server, &["delete", &id]).await;
    assert_eq!(jobs(server, &["get", &id]).await.status.code(), Some(5));
}

#[tokio::test]
async fn exit_codes_tell_a_script_what_happened() {
    let app = App::start().await;
    let server = app.url.as_str();
    let unknown = Uuid::now_v7().to_string();
    let gone = jobs(server, &["get", &unknown]).await;
    assert_eq!(gone.status.code(), Some(5), "{}", stderr(&gone));
    let file = app.outside().join("spec.yaml");
    std::fs::write(&file, "model: {from: path, path: /nowhere}\nprune: {amount: {layers: 0}, colour: red}\n")
        .unwrap();
    let wrong = jobs(server, &["submit", file.to_str().unwrap()]).await;
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("/prune/colour"), "{}", stderr(&wrong));
    assert_eq!(jobs("ftp://x", &["list"]).await.status.code(), Some(1));
    let queued = app.enqueue("waits").await.id;
    assert_eq!(jobs(server, &["resume", &queued.to_string()]).await.status.code(), Some(0));
    assert_eq!(
        jobs(server, &["delete", &queued.to_string()]).await.status.code(),
        Some(1),
        "it has not ended"
    );

    app.database.job_cancel(secateur::service::db::Tenant::DEFAULT, queued).await.unwrap();
    assert_eq!(jobs(server, &["watch", &queued.to_string()]).await.status.code(), Some(4));
    let fails = app.enqueue("fails").await.id;
    let watch =
        command(server, &["watch", &fails.to_string()]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let lease = app.claim().await;
    let failure = Failure { kind: FailureKind::Data, stage: None, message: "the corpus is too short".into() };
    app.database.fail(lease, &failure, Limits::default()).await.unwrap();
    let watched = watch.wait_with_output().await.unwrap();
    assert_eq!(watched.status.code(), Some(3));
    assert!(stdout(&watched).contains("the corpus is too short"), "{}", stdout(&watched));

    let locked = App::start_locked().await;
    assert_eq!(jobs(&locked.url, &["list"]).await.status.code(), Some(1));
    let key = app.outside().join("key");
    std::fs::write(&key, format!("{KEY}\n")).unwrap();
    done(&locked.url, &["list", "--api-key-file", key.to_str().unwrap()]).await;
    let by_word = command(&locked.url, &["list"]).env("SECATEUR_API_KEY", KEY).output().await.unwrap();
    assert_eq!(by_word.status.code(), Some(0));
}

#[tokio::test]
async fn a_watcher_hears_every_event_once_over_a_line_that_keeps_breaking() {
    let app = App::start().await;
    let id = app.enqueue("long").await.id;
    let line = breaking_line(&app, 1500).await;
    let long = breaking_line(&app, 8000).await;
    let watch = command(&line, &["watch", &id.to_string(), "--json"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lease = app.claim().await;
    for i in 0..20 {
        let told = secateur::job::progress::Event::Noted { stage: None, message: format!("note {i}") };
        app.database.record(lease, &[told]).await.unwrap();
    }
    app.finish(lease, &[("a.txt", b"words")]).await;
    let watched =
        tokio::time::timeout(Duration::from_secs(240), watch.wait_with_output()).await.unwrap().unwrap();
    let seqs: Vec<i64> = stdout(&watched)
        .lines()
        .filter_map(|l| serde_json::from_str::<Value>(l).unwrap()["seq"].as_i64())
        .collect();
    assert_eq!(seqs, (1..=seqs.len() as i64).collect::<Vec<_>>());
    assert_eq!(seqs.len(), 23);
    // An answer that never comes whole is trouble, and said so.
    assert_eq!(watched.status.code(), Some(1), "{}", stderr(&watched));
    assert_eq!(jobs(&long, &["watch", &id.to_string()]).await.status.code(), Some(0));
}

async fn finished() -> (App, String, Vec<u8>) {
    let app = App::start().await;
    let id = app.enqueue("leaves").await.id;
    let lease = app.claim().await;
    let model: Vec<u8> = (0..200_000_u32).map(|i| (i * 31 % 251) as u8).collect();
    let files: [(&str, &[u8]); 4] = [
        ("healed/model.safetensors", &model),
        ("healed/config.json", b"{}"),
        ("odd name?.bin", b""),
        ("report.json", b"{}"),
    ];
    app.finish(lease, &files).await;
    (app, id.to_string(), model)
}

fn digest(path: &Path) -> String {
    hex::encode(Sha256::digest(std::fs::read(path).unwrap()))
}

#[tokio::test]
async fn a_download_goes_on_over_a_line_that_keeps_breaking_and_is_what_its_digests_say() {
    let (app, id, model) = finished().await;
    let line = breaking_line(&app, 50_000).await;
    let out = app.outside().join("out");
    let words = ["download", &id, "--out", out.to_str().unwrap(), "--json"];
    let listed: Value = serde_json::from_str(&done(&line, &words).await).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 4);
    for file in listed.as_array().unwrap() {
        assert_eq!(digest(&out.join(file["path"].as_str().unwrap())), file["sha256"].as_str().unwrap());
    }
    assert_eq!(std::fs::read(out.join("healed/model.safetensors")).unwrap(), model);

    // What is here is not fetched again; what is half here goes on.
    let modified = |name: &str| out.join(name).metadata().unwrap().modified().unwrap();
    let before = modified("healed/config.json");
    std::fs::remove_file(out.join("healed/model.safetensors")).unwrap();
    std::fs::write(out.join("healed/model.safetensors.part"), &model[..199_990]).unwrap();
    let narrow = breaking_line(&app, 2500).await;
    done(&narrow, &["download", &id, "healed", "--out", out.to_str().unwrap()]).await;
    assert_eq!(std::fs::read(out.join("healed/model.safetensors")).unwrap(), model);
    assert_eq!(modified("healed/config.json"), before);
}

#[tokio::test]
async fn a_download_that_is_not_what_its_digest_says_is_no_file() {
    let (app, id, model) = finished().await;
    let out = app.outside().join("out");
    std::fs::create_dir_all(out.join("healed")).unwrap();
    let mut wrong = model.clone();
    wrong[5] ^= 1;
    std::fs::write(out.join("healed/model.safetensors.part"), &wrong[..100_000]).unwrap();
    let words = ["download", &id, "healed/model.safetensors", "--out", out.to_str().unwrap()];
    let failed = jobs(&app.url, &words).await;
    assert_eq!(failed.status.code(), Some(1));
    assert!(stderr(&failed).contains("digest"), "{}", stderr(&failed));
    assert!(!out.join("healed/model.safetensors").exists());
    done(&app.url, &words).await;
    assert_eq!(std::fs::read(out.join("healed/model.safetensors")).unwrap(), model);
    let unknown = jobs(&app.url, &["download", &id, "nothing", "--out", out.to_str().unwrap()]).await;
    assert_eq!(unknown.status.code(), Some(1));
}

#[tokio::test]
async fn no_service_makes_a_download_write_elsewhere() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let evil = directory.path().join("evil");
    let absolute = evil.to_str().unwrap().to_owned();
    tokio::spawn(async move {
        for path in ["../evil", "a/../../evil", absolute.as_str(), ""] {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut asked = [0; 1024];
            let _ = near.read(&mut asked).await.unwrap();
            let body =
                json!({"data": [{"path": path, "sha256": "0".repeat(64), "size_bytes": 0}]}).to_string();
            let answer = format!(
                "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            near.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    let out = directory.path().join("out");
    for _ in 0..4 {
        let output =
            jobs(&url, &["download", &Uuid::now_v7().to_string(), "--out", out.to_str().unwrap()]).await;
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("elsewhere"), "{}", stderr(&output));
    }
    assert!(!evil.exists());
}

#[tokio::test]
async fn every_shell_gets_its_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_secateur")).args(["completions", shell]).output().await.unwrap();
        assert!(output.status.success() && stdout(&output).contains("idempotency-key"), "{shell}");
    }
}
