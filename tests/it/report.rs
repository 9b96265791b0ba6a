//! The result in words, tables and pictures.

use std::fs;

use secateur::job::preset::ModelFacts;
use secateur::job::progress::Stage;
use secateur::job::report::{
    Ablation, Candidate, CheckpointRef, Compared, Comparison, Considered, Cost, Decision, Estimate,
    EvalReport, Flaw, Generation, HealReport, LayerProfile, LayerSelection, LensReading, Likeness, LossPoint,
    Overlap, Perplexity, PerplexityChange, Report, Scores, Speed, StageSummary, Step, TaskChange, TaskScore,
    WrittenText, Zone,
};
use secateur::job::spec::{HealMethod, JobSpec, Preset, QloraSpec, Strategy, TrainingSpec};
use secateur::report::{Findings, card, comparison, page, plots, side_by_side, summary};
use serde_json::json;

use crate::support::made_up;

fn generation(cut: bool) -> Generation {
    let text = |sampled| WrittenText {
        prompt: "In the garden <b>".into(),
        text: if cut { "of of of of".into() } else { "stands a pear tree & a bench.".into() },
        sampled,
        tokens: 4,
        repetition: 0.6,
        surprise: 1.5,
        flaw: cut.then_some(Flaw::Repetitive),
    };
    Generation {
        repetition: 0.6,
        surprise: 1.5,
        broken: f64::from(u8::from(cut)),
        likeness: cut.then_some(Likeness { bleu: 12.34, chrf: 34.5, rouge_l: 0.456, similarity: 0.789 }),
        texts: vec![text(false), text(true)],
    }
}

fn comparison_of(checkpoint: &str) -> Comparison {
    let estimate = |value: f64| Estimate { value, low: value - 0.05, high: value + 0.05 };
    Comparison {
        checkpoint: checkpoint.into(),
        perplexity: vec![PerplexityChange { corpus: "garden.txt".into(), ratio: estimate(1.33) }],
        tasks: vec![TaskChange {
            task: "plants".into(),
            difference: estimate(-0.017),
            worse: 0.75,
            retention: Some(estimate(0.9)),
        }],
        retention: Some(estimate(0.9)),
        broken: Some(estimate(1.0)),
        prefill_speedup: Some(estimate(1.25)),
        decode_speedup: None,
    }
}

fn scores(layers: u32, perplexity: f64, acc: f64) -> Scores {
    let parameters = 28_311_552 + u64::from(layers) * 3_540_000;
    Scores {
        layer_count: layers,
        parameters,
        size_bytes: 2 * parameters,
        embedding_parameters: 28_311_552,
        perplexity: vec![Perplexity {
            corpus: "garden.txt".into(),
            value: perplexity,
            nll_per_token: perplexity.ln(),
            nll_over_ln_vocab: perplexity.ln() / 49_152f64.ln(),
            word_perplexity: perplexity.powf(1.3),
            tokens: 8192,
            stderr: 0.25,
        }],
        tasks: vec![TaskScore {
            task: "plants".into(),
            acc,
            acc_norm: Some(acc + 0.02),
            stderr: 0.021,
            n: 500,
            ..TaskScore::default()
        }],
        speed: Some(Speed {
            prefill_tokens_per_s: 18_000.0 / f64::from(layers),
            decode_tokens_per_s: 600.0 / f64::from(layers),
            latency_ms: f64::from(layers) / 0.6,
            ..Speed::default()
        }),
        peak_memory_bytes: 900_000_000,
        flops_per_token: 2 * parameters,
        generation: Some(generation(layers < 30)),
    }
}

