//! Ship, review or reject.

use secateur::engine::eval::{Checkpoints, Place, evaluate};
use secateur::job::progress::Stage;
use secateur::job::report::{
    Comparison, Decision, Estimate, EvalReport, Flaw, Generation, PerplexityChange, Scores, TaskChange,
    TaskScore,
};
use secateur::job::spec::{Corpus, EvalSpec, Gates, GenerationSpec, TaskSpec};
use secateur::report::judge;

use crate::support::rig::Rig;
use crate::support::tiny::{Tiny, Weight};

fn between(low: f64, high: f64) -> Estimate {
    Estimate { value: f64::midpoint(low, high), low, high }
}

fn scores() -> Scores {
    Scores {
        layer_count: 6,
        parameters: 1000,
        size_bytes: 2000,
        embedding_parameters: 100,
        perplexity: Vec::new(),
        tasks: vec![TaskScore { task: "t".into(), acc: 0.6, n: 100, ..TaskScore::default() }],
        speed: None,
        peak_memory_bytes: 1,
        flops_per_token: 2000,
        generation: Some(Generation::default()),
    }
}

/// All that was measured is well within the default gates.
fn sound() -> EvalReport {
    let ratio = between(1.05, 1.15);
    let task = TaskChange {
        task: "t".into(),
        difference: between(-0.05, 0.01),
        worse: 0.8,
        retention: Some(between(0.85, 1.0)),
    };
    EvalReport {
        base: scores(),
        pruned: scores(),
        healed: None,
        compared: vec![Comparison {
            checkpoint: "pruned".into(),
            perplexity: vec![PerplexityChange { corpus: "c".into(), ratio }],
            tasks: vec![task],
            retention: Some(between(0.85, 1.0)),
            broken: Some(between(0.0, 0.1)),
            prefill_speedup: Some(between(1.1, 1.3)),
            decode_speedup: Some(between(1.1, 1.3)),
        }],
        gguf: Vec::new(),
        overlap: Vec::new(),
    }
}

fn decided(change: impl FnOnce(&mut Comparison), gates: Gates) -> (Decision, Vec<String>) {
    let mut eval = sound();
    change(&mut eval.compared[0]);
    let verdict = judge(&eval, &EvalSpec { gates, ..EvalSpec::default() });
    (verdict.decision, verdict.reasons)
}

#[test]
fn what_passes_all_gates_ships_and_each_says_by_how_much() {
    let (decision, reasons) = decided(|_| (), Gates::default());
    assert_eq!(decision, Decision::Ship);
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert_eq!(
        reasons[2],
        "Perplexity on c, over the base model's: ×1.10 (×1.05 to ×1.15), wanted at most ×2.00: passed."
    );
}

#[test]
fn a_gate_is_failed_only_where_the_whole_interval_lies_beyond_it() {
    let perplexity = |low, high| decided(|c| c.perplexity[0].ratio = between(low, high), Gates::default());
    assert_eq!(perplexity(1.9, 2.0).0, Decision::Ship);
    assert_eq!(perplexity(1.9, 2.1).0, Decision::Review);
    assert_eq!(perplexity(2.1, 2.2).0, Decision::Reject);
    let retention = |low, high| decided(|c| c.retention = Some(between(low, high)), Gates::default());
    assert_eq!(retention(0.8, 0.9).0, Decision::Ship);
    assert_eq!(retention(0.7, 0.9).0, Decision::Review);
    let (decision, reasons) = retention(0.5, 0.7);
    assert_eq!(decision, Decision::Reject);
    assert_eq!(reasons.len(), 1, "only what stands in the way: {reasons:?}");
    assert!(reasons[0].contains("60 % (50 % to 70 %), wanted at least 80 %: failed"), "{reasons:?}");
}

#[test]
fn a_model_that_can_no_longer_write_is_rejected_however_good_its_scores_are() {
    let (decision, reasons) = decided(|c| c.broken = Some(between(0.4, 0.6)), Gates::default());
    assert_eq!(decision, Decision::Reject);
    assert!(reasons[0].contains("the base model writes well and this one does not"), "{reasons:?}");
    let off = Gates { max_broken: None, ..Gates::default() };
    assert_eq!(decided(|c| c.broken = Some(between(0.4, 0.6)), off).0, Decision::Ship);
}

#[test]
fn what_was_not_measured_or_says_nothing_asks_for_a_review() {
    let (decision, reasons) = decided(|c| c.retention = None, Gates::default());
    assert_eq!(decision, Decision::Review);
    assert!(reasons[0].contains("not surely better than chance"), "{reasons:?}");
    assert_eq!(decided(|c| c.broken = None, Gates::default()).0, Decision::Review);
    assert_eq!(decided(|c| c.perplexity.clear(), Gates::default()).0, Decision::Review);
    let mut eval = sound();
    eval.base.tasks.clear();
    eval.compared[0].retention = None;
    assert!(judge(&eval, &EvalSpec::default()).reasons[0].contains("no task was measured"));
    let none =
        Gates { min_retention: None, max_perplexity_ratio: None, max_broken: None, ..Gates::default() };
    let (decision, reasons) = decided(|_| (), none);
    assert_eq!(decision, Decision::Review);
    assert!(reasons[0].contains("eval.gates"), "{reasons:?}");
}

