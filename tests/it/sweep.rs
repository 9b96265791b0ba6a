//! Many jobs from one spec: what they have in common is done once, and what came out stands side by side.

use std::fs;
use std::process::Output;

use secateur::job::sweep::SweepReport;
use serde_json::{Value, json};

use crate::support::program::{Bench, stderr};
use crate::support::tiny::Tiny;

fn bench() -> Bench {
    Bench::new(&Tiny { layers: 6, ..Tiny::llama() })
}

/// Three cuts, of which the last is too many, each plain and scaled.
fn spec(bench: &Bench) -> Value {
    let mut base = bench.spec();
    base["prune"] = json!({"strategy": "block_endpoint"});
    let rescale = json!({
        "method": "rescale", "corpus": {"from": "path", "path": bench.path("healing.txt")}, "samples": 8, "seq_len": 32
    });
    json!({
        "name": "three cuts",
        "base": base,
        "axes": {
            "amount": [{"layers": 1}, {"layers": 2}, {"layers": 6}],
            "heal": [{"name": "plain", "methods": []}, {"name": "scaled", "methods": [rescale]}]
        }
    })
}

fn sweep(bench: &Bench, spec: &Value, more: &[&str]) -> Output {
    bench.start_as("sweep", spec, "out", more).wait_with_output().unwrap()
}

fn found(bench: &Bench) -> SweepReport {
    serde_json::from_slice(&fs::read(bench.path("out/sweep.json")).unwrap()).unwrap()
}

#[test]
fn a_sweep_profiles_once_and_goes_on_behind_a_job_that_fails() {
    let bench = bench();
    let output = sweep(&bench, &spec(&bench), &[]);
    // Two jobs failed; that is said, and the others are there.
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let report = found(&bench);
    let names: Vec<&str> = report.rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names[..3], ["01-layers.plain", "01-layers.scaled", "02-layers.plain"]);
    for (i, row) in report.rows.iter().enumerate() {
        let Some(outcome) = &row.outcome else {
            let failure = row.failure.as_ref().unwrap();
            assert!(i >= 4 && failure.message.contains("asks for 6 layers"), "{row:?}");
            continue;
        };
        assert_eq!(outcome.dropped.len(), i / 2 + 1, "{row:?}");
        assert!(
            outcome.perplexity_ratio.is_some_and(|ratio| ratio > 0.0) && outcome.accuracy_ratio.is_none()
        );
        let job = bench.path("out/jobs").join(&row.name);
        assert!(job.join("report.json").exists() && job.join("pruned/model.safetensors").exists());
    }
    assert!(report.rows.iter().any(|row| row.on_front) && report.base.is_some());
    let records = fs::read_dir(bench.path("out/running/records")).unwrap();
    let profiles =
        records.filter(|r| r.as_ref().unwrap().file_name().to_string_lossy().starts_with("profile-"));
    assert_eq!(profiles.count(), 1);
    let page = fs::read_to_string(bench.path("out/sweep.html")).unwrap();
    assert!(page.contains("4 of 6 jobs done, 2 failed") && page.contains("06-layers.plain failed"), "{page}");
}

#[test]
fn jobs_that_are_done_are_not_done_again_and_new_ones_join_them() {
    let bench = bench();
    let mut spec = spec(&bench);
    spec["axes"]["amount"] = json!([{"layers": 1}, {"layers": 2}]);
    let output = sweep(&bench, &spec, &["--keep", "reports"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let first = bench.path("out/jobs/01-layers.plain/report.json");
    assert!(!first.with_file_name("pruned").exists());
    let written = fs::metadata(&first).unwrap().modified().unwrap();
    let rows = found(&bench).rows;
    spec["axes"]["amount"] = json!([{"layers": 1}, {"layers": 2}, {"layers": 3}]);
    let output = sweep(&bench, &spec, &["--keep", "reports"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(fs::metadata(&first).unwrap().modified().unwrap(), written);
    let more = found(&bench).rows;
    assert_eq!(more.len(), 6);
    assert!(rows.iter().zip(&more).all(|(a, b)| a.outcome == b.outcome));
}

#[test]
fn a_sweep_that_makes_no_sense_is_refused_with_all_its_places() {
    let bench = bench();
    let mut spec = spec(&bench);
    spec["axes"]["amount"] = json!([{"layers": 0}]);
    spec["base"]["calibration"]["samples"] = json!(0);
    let output = sweep(&bench, &spec, &[]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("/base/prune/amount/layers") && said.contains("/base/calibration/samples"),
        "{said}"
    );
    assert!(!bench.path("out").exists());
}
