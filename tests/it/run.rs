//! `secateur run`: the whole road as one process.

use std::fs;
use std::process::{Child, Command};

use secateur::job::progress::{Event, Stage};
use secateur::job::report::{Decision, LayerProfile, LayerSelection, Report, Zone};
use secateur::job::spec::{Measures, Zones};
use serde_json::{Value, json};

use crate::support::program::{Bench, events, finished, stderr, tree};
use crate::support::tiny::Tiny;

const HEALING: fn(&Event) -> bool = |event| matches!(event, Event::Advanced { stage: Stage::Heal, task, done: 3.., .. } if task == "training");

fn signal(child: &Child, signal: i32) {
    let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
    let signal = if signal == 15 { rustix::process::Signal::TERM } else { rustix::process::Signal::INT };
    rustix::process::kill_process(pid, signal).unwrap();
}

/// The files people take home.
fn results(bench: &Bench, workspace: &str) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    ["pruned", "healed", "adapter"].iter().flat_map(|d| tree(&bench.path(workspace).join(d))).collect()
}

/// Equal but for the last bits of floating-point numbers.
fn close(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            (a - b).abs() <= 1e-14 * a.abs().max(b.abs())
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| close(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| close(a, b)))
        }
        (a, b) => a == b,
    }
}

#[test]
fn a_run_leaves_every_file_of_the_contract() {
    let bench = Bench::new(&Tiny::llama());
    let told = bench.succeed(&bench.spec(), "out", &[]);
    assert_eq!(finished(&told), Stage::ALL.map(|s| (s, false)));
    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(bench.path("out").join(name)).unwrap()).unwrap()
    };
    let report: Report = serde_json::from_value(read("report.json")).unwrap();
    let same = |part: Value, file: &str| assert!(close(&part, &read(file)), "{file}: {part}");
    same(serde_json::to_value(&report.profile).unwrap(), "profile.json");
    same(serde_json::to_value(&report.selection).unwrap(), "selection.json");
    same(serde_json::to_value(&report.eval).unwrap(), "eval.json");
    assert_eq!(serde_json::to_value(&report.spec).unwrap()["prune"]["amount"], json!({"layers": 2}));
    assert_eq!(report.selection.dropped.len(), 2);
    assert_eq!(report.pruned.layer_count, 4);
    assert!(bench.path("out/pruned/model.safetensors").is_file());
    assert!(bench.path("out/report.html").is_file());
    let shipped = report.heal[0].checkpoint.as_ref().unwrap_or(&report.pruned);
    assert!(bench.path("out").join(&shipped.path).join("README.md").is_file());
    let healed = report.heal[0].checkpoint.is_some();
    assert_eq!(bench.path("out/healed/model.safetensors").is_file(), healed);
    assert_eq!(bench.path("out/adapter/adapter_config.json").is_file(), healed);
    for (path, digest) in &report.files {
        let found = secateur::engine::workspace::file_digest(&bench.path("out").join(path)).unwrap();
        assert_eq!(found, *digest, "{path}");
    }
    // As anybody would check it.
    let sums = Command::new("sha256sum")
        .args(["--check", "--strict", "SHA256SUMS"])
        .current_dir(bench.path("out"))
        .output()
        .unwrap();
    assert!(sums.status.success(), "{}", stderr(&sums));
    let statement = read("provenance.json");
    assert_eq!(statement["predicateType"], "https://slsa.dev/provenance/v1");
    let subjects = statement["subject"].as_array().unwrap();
    assert!(subjects.iter().any(|s| s["name"] == format!("{}/README.md", shipped.path)), "{subjects:?}");
    let made_from = &statement["predicate"]["buildDefinition"]["resolvedDependencies"];
    assert_eq!(made_from[0]["digest"]["blake3"], report.model_digest);
    assert_eq!(
        made_from.as_array().unwrap().len(),
        4,
        "the model, and the texts it was cut, healed and judged by"
    );
    let card = fs::read_to_string(bench.path("out").join(&shipped.path).join("README.md")).unwrap();
    assert!(card.contains("license: other\nlicense_link: LICENSE\n"), "{card}");
}