#[test]
fn speed_size_and_single_tasks_have_gates_of_their_own() {
    let speed = |least| Gates { min_speedup: Some(least), ..Gates::default() };
    assert_eq!(decided(|_| (), speed(1.1)).0, Decision::Ship);
    assert_eq!(decided(|_| (), speed(1.2)).0, Decision::Review);
    assert_eq!(decided(|_| (), speed(1.5)).0, Decision::Reject);
    assert_eq!(decided(|c| c.decode_speedup = None, speed(1.0)).0, Decision::Review);
    let size = |most| Gates { max_size_bytes: Some(most), ..Gates::default() };
    assert_eq!(decided(|_| (), size(2000)).0, Decision::Ship);
    assert_eq!(decided(|_| (), size(1999)).0, Decision::Reject);
    let task = |least| {
        let items = Corpus::Text { text: "i".into() };
        let tasks = vec![TaskSpec { min_retention: Some(least), ..TaskSpec::of("t", items) }];
        judge(&sound(), &EvalSpec { tasks, ..EvalSpec::default() }).decision
    };
    assert_eq!((task(0.85), task(0.9), task(1.1)), (Decision::Ship, Decision::Review, Decision::Reject));
}

/// `base`, and beside it as the pruned checkpoint what `change` makes of a copy, with no gate but that on writing.
fn measured(change: impl Fn(&mut Weight)) -> (EvalReport, Decision) {
    let rig = Rig::new();
    // So that it says one thing and another, a model of noise must not be too sure of itself.
    let calm = |weight: &mut Weight| {
        if weight.name == "model.norm.weight" {
            weight.values.iter_mut().for_each(|v| *v *= 0.1);
        }
    };
    let base = Tiny::llama().write_with(rig.path("base"), calm);
    let pruned = Tiny::llama().write_with(rig.path("pruned"), |weight| {
        calm(weight);
        change(weight);
    });
    let row = |i: usize| {
        format!(
            "{{\"kind\":\"multiple_choice\",\"context\":\"c{i}\",\"choices\":[\"a\",\"b\"],\"gold\":{}}}",
            i % 2
        )
    };
    let rows: Vec<String> = (0..40).map(row).collect();
    let items = Corpus::Text { text: rows.join("\n") };
    let spec = EvalSpec {
        perplexity: vec![Corpus::Text { text: "The text that is measured on, again and again. ".repeat(40) }],
        tasks: vec![TaskSpec::of("t", items)],
        seq_len: 64,
        speed: false,
        generation: Some(GenerationSpec {
            samples: 16,
            tokens: 32,
            prompt_tokens: 16,
            temperature: 1.0,
            ..GenerationSpec::default()
        }),
        gates: Gates { min_retention: None, max_perplexity_ratio: None, ..Gates::default() },
        ..EvalSpec::default()
    };
    let [base, pruned] = [base, pruned].map(|dir| Place { digest: dir.display().to_string(), dir });
    let checkpoints = Checkpoints { base, pruned, healed: None, gguf: Vec::new() };
    let report =
        evaluate(&checkpoints, &spec, 5, &rig.path("items"), &rig.workspace(), rig.cx(Stage::Eval)).unwrap();
    let decision = judge(&report, &spec).decision;
    (report, decision)
}

#[test]
fn a_copy_of_the_base_model_loses_nothing_and_that_is_sure() {
    let (report, decision) = measured(|_| ());
    assert_eq!(decision, Decision::Ship);
    let compared = &report.compared[0];
    let sure = |value| Estimate { value, low: value, high: value };
    assert_eq!(compared.perplexity[0].ratio, sure(1.0));
    assert_eq!(compared.tasks[0].difference, sure(0.0));
    assert!((compared.tasks[0].worse - 0.5).abs() < 1e-12);
    assert_eq!(compared.broken, Some(sure(0.0)));
    let written = report.pruned.generation.unwrap();
    let base = report.base.generation.unwrap();
    assert_eq!(written.texts, base.texts);
    assert_eq!(base.texts.iter().map(|t| t.sampled).collect::<Vec<_>>(), [[false; 16], [true; 16]].concat());
    let like = written.likeness.unwrap();
    assert!((like.similarity - 1.0).abs() < 1e-9, "{like:?}");
    assert!(base.likeness.is_none() && report.base.perplexity[0].stderr > 0.0);
}

#[test]
fn a_planted_loop_is_found_in_what_the_model_writes() {
    // A final norm so large that the likeliest token is all there is, and no layer that would move on from it.
    let (report, decision) = measured(|weight| {
        if weight.name == "model.norm.weight" {
            weight.values.iter_mut().for_each(|v| *v *= 300.0);
        } else if weight.name.ends_with("o_proj.weight") || weight.name.ends_with("down_proj.weight") {
            weight.values.iter_mut().for_each(|v| *v = 0.0);
        }
    });
    let written = report.pruned.generation.unwrap();
    let loops = written.texts.iter().filter(|text| text.flaw == Some(Flaw::Repetitive)).count();
    assert!(loops > 24, "only {loops} of 32: {:?}", report.base.generation);
    let base = report.base.generation.unwrap();
    assert!(written.repetition > 0.7 && written.repetition > base.repetition);
    let flaws: Vec<Option<Flaw>> = base.texts.iter().map(|text| text.flaw).collect();
    assert_eq!(decision, Decision::Reject, "{:?} {flaws:?}", report.compared[0].broken);
}