/// A profile shaped like a real one: middle layers turn the stream least.
fn profile(layer_count: u32) -> LayerProfile {
    let depth = f64::from(layer_count - 1);
    let step = |l: u32| 0.05 + 0.3 * (f64::from(l) / depth - 0.65).powi(2) + if l == 0 { 0.25 } else { 0.0 };
    let across = |l: u32, n: u32| (l..l + n).map(step).sum::<f64>().powf(0.7) * 0.6;
    let stderr = made_up::blocks(layer_count, |l, n| 0.03 * across(l, n));
    LayerProfile { stderr, ..made_up::profile(layer_count, across) }
}

fn checkpoint(path: &str) -> CheckpointRef {
    CheckpointRef {
        path: path.into(),
        digest: "ab".repeat(32),
        layer_count: 24,
        size_bytes: 1,
        parameters: 1,
    }
}

fn healing() -> HealReport {
    let facts = ModelFacts {
        model_type: "llama".into(),
        hidden_size: 576,
        layer_count: 30,
        vocab_size: 49_152,
        max_position_embeddings: 8192,
        experts: false,
        scale_free: true,
        tied: false,
        plain_mlp: true,
        no_gguf: None,
    };
    let curve = (0..120u32).map(|step| LossPoint {
        step,
        loss: 3.1 + 1.2 * (-f64::from(step) / 25.0).exp() + 0.1 * f64::from(step * 7 % 13) / 13.0,
        learning_rate: 3e-4,
    });
    let training = TrainingSpec { steps: Some(120), ..TrainingSpec::default() };
    HealReport {
        method: "qlora".into(),
        settings: HealMethod::Qlora(QloraSpec { training, ..QloraSpec::default() }).settings(
            Preset::Paper,
            &facts,
            6,
        ),
        trainable_parameters: 1_234_567,
        tokens: 250_000,
        curve: curve.collect(),
        repaired: Vec::new(),
        diverged_at: None,
        held_out_before: 4.05,
        held_out_after: 3.21,
        reverted: false,
        passed_over: false,
        checkpoint: Some(checkpoint("healed")),
    }
}

fn report(name: &str, dropped: Vec<u32>, heal: bool) -> Report {
    let spec = json!({
        "name": name, "model": {"from": "path", "path": "model"}, "prune": {"amount": {"layers": 6}},
        "eval": {"perplexity": [{"from": "path", "path": "garden.txt"}], "tasks": []}
    });
    let profile = profile(30);
    let n = dropped.len();
    let candidates = profile.by_len[n - 1][..30 - n]
        .iter()
        .enumerate()
        .map(|(l, d)| Candidate { start: l as u32, score: *d })
        .collect();
    let score = profile.by_len[n - 1][dropped[0] as usize];
    let spec = JobSpec::read(spec).unwrap();
    Findings {
        judged_by: spec.eval.clone(),
        budget: None,
        spec,
        model_digest: "cd".repeat(32),
        selection: LayerSelection {
            rounds: Vec::new(),
            dropped,
            strategy: Strategy::BlockEndpoint,
            score,
            candidates,
            considered: Vec::new(),
            compared: Vec::new(),
            mended: false,
        },
        profile,
        pruned: checkpoint("pruned"),
        heal: if heal { vec![healing()] } else { Vec::new() },
        eval: EvalReport {
            gguf: Vec::new(),
            base: scores(30, 18.7, 0.412),
            pruned: scores(24, 57.1, 0.371),
            healed: heal.then(|| scores(24, 24.9, 0.395)),
            compared: [Some("pruned"), heal.then_some("healed")]
                .into_iter()
                .flatten()
                .map(comparison_of)
                .collect(),
            overlap: Vec::new(),
        },
        files: [("pruned/config.json".to_owned(), "ef".repeat(32))].into(),
    }
    .report()
}

/// The report of what `report` says was found.
fn again(report: Report) -> Report {
    Findings {
        judged_by: report.spec.eval.clone(),
        budget: report.budget,
        spec: report.spec,
        model_digest: report.model_digest,
        profile: report.profile,
        selection: report.selection,
        pruned: report.pruned,
        heal: report.heal,
        eval: report.eval,
        files: report.files,
    }
    .report()
}

