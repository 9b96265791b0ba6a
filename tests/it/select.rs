//! Decisions over made-up profiles and made-up damage: no model, no tensor.

use secateur::engine::select::{Measured, Oracle, Oracles};
use secateur::engine::{Error, Result};
use secateur::job::report::{Ablation, Cost, LayerProfile, LayerSelection, Zone, cross_axis};
use secateur::job::spec::{DamageSpec, Measures, PruneAmount, PruneSpec, Strategy};

use crate::support::made_up::profile;

pub fn spec(strategy: Strategy, n: u32, keep_first: u32, keep_last: u32) -> PruneSpec {
    PruneSpec {
        rounds: 1,
        amount: Some(PruneAmount::Layers(n)),
        strategy,
        compare: Vec::new(),
        layers: None,
        keep_first,
        keep_last,
        damage: DamageSpec::default(),
    }
}

/// What reads the profile alone.
const CHEAP: [Strategy; 6] = [
    Strategy::BlockEndpoint,
    Strategy::BlockSum,
    Strategy::BlockInfluence,
    Strategy::RelativeMagnitude,
    Strategy::CrossAxis,
    Strategy::Deepest,
];

/// What measures.
const SEARCHES: [Strategy; 7] = [
    Strategy::Auto,
    Strategy::OneShotDamage,
    Strategy::GreedyDamage,
    Strategy::BeamDamage,
    Strategy::IterativeDamage,
    Strategy::EvolutionaryDamage,
    Strategy::TaskAccuracy,
];

/// A choice without an oracle.
fn select(profile: &LayerProfile, spec: &PruneSpec) -> Result<LayerSelection> {
    secateur::engine::select::select(profile, spec, 0, Oracles::default(), &mut |_, _, _| Ok(()))
}

pub type Damage<'a> = &'a dyn Fn(&[u32]) -> f64;

/// The standard error that made-up damage comes with.
fn error(damage: f64) -> f64 {
    damage / 8.0
}

/// Damage by a formula, on 16 windows of 10 tokens; remembers what it was asked.
struct MadeUp<'a> {
    damage: Damage<'a>,
    asked: Vec<(Vec<u32>, usize)>,
}

impl Oracle for MadeUp<'_> {
    fn windows(&self) -> usize {
        16
    }

    fn tokens(&self, windows: usize) -> u64 {
        10 * windows as u64
    }

    fn measure(
        &mut self,
        sets: &[Vec<u32>],
        windows: usize,
        tell: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Measured>> {
        assert!(!sets.is_empty() && sets.is_sorted(), "neighbours share their first layers");
        assert!((1..=16).contains(&windows));
        let mut measured = Vec::new();
        for set in sets {
            assert!(set.windows(2).all(|w| w[0] < w[1]), "ascending, none twice: {set:?}");
            self.asked.push((set.clone(), windows));
            let damage = (self.damage)(set);
            measured.push(Measured { damage, stderr: error(damage) });
            tell(measured.len())?;
        }
        Ok(measured)
    }
}

/// A choice by made-up damage, which stands for accuracy, too, and what the oracle of damage was asked.
fn measured_by(
    profile: &LayerProfile,
    spec: &PruneSpec,
    seed: u64,
    damage: Damage,
) -> (LayerSelection, Vec<(Vec<u32>, usize)>) {
    let mut text = MadeUp { damage, asked: Vec::new() };
    let mut items = MadeUp { damage, asked: Vec::new() };
    let oracles = Oracles {
        damage: spec.measures_damage().then_some(&mut text as &mut dyn Oracle),
        known: &profile.ablation,
        accuracy: spec.measures_accuracy().then_some(&mut items as &mut dyn Oracle),
    };
    let chosen = secateur::engine::select::select(profile, spec, seed, oracles, &mut |_, _, _| Ok(()));
    (chosen.unwrap(), text.asked)
}

pub fn measured(profile: &LayerProfile, spec: &PruneSpec, damage: Damage) -> LayerSelection {
    measured_by(profile, spec, 0, damage).0
}

