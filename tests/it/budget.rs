//! Jobs that are asked for an outcome: the number of layers is found by measuring.

use std::cell::Cell;
use std::fs;

use secateur::job::budget::ProbeOf;
use secateur::job::progress::{Event, Stage};
use secateur::job::report::Report;
use serde_json::{Value, json};

use crate::support::program::{Bench, finished, stderr, tree};
use crate::support::tiny::Tiny;

fn bench() -> Bench {
    Bench::new(&Tiny { layers: 6, ..Tiny::llama() })
}

fn asked(bench: &Bench, budget: Value) -> Value {
    bench.spec_with("/prune/amount", json!({ "budget": budget }))
}

fn report(bench: &Bench, workspace: &str) -> Report {
    serde_json::from_slice(&fs::read(bench.path(workspace).join("report.json")).unwrap()).unwrap()
}

/// The weights people take home.
fn weights(bench: &Bench, workspace: &str) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    ["pruned", "healed", "adapter"]
        .iter()
        .flat_map(|d| tree(&bench.path(workspace).join(d)))
        .filter(|(path, _)| path.extension().is_some_and(|e| e == "safetensors"))
        .collect()
}

#[test]
fn a_promised_size_takes_the_fewest_layers_and_the_job_is_the_one_of_that_number() {
    let bench = bench();
    bench.succeed(&bench.spec(), "two", &[]);
    let two = report(&bench, "two").pruned.size_bytes;
    bench.succeed(&asked(&bench, json!({"max_size_bytes": two})), "out", &[]);
    let found = report(&bench, "out");
    let budget = found.budget.unwrap();
    assert_eq!((budget.layers, found.selection.dropped.len()), (2, 2));
    // Size is arithmetic: it was tried once.
    let tried: Vec<_> = budget.probes.iter().map(|p| (p.layers, p.of, p.kept)).collect();
    assert_eq!(tried, [(2, ProbeOf::Costs, true)]);
    assert!(found.pruned.size_bytes <= two);
    assert_eq!(weights(&bench, "out"), weights(&bench, "two"));
    // The promise is a gate of the verdict, and what was asked stays as it was.
    assert!(found.verdict.unwrap().reasons.iter().chain(&budget.probes[0].said).any(|r| r.contains("Size")));
    assert!(found.spec.prune.budget().is_some());
    assert!(!bench.path("out/probes").exists());
    assert!(fs::read_to_string(bench.path("out/report.html")).unwrap().contains("How many layers"));
}

#[test]
fn a_promised_quality_takes_the_most_layers_from_one_profile_and_one_look_at_the_base() {
    let bench = bench();
    let told = bench.succeed(&asked(&bench, json!({"max_perplexity_ratio": 1000.0})), "out", &[]);
    let budget = report(&bench, "out").budget.unwrap();
    let tried: Vec<_> = budget.probes.iter().map(|p| (p.layers, p.of, p.kept)).collect();
    // Of such a tiny model each layer less takes its toll: 390 times the perplexity with two, 6000 with three.
    let whole = |n, kept| (n, ProbeOf::Quality, kept);
    assert_eq!((budget.layers, tried), (2, vec![whole(3, false), whole(2, true)]), "{:?}", budget.probes);
    let done = finished(&told);
    let anew = |stage| done.iter().filter(|(s, reused)| *s == stage && !reused).count();
    // What the last probe measured is the result and is measured no more.
    assert_eq!([Stage::Profile, Stage::Heal, Stage::Eval].map(anew), [1, 2, 2]);
    let base = |event: &Event| matches!(event, Event::Advanced { task, .. } if task.starts_with("base: "));
    let measured =
        told.iter().position(|event| matches!(event, Event::StageFinished { stage: Stage::Eval, .. }));
    let (first, later) = told.split_at(measured.unwrap());
    assert!(first.iter().any(base) && !later.iter().any(base));
    bench.succeed(&bench.spec(), "two", &[]);
    assert_eq!(weights(&bench, "out"), weights(&bench, "two"));
}

