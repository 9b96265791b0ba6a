//! Every route of the served document, before every kind of caller who may not pass: made from the document, so that a new
//! route cannot be forgotten. Also how keys are made, and what the first one does.

use std::time::Duration;

use reqwest::{Method, Response, StatusCode};
use secateur::service::db::{NewApiKey, Tenant};
use secateur::service::http::{ApiKey, Scope};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::support::app::{App, KEY, checkpoint, problem};

const OTHER: Tenant = Tenant(2);

/// An operation of the document.
struct Door {
    method: Method,
    template: String,
    /// What a key needs; none: it is open to all.
    scope: Option<Scope>,
}

async fn doors(app: &App) -> Vec<Door> {
    let document: Value = app.get("/openapi.json").send().await.unwrap().json().await.unwrap();
    let mut doors = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let place = format!("{method} {path}");
            let security =
                operation["security"].as_array().unwrap_or_else(|| panic!("{place} names no scope"));
            let scope = security.iter().find_map(|s| s.get("api_key")).map(|scopes| {
                serde_json::from_value(scopes[0].clone()).unwrap_or_else(|e| panic!("{place}: {e}"))
            });
            doors.push(Door {
                method: method.to_uppercase().parse().unwrap(),
                template: path.clone(),
                scope,
            });
        }
    }
    let open = doors.iter().filter(|door| door.scope.is_none()).count();
    assert!(doors.len() > 40 && open == 2, "{} routes, {open} of them open", doors.len());
    doors
}

/// Keeps a new key and gives its text.
async fn key(app: &App, tenant: Tenant, scope: Scope, expires_in: Option<i64>) -> String {
    let (key, text) = ApiKey::make();
    let expires_at = expires_in.map(|s| time::OffsetDateTime::now_utc() + time::Duration::seconds(s));
    let row = NewApiKey { scopes: vec![scope.name().into()], expires_at, ..key.row(tenant, "test") };
    app.database.key_put(&row).await.unwrap();
    text
}

async fn ask(app: &App, method: &Method, path: &str, key: Option<&str>) -> Response {
    let request = app.request(method.clone(), path).timeout(Duration::from_secs(60));
    let request = match key {
        Some(key) => request.bearer_auth(key),
        None => request,
    };
    request.send().await.unwrap()
}

#[tokio::test]
async fn no_route_lets_anybody_pass_without_a_good_key_of_the_right_scope() {
    let app = App::start_locked().await;
    let expired = key(&app, Tenant::DEFAULT, Scope::Admin, Some(-1)).await;
    let revoked = key(&app, Tenant::DEFAULT, Scope::Admin, None).await;
    let id = revoked.parse::<ApiKey>().unwrap().id;
    assert!(app.database.key_revoke(Tenant::DEFAULT, &id).await.unwrap());
    let lesser = [
        (Scope::Read, key(&app, Tenant::DEFAULT, Scope::Read, None).await),
        (Scope::Submit, key(&app, Tenant::DEFAULT, Scope::Submit, None).await),
    ];
    for Door { method, template, scope } in doors(&app).await {
        let nobody = Uuid::nil().to_string();
        let path = template.replace("{id}", &nobody).replace("{delivery}", &nobody).replace("{number}", "1");
        let Some(needed) = scope else {
            assert_eq!(ask(&app, &method, &path, None).await.status(), 200, "{path} is open");
            continue;
        };
        for bad in [None, Some("nonsense"), Some(expired.as_str()), Some(&revoked)] {
            problem(ask(&app, &method, &path, bad).await, 401, "unauthorized").await;
        }
        for (scope, key) in &lesser {
            let answer = ask(&app, &method, &path, Some(key)).await;
            if *scope < needed {
                let told = problem(answer, 403, "forbidden").await;
                assert!(told["detail"].as_str().unwrap().contains(needed.name()), "{method} {path}: {told}");
            } else {
                assert!(![401, 403].contains(&answer.status().as_u16()), "{method} {path}");
            }
        }
    }
}

/// One thing of each kind, all of the first tenant's.
struct Things {
    job: String,
    sweep: String,
    upload: String,
    endpoint: String,
    delivery: String,
    key: String,
}