/// Every set of `n` of the layers `layers`.
fn all_sets(layers: std::ops::Range<u32>, n: usize) -> Vec<Vec<u32>> {
    if n == 0 {
        return vec![Vec::new()];
    }
    let with =
        |l: u32| all_sets(l + 1..layers.end, n - 1).into_iter().map(move |rest| [&[l][..], &rest].concat());
    layers.clone().flat_map(with).collect()
}

/// The set of `n` layers of least damage, by looking at all of them.
fn optimum(layers: std::ops::Range<u32>, n: usize, damage: Damage) -> Vec<u32> {
    all_sets(layers, n).into_iter().min_by(|a, b| damage(a).total_cmp(&damage(b))).unwrap()
}

/// A damage without rhyme or reason, the same for the same set.
fn wild(set: &[u32]) -> f64 {
    let mixed = set
        .iter()
        .fold(7u32, |h, l| (h ^ l.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b).rotate_left(13));
    f64::from(mixed) / f64::from(u32::MAX) + 0.2 * set.len() as f64
}

/// Each layer's own damage; together they add up.
pub fn additive(set: &[u32]) -> f64 {
    set.iter().map(|l| f64::from(l * 7 % 11) + 1.0).sum()
}

/// Layer 0 is missed least by itself but carries what all others need; 3 and 4 do the same work twice.
fn trap(set: &[u32]) -> f64 {
    match set {
        [0] => 1.0,
        [3] => 1.1,
        [3, 4] => 1.2,
        [0, ..] => 5.0 + set.len() as f64,
        set => 2.0 * set.len() as f64,
    }
}

pub fn flat(layer_count: u32) -> LayerProfile {
    profile(layer_count, |_, n| 0.1 * f64::from(n))
}

#[test]
fn every_strategy_drops_as_many_layers_as_asked_and_keeps_both_ends() {
    let made_up = profile(12, |l, n| f64::from((l * 7 + n * 3) % 11) / 11.0);
    for strategy in CHEAP.into_iter().chain(SEARCHES) {
        for n in 1..=8 {
            let chosen = measured(&made_up, &spec(strategy, n, 2, 2), &wild);
            assert_eq!(chosen.dropped.len(), n as usize, "{strategy:?}");
            assert!(chosen.dropped.windows(2).all(|w| w[0] < w[1]), "ascending, none twice");
            assert!(chosen.dropped.iter().all(|l| (2..10).contains(l)), "{strategy:?} {:?}", chosen.dropped);
        }
    }
}

#[test]
fn a_layer_that_does_nothing_is_found_wherever_it_stands() {
    for idle in 0..9 {
        let one_idle = profile(9, |l, n| if l == idle && n == 1 { 0.0 } else { 0.1 + 0.01 * f64::from(n) });
        for strategy in &CHEAP[..5] {
            let chosen = select(&one_idle, &spec(*strategy, 1, 0, 0)).unwrap();
            assert_eq!(chosen.dropped, [idle], "{strategy:?}");
        }
    }
}

#[test]
fn block_endpoint_reads_the_row_of_its_own_length() {
    // Only the block 3..6 of three layers is near; rows two and four point elsewhere.
    let one_block = profile(10, |l, n| match (l, n) {
        (3, 3) => 0.05,
        (7, 2) | (0, 4) => 0.01,
        _ => 0.5,
    });
    let chosen = select(&one_block, &spec(Strategy::BlockEndpoint, 3, 0, 1)).unwrap();
    assert_eq!(chosen.dropped, [3, 4, 5]);
    assert!((chosen.score - 0.05).abs() < 1e-15);
    let starts: Vec<u32> = chosen.candidates.iter().map(|c| c.start).collect();
    assert_eq!(starts, [0, 1, 2, 3, 4, 5, 6], "every place a block of 3 fits before the last layer");
}

