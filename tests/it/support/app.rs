//! A running API: a real listener on loopback over a fresh database.

use std::fs;
use std::path::PathBuf;

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, Uri};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use secateur::job::spec::JobSpec;
use secateur::service::db::{Database, JobRow, Lease, NewArtifact, NewJob, Tenant};
use secateur::service::http::{ApiKey, AppState, Feeds, Limits, Lock, Roots, Turnstile, serve};
use secateur::service::seal::Seal;
use secateur::service::sinks::{Drain, Reach, Settings, Sink};
use secateur::service::store::{Store, epoch_prefix};
use serde_json::{Value, json};
use sqlx::postgres::PgConnectOptions;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::postgres;
use super::tiny::Tiny;

pub const KEY: &str = "sct_testkey1_0123456789abcdef0123456789abcdef";

/// Whose repositories of the Hub jobs may name.
pub const PUBLISH_TO: &str = "my-team";
const UNBOUND: Limits = Limits { requests_per_s: None, streams: 2000 };

pub struct App {
    pub url: String,
    /// Of the database, for what no route does.
    pub address: PgConnectOptions,
    pub database: Database,
    pub store: Store,
    pub shutdown: CancellationToken,
    pub client: Client,
    pub server: JoinHandle<std::io::Result<()>>,
    directory: TempDir,
}

impl App {
    /// Without a key, as `secateur up` on a laptop.
    pub async fn start() -> Self {
        Self::start_with(false, UNBOUND).await
    }

    /// With [`KEY`].
    pub async fn start_locked() -> Self {
        Self::start_with(true, UNBOUND).await
    }

    /// With [`KEY`], which may not ask for more than `limits`.
    pub async fn start_limited(limits: Limits) -> Self {
        Self::start_with(true, limits).await
    }

    async fn start_with(locked: bool, limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir(&root).unwrap();
        let address = postgres::fresh_options().await;
        let database = postgres::connect(&address).await;
        database.migrate().await.unwrap();
        if locked {
            let key: ApiKey = KEY.parse().unwrap();
            database.key_put(&key.row(Tenant::DEFAULT, "test")).await.unwrap();
        }
        let store = Store::open(directory.path().join("store")).unwrap();
        let shutdown = CancellationToken::new();
        let state = AppState {
            database: database.clone(),
            store: store.clone(),
            seal: Seal::with(&[7; 32]),
            reach: Reach::Private,
            publish_to: [PUBLISH_TO.to_owned()].into(),
            roots: Roots::new(&[root]).unwrap(),
            lock: Lock::new(&database).await.unwrap(),
            turnstile: Turnstile::new(limits),
            feeds: Feeds::default(),
            shutdown: shutdown.clone(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (listening, stop) = (database.clone(), shutdown.clone());
        tokio::spawn(async move { listening.listen(stop).await });
        let server = tokio::spawn(serve(listener, state));
        Self { url, address, database, store, shutdown, client: client(), server, directory }
    }

    /// Drains the outbox as the service does, with waits a thousand times shorter.
    pub fn drain(&self, reach: Reach, named: Vec<Sink>) {
        let settings = Settings { reach, patience: 0.001, named };
        let (database, store, seal) = (self.database.clone(), self.store.clone(), Seal::with(&[7; 32]));
        tokio::spawn(Drain { database, store, seal, settings }.serve(self.shutdown.clone()));
    }

    /// The allowed root.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("root").canonicalize().unwrap()
    }

    /// A directory beside the root that no job may read.
    pub fn outside(&self) -> PathBuf {
        let outside = self.directory.path().canonicalize().unwrap().join("outside");
        fs::create_dir_all(&outside).unwrap();
        outside
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    pub fn get(&self, path: &str) -> RequestBuilder {
        self.request(Method::GET, path)
    }

    pub fn post(&self, path: &str) -> RequestBuilder {
        self.request(Method::POST, path)
    }

    pub async fn json(&self, path: &str) -> Value {
        let response = self.get(path).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        response.json().await.unwrap()
    }

    /// A spec that is fine, on a model of `layers` layers below the root.
    pub fn spec(&self, layers: u32) -> Value {
        let model = self.root().join("model");
        checkpoint(layers).write(&model);
        json!({"model": {"from": "path", "path": model}, "prune": {"amount": {"layers": 2}}})
    }

    /// Puts a job into the queue, past the API's checks.
    pub async fn enqueue(&self, name: &str) -> JobRow {
        let spec = json!({
            "name": name, "labels": {"team": "nlp", "run": name},
            "model": {"from": "hub", "repo": "org/name"}, "prune": {"amount": {"layers": 2}},
        });
        let spec = JobSpec::read(spec).unwrap();
        self.database.job_insert(Tenant::DEFAULT, &NewJob::new(spec)).await.unwrap()
    }

    /// Takes the next job, as a worker does.
    pub async fn claim(&self) -> Lease {
        let claimed = self.database.claim(Uuid::now_v7(), std::time::Duration::from_secs(60)).await.unwrap();
        claimed.unwrap().0
    }

    /// Ends a claimed job with these files.
    pub async fn finish(&self, lease: Lease, files: &[(&str, &[u8])]) {
        let mut stored = Vec::new();
        for (path, bytes) in files {
            let file = self.directory.path().join("upload");
            let _ = fs::remove_file(&file);
            fs::write(&file, bytes).unwrap();
            let location = format!("{}/{path}", epoch_prefix(lease.job, lease.epoch));
            let put = self.store.put(&location, &file).await.unwrap();
            stored.push(NewArtifact {
                path: (*path).into(),
                sha256: put.sha256,
                size_bytes: put.size_bytes,
                location,
            });
        }
        self.database.finish(lease, &stored).await.unwrap();
    }
}

/// A client like any other. Which cryptography it is to use must be said, as in the program itself.
pub fn client() -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::new()
}

/// Somebody on loopback who is told of things; gives where.
pub async fn receive(
    answer: impl Fn(&Method, &Uri, &HeaderMap, &[u8]) -> (StatusCode, Value) + Clone + Send + Sync + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let routes =
        Router::new().fallback(async move |method: Method, uri: Uri, headers: HeaderMap, body: Bytes| {
            let (status, body) = answer(&method, &uri, &headers, &body);
            (status, body.to_string())
        });
    tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
    url
}

/// Asserts that `response` is a well-formed problem and gives its body.
pub async fn problem(response: Response, status: u16, code: &str) -> Value {
    assert_eq!(response.status(), StatusCode::from_u16(status).unwrap());
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let body: Value = response.json().await.unwrap();
    assert_eq!((&body["code"], &body["status"]), (&json!(code), &json!(status)), "{body}");
    assert_eq!(body["type"], format!("/problems/{code}"));
    assert_eq!(body["request_id"], id);
    assert!(body["title"].is_string() && !body["detail"].as_str().unwrap().is_empty(), "{body}");
    body
}

/// The JSON pointers of a problem.
pub fn pointers(body: &Value) -> Vec<&str> {
    body["errors"].as_array().unwrap().iter().map(|e| e["pointer"].as_str().unwrap()).collect()
}

/// The smallest checkpoint of so many layers.
pub fn checkpoint(layers: u32) -> Tiny {
    Tiny { layers: layers as usize, hidden: 8, intermediate: 8, heads: 2, kv_heads: 1, ..Tiny::llama() }
}
