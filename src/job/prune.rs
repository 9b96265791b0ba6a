//! What is asked of the cut: how many layers, by which strategy, measured how.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::budget::Budget;
use super::spec::{Corpus, TaskSpec};

/// How much to cut and by which rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PruneSpec {
    /// Required, except with `"strategy": "explicit"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub amount: Option<PruneAmount>,
    /// Decides which layers go.
    #[serde(default)]
    pub strategy: Strategy,
    /// Strategies to run beside it: what each would drop, at what damage and cost. None of them decides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub compare: Vec<Strategy>,
    /// The layers to drop (from 0), with `"strategy": "explicit"` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<u32>>,
    /// Never drop this many layers at the start. `explicit` is not bound by it.
    #[serde(default)]
    pub keep_first: u32,
    /// Never drop this many layers at the end. `explicit` is not bound by it.
    #[serde(default = "one")]
    pub keep_last: u32,
    /// Let the layers go in so many rounds: a share of them goes, what is left is healed, and profiled and chosen from
    /// anew.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub rounds: u32,
    /// How the damage of leaving layers out is measured, for the strategies that measure it.
    #[serde(default)]
    pub damage: DamageSpec,
}

impl PruneSpec {
    /// How many of `layer_count` layers are to go; none where the spec does not say.
    #[must_use]
    pub fn layers_to_drop(&self, layer_count: u32) -> Option<u32> {
        if self.strategy == Strategy::Explicit {
            return self.layers.as_ref().map(|layers| layers.len() as u32);
        }
        self.amount.and_then(|amount| amount.layers(layer_count))
    }

    /// How many may go at most: those between `keep_first` and `keep_last`, and one must stay.
    #[must_use]
    pub fn most_layers(&self, layer_count: u32) -> u32 {
        let free = layer_count.saturating_sub(self.keep_first).saturating_sub(self.keep_last);
        free.min(layer_count.saturating_sub(1))
    }

    /// The promises that decide how many layers go, where nothing else does.
    #[must_use]
    pub fn budget(&self) -> Option<Budget> {
        match self.amount {
            Some(PruneAmount::Budget(budget)) => Some(budget),
            Some(PruneAmount::Layers(_) | PruneAmount::Fraction(_)) | None => None,
        }
    }

    /// The strategy that decides, then those to compare with it, none twice.
    #[must_use]
    pub fn strategies(&self) -> Vec<Strategy> {
        let mut all = vec![self.strategy];
        for strategy in &self.compare {
            if !all.contains(strategy) {
                all.push(*strategy);
            }
        }
        all
    }

    /// Whether the damage on text must be measured.
    #[must_use]
    pub fn measures_damage(&self) -> bool {
        !self.compare.is_empty() || self.strategy.measures() == Measures::Damage
    }

    /// Whether the accuracy on task items must be measured.
    #[must_use]
    pub fn measures_accuracy(&self) -> bool {
        self.strategies().iter().any(|s| s.measures() == Measures::Accuracy)
    }
}

/// How the damage of leaving layers out is measured, and how long a strategy may search.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DamageSpec {
    /// Text to measure on; the calibration corpus when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corpus: Option<Corpus>,
    /// Windows to measure on. A text that gives fewer is refused; with the default of 16 what it gives is measured.
    pub samples: u32,
    /// Tokens per window; those of the calibration when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<u32>,
    pub measure: DamageMeasure,
    /// `kl`: the likeliest tokens of the intact model that are compared one by one; the others count as one.
    pub top_k: u32,
    /// Sets of layers a strategy may measure; it then gives the best so far, which is measured in any case. No bound
    /// when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_evaluations: Option<u32>,
    /// Tokens a strategy may send through the model to measure, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u64>,
    /// `beam_damage`: partial cuts kept after each layer.
    pub beam: u32,
    /// `iterative_damage`: layers dropped before the rest is ranked again.
    pub layers_per_round: u32,
    /// `evolutionary_damage`: offspring per generation.
    pub population: u32,
    /// `evolutionary_damage`: generations.
    pub generations: u32,
    /// `task_accuracy`: the items whose accuracy must not drop.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<TaskSpec>,
}

impl Default for DamageSpec {
    fn default() -> Self {
        Self {
            corpus: None,
            samples: 16,
            seq_len: None,
            measure: DamageMeasure::Loss,
            top_k: 512,
            max_evaluations: None,
            max_tokens: None,
            beam: 4,
            layers_per_round: 2,
            population: 16,
            generations: 16,
            tasks: Vec::new(),
        }
    }
}

impl DamageSpec {
    /// Whether text that gives fewer windows than `samples` is to be refused, as in the calibration
    /// ([`super::spec::CalibrationSpec::insists_on_samples`]).
    #[must_use]
    pub fn insists_on_samples(&self) -> bool {
        self.samples != Self::default().samples
    }
}

