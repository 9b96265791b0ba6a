//! What the result may take and must keep, instead of a number of layers: the job finds the number by measuring.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::complaint::Complaint;
use super::eval::{EvalSpec, Gates};

/// Promises of the result. With one of the first four the fewest layers go that keep them all; with none of those, the
/// most that keep the others. A promise is kept where that is sure with `eval.gates.confidence`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Budget {
    /// Of the weight files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_size_bytes: Option<u64>,
    /// Peak memory while the checkpoint is measured on this device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_memory_bytes: Option<u64>,
    /// Tokens per second while decoding, relative to the base model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_speedup: Option<f64>,
    /// Per decoded token, on this device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_latency_ms: Option<f64>,
    /// Accuracy above chance, all tasks together, relative to the base model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_retention: Option<f64>,
    /// Perplexity relative to the base model's, on every text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_perplexity_ratio: Option<f64>,
    /// Of the numbers of layers that keep all promises, the one that comes off best when these are weighed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weigh: Option<Weights>,
}

/// How much several things matter beside each other: what is looked for is the least of the sum of each weight times
/// what is lost of it, as a natural logarithm. With `{"perplexity": 1, "speed": 2}` a decoder that is 10 % faster is worth 0.2
/// nats per token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Weights {
    /// Of perplexity over the base model's: nats per token, the mean of all texts.
    #[serde(skip_serializing_if = "is_zero")]
    pub perplexity: f64,
    /// Of accuracy above chance under the base model's, all tasks together.
    #[serde(skip_serializing_if = "is_zero")]
    pub accuracy: f64,
    /// Of the weight files over the base model's.
    #[serde(skip_serializing_if = "is_zero")]
    pub size: f64,
    /// Of tokens per second while decoding under the base model's.
    #[serde(skip_serializing_if = "is_zero")]
    pub speed: f64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

impl Budget {
    /// What cutting more makes easier to keep.
    #[must_use]
    pub fn costs(self) -> Self {
        Self { min_retention: None, max_perplexity_ratio: None, weigh: None, ..self }
    }

    /// What cutting more makes harder to keep.
    #[must_use]
    pub fn quality(self) -> Self {
        let Self { min_retention, max_perplexity_ratio, .. } = self;
        Self { min_retention, max_perplexity_ratio, ..Self::default() }
    }

    #[must_use]
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// The gates that judge these promises, and nothing else.
    #[must_use]
    pub fn gates(self, confidence: f64) -> Gates {
        let Self {
            max_size_bytes,
            max_memory_bytes,
            min_speedup,
            max_latency_ms,
            min_retention,
            max_perplexity_ratio,
            weigh: _,
        } = self;
        Gates {
            min_retention,
            max_perplexity_ratio,
            min_speedup,
            max_latency_ms,
            max_size_bytes,
            max_memory_bytes,
            max_broken: None,
            confidence,
        }
    }

    /// `gates`, and where a promise stands, the promise.
    #[must_use]
    pub fn over(self, gates: &Gates) -> Gates {
        let own = self.gates(gates.confidence);
        Gates {
            min_retention: own.min_retention.or(gates.min_retention),
            max_perplexity_ratio: own.max_perplexity_ratio.or(gates.max_perplexity_ratio),
            min_speedup: own.min_speedup.or(gates.min_speedup),
            max_latency_ms: own.max_latency_ms.or(gates.max_latency_ms),
            max_size_bytes: own.max_size_bytes.or(gates.max_size_bytes),
            max_memory_bytes: own.max_memory_bytes.or(gates.max_memory_bytes),
            ..gates.clone()
        }
    }

    /// The promises in a few words, fit for a directory.
    #[must_use]
    pub fn name(self) -> String {
        let words = [
            self.max_size_bytes.map(|v| format!("max-size-{v}")),
            self.max_memory_bytes.map(|v| format!("max-memory-{v}")),
            self.min_speedup.map(|v| format!("min-speedup-{v}")),
            self.max_latency_ms.map(|v| format!("max-latency-{v}")),
            self.min_retention.map(|v| format!("min-retention-{v}")),
            self.max_perplexity_ratio.map(|v| format!("max-perplexity-ratio-{v}")),
            self.weigh.map(|w| {
                let Weights { perplexity, accuracy, size, speed } = w;
                format!("weigh-{perplexity}-{accuracy}-{size}-{speed}")
            }),
        ];
        words.into_iter().flatten().collect::<Vec<_>>().join("+")
    }

