//! Whether the result can be shipped: what was measured against the gates of the spec.

use std::cmp::Ordering;

use super::bytes;
use crate::job::budget::Weights;
use crate::job::report::{Comparison, Decision, Estimate, EvalReport, Scores, Verdict};
use crate::job::spec::{EvalSpec, Gates};

/// The verdict on the healed checkpoint where there is one, else on the pruned one.
pub fn judge(eval: &EvalReport, spec: &EvalSpec) -> Verdict {
    let nothing = Comparison::default();
    let compared = eval.compared.last().unwrap_or(&nothing);
    let mut rulings = broken(eval, compared, &spec.gates);
    rulings.extend(retention(eval, compared, spec));
    rulings.extend(perplexity(compared, &spec.gates));
    rulings.extend(cost(super::shipped(eval), compared, &spec.gates));
    let decision = rulings.iter().map(|ruling| ruling.0).max().unwrap_or(Decision::Review);
    let mut reasons: Vec<String> = match decision {
        Decision::Ship => rulings.into_iter().map(|ruling| ruling.1).collect(),
        // What weighs most comes first.
        Decision::Review | Decision::Reject => {
            let mut open: Vec<Ruling> = rulings.into_iter().filter(|r| r.0 != Decision::Ship).collect();
            open.sort_by_key(|ruling| std::cmp::Reverse(ruling.0));
            open.into_iter().map(|ruling| ruling.1).collect()
        }
    };
    if reasons.is_empty() {
        reasons.push("There is no gate to pass; name some in eval.gates.".into());
    }
    let checkpoint = if eval.healed.is_some() { "healed" } else { "pruned" };
    Verdict { decision, checkpoint: checkpoint.into(), reasons }
}

/// What one gate says, and why.
struct Ruling(Decision, String);

/// Which side of the limit is the good one.
#[derive(Clone, Copy)]
enum Limit {
    AtLeast(f64),
    AtMost(f64),
}

/// Where an interval lies wholly on one side of the limit, that is sure.
fn rule(what: &str, estimate: Estimate, limit: Limit, shown: fn(f64) -> String) -> Ruling {
    let Estimate { value, low, high } = estimate;
    let (word, bound, worst, best) = match limit {
        Limit::AtLeast(bound) => ("at least", bound, low.total_cmp(&bound), high.total_cmp(&bound)),
        Limit::AtMost(bound) => ("at most", bound, bound.total_cmp(&high), bound.total_cmp(&low)),
    };
    let (decision, said) = match (worst, best) {
        (Ordering::Greater | Ordering::Equal, _) => (Decision::Ship, "passed"),
        (Ordering::Less, Ordering::Less) => (Decision::Reject, "failed"),
        (Ordering::Less, Ordering::Greater | Ordering::Equal) => (Decision::Review, "not sure"),
    };
    let interval = if low == high { String::new() } else { format!(" ({} to {})", shown(low), shown(high)) };
    let bound = shown(bound);
    Ruling(decision, format!("{what}: {}{interval}, wanted {word} {bound}: {said}.", shown(value)))
}

fn open(what: &str, why: &str) -> Ruling {
    Ruling(Decision::Review, format!("{what}: {why}."))
}

fn broken(eval: &EvalReport, compared: &Comparison, gates: &Gates) -> Vec<Ruling> {
    const WHAT: &str = "Texts that the base model writes well and this one does not";
    let Some(limit) = gates.max_broken else { return Vec::new() };
    vec![match (compared.broken, &eval.base.generation) {
        (Some(estimate), _) => rule(WHAT, estimate, Limit::AtMost(limit), percent),
        (None, Some(_)) => open(WHAT, "most of the base model's own are broken, so they say nothing"),
        (None, None) => open(WHAT, "nothing was written, because eval.generation is off"),
    }]
}