impl Things {
    async fn make(app: &App) -> Self {
        let job = app.enqueue("theirs").await.id.to_string();
        let lease = app.claim().await;
        let files: [(&str, &[u8]); 3] =
            [("healed/config.json", b"{}"), ("profile.json", b"{}"), ("report.json", b"{}")];
        app.finish(lease, &files).await;
        let made = async |path: &str, body: Value| -> String {
            let answer = app.post(path).bearer_auth(KEY).json(&body).send().await.unwrap();
            assert_eq!(answer.status(), 201, "{path}");
            answer.json::<Value>().await.unwrap()["id"].as_str().unwrap().to_owned()
        };
        let base = app.spec(6);
        checkpoint(6).write(app.root().join("model"));
        let axes = json!({"amount": [{"layers": 1}, {"layers": 2}]});
        let sweep = made("/v1/sweeps", json!({"base": base, "axes": axes})).await;
        let file = json!({"name": "a.txt", "size_bytes": 5, "sha256": "5".repeat(64)});
        let upload = made("/v1/uploads", file).await;
        let hook = json!({"url": "http://127.0.0.1:9/hook"});
        let endpoint = made("/v1/webhook_endpoints", hook).await;
        let ping = format!("/v1/webhook_endpoints/{endpoint}/ping");
        assert!(app.post(&ping).bearer_auth(KEY).send().await.unwrap().status().is_success());
        let told = format!("/v1/webhook_endpoints/{endpoint}/deliveries");
        let told: Value = app.get(&told).bearer_auth(KEY).send().await.unwrap().json().await.unwrap();
        let delivery = told["data"][0]["id"].as_str().unwrap().to_owned();
        let key = made("/v1/api_keys", json!({"name": "spare", "scopes": ["read"]})).await;
        Self { job, sweep, upload, endpoint, delivery, key }
    }

    /// The path of what is ours behind `template`.
    fn path(&self, template: &str) -> String {
        let id = match template.split('/').nth(2).unwrap() {
            "jobs" | "api" | "{id}" => &self.job,
            "sweeps" => &self.sweep,
            "uploads" => &self.upload,
            "webhook_endpoints" => &self.endpoint,
            "api_keys" => &self.key,
            other => panic!("whose are the ids of `{other}` in {template}? Say it here."),
        };
        let below = template.replace("{id}", id).replace("{delivery}", &self.delivery);
        let file = if template.contains("tree") { "extra" } else { "healed/config.json" };
        let file = if template.contains("/resolve/") { "config.json" } else { file };
        below.replace("{number}", "1").replace("{revision}", "main").replace("{path}", file)
    }
}

#[tokio::test]
async fn no_route_tells_a_tenant_of_what_another_has() {
    let app = App::start_locked().await;
    let pool = sqlx::PgPool::connect_with(app.address.clone()).await.unwrap();
    sqlx::query("insert into tenants (id, name) values (2, 'other')").execute(&pool).await.unwrap();
    let stranger = key(&app, OTHER, Scope::Admin, None).await;
    let things = Things::make(&app).await;
    let all = [&things.job, &things.sweep, &things.upload, &things.endpoint, &things.delivery, &things.key];
    // What ends things comes last: until then their owner must find them.
    let (last, first): (Vec<_>, Vec<_>) =
        doors(&app).await.into_iter().partition(|door| door.method == Method::DELETE);
    for Door { method, template, .. } in first.into_iter().chain(last) {
        if !template.contains('{') {
            if method == Method::GET && template != "/metrics" {
                let text = ask(&app, &method, &template, Some(&stranger)).await.text().await.unwrap();
                assert!(!all.iter().any(|id| text.contains(*id)), "{template} shows a stranger: {text}");
            }
            continue;
        }
        let path = things.path(&template);
        let answer = ask(&app, &method, &path, Some(&stranger)).await;
        assert_eq!(answer.status(), 404, "{method} {path} by a stranger");
        // And the same by its owner: it is there.
        let answer = ask(&app, &method, &path, Some(KEY)).await;
        let status = answer.status();
        let code = answer.json::<Value>().await.unwrap_or_default()["code"].clone();
        let there = status != StatusCode::NOT_FOUND
            || matches!(code.as_str(), Some("result-not-ready" | "artifact-not-found"));
        assert!(
            there && ![401, 403, 500].contains(&status.as_u16()),
            "{method} {path} by its owner: {status} {code}"
        );
    }
    let mut spec = app.spec(6);
    spec["model"] = json!({"from": "job", "job_id": things.job});
    spec["calibration"] = json!({"corpus": {"from": "upload", "upload_id": things.upload}});
    for part in ["model", "calibration"] {
        let mut one = app.spec(6);
        one[part] = spec[part].clone();
        let answer = app.post("/v1/jobs").bearer_auth(&stranger).json(&one).send().await.unwrap();
        let told = problem(answer, 422, "invalid-spec").await.to_string();
        assert!(told.contains("there is no such"), "{told}");
    }
}

