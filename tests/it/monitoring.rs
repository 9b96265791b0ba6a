//! The dashboard of Grafana and the rules of Prometheus ask for what the service tells, and for nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::support::app::App;
use crate::support::postgres::worker;

fn read(name: &str) -> String {
    fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("deploy").join(name)).unwrap()
}

/// Every metric of ours that a text names; those of a histogram by the name of the whole.
fn names(text: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let found = text.match_indices("secateur_").map(|(at, _)| {
        let name: String = text[at..].chars().take_while(|c| word(*c)).collect();
        let whole =
            ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).map(String::from);
        whole.unwrap_or(name)
    });
    found.collect()
}

fn queries(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            found.extend(map.get("expr").and_then(Value::as_str).map(String::from));
            map.values().for_each(|value| queries(value, found));
        }
        Value::Array(items) => items.iter().for_each(|item| queries(item, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[tokio::test]
async fn every_metric_that_is_asked_for_is_one_that_the_service_tells() {
    use secateur::service::telemetry as t;
    let app = App::start().await;
    app.json("/v1/jobs").await;
    t::worker_ready("cpu");
    t::sink_ready("webhook");
    let worker = worker(uuid::Uuid::now_v7(), "cuda:0");
    app.database.worker_started(&worker).await.unwrap();
    let text = app.get("/metrics").send().await.unwrap().text().await.unwrap();
    assert!(text.contains("secateur_workers{device=\"cuda\",state=\"idle\"} 1"), "{text}");
    for name in ["secateur_queue_wait_seconds_count ", "secateur_leases_lost_total "] {
        assert!(
            text.lines().any(|l| l.starts_with(name)),
            "{name} is there before anything happens:\n{text}"
        );
    }
    let typed: BTreeSet<String> =
        text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next().map(String::from)).collect();

    let dashboard: Value = serde_json::from_str(&read("grafana/secateur.json")).unwrap();
    let mut asked = Vec::new();
    queries(&dashboard, &mut asked);
    assert!(asked.len() > 20);
    let rules = read("prometheus/rules.yml");
    for name in names(&asked.join("\n")).union(&names(&rules)) {
        assert!(typed.contains(name), "{name} is asked for, but not told:\n{text}");
    }
    for name in names(&read("prometheus/rules_test.yml")) {
        assert!(typed.contains(&name), "{name} is made up");
    }
    let shown = names(&asked.join("\n"));
    for name in &typed {
        assert!(shown.contains(name), "{name} is told, but shown nowhere");
    }
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        assert!(!line.contains("job_id") && !line.contains("tenant"), "too many values: {line}");
    }
}
