//! Reading a spec so that a person hears *all* that is wrong with it at once,
//! each with the place.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::spec::JobSpec;

/// One thing that is wrong with a spec, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Complaint {
    /// JSON pointer (RFC 6901) into the spec.
    pub pointer: String,
    pub message: String,
}

impl std::fmt::Display for Complaint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", if self.pointer.is_empty() { "/" } else { &self.pointer }, self.message)
    }
}

/// More complaints than this help nobody.
const MAX_COMPLAINTS: usize = 50;

impl JobSpec {
    /// Reads and validates a spec.
    ///
    /// serde stops at the first error. So each value it stumbles over is noted,
    /// taken out, and reading starts again, until what is left can be read.
    ///
    /// # Errors
    /// Every complaint about the spec, in the order they were found.
    pub fn read(mut value: Value) -> Result<Self, Vec<Complaint>> {
        let mut complaints = Vec::new();
        let spec = loop {
            let error = match parse(&value) {
                Ok(spec) => break Some(spec),
                Err(error) => error,
            };
            if complaints.len() == MAX_COMPLAINTS || !repair(&mut value, error, &mut complaints) {
                break None;
            }
        };
        let known: Vec<String> = complaints.iter().map(|c| c.pointer.clone()).collect();
        let said =
            |c: &Complaint| known.iter().any(|k| c.pointer.starts_with(k) || k.starts_with(&c.pointer));
        let rules = spec.iter().flat_map(JobSpec::validate);
        complaints.extend(rules.filter(|c| !said(c)));
        match spec {
            Some(spec) if complaints.is_empty() => Ok(spec),
            _ => Err(complaints),
        }
    }
}

/// Where reading stopped and why.
#[derive(PartialEq)]
struct Stumble {
    path: Vec<String>,
    message: String,
}

fn parse(value: &Value) -> Result<JobSpec, Stumble> {
    serde_path_to_error::deserialize(value).map_err(|e| {
        use serde_path_to_error::Segment;
        let path = e.path().iter().filter_map(|segment| match segment {
            Segment::Seq { index } => Some(index.to_string()),
            Segment::Map { key } => Some(key.clone()),
            Segment::Enum { .. } | Segment::Unknown => None,
        });
        Stumble { path: path.collect(), message: e.inner().to_string() }
    })
}

/// Notes what was stumbled over and takes it out. False when reading cannot go on.
fn repair(value: &mut Value, stumble: Stumble, complaints: &mut Vec<Complaint>) -> bool {
    let Stumble { mut path, message } = stumble;
    if let Some(field) = quoted_after(&message, "missing field ") {
        path.push(field.into());
        let filler = match pointer(&path).as_str() {
            "/model" => json!({"from": "path", "path": "."}),
            "/prune" => json!({"amount": {"layers": 1}}),
            _ => Value::Null,
        };
        complaints.push(Complaint { pointer: pointer(&path), message: "is required".into() });
        if filler.is_null() {
            // Part of a tagged value: drop the whole of it.
            path.pop();
            return remove(value, &path);
        }
        insert(value, &path, filler);
        return true;
    }
    while let Some(child) = culprit(value, &path, &message) {
        path.push(child);
    }
    complaints.push(Complaint { pointer: pointer(&path), message });
    remove(value, &path)
}

/// serde reads tagged values (`{"from": …}`) in two steps and forgets where
/// inside them it failed. The culprit is the child without which it fails
/// differently, or not at all.
fn culprit(value: &Value, path: &[String], message: &str) -> Option<String> {
    let node = value.pointer(&pointer(path))?;
    let keys: Vec<String> = match node {
        Value::Object(map) => map.keys().cloned().collect(),
        Value::Array(items) => (0..items.len()).map(|i| i.to_string()).collect(),
        _ => return None,
    };
    if let Some(field) = quoted_after(message, "unknown field ").filter(|f| keys.iter().any(|k| k == f)) {
        return Some(field.into());
    }
    let is_tag = |key: &str| matches!(key, "from" | "method");
    if message.starts_with("unknown variant") {
        if let Some(tag) = keys.iter().find(|k| is_tag(k)) {
            return Some(tag.clone());
        }
    }
    keys.into_iter().filter(|key| !is_tag(key)).find(|key| {
        let mut without = value.clone();
        let mut child = path.to_vec();
        child.push(key.clone());
        remove(&mut without, &child);
        match parse(&without) {
            Ok(_) => true,
            Err(other) => {
                other.message != message || other.path.as_slice() != path && !other.path.starts_with(path)
            }
        }
    })
}

fn remove(value: &mut Value, path: &[String]) -> bool {
    let Some((last, parent)) = path.split_last() else { return false };
    match value.pointer_mut(&pointer(parent)) {
        Some(Value::Object(map)) if matches!(last.as_str(), "from" | "method") => {
            // A tag gone means the whole value is gone.
            map.clear();
            remove(value, parent)
        }
        Some(Value::Object(map)) => map.shift_remove(last).is_some(),
        Some(Value::Array(items)) => last.parse().is_ok_and(|i: usize| {
            let inside = i < items.len();
            if inside {
                items.remove(i);
            }
            inside
        }),
        _ => false,
    }
}

fn insert(value: &mut Value, path: &[String], filler: Value) {
    if let Some((last, parent)) = path.split_last() {
        if let Some(Value::Object(map)) = value.pointer_mut(&pointer(parent)) {
            map.insert(last.clone(), filler);
        }
    }
}

fn pointer(path: &[String]) -> String {
    path.iter().map(|p| format!("/{}", p.replace('~', "~0").replace('/', "~1"))).collect()
}

fn quoted_after<'a>(message: &'a str, intro: &str) -> Option<&'a str> {
    message.strip_prefix(intro)?.strip_prefix('`')?.split('`').next()
}