#[test]
fn block_sum_and_block_endpoint_may_disagree() {
    // Layers 1 and 2 turn the stream a little each and add up; 4 and 5 turn it there and back.
    let steps = [0.5, 0.1, 0.1, 0.5, 0.3, 0.3, 0.5];
    let there_and_back = profile(7, |l, n| match (l, n) {
        (4, 2) => 0.02,
        (l, n) => steps[l as usize..(l + n) as usize].iter().sum(),
    });
    let endpoint = select(&there_and_back, &spec(Strategy::BlockEndpoint, 2, 0, 0)).unwrap();
    let sum = select(&there_and_back, &spec(Strategy::BlockSum, 2, 0, 0)).unwrap();
    assert_eq!((endpoint.dropped, sum.dropped), (vec![4, 5], vec![1, 2]));
}

#[test]
fn of_equals_the_deeper_goes() {
    let flat = profile(10, |_, _| 0.3);
    for (strategy, expected) in [
        (Strategy::BlockEndpoint, [6, 7, 8]),
        (Strategy::BlockSum, [6, 7, 8]),
        (Strategy::BlockInfluence, [6, 7, 8]),
        (Strategy::RelativeMagnitude, [6, 7, 8]),
        (Strategy::CrossAxis, [6, 7, 8]),
        (Strategy::Deepest, [6, 7, 8]),
    ] {
        assert_eq!(select(&flat, &spec(strategy, 3, 0, 1)).unwrap().dropped, expected, "{strategy:?}");
    }
    for strategy in SEARCHES {
        let chosen = measured(&flat, &spec(strategy, 3, 0, 1), &|set| set.len() as f64);
        assert_eq!(chosen.dropped, [6, 7, 8], "{strategy:?}");
    }
    // The same distances summed in another order are a tie too.
    let steps = [0.1, 0.2, 0.3, 0.9, 0.3, 0.2, 0.1];
    let mirrored = profile(7, |l, n| steps[l as usize..(l + n) as usize].iter().sum());
    assert_eq!(select(&mirrored, &spec(Strategy::BlockSum, 3, 0, 0)).unwrap().dropped, [4, 5, 6]);
}

#[test]
fn single_layers_need_not_stand_together() {
    let scattered = profile(8, |l, _| if l % 3 == 1 { 0.01 * f64::from(l) } else { 0.5 });
    let chosen = select(&scattered, &spec(Strategy::BlockInfluence, 3, 0, 0)).unwrap();
    assert_eq!(chosen.dropped, [1, 4, 7]);
    assert!((chosen.score - 0.12).abs() < 1e-12);
}

#[test]
fn explicit_layers_are_taken_as_they_are() {
    let any = profile(6, |_, _| 0.3);
    let explicit = |layers: &[u32]| PruneSpec {
        amount: None,
        layers: Some(layers.to_vec()),
        ..spec(Strategy::Explicit, 1, 3, 3)
    };
    assert_eq!(select(&any, &explicit(&[5, 0])).unwrap().dropped, [0, 5]);
    for wrong in [&[6][..], &[0, 1, 2, 3, 4, 5], &[]] {
        assert!(select(&any, &explicit(wrong)).is_err(), "{wrong:?}");
    }
}

#[test]
fn more_layers_than_may_go_is_an_error_that_says_how_many_there_are() {
    let any = profile(6, |_, _| 0.3);
    for strategy in CHEAP {
        let error = select(&any, &spec(strategy, 5, 1, 1)).unwrap_err().to_string();
        assert!(error.contains("model of 6"), "{error}");
        assert!(select(&any, &spec(strategy, 6, 0, 0)).is_err(), "one layer must stay");
        assert_eq!(select(&any, &spec(strategy, 4, 1, 1)).unwrap().dropped, [1, 2, 3, 4]);
    }
}

#[test]
fn a_fraction_is_rounded_down_but_never_to_nothing() {
    for (fraction, layer_count, expected) in
        [(0.3, 10, 3), (0.3, 30, 9), (0.5, 7, 3), (0.01, 12, 1), (0.2, 30, 6)]
    {
        assert_eq!(
            PruneAmount::Fraction(fraction).layers(layer_count),
            Some(expected),
            "{fraction} of {layer_count}"
        );
    }
}