#[test]
fn what_matters_is_weighed_and_the_best_number_of_layers_is_the_job() {
    let bench = bench();
    // Size alone against next to no quality takes all that may go, quality against next to no size as little.
    for (name, weights_of, layers) in [
        ("all", json!({"perplexity": 0.0001, "size": 1000.0}), Some(5)),
        ("least", json!({"perplexity": 1000.0, "size": 0.0001}), Some(1)),
        ("middle", json!({"perplexity": 1.0, "size": 30.0}), None),
    ] {
        bench.succeed(&asked(&bench, json!({ "weigh": weights_of })), name, &[]);
        let budget = report(&bench, name).budget.unwrap();
        let weighed = |p: &secateur::job::budget::Probe| p.weighed.unwrap();
        let best = budget.probes.iter().min_by(|a, b| weighed(a).total_cmp(&weighed(b))).unwrap();
        assert_eq!(budget.layers, best.layers, "{name}: {:?}", budget.probes);
        assert!(layers.is_none_or(|layers| layers == budget.layers), "{name}: {:?}", budget.probes);
        assert!(best.said.iter().any(|said| said.starts_with("perplexity")), "{:?}", best.said);
        assert!(!bench.path(&format!("{name}/probes")).exists());
        let page = fs::read_to_string(bench.path(&format!("{name}/report.html"))).unwrap();
        assert!(page.contains("comes off best"));
        let plain = bench.spec_with("/prune/amount", json!({ "layers": budget.layers }));
        bench.succeed(&plain, &format!("{name}-plain"), &[]);
        assert_eq!(weights(&bench, name), weights(&bench, &format!("{name}-plain")));
    }
    for (weigh, pointer) in [
        (json!({"perplexity": 1.0}), "/prune/amount/budget/weigh:"),
        (json!({"perplexity": 1.0, "speed": 1.0}), "/prune/amount/budget/weigh/speed: needs eval.speed"),
        (json!({"perplexity": -1.0, "size": 1.0}), "/prune/amount/budget/weigh/perplexity: must be from 0"),
    ] {
        let mut spec = asked(&bench, json!({ "weigh": weigh }));
        spec["eval"]["speed"] = json!(false);
        let output = bench.run(&spec, "refused", &[]);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(pointer), "{}", stderr(&output));
    }
}

#[test]
fn a_promise_that_no_cut_keeps_fails_the_job_with_the_nearest_one() {
    let bench = bench();
    let mut spec = asked(&bench, json!({"min_speedup": 900.0}));
    spec["eval"]["speed"] = json!(true);
    let output = bench.run(&spec, "out", &[]);
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("no cut keeps") && said.contains("nearest is 5"), "{said}");
    assert!(
        said.contains("Decoding speed over the base model's") && said.contains("wanted at least ×900"),
        "{said}"
    );
    assert!(!bench.path("out/probes").exists() && !bench.path("out/pruned").exists());
}

