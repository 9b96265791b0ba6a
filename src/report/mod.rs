//! The result in words, in a table, as JSON and as a page.

mod beside;
mod budget;
mod card;
mod choice;
mod evaluation;
mod exports;
mod html;
mod lines;
mod plot;
mod provenance;
mod svg;
pub mod sweep;
mod verdict;

use std::collections::BTreeMap;
use std::fmt::Write;

pub use beside::side_by_side;
pub use card::card;
pub use exports::exports;
pub use html::page;
pub use provenance::{provenance, sums};
pub use verdict::{judge, weigh};

use crate::job::budget::BudgetReport;
use crate::job::report::{
    Block, CheckpointRef, Compared, EvalReport, Generation, HealReport, LayerProfile, LayerSelection,
    Overlap, Report, Scores, TaskScore,
};
use crate::job::spec::{Corpus, EvalSpec, JobSpec, Strategy, TaskSpec};

/// What the stages found, before it is put into words.
pub struct Findings {
    pub spec: JobSpec,
    /// The gates that hold: those of the spec and the promises of its budget.
    pub judged_by: EvalSpec,
    /// How the number of layers was found, where a budget asked for that.
    pub budget: Option<BudgetReport>,
    pub model_digest: String,
    pub profile: LayerProfile,
    pub selection: LayerSelection,
    pub pruned: CheckpointRef,
    pub heal: Vec<HealReport>,
    pub eval: EvalReport,
    /// sha256 of every file of the shipped checkpoints, by path in the workspace.
    pub files: BTreeMap<String, String>,
}

impl Findings {
    /// The whole result, remarks included.
    pub fn report(self) -> Report {
        let (remarks, verdict) = (remarks(&self), judge(&self.eval, &self.judged_by));
        Report {
            secateur_version: env!("CARGO_PKG_VERSION").into(),
            spec: self.spec,
            budget: self.budget,
            model_digest: self.model_digest,
            profile: self.profile,
            selection: self.selection,
            pruned: self.pruned,
            heal: self.heal,
            eval: self.eval,
            verdict: Some(verdict),
            remarks,
            files: self.files,
        }
    }
}

/// The plots of the profile and of the choice as files, by name.
pub fn plots(report: &Report) -> Vec<(&'static str, String)> {
    let (profile, selection) = (&report.profile, &report.selection);
    let mut all = vec![
        ("heat_map.svg", svg::heat_map(profile, selection)),
        ("profile_curve.svg", svg::profile_curve(profile, selection)),
    ];
    if !profile.ablation.is_empty() {
        let zones = &report.spec.calibration.zones;
        all.push(("criticality.svg", choice::criticality(profile, zones, selection)));
    }
    if selection.compared.iter().any(|c| c.path.len() > 1) {
        let measure = report.spec.prune.damage.measure;
        all.push(("strategies.svg", choice::strategies(&selection.compared, measure)));
    }
    if !profile.logit_lens.is_empty() {
        all.push(("logit_lens.svg", choice::logit_lens(profile)));
    }
    all.into_iter().map(|(name, figure)| (name, figure.file())).collect()
}

/// A row of the comparison: one cell each for base, pruned and, where there is one, healed.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub label: String,
    pub cells: Vec<Cell>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    pub text: String,
    /// Against the base model; absent in its own column and where a ratio says nothing.
    pub ratio: Option<f64>,
}

/// Column heads of [`comparison`].
pub fn columns(eval: &EvalReport) -> Vec<&'static str> {
    ["base", "pruned", "healed"][..scores(eval).len()].to_vec()
}

