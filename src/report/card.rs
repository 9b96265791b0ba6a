//! The model card that lies beside the weights: Markdown under the front matter of the Hugging Face Hub.

use std::fmt::Write;

use super::{columns, comparison, exports, shipped, summary};
use crate::job::report::Report;
use crate::job::spec::ModelSource;
use crate::report::svg::runs_text;

/// `README.md` of the checkpoint to ship, under the base model's `licence` (lines of front matter). It leaves out speed and memory: they differ from run to run and from device
/// to device, and what lies beside the weights is the same for the same spec.
pub fn card(report: &Report, licence: &[String]) -> String {
    let mut report = report.clone();
    let eval = &mut report.eval;
    for scores in [&mut eval.base, &mut eval.pruned].into_iter().chain(&mut eval.healed) {
        (scores.speed, scores.peak_memory_bytes) = (None, 0);
    }
    let mut out = front_matter(&report, licence);
    // A text takes all that is written to it.
    write_body(&mut out, &report).ok();
    out
}

/// The part that the Hub reads. Every text is quoted as in JSON, which YAML holds.
fn front_matter(report: &Report, licence: &[String]) -> String {
    let quoted = |text: &str| serde_json::to_string(text).expect("a text is JSON. This is a bug.");
    let mut out = String::from("---\nlibrary_name: transformers\npipeline_tag: text-generation\n");
    if let ModelSource::Hub { repo, .. } = &report.spec.model {
        out += &format!("base_model: {}\n", quoted(repo));
    }
    licence.iter().for_each(|line| out += &format!("{line}\n"));
    out += "tags:\n- secateur\n- layer-pruning\n";
    let scores = shipped(&report.eval);
    if !scores.tasks.is_empty() || !scores.perplexity.is_empty() {
        out += &format!("model-index:\n- name: {}\n  results:\n", quoted(&name(report)));
    }
    let mut result = |data: &str, metrics: &[(&str, f64)]| {
        let data = quoted(data);
        out += &format!(
            "  - task:\n      type: text-generation\n    dataset:\n      name: {data}\n      type: {data}\n    metrics:\n"
        );
        for (kind, value) in metrics {
            out += &format!("    - type: {kind}\n      value: {value}\n");
        }
    };
    for task in &scores.tasks {
        let mut metrics = vec![("acc", task.acc)];
        metrics.extend(task.acc_norm.map(|acc| ("acc_norm", acc)));
        result(&task.task, &metrics);
    }
    for text in &scores.perplexity {
        result(&text.corpus, &[("perplexity", text.value)]);
    }
    out + "---\n\n"
}

/// On one line: a heading has no more.
fn name(report: &Report) -> String {
    let name = report.spec.name.as_deref().unwrap_or("Pruned model");
    name.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn write_body(out: &mut String, report: &Report) -> std::fmt::Result {
    writeln!(out, "# {}\n", plain(&name(report)))?;
    for sentence in summary(report) {
        writeln!(out, "{}\n", plain(&sentence))?;
    }
    if let Some(verdict) = &report.verdict {
        writeln!(out, "**Verdict: {}.**\n", verdict.decision.name())?;
        verdict.reasons.iter().try_for_each(|reason| writeln!(out, "- {}", plain(reason)))?;
        writeln!(out)?;
    }
    writeln!(out, "## Before and after\n")?;
    let columns = columns(&report.eval);
    writeln!(out, "| | {} |\n|---|{}", columns.join(" | "), "---:|".repeat(columns.len()))?;
    for row in comparison(&report.eval) {
        let cells: Vec<String> = row
            .cells
            .iter()
            .map(|cell| match cell.ratio {
                Some(ratio) => format!("{} (×{ratio:.2})", cell.text),
                None => cell.text.clone(),
            })
            .collect();
        writeln!(out, "| {} | {} |", plain(&row.label), cells.join(" | "))?;
    }
    let (head, rows) = exports(&report.eval);
    if !rows.is_empty() {
        writeln!(out, "\n## Cut and quantised\n")?;
        let head: Vec<String> = head.iter().map(|cell| plain(cell)).collect();
        writeln!(out, "| {} |\n|---|{}", head.join(" | "), "---:|".repeat(head.len() - 1))?;
        for row in rows {
            let row: Vec<String> = row.iter().map(|cell| plain(cell)).collect();
            writeln!(out, "| {} |", row.join(" | "))?;
        }
        writeln!(out, "\nEach GGUF file was measured by its own weights on the same text.")?;
    }
    if !report.remarks.is_empty() {
        writeln!(out, "\n## Before you use it\n")?;
        report.remarks.iter().try_for_each(|remark| writeln!(out, "- {}", plain(remark)))?;
    }
    writeln!(out, "\n## How it was made\n")?;
    writeln!(out, "Cut from the base model: {}, counted from 0.", runs_text(&report.selection.dropped))?;
    let healing: Vec<&str> =
        report.heal.iter().filter(|heal| !heal.reverted).map(|heal| heal.method.as_str()).collect();
    if !healing.is_empty() {
        writeln!(out, "Healed by {}.", healing.join(", then "))?;
    }
    writeln!(
        out,
        "Chosen by `{}`; seed {}; secateur {}; base model, BLAKE3 over its content: `{}`.",
        report.selection.strategy.name(),
        report.spec.seed,
        report.secateur_version,
        report.model_digest
    )
}

/// Text that Markdown takes for nothing but text.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '\\' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '#' | '|') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}
