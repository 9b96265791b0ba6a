//! How the number of layers was found and how they went, for people.

use super::html::{escape, put, table};
use super::svg::runs_text;
use crate::job::budget::{BudgetReport, ProbeOf};
use crate::job::report::Report;

/// What went in which round, where there were several.
pub fn rounds(out: &mut String, report: &Report) {
    let rounds = &report.selection.rounds;
    if rounds.is_empty() {
        return;
    }
    put(out, "<section><h2>In rounds</h2><p>Numbers are those of the base model.</p>");
    let rows = rounds.iter().enumerate();
    let rows = rows.map(|(i, went)| vec![(i + 1).to_string(), went.len().to_string(), runs_text(went)]);
    table(out, &["round", "layers", "which"], &rows.collect::<Vec<_>>());
    put(out, "</section>");
}

/// What was tried, against what was promised.
pub fn search(out: &mut String, report: &Report) {
    let Some(BudgetReport { promises, layers, probes }) = &report.budget else { return };
    put(out, "<section><h2>How many layers</h2>");
    let why = match promises.weigh {
        None => "keeps what was asked for",
        Some(_) => "comes off best of those that keep what was asked for",
    };
    let chosen = format!("{layers} layers go: the number that {why}, found by trying these.");
    put(out, &format!("<p>{}</p>", escape(&chosen)));
    let rows = probes.iter().map(|probe| {
        let of = match probe.of {
            ProbeOf::Costs => "the cut alone",
            ProbeOf::Quality | ProbeOf::Weighed => "the whole job",
        };
        let kept = match (probe.weighed, probe.kept) {
            (Some(weighed), _) => format!("weighs {weighed:+.3}"),
            (None, true) => "kept".into(),
            (None, false) => "not kept".into(),
        };
        vec![probe.layers.to_string(), runs_text(&probe.dropped), of.into(), kept, probe.said.join(" ")]
    });
    table(out, &["layers", "which", "tried", "promises", "measured"], &rows.collect::<Vec<_>>());
    put(out, "</section>");
}
