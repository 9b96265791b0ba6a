//! Webhooks: who may be a receiver, what it gets, and that nothing is missing whatever befalls it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::Method;
use ring::hmac;
use secateur::job::report::{Failure, FailureKind};
use secateur::service::db::{Limits, Tenant};
use secateur::service::sinks::Reach;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::support::app::{App, pointers, problem};

/// A message as it came in.
#[derive(Debug, Clone)]
struct Heard {
    id: String,
    timestamp: String,
    signatures: Vec<String>,
    kind: String,
    body: String,
}

impl Heard {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    fn is_signed_with(&self, secret: &str) -> bool {
        let secret = STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
        let signed = format!("{}.{}.{}", self.id, self.timestamp, self.body);
        let expected = format!("v1,{}", STANDARD.encode(hmac::sign(&key, signed.as_bytes())));
        self.signatures.contains(&expected)
    }
}

/// A receiver that answers with whatever it is told to.
#[derive(Clone)]
struct Receiver {
    heard: Arc<Mutex<Vec<Heard>>>,
    answer: Arc<Mutex<StatusCode>>,
    address: SocketAddr,
    stop: CancellationToken,
}

impl Receiver {
    async fn start() -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), Arc::default()).await
    }

    async fn start_at(address: SocketAddr, heard: Arc<Mutex<Vec<Heard>>>) -> Self {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let receiver = Self {
            heard,
            answer: Arc::new(Mutex::new(StatusCode::OK)),
            address: listener.local_addr().unwrap(),
            stop: CancellationToken::new(),
        };
        let (this, stop) = (receiver.clone(), receiver.stop.clone());
        let hear = async move |headers: HeaderMap, body: String| {
            let header = |name: &str| headers[name].to_str().unwrap().to_owned();
            let heard = Heard {
                id: header("webhook-id"),
                timestamp: header("webhook-timestamp"),
                signatures: header("webhook-signature").split(' ').map(String::from).collect(),
                kind: header("content-type"),
                body,
            };
            this.heard.lock().unwrap().push(heard);
            let answer = *this.answer.lock().unwrap();
            (answer, [("location", "/elsewhere")], "said the receiver")
        };
        let routes = Router::new().fallback(hear);
        tokio::spawn(async move {
            axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await.unwrap();
        });
        receiver
    }

    fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    fn answers(&self, status: StatusCode) {
        *self.answer.lock().unwrap() = status;
    }

    fn all(&self) -> Vec<Heard> {
        self.heard.lock().unwrap().clone()
    }

    /// Waits for so many messages.
    async fn wait(&self, count: usize) -> Vec<Heard> {
        for _ in 0..600 {
            if self.all().len() >= count {
                return self.all();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("only {:#?}", self.all());
    }
}

async fn register(app: &App, body: Value) -> Value {
    let made = app.post("/v1/webhook_endpoints").json(&body).send().await.unwrap();
    assert_eq!(made.status(), 201);
    let location = made.headers()["location"].to_str().unwrap().to_owned();
    let made: Value = made.json().await.unwrap();
    assert_eq!(location, path(&made, ""));
    made
}

fn path(endpoint: &Value, below: &str) -> String {
    format!("/v1/webhook_endpoints/{}{below}", endpoint["id"].as_str().unwrap())
}

/// One job from its creation to its end.
async fn job(app: &App, name: &str) {
    app.enqueue(name).await;
    let lease = app.claim().await;
    app.finish(lease, &[("report.json", b"{}")]).await;
}

#[tokio::test]
async fn a_receiver_hears_of_every_state_signed_and_may_choose() {
    let app = App::start().await;
    let (all, ends) = (Receiver::start().await, Receiver::start().await);
    let first = register(&app, json!({"url": all.url()})).await;
    let second =
        json!({"url": ends.url(), "events": ["job.failed"], "format": "cloudevents", "description": "pager"});
    let second = register(&app, second).await;
    app.drain(Reach::Private, Vec::new());
    let row = app.enqueue("told").await;
    let lease = app.claim().await;
    let failure = Failure { kind: FailureKind::Data, stage: None, message: "no text".into() };
    app.database.fail(lease, &failure, Limits::default()).await.unwrap();

    let heard = all.wait(3).await;
    let by_kind: BTreeMap<String, Value> =
        heard.iter().map(|h| (h.json()["type"].as_str().unwrap().to_owned(), h.json())).collect();
    assert_eq!(by_kind.keys().collect::<Vec<_>>(), ["job.failed", "job.queued", "job.running"]);
    let failed = &by_kind["job.failed"]["data"];
    assert_eq!(
        (&failed["job_id"], &failed["name"], &failed["state"]),
        (&json!(row.id), &json!("told"), &json!("failed"))
    );
    assert_eq!(failed["failure"]["message"], "no text");
    assert!(
        heard
            .iter()
            .all(|h| h.is_signed_with(first["secret"].as_str().unwrap()) && h.kind == "application/json")
    );

    let event = &ends.wait(1).await[0];
    assert!(event.is_signed_with(second["secret"].as_str().unwrap()));
    assert!(!event.is_signed_with(first["secret"].as_str().unwrap()));
    let told = event.json();
    assert_eq!(event.kind, "application/cloudevents+json");
    assert_eq!((&told["specversion"], &told["type"]), (&json!("1.0"), &json!("secateur.job.failed")));
    assert_eq!((&told["id"], &told["subject"]), (&json!(event.id), &json!(row.id)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((all.all().len(), ends.all().len()), (3, 1), "nothing comes twice");
    let page = app.json(&path(&first, "/deliveries")).await;
    assert!(
        page["data"].as_array().unwrap().iter().all(|d| d["tries"].as_array().unwrap().len() == 1),
        "{page}"
    );
}

#[tokio::test]
async fn a_secret_is_shown_once_kept_sealed_and_both_count_while_it_is_rotated() {
    let app = App::start().await;
    let receiver = Receiver::start().await;
    let made = register(&app, json!({"url": receiver.url()})).await;
    let secret = made["secret"].as_str().unwrap().to_owned();
    let shown = app.json(&path(&made, "")).await;
    let list = app.json("/v1/webhook_endpoints").await;
    assert!(shown.get("secret").is_none() && list["data"][0].get("secret").is_none(), "{shown} {list}");
    let row = app.database.endpoints(Tenant::DEFAULT).await.unwrap().remove(0);
    let plain = STANDARD.decode(&secret["whsec_".len()..]).unwrap();
    assert!(!row.secret.windows(plain.len()).any(|bytes| bytes == plain));

    let rotated: Value = app.post(&path(&made, "/rotate")).send().await.unwrap().json().await.unwrap();
    let new = rotated["secret"].as_str().unwrap();
    assert!(new != secret && rotated["rotating"] == true);
    app.drain(Reach::Private, Vec::new());
    let sent = app.post(&path(&made, "/ping")).send().await.unwrap();
    assert_eq!(sent.status(), 202);
    let sent: Value = sent.json().await.unwrap();
    let ping = &receiver.wait(1).await[0];
    assert_eq!((json!(ping.id), &ping.json()["type"]), (sent["id"].clone(), &json!("ping")));
    assert!(ping.is_signed_with(&secret) && ping.is_signed_with(new));
}

#[tokio::test]
async fn a_receiver_that_was_away_misses_nothing_and_each_message_keeps_its_id_and_body() {
    let app = App::start().await;
    let first = Receiver::start().await;
    let endpoint = register(&app, json!({"url": first.url()})).await;
    app.drain(Reach::Private, Vec::new());
    first.answers(StatusCode::INTERNAL_SERVER_ERROR);
    job(&app, "refused").await;
    first.wait(4).await;
    first.stop.cancel();
    tokio::time::sleep(Duration::from_millis(200)).await;
    for i in 0..5 {
        job(&app, &format!("while it is away {i}")).await;
    }
    let second = Receiver::start_at(first.address, first.heard.clone()).await;
    for _ in 0..600 {
        let page = app.json(&path(&endpoint, "/deliveries?limit=100")).await;
        if page["data"].as_array().unwrap().iter().all(|d| d["state"] == "delivered") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut bodies: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for heard in second.all() {
        bodies.entry(heard.id).or_default().push(heard.body);
    }
    assert_eq!(bodies.len(), 6 * 3, "three states of six jobs");
    assert!(bodies.values().all(|same| same.iter().all(|body| *body == same[0])));

    let page = app.json(&path(&endpoint, "/deliveries?limit=10")).await;
    assert_eq!((&page["has_more"], page["data"].as_array().unwrap().len()), (&json!(true), 10));
    let after = page["last_id"].as_str().unwrap();
    let rest = app.json(&path(&endpoint, &format!("/deliveries?after={after}"))).await;
    let oldest = &rest["data"].as_array().unwrap()[7];
    let tries = oldest["tries"].as_array().unwrap();
    assert!(tries.len() >= 2, "{oldest}");
    assert_eq!((&tries[0]["status"], &tries.last().unwrap()["status"]), (&json!(500), &json!(200)));
    assert!(tries[0]["error"].as_str().unwrap().contains("said the receiver"), "{oldest}");

    let count = second.all().len();
    let id = oldest["id"].as_str().unwrap();
    let again = path(&endpoint, &format!("/deliveries/{id}/redeliver"));
    assert_eq!(app.post(&again).send().await.unwrap().status(), 202);
    let heard = second.wait(count + 1).await;
    // Messages are sent side by side: the oldest need not have been the first to arrive.
    assert_eq!((heard[count].id.as_str(), &heard[count].body), (id, &bodies[id][0]));
}

#[tokio::test]
async fn a_message_that_is_being_tried_is_nobody_elses_and_success_outlives_a_late_failure() {
    use secateur::service::db::Tried;
    let app = App::start().await;
    register(&app, json!({"url": "http://127.0.0.1:9/"})).await;
    app.enqueue("slow").await;
    let (lease, database) = (Duration::from_millis(300), &app.database);
    let due = async || database.messages_due("webhook", &[], 10, lease).await.unwrap();
    let slow = due().await.remove(0);
    assert!(due().await.is_empty(), "it is being tried");
    app.enqueue("quick").await;
    let quick = due().await.remove(0);
    let fine = Tried { status: Some(200), error: None, duration: Duration::ZERO };
    database.message_tried(&quick, &fine, None).await.unwrap();
    assert!(due().await.is_empty(), "another one's success changes nothing for it");
    tokio::time::sleep(lease).await;
    let again = due().await.remove(0);
    assert_eq!((again.id, &again.body, again.attempts), (slow.id, &slow.body, 2));
    database.message_tried(&slow, &fine, None).await.unwrap();
    let late = Tried { status: None, error: Some("too late".into()), duration: Duration::ZERO };
    database.message_tried(&again, &late, Some(Duration::ZERO)).await.unwrap();
    assert!(due().await.is_empty(), "it was delivered");
}

#[tokio::test]
async fn a_dead_receiver_slows_neither_jobs_nor_other_receivers() {
    let app = App::start().await;
    // Takes connections and never answers.
    let hole = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    register(&app, json!({"url": format!("http://{}/", hole.local_addr().unwrap())})).await;
    let alive = Receiver::start().await;
    register(&app, json!({"url": alive.url(), "events": ["job.succeeded"]})).await;
    app.drain(Reach::Private, Vec::new());
    let begun = std::time::Instant::now();
    for i in 0..20 {
        job(&app, &format!("job {i}")).await;
    }
    alive.wait(20).await;
    // Far less than one of the sixty tries that hang takes to end.
    assert!(begun.elapsed() < Duration::from_secs(14), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn redirects_are_not_followed_and_addresses_inside_are_not_called() {
    let app = App::start().await;
    let receiver = Receiver::start().await;
    let endpoint = register(&app, json!({"url": receiver.url()})).await;
    receiver.answers(StatusCode::TEMPORARY_REDIRECT);
    app.post(&path(&endpoint, "/ping")).send().await.unwrap();
    app.drain(Reach::Private, Vec::new());
    receiver.wait(2).await;
    let page = app.json(&path(&endpoint, "/deliveries")).await;
    assert_eq!(page["data"][0]["tries"][0]["status"], 307);
    assert_eq!(page["data"][0]["state"], "waiting");

    // Registered when it was allowed; called when it is not any more.
    let app = App::start().await;
    let receiver = Receiver::start().await;
    for url in [receiver.url(), format!("http://localhost:{}/", receiver.address.port())] {
        let endpoint = register(&app, json!({"url": url})).await;
        app.post(&path(&endpoint, "/ping")).send().await.unwrap();
    }
    app.drain(Reach::Public, Vec::new());
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert!(receiver.all().is_empty());
}

#[tokio::test]
async fn what_cannot_be_a_receiver_is_refused_with_all_reasons() {
    let app = App::start().await;
    let post = |body: Value| app.post("/v1/webhook_endpoints").json(&body).send();
    let wrong = json!({"url": "ftp://example.com", "events": ["job.succeeded", "job.exploded"], "description": "\u{0}"});
    let body = problem(post(wrong).await.unwrap(), 422, "invalid-webhook").await;
    assert_eq!(pointers(&body), ["/url", "/events/1", "/description"]);
    for body in
        [json!({}), json!({"url": 1}), json!({"url": "https://example.com", "secret": "mine"}), json!([])]
    {
        problem(post(body).await.unwrap(), 422, "invalid-webhook").await;
    }
    problem(app.get("/v1/webhook_endpoints/x").send().await.unwrap(), 400, "invalid-id").await;
    let nowhere = "/v1/webhook_endpoints/019ab7c2-1f2e-7c3a-9d5e-0123456789ab";
    for (method, below) in [
        (Method::GET, ""),
        (Method::DELETE, ""),
        (Method::POST, "/rotate"),
        (Method::POST, "/ping"),
        (Method::GET, "/deliveries"),
        (Method::POST, "/deliveries/019ab7c2-1f2e-7c3a-9d5e-0123456789ab/redeliver"),
    ] {
        let answer = app.request(method, &format!("{nowhere}{below}")).send().await.unwrap();
        problem(answer, 404, "webhook-not-found").await;
    }
    let made = register(&app, json!({"url": "https://example.com/hook"})).await;
    assert_eq!(app.request(Method::DELETE, &path(&made, "")).send().await.unwrap().status(), 204);
    assert_eq!(app.json("/v1/webhook_endpoints").await["data"], json!([]));
}