#[test]
fn cross_axis_wants_both_influence_and_magnitude_low() {
    let mut odd = profile(5, |_, _| 0.3);
    odd.influence = vec![0.9, 0.1, 0.2, 0.9, 0.9];
    odd.relative_magnitude = vec![0.9, 0.9, 0.2, 0.1, 0.9];
    odd.cross_axis = cross_axis(&odd.influence, &odd.relative_magnitude);
    // Layer 1 has the least influence and layer 3 the least magnitude, but each is high in the other.
    assert_eq!(select(&odd, &spec(Strategy::CrossAxis, 1, 0, 0)).unwrap().dropped, [2]);
    let same = cross_axis(&[0.5; 4], &[1.0, 2.0, 3.0, 4.0]);
    assert!(same.iter().all(|s| s.is_finite()) && same[0] < same[3]);
}

#[test]
fn greedy_finds_the_optimum_where_damages_add_up() {
    for n in 1..=5 {
        for strategy in [Strategy::OneShotDamage, Strategy::GreedyDamage, Strategy::IterativeDamage] {
            let chosen = measured(&flat(10), &spec(strategy, n, 1, 1), &additive);
            assert_eq!(chosen.dropped, optimum(1..9, n as usize, &additive), "{strategy:?} {n}");
            assert!((chosen.score - additive(&chosen.dropped)).abs() < 1e-12);
        }
    }
}

#[test]
fn a_beam_finds_the_pair_that_greedy_walks_past() {
    let greedy = measured(&flat(6), &spec(Strategy::GreedyDamage, 2, 0, 0), &trap);
    assert_eq!(greedy.compared[0].path[0].dropped, [0]);
    assert_ne!(greedy.dropped, [3, 4]);
    let mut beam = spec(Strategy::BeamDamage, 2, 0, 0);
    beam.damage.beam = 2;
    assert_eq!(measured(&flat(6), &beam, &trap).dropped, [3, 4]);
    assert_eq!(optimum(0..6, 2, &trap), [3, 4]);
}

#[test]
fn a_beam_of_one_is_greedy_and_one_as_wide_as_all_cuts_is_exhaustive() {
    for n in 1..=4 {
        let mut beam = spec(Strategy::BeamDamage, n, 0, 1);
        beam.damage.beam = 1;
        let greedy = measured(&flat(9), &spec(Strategy::GreedyDamage, n, 0, 1), &wild);
        assert_eq!(measured(&flat(9), &beam, &wild).dropped, greedy.dropped);
        beam.damage.beam = 200;
        assert_eq!(measured(&flat(9), &beam, &wild).dropped, optimum(0..8, n as usize, &wild), "{n}");
    }
}

#[test]
fn iterative_lies_between_one_shot_and_greedy() {
    for (per_round, like) in [(1, Strategy::GreedyDamage), (4, Strategy::OneShotDamage)] {
        let mut iterative = spec(Strategy::IterativeDamage, 4, 0, 0);
        iterative.damage.layers_per_round = per_round;
        let other = measured(&flat(10), &spec(like, 4, 0, 0), &wild);
        assert_eq!(measured(&flat(10), &iterative, &wild).dropped, other.dropped);
    }
    let two_at_a_time = measured(&flat(10), &spec(Strategy::IterativeDamage, 4, 0, 0), &wild);
    // Ten layers, then the eight that are left, then the cut itself.
    assert_eq!(two_at_a_time.compared[0].cost.evaluations, 10 + 8 + 1);
}

#[test]
fn evolution_climbs_out_of_the_cuts_it_begins_with() {
    let profile = profile(16, |l, n| f64::from((l * 7 + n * 3) % 11) / 11.0);
    let mut evolution = spec(Strategy::EvolutionaryDamage, 4, 0, 1);
    (evolution.damage.generations, evolution.damage.population) = (40, 16);
    let auto = measured(&profile, &spec(Strategy::Auto, 4, 0, 1), &additive);
    let (evolved, asked) = measured_by(&profile, &evolution, 1, &additive);
    assert!(evolved.score < auto.score, "{} {}", evolved.score, auto.score);
    assert_eq!(evolved.dropped, optimum(0..15, 4, &additive));
    // Many are looked at briefly, few at length.
    let on = |windows: usize| asked.iter().filter(|(_, w)| *w == windows).count();
    assert!(on(1) > 2 * on(4) && on(4) > on(16) && on(16) > 0, "{} {} {}", on(1), on(4), on(16));
    assert_eq!(on(1) + on(4) + on(16), asked.len());
}

