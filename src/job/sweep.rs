//! Many jobs asked for at once: one spec, and axes along which it varies. What came out of them side by side.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::complaint::Complaint;
use super::report::{Decision, Failure, Report, Scores};
use super::shape::Shapes;
use super::spec::{HealMethod, JobSpec, PruneAmount, Strategy};

/// A spec and the axes along which it varies: a job for every combination of their values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SweepSpec {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What all jobs have in common. `prune.amount` may be left out where an axis says it.
    pub base: JobSpec,
    pub axes: Axes,
    /// Jobs that may run at the same time; as many as there are devices when absent. On the command line they run one
    /// after another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_parallel: Option<u32>,
}

/// Values to take by turns. An axis that is left out stays as `base` has it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Axes {
    /// How many layers go.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub amount: Vec<PruneAmount>,
    /// The same, as a range of layers; after those of `amount`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<LayerRange>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub strategy: Vec<Strategy>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub heal: Vec<HealVariant>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub seed: Vec<u64>,
}

/// `from`, `from + step`, … up to `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LayerRange {
    pub from: u32,
    pub to: u32,
    #[serde(default = "one")]
    pub step: u32,
}

const fn one() -> u32 {
    1
}

/// A way of healing, by a name of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HealVariant {
    pub name: String,
    /// As `heal` of a job; `[]` heals nothing.
    pub methods: Vec<HealMethod>,
}

/// One job of a sweep.
#[derive(Debug, Clone, PartialEq)]
pub struct Child {
    /// Unlike that of any other child; fit for a directory.
    pub name: String,
    /// The way of healing, where that is an axis.
    pub heal: Option<String>,
    pub spec: JobSpec,
}

/// More jobs than a sweep may have.
const MOST_CHILDREN: usize = 500;

impl SweepSpec {
    /// Reads a sweep with all its jobs.
    ///
    /// # Errors
    /// Every complaint about its shape, its axes and its jobs, each complaint once.
    pub fn read(mut value: Value) -> Result<(Self, Vec<Child>), Vec<Complaint>> {
        let shape = Shapes::of::<Self>().check("SweepSpec", &mut value);
        if !shape.is_empty() {
            return Err(shape);
        }
        let wrong = |message: String| vec![Complaint { pointer: String::new(), message }];
        let spec: Self = serde_json::from_value(value).map_err(|e| wrong(e.to_string()))?;
        let complaints = spec.check_axes();
        if !complaints.is_empty() {
            return Err(complaints);
        }
        let children = spec.children();
        if children.iter().any(|child| child.spec.publish.is_some()) {
            let message =
                "the jobs of a sweep would replace each other there; publish the one that you choose";
            return Err(vec![Complaint { pointer: "/base/publish".into(), message: message.into() }]);
        }
        let mut said = BTreeSet::new();
        let of_child = |child: &Child| {
            let complaint = |c: Complaint| Complaint { pointer: format!("/base{}", c.pointer), ..c };
            child.spec.validate().into_iter().map(complaint).collect::<Vec<_>>()
        };
        let mut all: Vec<Complaint> = children.iter().flat_map(of_child).collect();
        all.retain(|c| said.insert((c.pointer.clone(), c.message.clone())));
        if all.is_empty() { Ok((spec, children)) } else { Err(all) }
    }