fn stages() -> Vec<StageSummary> {
    vec![
        StageSummary { stage: Stage::Profile, reused: true, duration_ms: 21_340 },
        StageSummary { stage: Stage::Prune, reused: false, duration_ms: 812 },
    ]
}

#[test]
fn the_page_needs_nothing_from_anywhere_and_closes_what_it_opens() {
    for (name, dropped, heal) in [("block", (18..24).collect(), true), ("scattered", vec![3, 11, 20], false)]
    {
        let html = page(&report(name, dropped, heal), &stages());
        fs::write(format!("{}/report-{name}.html", env!("CARGO_TARGET_TMPDIR")), &html).unwrap();
        for foreign in ["http:", "https:", "url(", "<script", "src=", "@import", "NaN", "inf"] {
            let found = html.replace("infer", "").contains(foreign);
            assert!(!found, "{name}: {foreign}");
        }
        for tag in [
            "svg", "table", "section", "figure", "details", "main", "p", "li", "ul", "td", "th", "tr",
            "title",
        ] {
            let opened =
                html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{name}: {tag}");
        }
        assert_eq!(html.matches("role='img'").count(), if heal { 3 } else { 2 });
        let cells = html.matches("fill='#").count();
        assert_eq!(cells, 30 * 31 / 2 + 48, "one cell for every block, and the key");
    }
}

/// A report of a search: `auto` decided, others were compared, every layer was left out once.
fn searched() -> Report {
    let mut report = report("searched", vec![17, 18, 20, 21, 22, 24], false);
    let own =
        |l: u32| 0.004 * f64::from(l * 7 % 5) + if l == 0 { 4.2 } else { 0.5 / f64::from(1 + l) - 0.018 };
    let damage = |set: &[u32]| set.iter().map(|l| own(*l)).sum::<f64>() * (0.8 + 0.2 * set.len() as f64);
    let zones = report.spec.calibration.zones;
    // The last layer's is not known.
    let stderr = |l: u32| if l == 29 { 0.0 } else { 0.002 + own(l).abs() / 20.0 };
    let layer = |l| Ablation { damage: own(l), stderr: stderr(l), zone: Zone::of(own(l), &zones) };
    report.profile.ablation = (0..30).map(layer).collect();
    let reading = |l: u32| LensReading {
        loss: 3.0 + 7.0 * (-f64::from(l) / 8.0).exp(),
        agreement: (f64::from(l) / 30.0).powi(3),
    };
    report.profile.logit_lens = (0..=30).map(reading).collect();
    report.profile.confidence = (1..=30).map(|n| 0.5 + 0.5 / f64::from(n)).collect();
    let compared = |(strategy, last): (Strategy, u32)| {
        let cut = |n: u32| (0..n).map(|i| last - i * (1 + last % 3)).rev().collect::<Vec<u32>>();
        let whole = !matches!(strategy, Strategy::Auto | Strategy::EvolutionaryDamage);
        let counts = if whole { 1..=6 } else { 6..=6 };
        let path: Vec<Step> =
            counts.map(|n| Step { damage: damage(&cut(n)), stderr: 0.0321, dropped: cut(n) }).collect();
        Compared {
            strategy,
            dropped: cut(6),
            damage: path.last().map(|step| step.damage),
            stderr: 0.0321,
            path,
            cost: Cost { evaluations: 42, tokens: 344_064 },
            budget_exhausted: strategy == Strategy::BeamDamage,
        }
    };
    let strategies = [
        (Strategy::Auto, 24),
        (Strategy::BlockEndpoint, 18),
        (Strategy::BlockInfluence, 19),
        (Strategy::RelativeMagnitude, 22),
        (Strategy::Deepest, 28),
        (Strategy::OneShotDamage, 17),
        (Strategy::GreedyDamage, 26),
        (Strategy::BeamDamage, 27),
        (Strategy::EvolutionaryDamage, 23),
        (Strategy::TaskAccuracy, 6),
    ];
    let selection = &mut report.selection;
    (selection.strategy, selection.compared) = (Strategy::Auto, strategies.map(compared).to_vec());
    let weighed = |(strategies, first, damage, why): (&[Strategy], u32, f64, &str)| Considered {
        strategies: strategies.to_vec(),
        dropped: (first..first + 6).collect(),
        damage: Some(damage),
        stderr: 0.0456,
        cost: Cost { evaluations: 1, tokens: 8192 },
        why: why.into(),
    };
    selection.considered = [
        (&[Strategy::BlockInfluence, Strategy::CrossAxis][..], 17, 0.31, "does the least damage of 2 cuts"),
        (&[Strategy::Deepest][..], 23, 1.72, "does 1.4100 nats per token more damage"),
    ]
    .map(weighed)
    .to_vec();
    report
}