#[test]
fn evolution_with_nothing_to_swap_takes_all_there_is() {
    let chosen = measured(&flat(6), &spec(Strategy::EvolutionaryDamage, 4, 1, 1), &wild);
    assert_eq!(chosen.dropped, [1, 2, 3, 4]);
}

#[test]
fn the_same_seed_gives_the_same_search_and_another_seed_another() {
    let profile = profile(20, |l, n| f64::from((l * 7 + n * 3) % 11) / 11.0);
    for strategy in SEARCHES {
        let run = |seed| measured_by(&profile, &spec(strategy, 6, 1, 1), seed, &wild);
        assert_eq!(run(3), run(3), "{strategy:?}");
        assert_eq!(run(3) == run(4), strategy != Strategy::EvolutionaryDamage, "{strategy:?}");
    }
}

#[test]
fn auto_takes_the_cut_of_least_damage_and_says_why() {
    // By the profile 7 and 8 are nearest; by damage the deepest block is best.
    let made_up =
        profile(12, |l, n| if (l, n) == (6, 2) { 0.01 } else { 0.2 + 0.01 * f64::from((l * 5 + n) % 7) });
    let damage = |set: &[u32]| if set == [9, 10] { 0.1 } else { 0.5 + 0.01 * f64::from(set[0]) };
    let chosen = measured(&made_up, &spec(Strategy::Auto, 2, 0, 1), &damage);
    assert_eq!((chosen.dropped.as_slice(), chosen.score), (&[9, 10][..], 0.1));
    let first = &chosen.considered[0];
    assert!(first.strategies.contains(&Strategy::Deepest) && first.damage == Some(0.1), "{first:?}");
    assert!(first.why.contains("least damage"), "{}", first.why);
    let mut named: Vec<Strategy> = chosen.considered.iter().flat_map(|c| c.strategies.clone()).collect();
    assert_eq!(named.len(), 6, "every cheap strategy has its cut in the table");
    named.retain(|s| s.measures() != Measures::Nothing);
    assert!(named.is_empty());
    for (i, cut) in chosen.considered.iter().enumerate() {
        assert_eq!((cut.damage, cut.stderr), (Some(damage(&cut.dropped)), error(damage(&cut.dropped))));
        assert_eq!(cut.cost, Cost { evaluations: 1, tokens: 160 });
        assert!(chosen.considered[i + 1..].iter().all(|other| other.dropped != cut.dropped), "none twice");
    }
    assert_eq!(chosen.compared[0].cost.evaluations, chosen.considered.len() as u64);
}

#[test]
fn a_budget_ends_the_search_with_the_best_so_far_and_says_so() {
    let made_up = profile(12, |l, _| 0.01 * f64::from(l));
    for strategy in SEARCHES {
        let whole = measured(&made_up, &spec(strategy, 4, 0, 1), &wild);
        assert!(!whole.compared[0].budget_exhausted, "{strategy:?}");
        let needed = whole.compared[0].cost;
        for most in 1..needed.evaluations as u32 {
            let mut bounded = spec(strategy, 4, 0, 1);
            bounded.damage.max_evaluations = Some(most);
            let chosen = measured(&made_up, &bounded, &wild);
            let cost = chosen.compared[0].cost.evaluations;
            assert_eq!(chosen.dropped.len(), 4, "{strategy:?} {most}");
            assert!(chosen.dropped.iter().all(|l| *l < 11));
            assert!(
                cost <= u64::from(most) + 1,
                "{strategy:?} {most}: {cost}; the cut itself may come on top"
            );
            let spent = chosen.compared[0].budget_exhausted;
            assert!(spent || cost >= needed.evaluations, "{strategy:?} {most}");
        }
        let mut bounded = spec(strategy, 4, 0, 1);
        bounded.damage.max_tokens = Some(needed.tokens);
        assert_eq!(measured(&made_up, &bounded, &wild), whole, "{strategy:?}: enough is enough");
        bounded.damage.max_tokens = Some(1);
        let chosen = measured(&made_up, &bounded, &wild);
        assert!(chosen.compared[0].budget_exhausted && chosen.dropped.len() == 4, "{strategy:?}");
    }
}