    fn check_axes(&self) -> Vec<Complaint> {
        let mut out = Vec::new();
        let mut add =
            |pointer: &str, message: String| out.push(Complaint { pointer: pointer.into(), message });
        let axes = &self.axes;
        if self.max_parallel == Some(0) {
            add("/max_parallel", "must be at least 1; leave it out for no limit".into());
        }
        if let Some(LayerRange { from, to, step }) = axes.layers
            && (from == 0 || step == 0 || to < from)
        {
            add(
                "/axes/layers",
                format!("from {from} to {to} by {step} is no range; give e.g. from 3 to 12 by 3"),
            );
            return out;
        }
        let mut names = BTreeSet::new();
        for (i, variant) in axes.heal.iter().enumerate() {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_+.".contains(c);
            if variant.name.is_empty() || variant.name.len() > 40 || !variant.name.chars().all(plain) {
                add(
                    &format!("/axes/heal/{i}/name"),
                    "must have 1 to 40 of the characters A-Z a-z 0-9 - _ + .".into(),
                );
            }
            if !names.insert(&variant.name) {
                add(&format!("/axes/heal/{i}/name"), format!("`{}` is there already", variant.name));
            }
        }
        let count = [self.amount_count(), axes.strategy.len(), axes.heal.len(), axes.seed.len()];
        let count = count.into_iter().fold(1usize, |product, n| product.saturating_mul(n.max(1)));
        if count > MOST_CHILDREN {
            add("/axes", format!("make {count} jobs; a sweep may have {MOST_CHILDREN}: take values away"));
        }
        if count == 1 {
            add("/axes", "make one job only; give an axis several values, or run the job alone".into());
        }
        out
    }

    /// How many there are, without making them: a range may be of thousands of millions.
    fn amount_count(&self) -> usize {
        let range = self
            .axes
            .layers
            .map_or(0, |LayerRange { from, to, step }| (to - from) as usize / step as usize + 1);
        self.axes.amount.len() + range
    }

    fn amounts(&self) -> Vec<PruneAmount> {
        let LayerRange { from, to, step } =
            self.axes.layers.unwrap_or(LayerRange { from: 1, to: 0, step: 1 });
        let range = (from..=to).step_by(step.max(1) as usize).map(PruneAmount::Layers);
        self.axes.amount.iter().copied().chain(range).collect()
    }

    /// A job for every combination, the amounts first, so that neighbours differ in what comes last on the road.
    #[must_use]
    pub fn children(&self) -> Vec<Child> {
        /// `None` where there is no such axis.
        fn values<T: Clone>(of: &[T]) -> Vec<Option<T>> {
            if of.is_empty() { vec![None] } else { of.iter().cloned().map(Some).collect() }
        }
        let axes = &self.axes;
        let mut out: Vec<Child> = Vec::new();
        for amount in values(&self.amounts()) {
            for strategy in values(&axes.strategy) {
                for heal in values(&axes.heal) {
                    for seed in values(&axes.seed) {
                        let mut spec = self.base.clone();
                        spec.prune.amount = amount.or(spec.prune.amount);
                        spec.prune.strategy = strategy.unwrap_or(spec.prune.strategy);
                        spec.seed = seed.unwrap_or(spec.seed);
                        if let Some(heal) = &heal {
                            spec.heal.clone_from(&heal.methods);
                        }
                        let parts = [
                            amount.map(|amount| match amount {
                                PruneAmount::Layers(n) => format!("{n:02}-layers"),
                                PruneAmount::Fraction(f) => format!("{:04.1}-percent", 100.0 * f),
                                PruneAmount::Budget(budget) => budget.name(),
                            }),
                            strategy.map(|strategy| strategy.name().to_owned()),
                            heal.as_ref().map(|heal| heal.name.clone()),
                            seed.map(|seed| format!("seed-{seed}")),
                        ];
                        let name = parts.into_iter().flatten().collect::<Vec<_>>().join(".");
                        spec.name = Some(name.clone());
                        out.push(Child { name, heal: heal.as_ref().map(|heal| heal.name.clone()), spec });
                    }
                }
            }
        }
        let mut seen = BTreeSet::new();
        out.retain(|child| seen.insert(child.name.clone()));
        out
    }
}

/// A sweep's results so far (`sweep.json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SweepReport {
    pub secateur_version: String,
    pub spec: SweepSpec,
    /// The base model as it was measured first.
    pub base: Option<Scores>,
    pub rows: Vec<SweepRow>,
}

/// One job of a sweep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SweepRow {
    pub name: String,
    pub strategy: Strategy,
    /// The way of healing, where that is an axis.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heal: Option<String>,
    pub seed: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// Why it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// No other job is at least as good in everything that was measured, and better in something.
    pub on_front: bool,
}