    /// What makes no sense, and what `eval` does not measure.
    pub(super) fn check(self, eval: &EvalSpec) -> Vec<Complaint> {
        const AT: &str = "/prune/amount/budget";
        let mut out = Vec::new();
        let mut add = |name: &str, message: String| {
            out.push(Complaint { pointer: format!("{AT}{name}"), message });
        };
        if self.is_empty() {
            add("", "name at least one promise, e.g. {\"max_perplexity_ratio\": 1.5}".into());
        }
        // No model worth cutting is smaller; whoever writes less means another unit.
        for (name, bytes) in
            [("max_size_bytes", self.max_size_bytes), ("max_memory_bytes", self.max_memory_bytes)]
        {
            if let Some(bytes) = bytes.filter(|bytes| *bytes < 10_000) {
                let message =
                    format!("is in bytes, and {bytes} is less than any model; e.g. 24000000000 for 24 GB");
                add(&format!("/{name}"), message);
            }
        }
        for (name, value) in
            [("min_speedup", self.min_speedup), ("max_perplexity_ratio", self.max_perplexity_ratio)]
        {
            if let Some(value) = value.filter(|value| !(*value > 1.0 && *value <= 1e6)) {
                let message =
                    format!("is relative to the base model and must be more than 1, not {value}; e.g. 1.3");
                add(&format!("/{name}"), message);
            }
        }
        if let Some(value) = self.min_retention.filter(|value| !(*value > 0.0 && *value <= 1.0)) {
            let message = format!(
                "is a share of what the base model has, above 0 and at most 1, not {value}; e.g. 0.95"
            );
            add("/min_retention", message);
        }
        if let Some(value) = self.max_latency_ms.filter(|value| !(*value > 0.0 && *value <= 1e6)) {
            add(
                "/max_latency_ms",
                format!("must be more than 0 and at most 1000000 milliseconds, not {value}"),
            );
        }
        if self.min_retention.is_some() && eval.tasks.is_empty() {
            add("/min_retention", "needs items to answer; name some in eval.tasks".into());
        }
        if self.max_perplexity_ratio.is_some() && eval.perplexity.is_empty() {
            add("/max_perplexity_ratio", "needs text to measure on; name some in eval.perplexity".into());
        }
        for (name, asked) in
            [("min_speedup", self.min_speedup.is_some()), ("max_latency_ms", self.max_latency_ms.is_some())]
        {
            if asked && !eval.speed {
                add(&format!("/{name}"), "needs eval.speed to be true".into());
            }
        }
        if let Some(weights) = self.weigh {
            weights.check(eval, &mut |name, message| add(&format!("/weigh{name}"), message));
        }
        out
    }
}

impl Weights {
    fn check(self, eval: &EvalSpec, add: &mut dyn FnMut(&str, String)) {
        let Self { perplexity, accuracy, size, speed } = self;
        for (name, weight, lacks) in [
            ("perplexity", perplexity, eval.perplexity.is_empty().then_some("text in eval.perplexity")),
            ("accuracy", accuracy, eval.tasks.is_empty().then_some("items in eval.tasks")),
            ("size", size, None),
            ("speed", speed, (!eval.speed).then_some("eval.speed to be true")),
        ] {
            if !(0.0..=1e6).contains(&weight) {
                add(&format!("/{name}"), format!("must be from 0 to 1000000, not {weight}"));
            }
            if let Some(lacks) = lacks.filter(|_| weight > 0.0) {
                add(&format!("/{name}"), format!("needs {lacks}"));
            }
        }
        if perplexity + accuracy <= 0.0 || size + speed <= 0.0 {
            let message = "weigh what is kept against what is gained, e.g. {\"perplexity\": 1, \"speed\": 2}: with one \
                           side alone nothing or everything would go";
            add("", message.into());
        }
    }
}

/// How the number of layers was found (part of `report.json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BudgetReport {
    pub promises: Budget,
    /// Layers that the search chose.
    pub layers: u32,
    /// What was tried, in this order.
    pub probes: Vec<Probe>,
}

/// A number of layers that was tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Probe {
    pub layers: u32,
    /// Ascending, from 0.
    pub dropped: Vec<u32>,
    /// What was looked at: the cut alone, or the result with healing and all.
    pub of: ProbeOf,
    /// All promises that were looked at are surely kept.
    pub kept: bool,
    /// The weighed sum, the less the better; where things are weighed and this could be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weighed: Option<f64>,
    /// What was measured, against each promise.
    pub said: Vec<String>,
}

/// What is tried of a number of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProbeOf {
    /// Size, memory and speed, which healing does not change.
    Costs,
    /// What is left of the base model, after healing.
    Quality,
    /// What is left against what is gained, after healing.
    Weighed,
}
