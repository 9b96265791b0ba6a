//! Events: pages, streams, replay.

use std::time::Duration;

use reqwest::Response;
use secateur::job::progress::{Event, Stage};
use secateur::service::db::Progress;
use serde_json::{Value, json};

use crate::support::app::{App, problem};

/// One event of a stream; comments have neither id nor name.
#[derive(Debug, Default, PartialEq)]
struct Told {
    id: Option<i64>,
    name: String,
    data: Value,
}

/// Reads server-sent events off a response.
struct Reader {
    response: Response,
    text: String,
}

impl Reader {
    async fn open(app: &App, path: &str, last: Option<i64>) -> Self {
        let mut request = app.get(path).header("accept", "text/event-stream");
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, text: String::new() }
    }

    /// The next event, `None` when the stream has closed.
    async fn next(&mut self) -> Option<Told> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let mut told = Told::default();
                for line in block.lines() {
                    match line.split_once(':').unwrap() {
                        ("id", id) => told.id = Some(id.trim().parse().unwrap()),
                        ("event", name) => told.name = name.trim().into(),
                        ("data", data) => told.data = serde_json::from_str(data).unwrap(),
                        ("", _) => {}
                        (field, _) => panic!("{field}"),
                    }
                }
                self.text = rest.to_string();
                return Some(told);
            }
            let wait = tokio::time::timeout(Duration::from_secs(60), self.response.chunk());
            let chunk = wait.await.expect("the stream is silent").unwrap()?;
            self.text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    async fn all(mut self) -> Vec<Told> {
        let mut all = Vec::new();
        while let Some(told) = self.next().await {
            all.push(told);
        }
        all
    }
}

fn measured(step: u64) -> Event {
    Event::Measured { stage: Stage::Heal, name: "loss".into(), step, value: 1.0 / step as f64 }
}

#[tokio::test]
async fn a_page_of_events_goes_on_after_the_one_before() {
    let app = App::start().await;
    let id = app.enqueue("pages").await.id;
    let lease = app.claim().await;
    app.database
        .record(lease, &[Event::StageStarted { stage: Stage::Heal }, measured(1), measured(2)])
        .await
        .unwrap();
    let path = format!("/v1/jobs/{id}/events");
    let first = app.json(&format!("{path}?limit=3")).await;
    assert_eq!(
        (&first["object"], &first["has_more"], &first["last_id"]),
        (&json!("list"), &json!(true), &json!("3"))
    );
    let rest = app.json(&format!("{path}?after=3")).await;
    assert_eq!(
        (&rest["has_more"], &rest["first_id"], &rest["last_id"]),
        (&json!(false), &json!("4"), &json!("5"))
    );
    let names: Vec<&Value> =
        [&first, &rest].iter().flat_map(|p| p["data"].as_array().unwrap()).map(|e| &e["event"]).collect();
    assert_eq!(names, ["state_changed", "state_changed", "stage_started", "measured", "measured"]);
    assert_eq!(rest["data"][1]["step"], 2);
    assert_eq!(app.json(&format!("{path}?after=99")).await["data"], json!([]));
    let some = app.json(&format!("{path}?event=stage_started&event=measured&limit=2")).await;
    assert_eq!(
        (&some["has_more"], &some["first_id"], &some["last_id"]),
        (&json!(true), &json!("3"), &json!("4"))
    );
    assert_eq!(app.json(&format!("{path}?event=nothing")).await["data"], json!([]));
    assert_eq!(app.json(&format!("/v1/jobs/{id}")).await["last_seq"], 5);
    for query in ["?limit=0", "?limit=1001", "?after=x", "?from=1"] {
        problem(app.get(&format!("{path}{query}")).send().await.unwrap(), 400, "invalid-query").await;
    }
}

#[tokio::test]
async fn a_stream_replays_follows_and_ends_with_the_job() {
    let app = App::start().await;
    let id = app.enqueue("streams").await.id;
    let path = format!("/v1/jobs/{id}/events");
    let mut reader = Reader::open(&app, &path, None).await;
    let queued = reader.next().await.unwrap();
    assert_eq!(
        (queued.id, queued.name.as_str(), &queued.data["state"]),
        (Some(1), "state_changed", &json!("queued"))
    );

    let lease = app.claim().await;
    assert_eq!(reader.next().await.unwrap().data["state"], "running");
    app.database.record(lease, &[Event::StageStarted { stage: Stage::Heal }, measured(1)]).await.unwrap();
    assert_eq!(reader.next().await.unwrap().name, "stage_started");
    assert_eq!(reader.next().await.unwrap().data["step"], 1);

    let progress =
        Progress { stage: Stage::Heal, task: "training".into(), done: 1, total: 4, unit: "steps".into() };
    app.database.renew(lease, Duration::from_secs(60), Some(&progress)).await.unwrap();
    let told = reader.next().await.unwrap();
    assert_eq!((told.id, told.name.as_str(), &told.data["fraction"]), (None, "progress", &json!(0.25)));
    assert_eq!(app.json(&format!("/v1/jobs/{id}")).await["progress"]["fraction"], 0.25);

    app.finish(lease, &[]).await;
    let rest = reader.all().await;
    let names: Vec<&str> = rest.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["state_changed", "end"]);
    assert_eq!(rest[0].data["state"], "succeeded");
}