/// What a job came to: the checkpoint it would ship, against the base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Outcome {
    /// Ascending, from 0.
    pub dropped: Vec<u32>,
    /// Share of the base model's layers that went.
    pub rate: f64,
    /// Perplexity over the base model's: the geometric mean over texts. Absent where no text was measured.
    pub perplexity_ratio: Option<f64>,
    /// Mean accuracy over the base model's. Absent where no task was measured.
    pub accuracy_ratio: Option<f64>,
    /// Standard error of `accuracy_ratio`, from the items of the job's own checkpoint.
    pub accuracy_ratio_stderr: Option<f64>,
    pub size_bytes: u64,
    pub peak_memory_bytes: u64,
    /// Decoded tokens a second over the base model's.
    pub speedup: Option<f64>,
    pub latency_ms: Option<f64>,
    /// Optimizer steps of healing that was kept.
    pub heal_steps: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Decision>,
}

impl SweepReport {
    /// Before any job is done.
    #[must_use]
    pub fn new(spec: SweepSpec, children: &[Child]) -> Self {
        let rows = children.iter().map(|child| SweepRow {
            name: child.name.clone(),
            strategy: child.spec.prune.strategy,
            heal: child.heal.clone(),
            seed: child.spec.seed,
            outcome: None,
            failure: None,
            on_front: false,
        });
        let rows = rows.collect();
        Self { secateur_version: env!("CARGO_PKG_VERSION").to_owned(), spec, base: None, rows }
    }
}

impl Outcome {
    #[must_use]
    pub fn of(report: &Report) -> Self {
        let base = &report.eval.base;
        let shipped = report.eval.healed.as_ref().unwrap_or(&report.eval.pruned);
        let nll = base.perplexity.iter().zip(&shipped.perplexity);
        let nll: Vec<f64> = nll.map(|(b, s)| s.nll_per_token - b.nll_per_token).collect();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let acc = |scores: &Scores| mean(&scores.tasks.iter().map(|task| task.acc).collect::<Vec<_>>());
        let tasks = !base.tasks.is_empty() && acc(base) > 0.0;
        let variance: f64 = shipped.tasks.iter().map(|task| task.stderr.powi(2)).sum();
        let speed = base.speed.as_ref().zip(shipped.speed.as_ref());
        let kept = report.heal.iter().filter(|heal| !heal.reverted && !heal.passed_over);
        Self {
            dropped: report.selection.dropped.clone(),
            rate: report.selection.dropped.len() as f64 / f64::from(base.layer_count.max(1)),
            perplexity_ratio: (!nll.is_empty()).then(|| mean(&nll).exp()),
            accuracy_ratio: tasks.then(|| acc(shipped) / acc(base)),
            accuracy_ratio_stderr: tasks.then(|| variance.sqrt() / shipped.tasks.len() as f64 / acc(base)),
            size_bytes: shipped.size_bytes,
            peak_memory_bytes: shipped.peak_memory_bytes,
            speedup: speed.map(|(b, s)| s.decode_tokens_per_s / b.decode_tokens_per_s),
            latency_ms: speed.map(|(_, s)| s.latency_ms),
            heal_steps: kept.map(|heal| heal.curve.len() as u64).sum(),
            verdict: report.verdict.as_ref().map(|verdict| verdict.decision),
        }
    }

    /// What is compared, less is better. Latency is noisy: what differs by less than two per cent is the same.
    fn costs(&self) -> Vec<f64> {
        let latency = self.latency_ms.map_or(0.0, |ms| (ms.max(1e-9).ln() / 0.02).round());
        vec![
            self.perplexity_ratio.unwrap_or(0.0),
            -self.accuracy_ratio.unwrap_or(0.0),
            self.size_bytes as f64,
            latency,
        ]
    }
}