#[tokio::test]
async fn keys_are_made_shown_once_and_revoked() {
    let app = App::start_locked().await;
    let keys = |body: Value| app.post("/v1/api_keys").bearer_auth(KEY).json(&body).send();
    let made = keys(json!({"name": "ci", "scopes": ["submit"]})).await.unwrap();
    assert_eq!(made.status(), 201);
    let location = made.headers()["location"].to_str().unwrap().to_owned();
    let made: Value = made.json().await.unwrap();
    let text = made["key"].as_str().unwrap();
    assert!(made["expires_at"].is_null() && location.ends_with(made["id"].as_str().unwrap()));
    assert_eq!(ask(&app, &Method::GET, "/v1/jobs", Some(text)).await.status(), 200);
    problem(ask(&app, &Method::GET, "/v1/api_keys", Some(text)).await, 403, "forbidden").await;
    let listed = ask(&app, &Method::GET, "/v1/api_keys", Some(KEY)).await.text().await.unwrap();
    assert!(listed.contains("\"ci\"") && !listed.contains(text) && !listed.contains("sha256"), "{listed}");
    assert_eq!(ask(&app, &Method::DELETE, &location, Some(KEY)).await.status(), 204);
    problem(ask(&app, &Method::DELETE, &location, Some(KEY)).await, 404, "key-not-found").await;
    problem(ask(&app, &Method::GET, "/v1/jobs", Some(text)).await, 401, "unauthorized").await;
    for (wrong, at) in [
        (json!({"name": "", "scopes": ["read"]}), "/name"),
        (json!({"name": "x", "scopes": []}), "/scopes"),
        (json!({"name": "x", "scopes": ["root"]}), "/scopes"),
        (json!({"name": "x", "scopes": ["read"], "expires_at": "2020-01-01T00:00:00Z"}), "/expires_at"),
        (json!({"name": "x", "scopes": ["read"], "secret": "mine"}), "/"),
    ] {
        let told = problem(keys(wrong).await.unwrap(), 422, "invalid-key").await;
        assert!(told["errors"][0]["pointer"].as_str().unwrap().starts_with(at), "{told}");
    }
}

#[tokio::test]
async fn the_first_key_locks_the_service_and_must_be_able_to_make_others() {
    let app = App::start().await;
    let keys = |body: Value| app.post("/v1/api_keys").json(&body).send();
    let told =
        problem(keys(json!({"name": "x", "scopes": ["read"]})).await.unwrap(), 422, "invalid-key").await;
    assert!(told["detail"].as_str().unwrap().contains("first key"), "{told}");
    assert_eq!(app.get("/v1/jobs").send().await.unwrap().status(), 200);
    let made: Value = keys(json!({"name": "x", "scopes": ["admin"]})).await.unwrap().json().await.unwrap();
    problem(app.get("/v1/jobs").send().await.unwrap(), 401, "unauthorized").await;
    let key = made["key"].as_str().unwrap();
    assert_eq!(ask(&app, &Method::GET, "/v1/jobs", Some(key)).await.status(), 200);
}

#[tokio::test]
async fn a_key_that_another_process_makes_locks_a_service_that_runs() {
    let app = App::start().await;
    assert_eq!(app.get("/v1/jobs").send().await.unwrap().status(), 200);
    let key: ApiKey = KEY.parse().unwrap();
    app.database.key_put(&key.row(Tenant::DEFAULT, "by another")).await.unwrap();
    timeout(Duration::from_secs(30), async {
        while app.get("/v1/jobs").send().await.unwrap().status() != 401 {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("it locks within a second or so");
    assert_eq!(ask(&app, &Method::GET, "/v1/jobs", Some(KEY)).await.status(), 200);
    // A key that is gone again opens nothing: only a new start does.
    app.database.key_revoke(Tenant::DEFAULT, &key.id).await.unwrap();
    problem(app.get("/v1/jobs").send().await.unwrap(), 401, "unauthorized").await;
}
