//! Several reports side by side.

use super::{Row, comparison};
use crate::job::report::{Estimate, Report};

/// A row of labels and cells for what `reports` tell of the checkpoints that they ship; where all have the same base
/// model, that stands in front. The first row holds the names.
pub fn side_by_side(reports: &[(String, Report)]) -> Vec<(String, Vec<String>)> {
    let mut columns: Vec<(String, Vec<(String, String)>)> = Vec::new();
    if reports.iter().all(|(_, report)| report.model_digest == reports[0].1.model_digest) {
        columns.push(("base".into(), base(reports)));
    }
    for (name, report) in reports {
        let of = |row: Row| row.cells.into_iter().last().map(|cell| (row.label, cell.text));
        let scores = comparison(&report.eval).into_iter().filter_map(of);
        columns.push((name.clone(), judged(report).into_iter().chain(scores).collect()));
    }
    let mut labels: Vec<&String> = Vec::new();
    for (label, _) in columns.iter().rev().flat_map(|(_, cells)| cells) {
        if !labels.contains(&label) {
            labels.push(label);
        }
    }
    let cell = |cells: &[(String, String)], label: &str| {
        cells.iter().find(|(l, _)| l == label).map_or_else(|| "–".to_owned(), |(_, text)| text.clone())
    };
    let names = columns.iter().map(|(name, _)| name.clone()).collect();
    let rows = labels
        .iter()
        .map(|label| ((*label).clone(), columns.iter().map(|(_, cells)| cell(cells, label)).collect()));
    std::iter::once((String::new(), names)).chain(rows).collect()
}

/// What all reports that tell it say alike of the base model: its scores on other items, or at another time of day, are
/// not those that a checkpoint is to be compared with.
fn base(reports: &[(String, Report)]) -> Vec<(String, String)> {
    let mut out: Vec<(String, String)> = Vec::new();
    for row in reports.iter().flat_map(|(_, report)| comparison(&report.eval)) {
        let Some(cell) = row.cells.into_iter().next() else { continue };
        match out.iter_mut().find(|(label, _)| *label == row.label) {
            None => out.push((row.label, cell.text)),
            Some((_, said)) if *said != cell.text => *said = "differs".into(),
            Some(_) => {}
        }
    }
    out
}

/// What a report says beside the scores.
fn judged(report: &Report) -> Vec<(String, String)> {
    let mut out = Vec::new();
    if let Some(verdict) = &report.verdict {
        out.push(("verdict".to_owned(), verdict.decision.name().to_owned()));
    }
    let dropped: Vec<String> = report.selection.dropped.iter().map(ToString::to_string).collect();
    out.push(("layers cut".to_owned(), dropped.join(",")));
    if let Some(compared) = report.eval.compared.last() {
        let told =
            |e: Estimate| format!("{:.1} % ({:.1} to {:.1})", 100.0 * e.value, 100.0 * e.low, 100.0 * e.high);
        out.extend(compared.retention.map(|e| ("accuracy above chance left".to_owned(), told(e))));
    }
    out
}