#[tokio::test]
async fn a_broken_stream_goes_on_where_it_broke_off_without_gap_or_repetition() {
    let app = App::start().await;
    let id = app.enqueue("replays").await.id;
    let lease = app.claim().await;
    let steps: Vec<Event> = (1..=2500).map(measured).collect();
    app.database.record(lease, &steps).await.unwrap();
    let path = format!("/v1/jobs/{id}/events");
    let mut first = Reader::open(&app, &path, None).await;
    let mut seen = Vec::new();
    while seen.len() < 700 {
        seen.extend(first.next().await.unwrap().id);
    }
    drop(first);
    app.finish(lease, &[]).await;
    let rest = Reader::open(&app, &path, seen.last().copied()).await.all().await;
    assert_eq!(rest.last().unwrap().name, "end");
    seen.extend(rest.iter().filter_map(|t| t.id));
    assert_eq!(seen, (1..=2503).collect::<Vec<i64>>());

    let after = Reader::open(&app, &format!("{path}?after=2500"), None).await.all().await;
    assert_eq!(after.iter().map(|t| t.id).collect::<Vec<_>>(), [Some(2501), Some(2502), Some(2503), None]);
    let nothing = Reader::open(&app, &path, Some(2503)).await.all().await;
    assert_eq!(nothing.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["end"]);
    let bad = app
        .get(&path)
        .header("accept", "text/event-stream")
        .header("last-event-id", "x")
        .send()
        .await
        .unwrap();
    problem(bad, 400, "invalid-query").await;
}

#[tokio::test]
async fn a_stream_of_a_job_that_is_deleted_ends() {
    let app = App::start().await;
    let id = app.enqueue("deleted").await.id;
    let mut reader = Reader::open(&app, &format!("/v1/jobs/{id}/events"), None).await;
    reader.next().await.unwrap();
    app.post(&format!("/v1/jobs/{id}/cancel")).send().await.unwrap();
    app.client.delete(format!("{}/v1/jobs/{id}", app.url)).send().await.unwrap();
    assert_eq!(reader.all().await.last().unwrap().name, "end");
}

#[tokio::test]
async fn series_are_gathered_from_what_was_measured() {
    let app = App::start().await;
    let id = app.enqueue("measures").await.id;
    let lease = app.claim().await;
    let rate = Event::Measured { stage: Stage::Heal, name: "learning_rate".into(), step: 1, value: 1e-4 };
    let again = Event::Measured { stage: Stage::Heal, name: "loss".into(), step: 2, value: 9.0 };
    app.database.record(lease, &[measured(1), rate, measured(2), measured(10), again]).await.unwrap();
    let path = format!("/v1/jobs/{id}/metrics");
    let all = app.json(&path).await;
    assert_eq!(all["data"].as_array().unwrap().len(), 2);
    assert_eq!(all["data"][0]["key"], "learning_rate");
    let points = |page: &Value| -> Vec<(u64, f64)> {
        let points = page["data"][0]["points"].as_array().unwrap();
        points.iter().map(|p| (p["step"].as_u64().unwrap(), p["value"].as_f64().unwrap())).collect()
    };
    let loss = app.json(&format!("{path}?key=loss")).await;
    assert_eq!(points(&loss), [(1, 1.0), (2, 9.0), (10, 0.1)], "by step; the later value of a step counts");
    assert_eq!(points(&app.json(&format!("{path}?key=loss&since_step=2")).await), [(2, 9.0), (10, 0.1)]);
    assert_eq!(app.json(&format!("{path}?key=none")).await["data"], json!([]));
    problem(app.get(&format!("{path}?since_step=-1")).send().await.unwrap(), 400, "invalid-query").await;
}

#[tokio::test]
async fn stages_tell_what_was_reused() {
    let app = App::start().await;
    let id = app.enqueue("stages").await.id;
    let lease = app.claim().await;
    let digest = "ab".repeat(32);
    let done = Event::StageFinished {
        stage: Stage::Profile,
        reused: true,
        duration_ms: 12,
        input_digest: digest.clone(),
    };
    let events =
        [Event::StageStarted { stage: Stage::Profile }, done, Event::StageStarted { stage: Stage::Select }];
    app.database.record(lease, &events).await.unwrap();
    let page = app.json(&format!("/v1/jobs/{id}/stages")).await;
    let stage = &page["data"][0];
    assert_eq!(
        (&stage["stage"], &stage["state"], &stage["reused"]),
        (&json!("profile"), &json!("finished"), &json!(true))
    );
    assert_eq!((&stage["duration_ms"], &stage["input_digest"]), (&json!(12), &json!(digest)));
    assert_eq!(page["data"][1]["state"], "running");
    assert_eq!(app.json(&format!("/v1/jobs/{id}")).await["stages"], page["data"]);
}
