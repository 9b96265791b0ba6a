//! A run keeps to the memory it is given, and gives the same results as with all there is.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;

use crate::support::program::Bench;
use crate::support::tiny::Tiny;

/// The largest resident size of a run, in bytes, as the kernel counts it.
fn peak(bench: &Bench, spec: &Value, workspace: &str, more: &[&str]) -> u64 {
    let mut child = bench.start(spec, workspace, more);
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    let ended = loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        if let Some(kib) = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()) {
            peak = peak.max(kib << 10);
        }
        if let Some(ended) = child.try_wait().unwrap() {
            break ended;
        }
        sleep(Duration::from_millis(2));
    };
    let errors = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert!(ended.success(), "{errors}");
    peak
}

#[test]
fn every_stage_keeps_to_the_memory_limit_and_comes_to_the_same() {
    const LIMIT: u64 = 160 << 20;
    let bench = Bench::new(&Tiny { layers: 32, hidden: 512, intermediate: 2048, ..Tiny::llama() });
    let model = fs::metadata(bench.path("model/model.safetensors")).unwrap().len();
    assert!(model > LIMIT, "a model of {model} bytes fits");
    let mut spec = bench.spec_with("/calibration/position", "mean".into());
    spec["heal"][0]["steps"] = 2.into();
    // Every token written reads all weights anew.
    spec["eval"]["generation"] = serde_json::json!({"samples": 2, "tokens": 2});
    let limited = peak(&bench, &spec, "limited", &["--memory-limit", "160MiB"]);
    let free = peak(&bench, &spec, "free", &[]);
    assert!(limited <= LIMIT, "{limited} bytes of {LIMIT}");
    assert!(free > LIMIT, "without a limit {free} bytes, so the limit was none");
    let read = |workspace: &str, file: &str| fs::read(bench.path(workspace).join(Path::new(file))).unwrap();
    for file in
        ["profile.json", "selection.json", "pruned/model.safetensors", "adapter/adapter_model.safetensors"]
    {
        assert!(read("limited", file) == read("free", file), "{file} depends on the memory");
    }
}

#[test]
fn a_limit_below_one_layer_is_refused_with_what_is_needed() {
    let bench = Bench::new(&Tiny::llama());
    let out =
        bench.start(&bench.spec(), "workspace", &["--memory-limit", "10MiB"]).wait_with_output().unwrap();
    let errors = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{errors}");
    assert!(errors.contains("--memory-limit of 10 MiB") && errors.contains("give at least"), "{errors}");
}