#[test]
fn methods_of_healing_run_one_after_the_other_and_each_says_what_it_did() {
    let bench = Bench::new(&Tiny::llama());
    let corpus = json!({"from": "path", "path": bench.path("healing.txt")});
    let mut spec = bench.spec();
    let qlora = spec["heal"][0].clone();
    let more = |method: &str| json!({"method": method, "corpus": corpus, "samples": 8, "seq_len": 32});
    spec["heal"] = json!([more("rescale"), more("least_squares"), qlora]);
    spec["prune"]["keep_first"] = json!(1);
    bench.succeed(&spec, "out", &[]);
    let report: Value = serde_json::from_slice(&fs::read(bench.path("out/report.json")).unwrap()).unwrap();
    let heal = report["heal"].as_array().unwrap();
    assert_eq!(heal.len(), 3);
    for (heal, method) in heal.iter().zip(["rescale", "least_squares", "qlora"]) {
        assert_eq!(heal["method"], method);
        let (before, after) =
            (heal["held_out_before"].as_f64().unwrap(), heal["held_out_after"].as_f64().unwrap());
        assert_eq!(heal["reverted"], after >= before, "{heal}");
    }
    assert_eq!(heal[1]["settings"], json!({"samples": 8, "seq_len": 32, "ridge": 0.01}));
    assert_eq!(heal[2]["settings"]["rank"], 4);
    assert_eq!(heal[2]["curve"].as_array().unwrap().len(), 6);
    assert_eq!(heal[0]["repaired"][0]["block"]["len"], 2);
    let kept: Vec<&Value> = heal.iter().filter(|heal| heal["reverted"] == false).collect();
    assert_eq!(bench.path("out/healed").exists(), !kept.is_empty());
    let alone = kept.len() == 1 && kept[0]["method"] == "qlora";
    assert_eq!(bench.path("out/adapter").exists(), alone);
    let page = fs::read_to_string(bench.path("out/report.html")).unwrap();
    assert!(page.contains("Healing by rescale") && page.contains("Healing by least_squares"));
}