#[test]
fn a_search_is_told_in_tables_and_drawn_in_plots() {
    let report = searched();
    let html = page(&report, &stages());
    fs::write(format!("{}/report-searched.html", env!("CARGO_TARGET_TMPDIR")), &html).unwrap();
    for told in [
        "Why these layers",
        "block_influence, cross_axis",
        "does 1.4100 nats per token more damage",
        "ended with its budget",
        "How much each layer is missed",
        "What the head reads on the way",
        "confidence",
        "0.3100\u{a0}±\u{a0}0.0456",
        "±\u{a0}0.0321",
        "layers 17 to 18, 20 to 22, 24",
    ] {
        assert!(html.contains(told), "{told}");
    }
    for (bars, zone) in [("needed", Zone::Needed), ("mixed", Zone::Mixed), ("redundant", Zone::Redundant)] {
        let count = report.profile.ablation.iter().filter(|a| a.zone == zone).count();
        assert!(count > 0 && html.contains(&format!("{bars}: {count}</text>")), "{bars}");
        assert_eq!(html.matches(&format!("<rect class='{bars}'")).count(), count + 1, "{bars}, and the key");
    }
    assert_eq!(html.matches("class='error'").count(), 29, "every layer whose standard error is known");
    assert_eq!(html.matches("class='gone'").count(), 6 + 1, "the layers that were cut, and the key");
    let points: usize = report.selection.compared.iter().map(|c| c.path.len()).sum();
    assert_eq!(
        html.matches("<path class='sign").count(),
        points + 10,
        "every point, and a name for every line"
    );
}