/// Base, pruned and healed side by side.
pub fn comparison(eval: &EvalReport) -> Vec<Row> {
    let all = scores(eval);
    let row = |label: String, text: &dyn Fn(f64) -> String, value: &dyn Fn(&Scores) -> Option<f64>| {
        row(&all, label, text, value)
    };
    let mut rows = vec![
        row("layers".into(), &|v| format!("{v:.0}"), &|s| Some(f64::from(s.layer_count))),
        row("parameters".into(), &amount, &|s| Some(s.parameters as f64)),
        row("of these in layers".into(), &amount, &|s| {
            Some((s.parameters - s.embedding_parameters.min(s.parameters)) as f64)
        }),
        row("weights".into(), &bytes, &|s| Some(s.size_bytes as f64)),
    ];
    for (i, p) in eval.base.perplexity.iter().enumerate() {
        let label = format!("perplexity, {}", p.corpus);
        rows.push(with_error(
            row(label, &|v| format!("{v:.2}"), &|s| s.perplexity.get(i).map(|p| p.value)),
            &all,
            i,
        ));
    }
    for (i, task) in eval.base.tasks.iter().enumerate() {
        rows.push(accuracy(&all, i, &task.task, false));
        if task.acc_norm.is_some() {
            rows.push(accuracy(&all, i, &task.task, true));
        }
        if task.exact_match.is_some() {
            let of = |s: &Scores| s.tasks.get(i).and_then(|t| t.exact_match).map(|e| e.flexible);
            rows.push(row(format!("last number right, {}", task.task), &|v| format!("{v:.3}"), &of));
        }
        if task.perplexity.is_some() {
            let of = |s: &Scores| s.tasks.get(i).and_then(|t| t.perplexity);
            rows.push(row(format!("perplexity, {}", task.task), &|v| format!("{v:.2}"), &of));
        }
    }
    if all.iter().any(|s| s.speed.is_some()) {
        let rate = |v: f64| format!("{v:.1}");
        let speed = |label: &str, value: fn(&crate::job::report::Speed) -> f64| {
            row(label.into(), &rate, &|s| s.speed.as_ref().map(value))
        };
        rows.push(speed("prefill, tokens/s", |s| s.prefill_tokens_per_s));
        rows.push(speed("decode, tokens/s", |s| s.decode_tokens_per_s));
        rows.push(speed("latency, ms per token", |s| s.latency_ms));
        rows.push(speed("first token, ms", |s| s.first_token_ms));
    }
    if all.iter().any(|s| s.flops_per_token > 0) {
        rows.push(row("operations per token".into(), &amount, &|s| Some(s.flops_per_token as f64)));
    }
    rows.extend(written_rows(&all));
    if all.iter().any(|s| s.peak_memory_bytes > 0) {
        rows.push(row("peak memory".into(), &bytes, &|s| Some(s.peak_memory_bytes as f64)));
    }
    rows
}

/// A row whose cells come from `value`, said by `text`, with their ratios to the base model's.
fn row(
    all: &[&Scores],
    label: String,
    text: &dyn Fn(f64) -> String,
    value: &dyn Fn(&Scores) -> Option<f64>,
) -> Row {
    let base = value(all[0]);
    let cell = |(i, s): (usize, &&Scores)| {
        let found = value(s);
        let ratio = match (found, base) {
            (Some(v), Some(b)) if i > 0 && b != 0.0 => Some(v / b),
            _ => None,
        };
        Cell { text: found.map_or("–".into(), text), ratio }
    };
    Row { label, cells: all.iter().enumerate().map(cell).collect() }
}

/// What is known of the written texts.
fn written_rows(all: &[&Scores]) -> Vec<Row> {
    if all.iter().all(|s| s.generation.is_none()) {
        return Vec::new();
    }
    let written = |label: &str, digits: usize, value: &dyn Fn(&Generation) -> Option<f64>| {
        let text = move |v: f64| format!("{v:.digits$}");
        let mut row = row(all, label.into(), &text, &|s| s.generation.as_ref().and_then(value));
        // What is best at 0, or a likeness already, has no ratio worth telling.
        row.cells.iter_mut().for_each(|cell| cell.ratio = None);
        row
    };
    vec![
        written("broken texts, share", 2, &|g| Some(g.broken)),
        written("repetition in texts", 2, &|g| Some(g.repetition)),
        written("surprise of the base model, nats", 2, &|g| Some(g.surprise)),
        written("BLEU with base texts", 1, &|g| g.likeness.map(|l| l.bleu)),
        written("chrF with base texts", 1, &|g| g.likeness.map(|l| l.chrf)),
        written("ROUGE-L with base texts", 3, &|g| g.likeness.map(|l| l.rouge_l)),
        written("similarity to base texts", 3, &|g| g.likeness.map(|l| l.similarity)),
    ]
}

/// The row with the standard errors of perplexity `i`, where they are known.
fn with_error(mut row: Row, all: &[&Scores], i: usize) -> Row {
    for (cell, scores) in row.cells.iter_mut().zip(all) {
        if let Some(p) = scores.perplexity.get(i).filter(|p| p.stderr > 0.0) {
            write!(cell.text, " ± {:.2}", p.stderr).expect("a text takes all. This is a bug.");
        }
    }
    row
}