fn retention(eval: &EvalReport, compared: &Comparison, spec: &EvalSpec) -> Vec<Ruling> {
    const AT_CHANCE: &str = "the base model is not surely better than chance on these items";
    let mut out = Vec::new();
    if let Some(limit) = spec.gates.min_retention {
        const WHAT: &str = "Accuracy above chance that is left, all tasks together";
        out.push(match compared.retention {
            Some(estimate) => rule(WHAT, estimate, Limit::AtLeast(limit), percent),
            None if eval.base.tasks.is_empty() => open(WHAT, "no task was measured"),
            None => open(WHAT, AT_CHANCE),
        });
    }
    for task in &spec.tasks {
        let Some(limit) = task.min_retention else { continue };
        let what = format!("Accuracy above chance that is left on {}", task.task);
        let change = compared.tasks.iter().find(|change| change.task == task.task);
        out.push(match change.and_then(|change| change.retention) {
            Some(estimate) => rule(&what, estimate, Limit::AtLeast(limit), percent),
            None => open(&what, AT_CHANCE),
        });
    }
    out
}

fn perplexity(compared: &Comparison, gates: &Gates) -> Vec<Ruling> {
    let Some(limit) = gates.max_perplexity_ratio else { return Vec::new() };
    let ruled = compared.perplexity.iter().map(|change| {
        let what = format!("Perplexity on {}, over the base model's", change.corpus);
        rule(&what, change.ratio, Limit::AtMost(limit), times)
    });
    let ruled: Vec<Ruling> = ruled.collect();
    if ruled.is_empty() { vec![open("Perplexity", "no text was measured")] } else { ruled }
}

fn cost(scores: &Scores, compared: &Comparison, gates: &Gates) -> Vec<Ruling> {
    let mut out = Vec::new();
    if let Some(limit) = gates.min_speedup {
        const WHAT: &str = "Decoding speed over the base model's";
        out.push(match compared.decode_speedup {
            Some(estimate) => rule(WHAT, estimate, Limit::AtLeast(limit), times),
            None => open(WHAT, "it was not measured, because eval.speed is off"),
        });
    }
    if let Some(limit) = gates.max_latency_ms {
        const WHAT: &str = "Latency of a decoded token";
        out.push(match &scores.speed {
            // The median of some hundred tokens.
            Some(speed) => rule(WHAT, exact(speed.latency_ms), Limit::AtMost(limit), milliseconds),
            None => open(WHAT, "it was not measured, because eval.speed is off"),
        });
    }
    if let Some(limit) = gates.max_size_bytes {
        let size = exact(scores.size_bytes as f64);
        out.push(rule("Size of the weights", size, Limit::AtMost(limit as f64), bytes));
    }
    if let Some(limit) = gates.max_memory_bytes {
        const WHAT: &str = "Peak memory";
        out.push(match scores.peak_memory_bytes {
            0 => open(WHAT, "this system does not tell it"),
            peak => rule(WHAT, exact(peak as f64), Limit::AtMost(limit as f64), bytes),
        });
    }
    out
}

/// The weighed sum of what is lost, the less the better, and what it is made of; none where a part of it was not
/// measured.
pub fn weigh(eval: &EvalReport, weights: Weights) -> (Option<f64>, Vec<String>) {
    let nothing = Comparison::default();
    let compared = eval.compared.last().unwrap_or(&nothing);
    let Weights { perplexity, accuracy, size, speed } = weights;
    let nats: Vec<f64> = compared.perplexity.iter().map(|change| change.ratio.value.ln()).collect();
    let lost = |estimate: Option<Estimate>| estimate.map(|e| -e.value.max(f64::MIN_POSITIVE).ln());
    let sizes = super::shipped(eval).size_bytes as f64 / eval.base.size_bytes.max(1) as f64;
    let parts = [
        ("perplexity", perplexity, (!nats.is_empty()).then(|| nats.iter().sum::<f64>() / nats.len() as f64)),
        ("accuracy", accuracy, lost(compared.retention)),
        ("size", size, Some(sizes.ln())),
        ("speed", speed, lost(compared.decode_speedup)),
    ];
    let weighed = parts.into_iter().filter(|(_, weight, _)| *weight > 0.0);
    let sum: Option<f64> = weighed.clone().map(|(_, weight, lost)| Some(weight * lost?)).sum();
    let said = weighed.map(|(name, weight, lost)| match lost {
        Some(lost) => format!("{name} {weight} × {lost:+.3}."),
        None => format!("{name} could not be weighed: the base model is not surely better than chance."),
    });
    (sum, said.collect())
}

const fn exact(value: f64) -> Estimate {
    Estimate { value, low: value, high: value }
}

fn milliseconds(ms: f64) -> String {
    format!("{ms:.2} ms")
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

fn times(ratio: f64) -> String {
    format!("×{ratio:.2}")
}