#[test]
fn plots_stand_alone_as_files_with_title_axes_and_their_own_colours() {
    let directory = format!("{}/plots", env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(&directory).unwrap();
    let all = plots(&searched());
    let names: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
    let expected =
        ["heat_map.svg", "profile_curve.svg", "criticality.svg", "strategies.svg", "logit_lens.svg"];
    assert_eq!(names, expected);
    for (name, svg) in all {
        fs::write(format!("{directory}/{name}"), &svg).unwrap();
        assert!(svg.starts_with("<svg xmlns='http://www.w3.org/2000/svg'"), "{name}");
        assert!(!svg.contains("var(--"), "{name}: a colour of the page, which is not there");
        for wrong in ["NaN", "inf", "<script", "href"] {
            assert!(!svg.replace("influence", "").contains(wrong), "{name}: {wrong}");
        }
        assert!(svg.contains("class='heading'") && svg.contains("rotate(-90)"), "{name}");
        for tag in ["svg", "g", "rect", "text", "path", "circle", "title"] {
            let whole = svg.matches(&format!("<{tag} ")).count() + svg.matches(&format!("<{tag}>")).count();
            assert!(svg.matches(&format!("</{tag}>")).count() <= whole, "{name}: {tag}");
        }
    }
    let plain = plots(&report("x", vec![4], false));
    assert_eq!(plain.len(), 2, "what was not measured is not drawn");
}

#[test]
fn remarks_tell_of_a_better_strategy_and_of_a_search_cut_short() {
    let mut report = searched();
    report.selection.compared[0].budget_exhausted = true;
    let remarks = again(report).remarks.join("\n");
    assert!(remarks.contains("ended with its budget after 42 sets"), "{remarks}");
    assert!(remarks.contains("less damage than auto, which decided"), "{remarks}");
}

#[test]
fn whatever_a_person_wrote_is_escaped() {
    let html = page(&report("<script>alert('x')</script> & \"co\"", vec![3, 4], false), &[]);
    assert!(!html.contains("<script"));
    assert!(html.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &quot;co&quot;"));
}

#[test]
fn the_summary_says_what_was_cut_and_what_it_cost() {
    let said = summary(&report("x", (18..24).collect(), true));
    assert_eq!(said[0], "6 of 30 layers cut, 16 % fewer parameters");
    assert_eq!(
        said[1],
        "Perplexity on garden.txt went from 18.70 to 57.10 by the cut and to 24.90 by healing."
    );
    assert_eq!(said[2], "Accuracy on plants went from 41.2 % to 39.5 % ± 2.1.");
    assert!(said[3].contains("1.25 times"), "{}", said[3]);
}

#[test]
fn the_comparison_has_a_column_for_every_checkpoint() {
    let rows = comparison(&report("x", (18..24).collect(), true).eval);
    assert!(rows.iter().all(|r| r.cells.len() == 3));
    let row = |label: &str| rows.iter().find(|r| r.label == label).unwrap();
    let texts = |label: &str| row(label).cells.iter().map(|c| c.text.clone()).collect::<Vec<_>>();
    assert_eq!(texts("layers"), ["30", "24", "24"]);
    assert_eq!(texts("parameters"), ["134.5 M", "113.3 M", "113.3 M"]);
    assert_eq!(texts("accuracy, plants"), ["0.412 ± 0.021", "0.371 ± 0.021", "0.395 ± 0.021"]);
    assert_eq!(row("layers").cells[0].ratio, None);
    assert!((row("layers").cells[1].ratio.unwrap() - 0.8).abs() < 1e-12);
    assert_eq!(comparison(&report("x", vec![4], false).eval)[0].cells.len(), 2);
}

#[test]
fn remarks_warn_of_what_the_numbers_do_not_show() {
    let remarks = report("x", (18..24).collect(), false).remarks.join("\n");
    assert!(remarks.contains("3.1 times the base model's"), "{remarks}");
    assert!(remarks.contains("as near as the chosen one"), "{remarks}");
    assert!(remarks.contains("21 % of the base model's parameters are embedding"), "{remarks}");
    let mut reverted = report("x", (18..24).collect(), true);
    reverted.heal[0].reverted = true;
    assert!(again(reverted).remarks[0].contains("thrown away"));
}

#[test]
fn the_page_begins_with_the_verdict_and_shows_what_was_written_side_by_side() {
    let report = report("x", (18..24).collect(), true);
    let verdict = report.verdict.as_ref().unwrap();
    assert_eq!((verdict.decision, verdict.checkpoint.as_str()), (Decision::Reject, "healed"));
    let html = page(&report, &[]);
    let at = |text: &str| html.find(text).unwrap_or_else(|| panic!("{text} is not there"));
    let order = [
        "Verdict on the healed checkpoint: reject",
        "Before and after",
        "24.90 ± 0.25",
        "What is left, and how sure that is",
        "90.0 % (85.0 to 95.0)",
        "-1.7 (-6.7 to +3.3)",
        "×1.330 (1.280 to 1.380)",
        "What they write",
        "In the garden &lt;b&gt;",
        "stands a pear tree &amp; a bench.",
        "of of of of <small>[repetitive]</small>",
        "Where the cut went",
    ];
    assert!(order.windows(2).all(|pair| at(pair[0]) < at(pair[1])), "not in this order");
    for told in ["BLEU with base texts", "12.3", "0.789", "operations per token"] {
        at(told);
    }
}

#[test]
fn remarks_tell_of_items_that_were_healed_on_stand_twice_or_are_too_long() {
    let mut asked = report("x", (18..24).collect(), true);
    let (measured, healed_on) = ("plants".to_owned(), "c4.jsonl".to_owned());
    asked.eval.overlap = vec![Overlap { measured, healed_on, common: 3, total: 500 }];
    (asked.eval.base.tasks[0].duplicates, asked.eval.base.tasks[0].truncated) = (2, 7);
    let remarks = again(asked).remarks.join("\n");
    for told in [
        "3 of the 500 items or passages of plants have 13 words in a row in common with the healing text c4.jsonl",
        "2 of the 500 items of plants stand in its file more than once",
        "The context of 7 of the 500 items of plants is longer than the model can take",
    ] {
        assert!(remarks.contains(told), "{told}: {remarks}");
    }
}

#[test]
fn a_model_card_has_front_matter_that_the_hub_can_read_and_nothing_that_differs_from_run_to_run() {
    let mut asked = report("tricky: \"name\" | *x*\n# y", (18..24).collect(), true);
    let written = card(&asked, &[]);
    let (_, rest) = written.split_once("---\n").unwrap();
    let (front, body) = rest.split_once("---\n").unwrap();
    let front: serde_json::Value = serde_yaml_ng::from_str(front).unwrap();
    assert_eq!(front["library_name"], "transformers");
    assert_eq!(front["model-index"][0]["name"], "tricky: \"name\" | *x* # y");
    let results = &front["model-index"][0]["results"];
    assert_eq!(results[0]["dataset"]["name"], "plants");
    assert_eq!(results[0]["metrics"][0]["value"], 0.395);
    assert_eq!(results[1]["metrics"][0]["type"], "perplexity");
    assert!(front.get("base_model").is_none(), "a path of this machine is nobody's business");
    for told in [
        "# tricky: \"name\" \\| \\*x\\* \\# y\n",
        "**Verdict: reject.**",
        "layers 18 to 23",
        "| accuracy, plants | 0.412",
    ] {
        assert!(body.contains(told), "{told}: {body}");
    }
    for absent in ["tokens/s", "memory", "speed"] {
        assert!(!body.contains(absent), "{absent}: {body}");
    }
    asked.spec.model = serde_json::from_value(json!({"from": "hub", "repo": "org/name"})).unwrap();
    assert!(card(&asked, &[]).contains("\nbase_model: \"org/name\"\n"));
}

#[test]
fn reports_stand_side_by_side_behind_the_base_model_they_have_in_common() {
    let named = |name: &str, heal| (name.to_owned(), report(name, (18..24).collect(), heal));
    let mut both = [named("a", true), named("b", false)];
    both[1].1.eval.base.tasks.clear();
    both[1].1.eval.pruned.tasks.clear();
    both[1].1.eval.base.peak_memory_bytes += 1_000_000;
    let rows = side_by_side(&both);
    assert_eq!(rows[0].1, ["base", "a", "b"]);
    let row = |label: &str| rows.iter().find(|(l, _)| l == label).unwrap().1.clone();
    assert_eq!(row("verdict"), ["–", "reject", "reject"]);
    assert_eq!(row("perplexity, garden.txt"), ["18.70 ± 0.25", "24.90 ± 0.25", "57.10 ± 0.25"]);
    assert_eq!(row("accuracy, plants"), ["0.412 ± 0.021", "0.395 ± 0.021", "–"]);
    assert_eq!(row("peak memory")[0], "differs", "only what all say alike is the base model's");
    both[1].1.model_digest = "another".into();
    assert_eq!(side_by_side(&both)[0].1, ["a", "b"]);
}