fn accuracy(all: &[&Scores], task: usize, name: &str, by_length: bool) -> Row {
    let cell = |s: &&Scores| {
        let score = s.tasks.get(task);
        let text = match (score, by_length) {
            (Some(t), false) => format!("{:.3} ± {:.3}", t.acc, t.stderr),
            (Some(t), true) => t.acc_norm.map_or("–".into(), |a| format!("{a:.3}")),
            (None, _) => "–".into(),
        };
        Cell { text, ratio: None }
    };
    let label = if by_length { format!("acc_norm, {name}") } else { format!("accuracy, {name}") };
    Row { label, cells: all.iter().map(cell).collect() }
}

fn scores(eval: &EvalReport) -> Vec<&Scores> {
    [&eval.base, &eval.pruned].into_iter().chain(&eval.healed).collect()
}

/// The checkpoint to ship: the healed one where there is one.
fn shipped(eval: &EvalReport) -> &Scores {
    eval.healed.as_ref().unwrap_or(&eval.pruned)
}

/// The result in a few sentences, the first one on its own.
pub fn summary(report: &Report) -> Vec<String> {
    let (base, out) = (&report.eval.base, shipped(&report.eval));
    let smaller = 100.0 * (1.0 - out.parameters as f64 / base.parameters.max(1) as f64);
    let mut said = vec![format!(
        "{} of {} layers cut, {smaller:.0} % fewer parameters",
        report.selection.dropped.len(),
        base.layer_count
    )];
    for (i, p) in base.perplexity.iter().enumerate() {
        let value = |s: &Scores| s.perplexity.get(i).map_or(f64::NAN, |p| p.value);
        let mut text = format!(
            "Perplexity on {} went from {:.2} to {:.2}",
            p.corpus,
            p.value,
            value(&report.eval.pruned)
        );
        if let Some(healed) = &report.eval.healed {
            write!(text, " by the cut and to {:.2} by healing", value(healed))
                .expect("a text takes all. This is a bug.");
        }
        said.push(text + ".");
    }
    for (i, t) in base.tasks.iter().enumerate() {
        if let Some(after) = out.tasks.get(i) {
            let (before, now) = (100.0 * t.acc, 100.0 * after.acc);
            let spread = 100.0 * after.stderr;
            said.push(format!("Accuracy on {} went from {before:.1} % to {now:.1} % ± {spread:.1}.", t.task));
        }
    }
    if let (Some(before), Some(now)) = (&base.speed, &out.speed) {
        let ratio = |now: f64, before: f64| now / before.max(f64::MIN_POSITIVE);
        said.push(format!(
            "Prefill runs at {:.2} times and decoding at {:.2} times the speed of the base model on this device.",
            ratio(now.prefill_tokens_per_s, before.prefill_tokens_per_s),
            ratio(now.decode_tokens_per_s, before.decode_tokens_per_s)
        ));
    }
    said
}

/// Sentences a person should read before using the result.
fn remarks(found: &Findings) -> Vec<String> {
    let mut out = Vec::new();
    for heal in found.heal.iter().filter(|h| h.reverted) {
        out.push(format!(
            "Healing by {} did not lower the held-out loss ({:.4} to {:.4} nats per token) and was thrown away.",
            heal.method, heal.held_out_before, heal.held_out_after
        ));
    }
    if !found.heal.is_empty() && found.heal.iter().all(|h| h.reverted) {
        out.push("No healing helped: the pruned checkpoint is the result.".into());
    }
    let (base, shipped) = (&found.eval.base, shipped(&found.eval));
    for (i, before) in base.perplexity.iter().enumerate() {
        if let Some(after) = shipped.perplexity.get(i).filter(|a| a.value > 2.0 * before.value) {
            let times = after.value / before.value;
            out.push(format!(
                "Perplexity on {} is {times:.1} times the base model's: drop fewer layers or heal longer.",
                before.corpus
            ));
        }
    }
    if let Some(rival) = rival(&found.profile, &found.selection) {
        out.push(format!(
            "The block that starts at layer {rival} is as near as the chosen one within two standard errors; \
             more calibration samples would tell them apart."
        ));
    }
    out.extend(remarks_on_choice(found));
    if found.spec.eval.perplexity.iter().any(|c| matches!(c, Corpus::Model { .. })) {
        out.push(
            "Perplexity was measured on text the base model wrote itself, which flatters the base model: \
             measure on text of your own before relying on it."
                .into(),
        );
    }
    if base.tasks.is_empty() {
        out.push(
            "No task was measured. Perplexity can stay low while question answering breaks \
             (arXiv 2403.17887, section 4): add tasks before relying on the result."
                .into(),
        );
    }
    if let Some(t) = shipped.tasks.iter().find(|t| t.stderr > 0.03) {
        out.push(format!(
            "{} items of {} leave a standard error of {:.1} points: small differences mean nothing.",
            t.n,
            t.task,
            100.0 * t.stderr
        ));
    }
    out.extend(remarks_on_items(&found.eval));
    let share = base.embedding_parameters as f64 / base.parameters.max(1) as f64;
    if share > 0.15 {
        out.push(format!(
            "{:.0} % of the base model's parameters are embedding and head, which cutting layers cannot shrink.",
            100.0 * share
        ));
    }
    out
}

