//! How much one caller may ask for, and the log of who changed what.

use std::io::{BufRead, BufReader};
use std::num::NonZeroU32;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::StreamExt;
use reqwest::Response;
use rustix::process::{Pid, Signal, kill_process};
use secateur::service::db::{NewApiKey, Tenant};
use secateur::service::http::{ApiKey, Limits, Scope};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::support::app::{App, KEY, client, problem};
use crate::support::postgres::url;

/// Another key of the same tenant.
async fn another(app: &App) -> String {
    let (key, text) = ApiKey::make();
    let row = NewApiKey { scopes: vec![Scope::Submit.name().into()], ..key.row(Tenant::DEFAULT, "another") };
    app.database.key_put(&row).await.unwrap();
    text
}

fn retry_after(response: &Response) -> u64 {
    response.headers()["retry-after"].to_str().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_key_that_asks_too_often_waits_and_no_other_does() {
    let app = App::start_limited(Limits { requests_per_s: NonZeroU32::new(2), streams: 1 }).await;
    let other = another(&app).await;
    let mut refused = 0;
    for _ in 0..20 {
        let answer = app.get("/v1/models").bearer_auth(KEY).send().await.unwrap();
        if answer.status() != 200 {
            assert_eq!(retry_after(&answer), 1);
            let told = problem(answer, 429, "too-many-requests").await;
            assert_eq!(told["retryable"], true);
            refused += 1;
        }
    }
    assert!(refused > 0, "twenty at once are more than two in a second");
    assert_eq!(app.get("/v1/models").bearer_auth(other).send().await.unwrap().status(), 200);
    assert_eq!(app.get("/livez").send().await.unwrap().status(), 200);
    sleep(Duration::from_millis(1100)).await;
    assert_eq!(app.get("/v1/models").bearer_auth(KEY).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_key_has_a_bound_of_open_streams_and_a_place_is_free_when_one_ends() {
    let app = App::start_limited(Limits { requests_per_s: None, streams: 2 }).await;
    let other = another(&app).await;
    let id = app.enqueue("watched").await.id;
    let watch = |key: &str| {
        let events = app.get(&format!("/v1/jobs/{id}/events"));
        events.header("accept", "text/event-stream").bearer_auth(key).send()
    };
    let (first, second) = (watch(KEY).await.unwrap(), watch(KEY).await.unwrap());
    assert_eq!((first.status(), second.status()), (reqwest::StatusCode::OK, reqwest::StatusCode::OK));
    problem(watch(KEY).await.unwrap(), 429, "too-many-streams").await;
    assert_eq!(watch(&other).await.unwrap().status(), 200);
    // A page is no stream.
    let page = app.get(&format!("/v1/jobs/{id}/events")).bearer_auth(KEY).send().await.unwrap();
    assert_eq!(page.status(), 200);
    drop(first);
    timeout(Duration::from_secs(30), async {
        while watch(KEY).await.unwrap().status() != 200 {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("the place of the stream that was dropped is free");
}

#[tokio::test]
async fn no_more_jobs_wait_than_may_however_many_ask_at_once() {
    let app = App::start().await;
    let pool = sqlx::PgPool::connect_with(app.address.clone()).await.unwrap();
    sqlx::query("update tenants set max_queued = 3").execute(&pool).await.unwrap();
    let spec = app.spec(6);
    let mut asked = JoinSet::new();
    for _ in 0..12 {
        asked.spawn(app.post("/v1/jobs").json(&spec).send());
    }
    let answers: Vec<Response> = asked.join_all().await.into_iter().map(Result::unwrap).collect();
    let (made, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|a| a.status() == 201);
    assert_eq!((made.len(), refused.len()), (3, 9));
    for answer in refused {
        assert!(retry_after(&answer) > 0);
        problem(answer, 429, "queue-full").await;
    }
    // What runs waits no more.
    app.claim().await;
    assert_eq!(app.post("/v1/jobs").json(&spec).send().await.unwrap().status(), 201);
}

#[tokio::test]
async fn who_changed_what_is_kept_and_no_secret_with_it() {
    let app = App::start_locked().await;
    let other = another(&app).await;
    let made = app.post("/v1/jobs").bearer_auth(&other).json(&app.spec(6)).send().await.unwrap();
    let job = made.headers()["location"].to_str().unwrap().to_owned();
    let cancelled = app.post(&format!("{job}/cancel")).bearer_auth(KEY).header("x-request-id", "mine").send();
    assert_eq!(cancelled.await.unwrap().status(), 200);
    assert_eq!(
        app.request(reqwest::Method::DELETE, &job).bearer_auth(KEY).send().await.unwrap().status(),
        204
    );
    let hook = json!({"url": "http://127.0.0.1:9/hook?token=canary"});
    let hook: Value = app
        .post("/v1/webhook_endpoints")
        .bearer_auth(KEY)
        .json(&hook)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let key = json!({"name": "canary", "scopes": ["read"]});
    let key: Value =
        app.post("/v1/api_keys").bearer_auth(KEY).json(&key).send().await.unwrap().json().await.unwrap();
    // Looked at, refused, or not understood: no change.
    for path in ["/v1/jobs", "/v1/audit"] {
        assert_eq!(app.get(path).bearer_auth(KEY).send().await.unwrap().status(), 200);
    }
    problem(
        app.post("/v1/jobs").bearer_auth(KEY).json(&json!({})).send().await.unwrap(),
        422,
        "invalid-spec",
    )
    .await;
    problem(app.get("/v1/audit").bearer_auth(&other).send().await.unwrap(), 403, "forbidden").await;

    let mut entries: Vec<Value> = Vec::new();
    let mut at = "/v1/audit?limit=2".to_owned();
    loop {
        let page: Value = app.get(&at).bearer_auth(KEY).send().await.unwrap().json().await.unwrap();
        entries.extend(page["data"].as_array().unwrap().clone());
        if page["has_more"] == false {
            break;
        }
        at = format!("/v1/audit?limit=2&after={}", page["last_id"].as_str().unwrap());
    }
    let told: Vec<(&str, &str, &str)> = entries
        .iter()
        .rev()
        .map(|e| ["key_id", "action", "target"].map(|name| e[name].as_str().unwrap()).into())
        .collect();
    let me = KEY.split('_').nth(1).unwrap();
    let they = other.split('_').nth(1).unwrap();
    let path = |kind: &str, made: &Value| format!("/v1/{kind}/{}", made["id"].as_str().unwrap());
    let (cancel, endpoint, made) =
        (format!("{job}/cancel"), path("webhook_endpoints", &hook), path("api_keys", &key));
    let expected: [(&str, &str, &str); 5] = [
        (they, "POST /v1/jobs", &job),
        (me, "POST /v1/jobs/{id}/cancel", &cancel),
        (me, "DELETE /v1/jobs/{id}", &job),
        (me, "POST /v1/webhook_endpoints", &endpoint),
        (me, "POST /v1/api_keys", &made),
    ];
    assert_eq!(told, expected);
    assert_eq!(entries[3]["request_id"], "mine");
    let all = Value::from(entries).to_string();
    for secret in ["canary", hook["secret"].as_str().unwrap(), key["key"].as_str().unwrap(), KEY] {
        assert!(!all.contains(secret), "{secret} in {all}");
    }
}

/// Reads a stream of events to its end; gives the numbers and kinds it told.
async fn watch_all(response: Response) -> (Vec<i64>, bool) {
    let mut stream = response.bytes_stream();
    let mut text = String::new();
    while let Some(Ok(bytes)) = stream.next().await {
        text.push_str(std::str::from_utf8(&bytes).unwrap());
    }
    let ids = text.lines().filter_map(|line| line.strip_prefix("id: ")?.parse().ok()).collect();
    (ids, text.trim_end().ends_with("event: end\ndata: {}"))
}

/// `secateur api` over the database of `app`: a process of its own, whose memory is nobody else's.
struct Api {
    child: Child,
    url: String,
    _data: TempDir,
}

impl Api {
    fn start(app: &App) -> Self {
        let data = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_secateur"))
            .args(["api", "--bind", "127.0.0.1:0", "--database-url", &url(&app.address), "--data-dir"])
            .arg(data.path())
            .env_remove("SECATEUR_API_KEY")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").expect("it listens").to_owned();
        Self { child, url, _data: data }
    }

    async fn watch(&self, job: Uuid, count: usize) -> JoinSet<(Vec<i64>, bool)> {
        let client = client();
        let mut watchers = JoinSet::new();
        for i in 0..count {
            let request = client.get(format!("{}/v1/jobs/{job}/events", self.url));
            let answer = request.header("accept", "text/event-stream").send().await.unwrap();
            assert_eq!(answer.status(), 200, "watcher {i}");
            watchers.spawn(watch_all(answer));
        }
        watchers
    }

    fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    fn memory_mib(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() >> 10
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_watchers_of_one_job_hear_all_of_it_and_cost_one_reader() {
    const WATCHERS: usize = 1000;
    let app = App::start().await;
    let api = Api::start(&app);
    let pool = sqlx::PgPool::connect_with(app.address.clone()).await.unwrap();
    let id = app.enqueue("watched").await.id;
    let lease = app.claim().await;
    let (files, memory) = (api.open_files(), api.memory_mib());
    let watchers = api.watch(id, WATCHERS).await;
    assert!(api.open_files() >= files + WATCHERS, "each is on a line of its own");
    let note = |n: usize| secateur::job::progress::Event::Noted { stage: None, message: format!("note {n}") };
    let read_before = rows_read(&pool).await;
    for n in 0..50 {
        app.database.record(lease, &[note(n)]).await.unwrap();
    }
    let connections: i64 = sqlx::query_scalar(
        "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'secateur'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!(connections <= 32, "{connections} connections of two pools, of 10 and 20, and those that listen");
    app.finish(lease, &[]).await;
    let told = timeout(Duration::from_secs(120), watchers.join_all()).await.expect("all streams end");
    let all: Vec<i64> = (1..=53).collect();
    for (ids, ended) in &told {
        assert!(*ended && ids == &all, "{ids:?}");
    }
    let (read, grown) = (rows_read(&pool).await - read_before, api.memory_mib().saturating_sub(memory));
    println!(
        "{WATCHERS} watchers: {grown} MiB more, {connections} connections, {read} rows read of the database"
    );
    assert!(grown < 150, "{grown} MiB more for {WATCHERS} watchers");
    // A reader for each would have read 50 events and as many rows of jobs a thousand times.
    assert!(read < 20_000, "{read} rows were read");
}

/// Rows that statements have fetched in this database so far.
async fn rows_read(pool: &sqlx::PgPool) -> i64 {
    // Statistics are told when a connection has been idle for a moment.
    sleep(Duration::from_millis(1500)).await;
    let sum = "select sum(coalesce(idx_tup_fetch, 0) + seq_tup_read)::int8 from pg_stat_user_tables
               where relname in ('events', 'jobs')";
    sqlx::query_scalar(sum).fetch_one(pool).await.unwrap()
}

#[tokio::test]
async fn a_service_that_is_told_to_stop_ends_the_streams_that_are_open() {
    let app = App::start().await;
    let mut api = Api::start(&app);
    let id = app.enqueue("waits").await.id;
    let watchers = api.watch(id, 100).await;
    kill_process(Pid::from_child(&api.child), Signal::TERM).unwrap();
    let ended = async {
        loop {
            match api.child.try_wait().unwrap() {
                Some(status) => return status,
                None => sleep(Duration::from_millis(10)).await,
            }
        }
    };
    assert!(timeout(Duration::from_secs(20), ended).await.expect("it waits for no stream").success());
    // The job has not ended: none is told so, and each may go on elsewhere from its last event.
    // Some may not even have heard of its beginning.
    let told = watchers.join_all().await;
    assert!(told.iter().all(|(ids, ended)| !ended && ids.iter().all(|id| *id == 1)), "{told:?}");
}
