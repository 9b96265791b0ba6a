//! Results on the Hugging Face Hub, against a small one; `scripts/check_hub.py` has the Hub's own client try a like one, too.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::{HeaderMap, Method, StatusCode, Uri};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use secateur::job::spec::JobSpec;
use secateur::service::db::{NewJob, Tenant};
use secateur::service::sinks::{Hub, Reach, Sink};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::app::{App, PUBLISH_TO, pointers, problem, receive};

const TOKEN: &str = "hf_canary";

#[derive(Default)]
struct Held {
    url: String,
    private: Option<bool>,
    /// By sha256; the flag says whether it was verified.
    large: BTreeMap<String, (Vec<u8>, bool)>,
    commits: Vec<Value>,
    files: BTreeMap<String, Vec<u8>>,
    /// The next commit is made, and its answer gets lost.
    lose_answer: bool,
}

#[derive(Clone, Default)]
struct FakeHub(Arc<Mutex<Held>>);

impl FakeHub {
    async fn start(&self) -> String {
        let this = self.clone();
        let url = receive(move |method, uri, headers, body| this.answer(method, uri, headers, body)).await;
        self.0.lock().unwrap().url.clone_from(&url);
        url
    }

    fn answer(&self, method: &Method, uri: &Uri, headers: &HeaderMap, body: &[u8]) -> (StatusCode, Value) {
        let mut held = self.0.lock().unwrap();
        let path = uri.path();
        if let Some(oid) = path.strip_prefix("/storage/") {
            assert!(!headers.contains_key("authorization"), "the storage is told no token");
            held.large.insert(oid.into(), (body.to_vec(), false));
            return (StatusCode::OK, json!({}));
        }
        assert_eq!(headers["authorization"], format!("Bearer {TOKEN}"));
        let sent = || serde_json::from_slice::<Value>(body).unwrap();
        match (method, path) {
            (&Method::POST, "/api/repos/create") if held.private.is_some() => {
                (StatusCode::CONFLICT, json!({"error": "You already created this model repo"}))
            }
            (&Method::POST, "/api/repos/create") => {
                let sent = sent();
                assert_eq!((&sent["name"], &sent["organization"]), (&json!("small"), &json!(PUBLISH_TO)));
                held.private = sent["private"].as_bool();
                (StatusCode::OK, json!({"url": "…"}))
            }
            (&Method::POST, "/api/models/my-team/small/preupload/main") => {
                (StatusCode::OK, preupload(&sent()))
            }
            (&Method::POST, "/my-team/small.git/info/lfs/objects/batch") => {
                assert_eq!(headers["accept"], "application/vnd.git-lfs+json");
                (StatusCode::OK, batch(&held, &sent()))
            }
            (&Method::POST, "/verify") => {
                let oid = sent()["oid"].as_str().unwrap().to_owned();
                let (bytes, verified) = held.large.get_mut(&oid).unwrap();
                assert_eq!(hex::encode(Sha256::digest(bytes)), oid);
                *verified = true;
                (StatusCode::OK, json!({}))
            }
            (&Method::GET, "/api/models/my-team/small/commits/main") => (StatusCode::OK, json!(held.commits)),
            (&Method::POST, "/api/models/my-team/small/commit/main") => {
                assert_eq!(headers["content-type"], "application/x-ndjson");
                let id = commit(&mut held, std::str::from_utf8(body).unwrap());
                if std::mem::take(&mut held.lose_answer) {
                    return (StatusCode::BAD_GATEWAY, json!({}));
                }
                (StatusCode::OK, json!({"commitOid": id, "commitUrl": "…"}))
            }
            other => panic!("{other:?}"),
        }
    }
}

fn preupload(sent: &Value) -> Value {
    let mode = |file: &Value| {
        let path = file["path"].as_str().unwrap();
        assert!(STANDARD.decode(file["sample"].as_str().unwrap()).unwrap().len() <= 512);
        let large = std::path::Path::new(path).extension().is_some_and(|e| e == "safetensors");
        json!({"path": path, "uploadMode": if large { "lfs" } else { "regular" }, "shouldIgnore": false})
    };
    json!({"files": sent["files"].as_array().unwrap().iter().map(mode).collect::<Vec<_>>()})
}

