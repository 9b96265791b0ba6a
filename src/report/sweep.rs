//! A sweep as one page: its table and its curves.

use super::html::{escape, figure, list, opened, put, table};
use super::lines::{Point, Series, lines};
use super::plot::Figure;
use super::{bytes, svg::runs_text};
use crate::job::sweep::{Outcome, SweepReport, SweepRow};

/// The whole page.
pub fn page(report: &SweepReport) -> String {
    let name = report.spec.name.clone().unwrap_or_else(|| "Sweep".into());
    let done = report.rows.iter().filter(|row| row.outcome.is_some()).count();
    let failed = report.rows.iter().filter(|row| row.failure.is_some()).count();
    let failed = if failed > 0 { format!(", {failed} failed") } else { String::new() };
    let mut out = opened(&name, &format!("{done} of {} jobs done{failed}", report.rows.len()));
    put(
        &mut out,
        "<p>All against the base model. Those on the front are beaten by no other one in perplexity, accuracy, size \
         and latency together.</p></header>",
    );
    list(&mut out, "Without a result", &missing(report));
    put(&mut out, "<section><h2>Side by side</h2>");
    let (head, rows) = side_by_side(report);
    table(&mut out, &head, &rows);
    put(&mut out, "</section><section><h2>What each layer costs</h2>");
    for (plot, caption) in plots(report) {
        figure(&mut out, &plot, caption);
    }
    put(
        &mut out,
        &format!(
            "</section><footer>secateur {}</footer></main></body></html>\n",
            escape(&report.secateur_version)
        ),
    );
    out
}

/// Its heads and rows, for a page or a terminal; what no job has, has no column.
#[must_use]
pub fn side_by_side(report: &SweepReport) -> (Vec<&'static str>, Vec<Vec<String>>) {
    const HEAD: [&str; 10] = [
        "job",
        "front",
        "verdict",
        "cut",
        "share",
        "perplexity",
        "accuracy",
        "decode",
        "weights",
        "heal steps",
    ];
    let rows: Vec<Vec<String>> = report.rows.iter().filter_map(cells).collect();
    let used = |i: &usize| rows.iter().any(|row| !matches!(row[*i].as_str(), "" | "–" | "0"));
    let columns: Vec<usize> = (0..HEAD.len()).filter(used).collect();
    let kept = |row: &Vec<String>| columns.iter().map(|i| row[*i].clone()).collect();
    (columns.iter().map(|i| HEAD[*i]).collect(), rows.iter().map(kept).collect())
}

/// What became of the jobs that have no result, in sentences.
#[must_use]
pub fn missing(report: &SweepReport) -> Vec<String> {
    let sentence = |row: &SweepRow| match &row.failure {
        Some(failure) => Some(format!("{} failed: {}", row.name, failure.message)),
        None if row.outcome.is_none() => Some(format!("{} has not run yet", row.name)),
        None => None,
    };
    report.rows.iter().filter_map(sentence).collect()
}

fn cells(row: &SweepRow) -> Option<Vec<String>> {
    let none = || "–".to_owned();
    let outcome = row.outcome.as_ref()?;
    let times = |ratio: Option<f64>| ratio.map_or_else(none, |ratio| format!("×{ratio:.3}"));
    let accuracy = match (outcome.accuracy_ratio, outcome.accuracy_ratio_stderr) {
        (Some(ratio), Some(stderr)) => format!("×{ratio:.3} ± {stderr:.3}"),
        (ratio, _) => times(ratio),
    };
    Some(vec![
        row.name.clone(),
        if row.on_front { "●".into() } else { String::new() },
        outcome.verdict.map_or_else(none, |verdict| verdict.name().to_owned()),
        runs_text(&outcome.dropped),
        format!("{:.1}\u{a0}%", 100.0 * outcome.rate),
        times(outcome.perplexity_ratio),
        accuracy,
        times(outcome.speedup),
        bytes(outcome.size_bytes as f64),
        outcome.heal_steps.to_string(),
    ])
}

fn plots(report: &SweepReport) -> Vec<(Figure, &'static str)> {
    let mut out = Vec::new();
    let layers = |outcome: &Outcome| outcome.dropped.len() as f64;
    let perplexity = |outcome: &Outcome| outcome.perplexity_ratio.map(|ratio| ratio - 1.0);
    let lost = |outcome: &Outcome| outcome.accuracy_ratio.map(|ratio| 1.0 - ratio);
    let series = by_layers(report, layers, perplexity);
    if !series.is_empty() {
        let plot = lines(&series, ("layers cut", "perplexity above the base model's (share)"));
        out.push((
            plot.figure("perplexity", "Perplexity by layers cut"),
            "Perplexity: 0 is the base model's.",
        ));
    }
    let series = by_layers(report, layers, lost);
    if !series.is_empty() {
        let plot = lines(&series, ("layers cut", "accuracy lost (share of the base model's)"));
        out.push((
            plot.figure("accuracy", "Accuracy lost by layers cut"),
            "Accuracy: 0 is the base model's.",
        ));
    }
    let series = front(report);
    if series.iter().any(|series| !series.points.is_empty()) {
        let plot = lines(&series, ("size of the weights, MB", "perplexity above the base model's (share)"));
        out.push((
            plot.figure("front", "Perplexity against size"),
            "What is bought with size: lower and further left is better.",
        ));
    }
    out
}

/// A line for each strategy and way of healing.
fn by_layers(
    report: &SweepReport,
    x: impl Fn(&Outcome) -> f64,
    y: impl Fn(&Outcome) -> Option<f64>,
) -> Vec<Series> {
    let mut all: Vec<Series> = Vec::new();
    for row in &report.rows {
        let Some((outcome, y)) = row.outcome.as_ref().and_then(|o| Some((o, y(o)?))) else { continue };
        let strategy = (!report.spec.axes.strategy.is_empty()).then(|| row.strategy.name().to_owned());
        let parts: Vec<String> = strategy.into_iter().chain(row.heal.clone()).collect();
        let name = if parts.is_empty() { row.strategy.name().to_owned() } else { parts.join(", ") };
        let point = Point { x: x(outcome), y, what: format!("{}: {y:.4}", row.name) };
        match all.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => all.push(Series { name, points: vec![point], joined: true }),
        }
    }
    for series in &mut all {
        series.points.sort_by(|a, b| a.x.total_cmp(&b.x));
    }
    all
}

/// Those that nothing beats, and the others.
fn front(report: &SweepReport) -> Vec<Series> {
    let of = |on_front: bool, name: &str| {
        let rows = report.rows.iter().filter(|row| row.on_front == on_front);
        let point = |row: &SweepRow| {
            let outcome = row.outcome.as_ref()?;
            let y = outcome.perplexity_ratio? - 1.0;
            Some(Point { x: outcome.size_bytes as f64 / 1e6, y, what: format!("{}: {y:.4}", row.name) })
        };
        let mut points: Vec<Point> = rows.filter_map(point).collect();
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        Series { name: name.into(), points, joined: false }
    };
    vec![of(true, "front"), of(false, "beaten")]
}