/// What a person should know of what was measured on.
fn remarks_on_items(eval: &EvalReport) -> Vec<String> {
    let mut out = Vec::new();
    for Overlap { measured, healed_on, common, total } in &eval.overlap {
        out.push(format!(
            "{common} of the {total} items or passages of {measured} have 13 words in a row in common with the healing \
             text {healed_on}, which flatters the healed model."
        ));
    }
    for task in &eval.base.tasks {
        let TaskScore { task, n, duplicates, truncated, .. } = task;
        if *duplicates > 0 {
            out.push(format!("{duplicates} of the {n} items of {task} stand in its file more than once."));
        }
        if *truncated > 0 {
            out.push(format!(
                "The context of {truncated} of the {n} items of {task} is longer than the model can take and was cut \
                 from the left."
            ));
        }
    }
    out
}

/// What a person should know of how the layers were chosen.
fn remarks_on_choice(found: &Findings) -> Vec<String> {
    let mut out = Vec::new();
    let (spec, compared) = (&found.spec, &found.selection.compared);
    let Some(decided) = compared.first() else { return out };
    if decided.budget_exhausted {
        out.push(format!(
            "The search for the layers ended with its budget after {} sets: a larger one may find a better cut.",
            decided.cost.evaluations
        ));
    }
    let damage = |c: &Compared| c.damage.unwrap_or(f64::INFINITY);
    let best = compared.iter().min_by(|a, b| damage(a).total_cmp(&damage(b))).unwrap_or(decided);
    if damage(best) < damage(decided) {
        out.push(format!(
            "{} would have done {:.3} nats per token less damage than {}, which decided.",
            best.strategy.name(),
            damage(decided) - damage(best),
            decided.strategy.name()
        ));
    }
    let text = spec.prune.damage.corpus.as_ref().unwrap_or(&spec.calibration.corpus);
    if !matches!(text, Corpus::Model { .. }) && spec.eval.perplexity.contains(text) {
        out.push(
            "The layers were chosen on a text that perplexity was measured on, which flatters the result: measure on \
             text that chose nothing."
                .into(),
        );
    }
    let judged = |t: &&TaskSpec| spec.eval.tasks.iter().any(|e| e.items == t.items);
    if let Some(task) = spec.prune.damage.tasks.iter().find(judged) {
        out.push(format!(
            "The items of {} helped to choose the layers and judge the result, which flatters it.",
            task.task
        ));
    }
    out
}

/// Start of another block that may well be nearer than the chosen one.
fn rival(profile: &LayerProfile, selection: &LayerSelection) -> Option<u32> {
    let chosen = contiguous(&selection.dropped)?;
    if selection.strategy != Strategy::BlockEndpoint {
        return None;
    }
    let stderr = &profile.stderr[chosen.len as usize - 1];
    let error = |start: u32| stderr[start as usize];
    let close = |c: &&crate::job::report::Candidate| {
        let spread = error(c.start).hypot(error(chosen.start));
        c.start != chosen.start && c.score - selection.score < 2.0 * spread
    };
    selection.candidates.iter().filter(close).min_by(|a, b| a.score.total_cmp(&b.score)).map(|c| c.start)
}

/// The dropped layers as one block, if they are one.
fn contiguous(dropped: &[u32]) -> Option<Block> {
    match Block::runs(dropped)[..] {
        [block] => Some(block),
        _ => None,
    }
}

/// 134515008 as `134.5 M`.
fn amount(value: f64) -> String {
    scaled(value, &["", " k", " M", " G", " T"])
}

fn bytes(value: f64) -> String {
    scaled(value, &[" B", " kB", " MB", " GB", " TB"])
}

fn scaled(value: f64, units: &[&str]) -> String {
    let step = (value.max(1.0).log10() / 3.0) as usize;
    let step = step.min(units.len() - 1);
    let digits = usize::from(step > 0);
    format!("{:.digits$}{}", value / 1000f64.powi(step as i32), units[step])
}