fn batch(held: &Held, sent: &Value) -> Value {
    assert_eq!((&sent["operation"], &sent["hash_algo"]), (&json!("upload"), &json!("sha256")));
    let object = |object: &Value| {
        let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap() as usize);
        if held.large.contains_key(oid) {
            return json!({"oid": oid, "size": size});
        }
        let upload = json!({"href": format!("{}/storage/{oid}", held.url), "header": {}});
        let verify = json!({"href": format!("{}/verify", held.url)});
        json!({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
    };
    json!({"transfer": "basic", "objects": sent["objects"].as_array().unwrap().iter().map(object).collect::<Vec<_>>()})
}

fn commit(held: &mut Held, lines: &str) -> String {
    let mut title = Value::Null;
    for line in lines.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let (key, value) = (line["key"].as_str().unwrap(), &line["value"]);
        let path = value["path"].as_str().unwrap_or_default().to_owned();
        match key {
            "header" => title = value["summary"].clone(),
            "file" => {
                assert_eq!(value["encoding"], "base64");
                held.files.insert(path, STANDARD.decode(value["content"].as_str().unwrap()).unwrap());
            }
            "lfsFile" => {
                let (bytes, verified) = &held.large[value["oid"].as_str().unwrap()];
                assert!(*verified && bytes.len() as u64 == value["size"].as_u64().unwrap());
                let bytes = bytes.clone();
                held.files.insert(path, bytes);
            }
            other => panic!("{other}"),
        }
    }
    let id = format!("c{}", held.commits.len());
    held.commits.insert(0, json!({"id": id, "title": title}));
    id
}

async fn drain(app: &App, hub: &FakeHub) {
    let (url, token) = (hub.start().await, TOKEN.into());
    app.database.sink_seen("hub").await.unwrap();
    app.drain(Reach::Public, vec![Sink::Hub(Hub { url, token, namespaces: vec![PUBLISH_TO.into()] })]);
}

async fn enqueue(app: &App, publish: Value) -> uuid::Uuid {
    let mut spec = json!({"model": {"from": "hub", "repo": "org/name"}, "prune": {"amount": {"layers": 2}}});
    spec["publish"] = publish;
    let spec = JobSpec::read(spec).unwrap();
    app.database.job_insert(Tenant::DEFAULT, &NewJob::new(spec)).await.unwrap().id
}

#[tokio::test]
async fn the_better_checkpoint_of_a_job_that_asks_for_it_is_one_commit_though_an_answer_was_lost() {
    let app = App::start().await;
    let hub = FakeHub::default();
    hub.0.lock().unwrap().lose_answer = true;
    drain(&app, &hub).await;
    let id = enqueue(&app, json!({"repo": "my-team/small"})).await;
    let files: [(&str, &[u8]); 5] = [
        ("healed/README.md", b"# card"),
        ("healed/config.json", b"{}"),
        ("healed/model.safetensors", b"many weights, healed"),
        ("pruned/model.safetensors", b"many weights"),
        ("report.json", b"{}"),
    ];
    app.finish(app.claim().await, &files).await;
    // One that does not ask stays at home.
    app.enqueue("silent").await;
    app.finish(app.claim().await, &files).await;
    for _ in 0..600 {
        let waiting = app.database.backlog().await.unwrap().iter().map(|sink| sink.pending).sum::<i64>();
        if waiting == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let told = app.json(&format!("/v1/jobs/{id}/sinks")).await;
    assert_eq!(told["known_as"], json!({"hub": "c0"}));
    let published =
        told["deliveries"].as_array().unwrap().iter().find(|d| d["type"] == "job.succeeded").unwrap();
    assert_eq!((&published["sink"], &published["state"]), (&json!("hub"), &json!("delivered")));
    assert!(published["tries"].as_array().unwrap().len() > 1, "an answer was lost: {published}");
    assert!(!told.to_string().contains(TOKEN));
    let held = hub.0.lock().unwrap();
    assert_eq!(held.private, Some(true));
    assert_eq!(held.commits.len(), 1, "{:?}", held.commits);
    assert_eq!(held.commits[0]["title"], format!("The result of job {id}"));
    let wanted: BTreeMap<String, Vec<u8>> = files[..3]
        .iter()
        .map(|(path, bytes)| (path.strip_prefix("healed/").unwrap().to_owned(), bytes.to_vec()))
        .collect();
    assert_eq!(held.files, wanted);
}

#[tokio::test]
async fn a_job_may_be_published_only_where_the_service_may_write_and_a_sweep_not_at_all() {
    let app = App::start().await;
    let mut spec = app.spec(6);
    for (repo, said) in
        [("others/small", "only below my-team"), ("small", "owner/name"), ("my-team/../x", "owner/name")]
    {
        spec["publish"] = json!({"repo": repo});
        let refused =
            problem(app.post("/v1/jobs").json(&spec).send().await.unwrap(), 422, "invalid-spec").await;
        assert_eq!(pointers(&refused), ["/publish/repo"], "{repo}");
        assert!(refused.to_string().contains(said), "{refused}");
    }
    spec["publish"] = json!({"repo": "my-team/small", "private": false});
    assert_eq!(app.post("/v1/jobs").json(&spec).send().await.unwrap().status(), 201);
    let sweep = json!({"base": spec, "axes": {"layers": {"from": 1, "to": 2, "step": 1}}});
    let refused =
        problem(app.post("/v1/sweeps").json(&sweep).send().await.unwrap(), 422, "invalid-spec").await;
    assert_eq!(pointers(&refused), ["/base/publish"]);
}