#[test]
fn a_result_that_is_rejected_fails_the_job_where_it_is_to_and_other_gates_measure_nothing_again() {
    let bench = Bench::new(&Tiny::llama());
    let mut spec = bench.spec();
    bench.succeed(&spec, "out", &[]);
    spec["eval"]["gates"] = json!({"max_size_bytes": 1});
    let told = bench.succeed(&spec, "out", &[]);
    let reused = |(stage, reused): (Stage, bool)| reused == (stage != Stage::Report);
    assert!(finished(&told).into_iter().all(reused), "{told:?}");
    spec["eval"]["on_reject"] = json!("fail");
    let output = bench.run(&spec, "out", &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is rejected") && stderr(&output).contains("Size of the weights"));
    let report: Report = serde_json::from_slice(&fs::read(bench.path("out/report.json")).unwrap()).unwrap();
    assert_eq!(report.verdict.unwrap().decision, Decision::Reject);
}

#[test]
fn the_same_run_again_repeats_nothing_and_changes_nothing() {
    let bench = Bench::new(&Tiny::llama());
    bench.succeed(&bench.spec(), "out", &[]);
    let before = tree(&bench.path("out"));
    let told = bench.succeed(&bench.spec(), "out", &[]);
    assert_eq!(finished(&told), Stage::ALL.map(|s| (s, true)));
    assert_eq!(tree(&bench.path("out")), before);
}

#[test]
fn a_run_killed_while_healing_goes_on_and_ends_with_the_same_bytes() {
    let bench = Bench::new(&Tiny::llama());
    bench.succeed(&bench.spec(), "undisturbed", &["--until", "heal"]);
    let mut child = bench.start_until(&bench.spec(), "killed", HEALING);
    child.kill().unwrap();
    child.wait().unwrap();
    let told = bench.succeed(&bench.spec(), "killed", &["--until", "heal"]);
    assert_eq!(
        finished(&told),
        [(Stage::Profile, true), (Stage::Select, true), (Stage::Prune, true), (Stage::Heal, false)]
    );
    let from_the_middle = |e: &Event| matches!(e, Event::Noted { message, .. } if message.contains("goes on from optimizer step"));
    assert!(told.iter().any(from_the_middle));
    assert!(results(&bench, "killed") == results(&bench, "undisturbed"), "the same bytes");
}

#[test]
fn a_signal_stops_the_run_at_the_next_seam_and_its_records_stay() {
    for (number, code) in [(15, 143), (2, 130)] {
        let bench = Bench::new(&Tiny::llama());
        let child = bench.start_until(&bench.spec(), "out", HEALING);
        signal(&child, number);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(stderr(&output).contains("stopped on request"), "{}", stderr(&output));
        assert!(!bench.path("out/healed").exists());
        let told = bench.succeed(&bench.spec(), "out", &["--until", "heal"]);
        assert_eq!(
            finished(&told)[..3],
            [(Stage::Profile, true), (Stage::Select, true), (Stage::Prune, true)]
        );
    }
}

#[test]
fn another_ratio_reuses_the_profile_and_writes_its_own_cut() {
    let bench = Bench::new(&Tiny::llama());
    bench.succeed(&bench.spec(), "out", &["--until", "prune"]);
    let other = bench.spec_with("/prune/amount", json!({"layers": 3}));
    let told = bench.succeed(&other, "out", &["--until", "prune"]);
    assert_eq!(finished(&told), [(Stage::Profile, true), (Stage::Select, false), (Stage::Prune, false)]);
    let config = fs::read(bench.path("out/pruned/config.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&config).unwrap()["num_hidden_layers"], 3);
}

#[test]
fn the_size_of_a_batch_is_no_reason_to_measure_again_but_the_text_is() {
    let bench = Bench::new(&Tiny::llama());
    bench.succeed(&bench.spec(), "out", &["--until", "profile"]);
    let bigger = bench.spec_with("/calibration/batch_size", json!(7));
    assert_eq!(finished(&bench.succeed(&bigger, "out", &["--until", "profile"])), [(Stage::Profile, true)]);
    fs::rename(bench.path("calibration.txt"), bench.path("moved.txt")).unwrap();
    let moved = bench.spec_with("/calibration/corpus/path", json!(bench.path("moved.txt")));
    assert_eq!(finished(&bench.succeed(&moved, "out", &["--until", "profile"])), [(Stage::Profile, true)]);
    fs::copy(bench.path("healing.txt"), bench.path("moved.txt")).unwrap();
    assert_eq!(finished(&bench.succeed(&moved, "out", &["--until", "profile"])), [(Stage::Profile, false)]);
}

fn selection(bench: &Bench) -> LayerSelection {
    serde_json::from_slice(&fs::read(bench.path("out/selection.json")).unwrap()).unwrap()
}

fn measures_damage(told: &[Event]) -> bool {
    told.iter().any(|e| matches!(e, Event::Advanced { task, .. } if task.starts_with("measuring damage")))
}

#[test]
fn every_strategy_runs_and_leaves_what_it_measured() {
    let bench = Bench::new(&Tiny::llama());
    let item = |i: usize| json!({"kind": "multiple_choice", "context": format!("{i} is"), "choices": ["odd", "even"], "gold": i % 2});
    let items: String = (0..8).map(|i| format!("{}\n", item(i))).collect();
    fs::write(bench.path("items.jsonl"), items).unwrap();
    let strategies = [
        "auto",
        "block_endpoint",
        "block_sum",
        "block_influence",
        "relative_magnitude",
        "cross_axis",
        "deepest",
        "one_shot_damage",
        "greedy_damage",
        "beam_damage",
        "iterative_damage",
        "evolutionary_damage",
        "task_accuracy",
    ];
    for name in strategies {
        let tasks = json!([{"task": "t", "items": {"from": "path", "path": bench.path("items.jsonl")}}]);
        let damage = json!({"samples": 4, "population": 4, "generations": 2, "tasks": tasks});
        let prune = json!({"amount": {"layers": 2}, "strategy": name, "damage": damage});
        let told = bench.succeed(&bench.spec_with("/prune", prune), "out", &["--until", "select"]);
        let chosen = selection(&bench);
        assert_eq!((chosen.strategy.name(), chosen.dropped.len()), (name, 2));
        assert!(!chosen.dropped.contains(&5), "{name}: the last layer stays");
        let measures = chosen.strategy.measures() != Measures::Nothing;
        assert_eq!(measures_damage(&told), measures, "{name}");
        assert_eq!(chosen.compared.len(), usize::from(measures), "{name}");
    }
}

#[test]
fn the_size_of_the_stream_is_made_up_for_where_the_cut_will_be_healed() {
    let bench = Bench::new(&Tiny::llama());
    let text = json!({"from": "path", "path": bench.path("healing.txt")});
    let qlora = json!({"method": "qlora", "corpus": text, "steps": 1, "batch_size": 1, "seq_len": 16});
    let rescale = json!({"method": "rescale", "corpus": text, "seq_len": 16});
    let mut damages = Vec::new();
    for (strategy, heal, mended) in [
        ("auto", json!([qlora]), true),
        ("auto", json!([]), false),
        ("greedy_damage", json!([qlora]), false),
        ("greedy_damage", json!([rescale, qlora]), true),
    ] {
        let mut spec = bench.spec_with("/heal", heal);
        spec["prune"] =
            json!({"amount": {"layers": 2}, "strategy": strategy, "keep_first": 1, "damage": {"samples": 4}});
        bench.succeed(&spec, "out", &["--until", "select"]);
        let chosen = selection(&bench);
        assert_eq!(chosen.mended, mended, "{strategy}");
        damages.push(chosen.compared[0].damage);
    }
    assert!(damages[0] != damages[1] && damages[2] != damages[3], "{damages:?}");
}

#[test]
fn damage_is_measured_again_for_another_text_and_only_by_those_who_measure_it() {
    let bench = Bench::new(&Tiny::llama());
    let select = |strategy: &str, samples: u32, text: &str| {
        let corpus = json!({"from": "path", "path": bench.path(text)});
        let prune = json!({
            "amount": {"layers": 2}, "strategy": strategy, "damage": {"samples": samples, "corpus": corpus}
        });
        let told = bench.succeed(&bench.spec_with("/prune", prune), "out", &["--until", "select"]);
        finished(&told)[1]
    };
    assert_eq!(select("greedy_damage", 4, "calibration.txt"), (Stage::Select, false));
    assert_eq!(select("greedy_damage", 4, "calibration.txt"), (Stage::Select, true));
    assert_eq!(select("greedy_damage", 5, "calibration.txt"), (Stage::Select, false));
    assert_eq!(select("greedy_damage", 5, "healing.txt"), (Stage::Select, false));
    assert_eq!(select("block_sum", 5, "healing.txt"), (Stage::Select, false));
    assert_eq!(select("block_sum", 6, "calibration.txt"), (Stage::Select, true), "it measures nothing");
}

#[test]
fn a_profile_with_ablation_tells_how_much_each_layer_is_missed() {
    let bench = Bench::new(&Tiny { identity: vec![3], ..Tiny::llama() });
    let mut spec = bench.spec_with("/calibration/ablation", json!(true));
    spec["calibration"]["zones"] = json!({"needed": 1e-4, "redundant": 1e-5});
    bench.succeed(&spec, "out", &["--until", "profile"]);
    let profile: LayerProfile =
        serde_json::from_slice(&fs::read(bench.path("out/profile.json")).unwrap()).unwrap();
    assert_eq!(profile.ablation.len(), 6);
    for (layer, ablation) in profile.ablation.iter().enumerate() {
        assert_eq!(ablation.damage.abs() < 1e-5, layer == 3, "{layer}: {ablation:?}");
        assert_eq!(ablation.stderr < 1e-6, layer == 3, "{layer}: {ablation:?}");
        assert_eq!(ablation.zone, Zone::of(ablation.damage, &spec_zones(1e-4, 1e-5)));
    }
    assert_eq!(profile.ablation[3].zone, Zone::Redundant);
    let told = bench.succeed(&bench.spec(), "out", &["--until", "profile"]);
    assert_eq!(finished(&told), [(Stage::Profile, false)], "without ablation it is another profile");
}

#[test]
fn a_model_writes_each_text_once_in_a_workspace() {
    let bench = Bench::new(&Tiny::llama());
    let corpus = json!({"from": "model"});
    let mut spec = bench.spec_with("/prune/strategy", json!("greedy_damage"));
    spec["prune"]["damage"] = json!({"samples": 4});
    spec["calibration"]["corpus"] = corpus;
    spec["calibration"]["ablation"] = json!(true);
    let written = |spec: &Value| {
        let told = bench.succeed(spec, "out", &["--until", "select"]);
        let ended = |e: &Event| {
            matches!(e, Event::Advanced { task, done, total, .. }
                if task == "writing calibration text" && done == total)
        };
        (told.iter().filter(|e| ended(e)).count(), selection(&bench))
    };
    let (texts, first) = written(&spec);
    assert_eq!(texts, 2, "one to calibrate with, one to measure damage on, by ablation and search");
    // Another run has other stages, but the same texts.
    spec["calibration"]["logit_lens"] = json!(true);
    assert_eq!(written(&spec), (0, first));
    spec["seed"] = json!(5);
    assert_eq!(written(&spec).0, 2);
}

const fn spec_zones(needed: f64, redundant: f64) -> Zones {
    Zones { needed, redundant }
}

#[test]
fn strategies_compared_come_with_a_chart() {
    let bench = Bench::new(&Tiny::llama());
    let prune = json!({
        "amount": {"layers": 2}, "strategy": "block_endpoint", "compare": ["greedy_damage", "auto"],
        "damage": {"samples": 4}
    });
    let mut spec = bench.spec_with("/prune", prune);
    spec["heal"] = json!([]);
    spec["calibration"]["ablation"] = json!(true);
    bench.succeed(&spec, "out", &[]);
    let chosen = selection(&bench);
    let names: Vec<&str> = chosen.compared.iter().map(|c| c.strategy.name()).collect();
    assert_eq!(names, ["block_endpoint", "greedy_damage", "auto"]);
    assert!(chosen.compared[2].damage <= chosen.compared[0].damage, "auto weighs that cut, too");
    let plots = tree(&bench.path("out/plots"));
    let mut files: Vec<&str> = plots.iter().map(|(path, _)| path.to_str().unwrap()).collect();
    files.sort_unstable();
    assert_eq!(files, ["criticality.svg", "heat_map.svg", "profile_curve.svg", "strategies.svg"]);
    let html = fs::read_to_string(bench.path("out/report.html")).unwrap();
    assert!(html.contains("Why these layers") && html.contains("How much each layer is missed"));
    // Without a comparison the chart goes, too.
    bench.succeed(&bench.spec_with("/heal", json!([])), "out", &[]);
    assert!(!bench.path("out/plots/strategies.svg").exists());
}

#[test]
fn nothing_healed_is_left_beside_a_cut_it_does_not_belong_to() {
    let bench = Bench::new(&Tiny::llama());
    bench.succeed(&bench.spec(), "out", &["--until", "heal"]);
    let unhealed = bench.spec_with("/heal", json!([]));
    bench.succeed(&unhealed, "out", &["--until", "heal"]);
    assert!(!bench.path("out/healed").exists() && !bench.path("out/adapter").exists());
    assert!(bench.path("out/pruned").exists());
}

#[test]
fn explicit_layers_are_cut_and_the_profile_is_written_all_the_same() {
    let bench = Bench::new(&Tiny::qwen2());
    let spec = bench.spec_with("/prune", json!({"strategy": "explicit", "layers": [4, 1]}));
    bench.succeed(&spec, "out", &["--until", "prune"]);
    let selection: Value =
        serde_json::from_slice(&fs::read(bench.path("out/selection.json")).unwrap()).unwrap();
    assert_eq!(selection["dropped"], json!([1, 4]));
    assert!(bench.path("out/profile.json").is_file());
}

#[test]
fn a_spec_may_be_a_json_yaml_or_toml_file() {
    let bench = Bench::new(&Tiny::llama());
    let spec = bench.spec_with("/heal", json!([]));
    fs::write(bench.path("spec.json"), spec.to_string()).unwrap();
    fs::write(bench.path("spec.yaml"), serde_yaml_ng::to_string(&spec).unwrap()).unwrap();
    fs::write(bench.path("spec.toml"), toml::to_string(&spec).unwrap()).unwrap();
    for name in ["spec.json", "spec.yaml", "spec.toml"] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_secateur"))
            .args(["run", "--until", "select", "--workspace"])
            .arg(bench.path("out"))
            .arg(bench.path(name))
            .output()
            .unwrap();
        assert!(output.status.success(), "{name}: {}", stderr(&output));
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_run_without_a_panic() {
    let bench = Bench::new(&Tiny::llama());
    let mut child = bench.start(&bench.spec(), "out", &["--events", "jsonl"]);
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
    assert!(!bench.path("out/pruned").exists(), "nobody is left to work for");
}

#[test]
fn two_runs_never_share_a_workspace() {
    let bench = Bench::new(&Tiny::llama());
    let mut first = bench.start_until(&bench.spec(), "out", HEALING);
    let second = bench.run(&bench.spec(), "out", &[]);
    first.kill().unwrap();
    first.wait().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr(&second).contains("another run is using this workspace"), "{}", stderr(&second));
}

#[test]
fn a_failure_is_the_last_event_and_one_line_on_stderr() {
    let bench = Bench::new(&Tiny::llama());
    fs::remove_file(bench.path("model/tokenizer.json")).unwrap();
    let output = bench.run(&bench.spec(), "out", &["--events", "jsonl"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    let told = events(&output.stdout);
    assert!(
        matches!(told.last(), Some(Event::Failed { failure }) if failure.message.contains("tokenizer.json"))
    );
}
