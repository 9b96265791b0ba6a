//! Decisions over made-up profiles: no model, no tensor.

use secateur::engine::select::select;
use secateur::job::report::LayerProfile;
use secateur::job::spec::{PruneAmount, PruneSpec, Strategy, TokenPosition};

/// A profile whose distance across `start..start + len` is `distance(start, len)`.
fn profile(layer_count: u32, distance: impl Fn(u32, u32) -> f64) -> LayerProfile {
    let rows = |value: &dyn Fn(u32, u32) -> f64| -> Vec<Vec<f64>> {
        (1..=layer_count).map(|n| (0..=layer_count - n).map(|l| value(l, n)).collect()).collect()
    };
    LayerProfile {
        layer_count,
        samples: 2,
        tokens: 64,
        position: TokenPosition::Last,
        unit: "pi".into(),
        by_len: rows(&distance),
        stderr: rows(&|_, _| 0.0),
        influence: (0..layer_count).map(|l| distance(l, 1)).collect(),
        relative_magnitude: (0..layer_count).map(|l| 2.0 * distance(l, 1)).collect(),
        norm: vec![1.0; layer_count as usize + 1],
    }
}

fn spec(strategy: Strategy, n: u32, keep_first: u32, keep_last: u32) -> PruneSpec {
    PruneSpec { amount: Some(PruneAmount::Layers(n)), strategy, layers: None, keep_first, keep_last }
}

const FREE: [Strategy; 5] = [
    Strategy::BlockEndpoint,
    Strategy::BlockSum,
    Strategy::BlockInfluence,
    Strategy::RelativeMagnitude,
    Strategy::Deepest,
];

#[test]
fn every_strategy_drops_as_many_layers_as_asked_and_keeps_both_ends() {
    let made_up = profile(12, |l, n| f64::from((l * 7 + n * 3) % 11) / 11.0);
    for strategy in FREE {
        for n in 1..=8 {
            let chosen = select(&made_up, &spec(strategy, n, 2, 2)).unwrap();
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
        for strategy in &FREE[..4] {
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
        (Strategy::Deepest, [6, 7, 8]),
    ] {
        assert_eq!(select(&flat, &spec(strategy, 3, 0, 1)).unwrap().dropped, expected, "{strategy:?}");
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
    for strategy in FREE {
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
            expected,
            "{fraction} of {layer_count}"
        );
    }
}
