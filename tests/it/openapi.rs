//! The API document that is committed is the one that is served.

use serde_json::Value;

const COMMITTED: &str = include_str!("../../openapi/openapi.json");

#[test]
fn the_committed_openapi_document_is_current() {
    let current = secateur::service::http::document().to_pretty_json().unwrap();
    assert!(
        COMMITTED.trim_end() == current,
        "openapi/openapi.json is not what the code says; run: cargo run -- openapi > openapi/openapi.json"
    );
}

#[test]
fn every_reference_of_the_document_leads_somewhere() {
    let document: Value = serde_json::from_str(COMMITTED).unwrap();
    let mut references = Vec::new();
    collect(&document, &mut references);
    assert!(references.len() > 20);
    for reference in references {
        let pointer = reference.strip_prefix('#').expect("no reference leads out of the document");
        assert!(document.pointer(pointer).is_some(), "{reference}");
    }
}

fn collect(value: &Value, references: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            references.extend(map.get("$ref").and_then(Value::as_str).map(String::from));
            map.values().for_each(|v| collect(v, references));
        }
        Value::Array(items) => items.iter().for_each(|v| collect(v, references)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn every_operation_is_described_and_tells_of_problems() {
    let document: Value = serde_json::from_str(COMMITTED).unwrap();
    let mut names = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let place = format!("{method} {path}");
            assert!(operation["summary"].is_string() && operation["tags"][0].is_string(), "{place}");
            names.push(operation["operationId"].as_str().expect("an operation has a name").to_owned());
            for (status, response) in operation["responses"].as_object().unwrap() {
                let problem = response["content"].get("application/problem+json").is_some();
                assert_eq!(
                    problem,
                    status.starts_with('4') || status.starts_with('5') || status == "default",
                    "{place} {status}"
                );
            }
        }
    }
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count, "operation names differ, for clients are made from them");
}