/// What damage is, in nats per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DamageMeasure {
    /// Negative log-likelihood of the text, above the intact model's (SLEB, arXiv 2402.09025).
    Loss,
    /// Divergence from the intact model's prediction, KL(intact, pruned) (`EvoPress`, arXiv 2410.14649).
    Kl,
}

/// How many layers to drop.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PruneAmount {
    Layers(u32),
    /// A share of all layers, rounded down, at least one layer.
    Fraction(f64),
    /// As many as these promises allow, or ask for; found by measuring.
    Budget(Budget),
}

impl PruneAmount {
    /// The number of layers to drop of `layer_count`; none where only measuring can tell.
    #[must_use]
    pub fn layers(self, layer_count: u32) -> Option<u32> {
        match self {
            Self::Layers(n) => Some(n),
            // The small term keeps 0.3 of 10 at three layers: 0.3 * 10 is 2.999… in binary.
            Self::Fraction(f) => Some(((f * f64::from(layer_count) + 1e-9).floor() as u32).max(1)),
            Self::Budget(_) => None,
        }
    }
}

/// Which layers go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// The cheap strategies' cuts and the deepest block, each measured: the one of least damage.
    #[default]
    Auto,
    /// The block whose end stream is nearest to its start stream (the paper, eq. 7).
    BlockEndpoint,
    /// The block with the least sum of adjacent distances (the review, section 4.2).
    BlockSum,
    /// The single layers of least block influence (`ShortGPT`, arXiv 2403.03853).
    BlockInfluence,
    /// The single layers that add least to the stream, relative to its norm.
    RelativeMagnitude,
    /// The single layers low in both block influence and relative magnitude (`XMerge`, arXiv 2609.02083).
    CrossAxis,
    /// The deepest block that `keep_last` allows (the paper, section 4.4).
    Deepest,
    /// The layers that damage least one by one, all taken at once (Shortened Llama, arXiv 2402.02834).
    OneShotDamage,
    /// Layer by layer, each time the one that damages least (SLEB, arXiv 2402.09025).
    GreedyDamage,
    /// Layer by layer, keeping the best few partial cuts.
    BeamDamage,
    /// A few layers at a time, ranked anew by damage after each round.
    IterativeDamage,
    /// Cuts that swap layers and compete on more and more text (`EvoPress`, arXiv 2410.14649).
    EvolutionaryDamage,
    /// Layer by layer, each time the one that costs least accuracy on `damage.tasks` (arXiv 2605.14075).
    TaskAccuracy,
    /// The layers named in `layers`.
    Explicit,
}

/// What a strategy must measure with layers left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measures {
    /// Nothing: it reads the layer profile.
    Nothing,
    /// Damage on text.
    Damage,
    /// Accuracy on task items.
    Accuracy,
}

impl Strategy {
    #[must_use]
    pub const fn measures(self) -> Measures {
        match self {
            Self::BlockEndpoint
            | Self::BlockSum
            | Self::BlockInfluence
            | Self::RelativeMagnitude
            | Self::CrossAxis
            | Self::Deepest
            | Self::Explicit => Measures::Nothing,
            Self::Auto
            | Self::OneShotDamage
            | Self::GreedyDamage
            | Self::BeamDamage
            | Self::IterativeDamage
            | Self::EvolutionaryDamage => Measures::Damage,
            Self::TaskAccuracy => Measures::Accuracy,
        }
    }

    /// Its name in a spec.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::BlockEndpoint => "block_endpoint",
            Self::BlockSum => "block_sum",
            Self::BlockInfluence => "block_influence",
            Self::RelativeMagnitude => "relative_magnitude",
            Self::CrossAxis => "cross_axis",
            Self::Deepest => "deepest",
            Self::OneShotDamage => "one_shot_damage",
            Self::GreedyDamage => "greedy_damage",
            Self::BeamDamage => "beam_damage",
            Self::IterativeDamage => "iterative_damage",
            Self::EvolutionaryDamage => "evolutionary_damage",
            Self::TaskAccuracy => "task_accuracy",
            Self::Explicit => "explicit",
        }
    }
}

const fn one() -> u32 {
    1
}

// serde hands over a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
const fn is_one(rounds: &u32) -> bool {
    *rounds == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strategy_is_told_by_the_name_a_spec_gives_it() {
        for name in ["auto", "block_endpoint", "cross_axis", "greedy_damage", "task_accuracy", "explicit"] {
            let strategy: Strategy = serde_json::from_value(name.into()).expect("a name of a strategy");
            assert_eq!(strategy.name(), name);
        }
    }
}