#[test]
fn a_search_without_a_budget_falls_back_on_influence() {
    let made_up = profile(8, |l, _| 0.01 * f64::from((l + 5) % 8));
    for strategy in [Strategy::OneShotDamage, Strategy::GreedyDamage, Strategy::BeamDamage] {
        let mut bounded = spec(strategy, 3, 0, 0);
        bounded.damage.max_tokens = Some(1);
        assert_eq!(measured(&made_up, &bounded, &wild).dropped, [3, 4, 5], "{strategy:?}");
    }
}

#[test]
fn nothing_is_measured_twice_and_no_strategy_pays_for_another() {
    let made_up = profile(10, |l, n| f64::from((l * 7 + n * 3) % 11) / 11.0);
    let mut several = spec(Strategy::GreedyDamage, 3, 0, 1);
    several.compare =
        vec![Strategy::OneShotDamage, Strategy::BeamDamage, Strategy::BlockEndpoint, Strategy::Auto];
    let (chosen, asked) = measured_by(&made_up, &several, 0, &wild);
    let mut unique = asked.clone();
    unique.sort();
    unique.dedup();
    assert_eq!(unique.len(), asked.len());
    for compared in &chosen.compared {
        let alone = measured(&made_up, &spec(compared.strategy, 3, 0, 1), &wild);
        assert_eq!(compared.dropped, alone.dropped, "{:?}", compared.strategy);
        if let [alone] = alone.compared.as_slice() {
            assert_eq!(compared.cost, alone.cost, "{:?}", compared.strategy);
        }
    }
}

#[test]
fn what_ablation_measured_is_not_measured_again_and_changes_nothing() {
    let mut ablated = flat(10);
    let zone = Zone::Needed;
    let single = |l: u32| Ablation { damage: wild(&[l]), stderr: error(wild(&[l])), zone };
    for strategy in SEARCHES {
        let spec = spec(strategy, 3, 0, 1);
        ablated.ablation.clear();
        let (without, asked) = measured_by(&ablated, &spec, 0, &wild);
        ablated.ablation = (0..10).map(single).collect();
        let (with, left) = measured_by(&ablated, &spec, 0, &wild);
        assert_eq!(with, without, "{strategy:?}: the cost, too");
        let single = |(set, windows): &(Vec<u32>, usize)| set.len() == 1 && *windows == 16;
        assert!(!left.iter().any(single), "{strategy:?}");
        let others = asked.into_iter().filter(|question| !single(question));
        assert_eq!(left, others.collect::<Vec<_>>(), "{strategy:?}");
    }
}

