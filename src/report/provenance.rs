//! What was made of what, for machines: an in-toto statement with a SLSA provenance predicate, and `SHA256SUMS`.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};

use crate::job::report::Report;
use crate::job::spec::ModelSource;

/// What the statement calls this kind of work and who did it.
const BUILD_TYPE: &str = "urn:secateur:prune:v1";
const BUILDER: &str = "urn:secateur";

/// The statement about `files` (sha256 by path in the workspace), made from the base model and the `texts` (name and
/// digest of content). It tells no time, so that the same spec gives the same bytes.
pub fn provenance(report: &Report, files: &BTreeMap<String, String>, texts: &[(String, String)]) -> Value {
    let subject: Vec<Value> =
        files.iter().map(|(path, sha256)| json!({"name": path, "digest": {"sha256": sha256}})).collect();
    let mut made_from =
        vec![json!({"name": base(report), "uri": base(report), "digest": {"blake3": report.model_digest}})];
    made_from.extend(texts.iter().map(|(name, digest)| json!({"name": name, "digest": {"sha256": digest}})));
    let verdict = report.verdict.as_ref().map(|verdict| verdict.decision.name());
    json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subject,
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"spec": report.spec},
                "internalParameters": {"dropped_layers": report.selection.dropped, "verdict": verdict},
                "resolvedDependencies": made_from,
            },
            "runDetails": {"builder": {"id": BUILDER, "version": {"secateur": report.secateur_version}}},
        },
    })
}

fn base(report: &Report) -> String {
    match &report.spec.model {
        ModelSource::Hub { repo, revision } => format!("hf://{repo}@{revision}"),
        ModelSource::Path { path } => path.clone(),
        ModelSource::S3 { uri } => uri.clone(),
        ModelSource::Job { job_id } => format!("urn:uuid:{job_id}"),
    }
}

/// As `sha256sum` writes and checks it.
pub fn sums(files: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    for (path, sha256) in files {
        writeln!(out, "{sha256}  {path}").expect("a text takes all. This is a bug.");
    }
    out
}