/// Marks the rows that no other one beats.
pub fn mark_front(rows: &mut [SweepRow]) {
    let costs: Vec<Option<Vec<f64>>> =
        rows.iter().map(|row| row.outcome.as_ref().map(Outcome::costs)).collect();
    let beats = |a: &Vec<f64>, b: &Vec<f64>| a.iter().zip(b).all(|(a, b)| a <= b) && a != b;
    for (row, own) in rows.iter_mut().zip(&costs) {
        row.on_front = own.as_ref().is_some_and(|own| !costs.iter().flatten().any(|other| beats(other, own)));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sweep(axes: Value) -> Value {
        json!({
            "base": {"model": {"from": "path", "path": "m"}, "prune": {}, "heal": []},
            "axes": axes
        })
    }

    fn names(axes: Value) -> Vec<String> {
        SweepSpec::read(sweep(axes)).unwrap().1.into_iter().map(|child| child.name).collect()
    }

    #[test]
    fn every_combination_is_a_job_with_a_name_of_its_own() {
        let heal =
            json!([{"name": "none", "methods": []}, {"name": "qlora", "methods": [{"method": "qlora"}]}]);
        let axes =
            json!({"layers": {"from": 3, "to": 9, "step": 3}, "strategy": ["deepest", "auto"], "heal": heal});
        let all = names(axes);
        assert_eq!(all.len(), 12);
        assert_eq!(all[..3], ["03-layers.deepest.none", "03-layers.deepest.qlora", "03-layers.auto.none"]);
        assert_eq!(names(json!({"amount": [{"fraction": 0.3}, {"layers": 2}, {"layers": 2}]})).len(), 2);
        let (_, children) =
            SweepSpec::read(sweep(json!({"amount": [{"layers": 1}], "seed": [3, 4]}))).unwrap();
        assert_eq!((children[1].spec.seed, children[1].spec.prune.amount), (4, Some(PruneAmount::Layers(1))));
    }

    #[test]
    fn what_is_wrong_with_a_sweep_is_said_at_its_place() {
        let variant = |name: &str| json!({"name": name, "methods": []});
        for (axes, at) in [
            (json!({}), "/axes"),
            (json!({"layers": {"from": 1, "to": 501}}), "/axes"),
            (json!({"layers": {"from": 5, "to": 3}}), "/axes/layers"),
            (json!({"seed": [1, 2]}), "/base/prune/amount"),
            (json!({"amount": [{"layers": 0}, {"layers": 1}]}), "/base/prune/amount/layers"),
            (json!({"amount": [{"layers": 1}], "heal": [variant("a/b"), variant("b")]}), "/axes/heal/0/name"),
            (json!({"amount": [{"layers": 1}], "heal": [variant("a"), variant("a")]}), "/axes/heal/1/name"),
            (json!({"depth": 3}), "/axes/depth"),
        ] {
            let complaints = SweepSpec::read(sweep(axes.clone())).unwrap_err();
            assert!(complaints.iter().any(|c| c.pointer == at), "{axes}: {complaints:?}");
        }
    }

    #[test]
    fn the_front_is_what_nothing_beats() {
        let row = |perplexity: f64, size: u64, ms: f64| SweepRow {
            name: "x".into(),
            strategy: Strategy::Auto,
            heal: None,
            seed: 0,
            outcome: Some(Outcome {
                dropped: vec![1],
                rate: 0.1,
                perplexity_ratio: Some(perplexity),
                accuracy_ratio: None,
                accuracy_ratio_stderr: None,
                size_bytes: size,
                peak_memory_bytes: 1,
                speedup: None,
                latency_ms: Some(ms),
                heal_steps: 0,
                verdict: None,
            }),
            failure: None,
            on_front: false,
        };
        let mut rows = vec![row(1.2, 90, 9.0), row(1.3, 90, 8.99), row(1.5, 80, 8.0), row(1.5, 85, 8.0)];
        rows.push(SweepRow { outcome: None, ..row(0.1, 1, 1.0) });
        mark_front(&mut rows);
        assert_eq!(
            rows.iter().map(|row| row.on_front).collect::<Vec<_>>(),
            [true, false, true, false, false]
        );
    }
}