#[test]
fn strategies_compared_show_their_damage_layer_by_layer_and_do_not_decide() {
    let made_up = profile(10, |l, n| f64::from((l * 7 + n * 3) % 11) / 11.0);
    let alone = measured(&made_up, &spec(Strategy::BlockInfluence, 4, 0, 1), &wild);
    assert!(alone.compared.is_empty(), "nothing was measured");
    let mut several = spec(Strategy::BlockInfluence, 4, 0, 1);
    several.compare = vec![
        Strategy::GreedyDamage,
        Strategy::Deepest,
        Strategy::BlockInfluence,
        Strategy::EvolutionaryDamage,
        Strategy::TaskAccuracy,
    ];
    let chosen = measured(&made_up, &several, &wild);
    assert_eq!(chosen.dropped, alone.dropped);
    let ran: Vec<Strategy> = chosen.compared.iter().map(|c| c.strategy).collect();
    assert_eq!(ran, [&[Strategy::BlockInfluence][..], &several.compare[..2], &several.compare[3..]].concat());
    for compared in &chosen.compared {
        let counts: Vec<usize> = compared.path.iter().map(|step| step.dropped.len()).collect();
        let expected =
            if compared.strategy == Strategy::EvolutionaryDamage { vec![4] } else { vec![1, 2, 3, 4] };
        assert_eq!(counts, expected, "{:?}", compared.strategy);
        assert!(compared.path.iter().all(|step| step.damage == wild(&step.dropped)));
        assert!(compared.path.iter().all(|step| step.stderr == error(step.damage)));
        let last = compared.path.last().unwrap();
        assert_eq!((&last.dropped, Some(last.damage)), (&compared.dropped, compared.damage));
        assert_eq!(last.stderr, compared.stderr);
        let free = compared.strategy.measures() == Measures::Nothing;
        assert_eq!(compared.cost == Cost::default(), free, "{:?}", compared.strategy);
    }
    assert_eq!(chosen.compared[0].dropped, alone.dropped);
}

#[test]
fn layers_named_by_hand_can_be_compared_with_what_a_search_finds() {
    let mut by_hand = spec(Strategy::Explicit, 1, 0, 1);
    (by_hand.amount, by_hand.layers, by_hand.compare) =
        (None, Some(vec![7, 2]), vec![Strategy::GreedyDamage]);
    let chosen = measured(&flat(9), &by_hand, &additive);
    assert_eq!(chosen.dropped, [2, 7]);
    assert_eq!(chosen.compared[0].damage, Some(additive(&[2, 7])));
    assert_eq!(chosen.compared[1].dropped, optimum(0..8, 2, &additive));
}

#[test]
fn progress_never_goes_back_nor_beyond_its_total() {
    let layers = profile(10, |l, n| f64::from((l * 7 + n * 3) % 11) / 11.0);
    for strategy in SEARCHES {
        let mut told = Vec::new();
        let spec = spec(strategy, 3, 0, 1);
        let mut made_up = MadeUp { damage: &wild, asked: Vec::new() };
        let oracles = if spec.measures_damage() {
            Oracles { damage: Some(&mut made_up), ..Oracles::default() }
        } else {
            Oracles { accuracy: Some(&mut made_up), ..Oracles::default() }
        };
        let mut tell = |task: &str, done: u64, total: u64| {
            assert_eq!(task, strategy.name());
            told.push((done, total));
            Ok(())
        };
        secateur::engine::select::select(&layers, &spec, 0, oracles, &mut tell).unwrap();
        assert!(told.len() > 3, "{strategy:?}");
        assert!(told.is_sorted() && told.iter().all(|(done, total)| done <= total), "{strategy:?}: {told:?}");
    }
}

#[test]
fn a_search_stops_where_it_is_told_to() {
    let mut text = MadeUp { damage: &wild, asked: Vec::new() };
    let oracles = Oracles { damage: Some(&mut text), ..Oracles::default() };
    let mut tell = |_: &str, done: u64, _: u64| if done == 5 { Err(Error::Stopped) } else { Ok(()) };
    let greedy = spec(Strategy::GreedyDamage, 3, 0, 1);
    let ended = secateur::engine::select::select(&flat(10), &greedy, 0, oracles, &mut tell);
    assert!(matches!(ended, Err(Error::Stopped)));
    assert_eq!(text.asked.len(), 5);
}

#[test]
fn a_damage_that_is_no_number_names_the_layers() {
    let mut text = MadeUp { damage: &|set| if set == [4] { f64::NAN } else { 1.0 }, asked: Vec::new() };
    let oracles = Oracles { damage: Some(&mut text), ..Oracles::default() };
    let greedy = spec(Strategy::GreedyDamage, 3, 0, 1);
    let ended = secateur::engine::select::select(&flat(10), &greedy, 0, oracles, &mut |_, _, _| Ok(()));
    assert!(ended.unwrap_err().to_string().contains("[4]"));
}
