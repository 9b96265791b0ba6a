//! Measuring and deciding together, on small models whose best cut is known.

use secateur::engine::damage::Damage;
use secateur::engine::model::Checkpoint;
use secateur::engine::profile::profile;
use secateur::engine::select::{Oracle, Oracles, select};
use secateur::job::progress::Stage;
use secateur::job::report::{LayerProfile, LayerSelection};
use secateur::job::spec::{CalibrationSpec, DamageMeasure, DamageSpec, Measures, PruneSpec, Strategy};
use serde_json::json;

use crate::support::rig::{Rig, windows};
use crate::support::tiny::Tiny;

/// All that choose by the profile or by damage on text.
const STRATEGIES: [Strategy; 11] = [
    Strategy::Auto,
    Strategy::BlockEndpoint,
    Strategy::BlockSum,
    Strategy::BlockInfluence,
    Strategy::RelativeMagnitude,
    Strategy::CrossAxis,
    Strategy::OneShotDamage,
    Strategy::GreedyDamage,
    Strategy::BeamDamage,
    Strategy::IterativeDamage,
    Strategy::EvolutionaryDamage,
];

/// A small model, its profile and its oracle of damage.
struct Subject<'a> {
    profile: LayerProfile,
    damage: Damage<'a>,
}

impl<'a> Subject<'a> {
    /// The divergence from the intact model is least where nothing changes; the loss of a random model on random
    /// tokens may well fall.
    fn new(rig: &'a Rig, base: &Checkpoint) -> Self {
        let spec = DamageSpec { measure: DamageMeasure::Kl, ..DamageSpec::default() };
        let profile =
            profile(base, &windows(4, 24), &CalibrationSpec::default(), 1, rig.cx(Stage::Profile)).unwrap();
        let damage = Damage::open(base, windows(3, 24), &spec, false, rig.cx(Stage::Select)).unwrap();
        Self { profile, damage }
    }

    fn choose(&mut self, strategy: Strategy, n: u32, beam: u32) -> LayerSelection {
        let spec: PruneSpec = serde_json::from_value(json!({
            "amount": {"layers": n}, "strategy": strategy, "keep_last": 0, "damage": {"beam": beam}
        }))
        .unwrap();
        let oracle = &mut self.damage as &mut dyn Oracle;
        let oracles = Oracles { damage: spec.measures_damage().then_some(oracle), ..Oracles::default() };
        select(&self.profile, &spec, 0, oracles, &mut |_, _, _| Ok(())).unwrap()
    }

    /// The pair of layers of least damage, by trying all.
    fn best_pair(&mut self) -> Vec<u32> {
        let layers = self.profile.layer_count;
        let pairs: Vec<Vec<u32>> =
            (0..layers).flat_map(|a| (a + 1..layers).map(move |b| vec![a, b])).collect();
        let measured = self.damage.measure(&pairs, 3, &mut |_| Ok(())).unwrap();
        let damage = |pair: &usize| measured[*pair].damage;
        let best = (0..pairs.len()).min_by(|a, b| damage(a).total_cmp(&damage(b))).unwrap();
        pairs[best].clone()
    }
}

#[test]
fn a_layer_that_does_nothing_is_what_every_metric_and_every_search_finds() {
    for idle in [0, 2, 5] {
        let rig = Rig::new();
        let base = rig.base(&Tiny { identity: vec![idle], ..Tiny::llama() });
        let mut subject = Subject::new(&rig, &base);
        for strategy in STRATEGIES {
            let chosen = subject.choose(strategy, 1, 4);
            assert_eq!(chosen.dropped, [idle as u32], "{strategy:?}");
            if strategy.measures() == Measures::Damage {
                assert!(chosen.score.abs() < 1e-5, "{strategy:?}: {}", chosen.score);
            }
        }
    }
}

#[test]
fn greedy_and_beam_find_the_pair_that_trying_all_finds() {
    let planted = Tiny { identity: vec![1, 4], ..Tiny::llama() };
    for (tiny, known) in
        [(planted, Some([1, 4])), (Tiny::llama(), None), (Tiny::mistral(), None), (Tiny::qwen2(), None)]
    {
        let rig = Rig::new();
        let base = rig.base(&tiny);
        let mut subject = Subject::new(&rig, &base);
        let best = subject.best_pair();
        assert!(known.is_none_or(|known| best == known), "{best:?}");
        for (strategy, beam) in [(Strategy::GreedyDamage, 1), (Strategy::BeamDamage, 15)] {
            let chosen = subject.choose(strategy, 2, beam);
            assert_eq!(chosen.dropped, best, "{strategy:?} on {}", tiny.model_type);
        }
    }
}
