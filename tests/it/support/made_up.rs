//! Profiles that no model was measured for: what decisions and reports are tested on.

use secateur::job::report::{LayerProfile, cross_axis};
use secateur::job::spec::TokenPosition;

/// A profile whose distance across `start..start + len` is `distance(start, len)`.
pub fn profile(layer_count: u32, distance: impl Fn(u32, u32) -> f64) -> LayerProfile {
    let influence: Vec<f64> = (0..layer_count).map(|l| distance(l, 1)).collect();
    let relative_magnitude: Vec<f64> = influence.iter().map(|d| 2.0 * d).collect();
    LayerProfile {
        layer_count,
        samples: 64,
        tokens: 16_384,
        position: TokenPosition::Last,
        unit: "pi".into(),
        by_len: blocks(layer_count, distance),
        stderr: blocks(layer_count, |_, _| 0.0),
        cross_axis: cross_axis(&influence, &relative_magnitude),
        influence,
        relative_magnitude,
        norm: vec![1.0; layer_count as usize + 1],
        influence_stderr: Vec::new(),
        relative_magnitude_stderr: Vec::new(),
        cross_axis_stderr: Vec::new(),
        norm_stderr: Vec::new(),
        contribution: Vec::new(),
        ablation: Vec::new(),
        logit_lens: Vec::new(),
        confidence: Vec::new(),
        samples_asked: 64,
        stopped_early: false,
    }
}

/// A value for every block, as a profile keeps them: a row for each length, by first layer.
pub fn blocks(layer_count: u32, value: impl Fn(u32, u32) -> f64) -> Vec<Vec<f64>> {
    (1..=layer_count).map(|n| (0..=layer_count - n).map(|l| value(l, n)).collect()).collect()
}