#[test]
fn a_search_killed_in_a_probe_goes_on_there_and_ends_with_the_same_bytes() {
    const TRAINING: fn(&Event) -> bool = |event| matches!(event, Event::Advanced { stage: Stage::Heal, task, done: 3.., .. } if task == "training");
    let bench = bench();
    let spec = asked(&bench, json!({"max_perplexity_ratio": 1000.0}));
    bench.succeed(&spec, "undisturbed", &[]);
    let healed = Cell::new(0);
    // In the middle of the second probe.
    let mut child = bench.start_until(&spec, "killed", |event| {
        healed
            .set(healed.get() + i32::from(matches!(event, Event::StageFinished { stage: Stage::Heal, .. })));
        healed.get() == 1 && TRAINING(event)
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let told = bench.succeed(&spec, "killed", &[]);
    let anew = finished(&told).into_iter().filter(|done| *done == (Stage::Heal, false)).count();
    assert_eq!(anew, 1, "{:?}", finished(&told));
    assert_eq!(weights(&bench, "killed"), weights(&bench, "undisturbed"));
    assert_eq!(report(&bench, "killed").budget, report(&bench, "undisturbed").budget);
}

#[test]
fn budgets_that_make_no_sense_are_refused_by_the_place_of_what_is_wrong() {
    let bench = bench();
    let base = fs::metadata(bench.path("model/model.safetensors")).unwrap().len();
    let refused = [
        (json!({}), 2, "/prune/amount/budget: name at least one"),
        (json!({"max_size_bytes": 24}), 2, "/prune/amount/budget/max_size_bytes: is in bytes, and 24"),
        (json!({"max_size_bytes": "24GB"}), 2, "/prune/amount/budget/max_size_bytes"),
        (json!({"min_speedup": 0.9}), 2, "/prune/amount/budget/min_speedup: is relative"),
        (json!({"min_speedup": 1.2}), 2, "needs eval.speed"),
        (json!({"min_retention": 95.0}), 2, "/prune/amount/budget/min_retention: is a share"),
        (json!({"min_retention": 0.95}), 2, "name some in eval.tasks"),
        (json!({"max_perplexity_ratio": 0.5}), 2, "must be more than 1"),
        (json!({"max_layers": 3}), 2, "max_layers"),
        (json!({"max_size_bytes": base * 2}), 1, "nothing needs to go"),
        (json!({"max_size_bytes": 10_000}), 1, "cannot be met: with 5 layers less"),
    ];
    for (budget, code, message) in refused {
        let output = bench.run(&asked(&bench, budget.clone()), "out", &[]);
        assert_eq!(output.status.code(), Some(code), "{budget}");
        assert!(stderr(&output).contains(message), "{budget}: {}", stderr(&output));
        assert!(!bench.path("out/profile.json").exists(), "{budget}: something was computed");
    }
}

#[test]
fn runs_that_share_records_measure_the_base_model_once_wherever_they_work() {
    let bench = bench();
    let shared = bench.path("shared");
    let more = ["--records", shared.to_str().unwrap()];
    bench.succeed(&bench.spec(), "one", &more);
    let told = bench.succeed(&bench.spec_with("/prune/amount", json!({"layers": 3})), "two", &more);
    let done = finished(&told);
    assert_eq!(done[..2], [(Stage::Profile, true), (Stage::Select, false)]);
    assert!(
        !told.iter().any(|event| matches!(event, Event::Advanced { task, .. } if task.starts_with("base: ")))
    );
    // What one run found stays its own, too: the shared directory may go.
    fs::remove_dir_all(&shared).unwrap();
    let again = bench.succeed(&bench.spec_with("/prune/amount", json!({"layers": 3})), "two", &[]);
    assert_eq!(finished(&again), Stage::ALL.map(|stage| (stage, true)));
}

#[test]
fn layers_go_in_rounds_each_healed_and_the_result_is_told_against_the_base_model() {
    let bench = bench();
    let mut spec = bench.spec_with("/prune/amount", json!({"layers": 3}));
    spec["prune"]["rounds"] = json!(2);
    bench.succeed(&spec, "out", &[]);
    let found = report(&bench, "out");
    let rounds = &found.selection.rounds;
    assert_eq!(rounds.iter().map(Vec::len).collect::<Vec<_>>(), [1, 2]);
    let mut all = rounds.concat();
    all.sort_unstable();
    assert_eq!(all, found.selection.dropped);
    // The pruned checkpoint is the base model without all of them, as if they had gone at once.
    let mut at_once = bench.spec_with("/prune", json!({"strategy": "explicit", "layers": all}));
    at_once["heal"] = json!([]);
    bench.succeed(&at_once, "at once", &["--until", "prune"]);
    assert_eq!(tree(&bench.path("out/pruned")).len(), tree(&bench.path("at once/pruned")).len());
    let file = |workspace: &str| fs::read(bench.path(workspace).join("pruned/model.safetensors")).unwrap();
    assert!(file("out") == file("at once"));
    // Each round was healed from where the one before had come to.
    assert_eq!(found.heal.len(), 2);
    let helped: Vec<_> = found.heal.iter().filter(|heal| !heal.reverted).collect();
    assert!(!helped.is_empty() && found.eval.healed.is_some(), "{:?}", found.heal);
    let named: Vec<_> = found.heal.iter().filter_map(|heal| heal.checkpoint.as_ref()).collect();
    assert_eq!(named.len(), 1);
    assert_eq!((named[0].path.as_str(), named[0].layer_count), ("healed", 3));
    assert!(bench.path("out/healed/model.safetensors").exists() && !bench.path("out/rounds").exists());
    assert!(!bench.path("out/adapter").exists());
    assert!(fs::read_to_string(bench.path("out/report.html")).unwrap().contains("In rounds"));
    // All is recorded.
    let told = bench.succeed(&spec, "out", &[]);
    assert_eq!(finished(&told), Stage::ALL.map(|stage| (stage, true)));
}

#[test]
fn rounds_killed_in_the_second_go_on_there_and_end_with_the_same_bytes() {
    let bench = bench();
    let mut spec = bench.spec_with("/prune/amount", json!({"layers": 3}));
    spec["prune"]["rounds"] = json!(2);
    bench.succeed(&spec, "undisturbed", &[]);
    let healed = Cell::new(0);
    let mut child = bench.start_until(&spec, "killed", |event| {
        healed
            .set(healed.get() + i32::from(matches!(event, Event::StageFinished { stage: Stage::Heal, .. })));
        healed.get() == 1 && matches!(event, Event::Advanced { stage: Stage::Heal, .. })
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let told = bench.succeed(&spec, "killed", &[]);
    // The first round is there; the second one, and the record of both, are new.
    let heals: Vec<bool> = finished(&told)
        .into_iter()
        .filter(|(stage, _)| *stage == Stage::Heal)
        .map(|(_, reused)| reused)
        .collect();
    assert_eq!(heals, [true, false, false]);
    assert_eq!(weights(&bench, "killed"), weights(&bench, "undisturbed"));
    for (rounds, message) in [(4, "only 3 layers go"), (0, "/prune/rounds")] {
        spec["prune"]["rounds"] = json!(rounds);
        let output = bench.run(&spec, "out", &[]);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(message), "{}", stderr(&output));
    }
}
