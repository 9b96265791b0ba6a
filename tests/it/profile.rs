//! One pass over the windows gives every block of every length.

use std::f64::consts::PI;

use secateur::engine::eval::loglikelihood::{Request, likelihoods};
use secateur::engine::model::{Batch, Checkpoint, Decoder};
use secateur::engine::profile::profile;
use secateur::job::progress::{Event, Stage};
use secateur::job::report::LayerProfile;
use secateur::job::spec::{CalibrationSpec, Distance, TokenPosition};

use crate::support::rig::{Rig, windows};
use crate::support::tiny::Tiny;

fn spec(position: TokenPosition) -> CalibrationSpec {
    CalibrationSpec { position, batch_size: 3, ..CalibrationSpec::default() }
}

fn measure(rig: &Rig, base: &Checkpoint, windows: &[Vec<u32>], spec: &CalibrationSpec) -> LayerProfile {
    profile(base, windows, spec, 1, rig.cx(Stage::Profile)).unwrap()
}

/// Streams of one window at every seam, `[seam][token][h]`.
fn streams(rig: &Rig, base: &Checkpoint, window: &[u32]) -> Vec<Vec<Vec<f32>>> {
    let decoder = Decoder::open(base, &rig.compute).unwrap();
    let batch = Batch::of(&[window]);
    let x = decoder.embed(&batch).unwrap();
    let mut out = vec![x.to_vec2().unwrap()];
    decoder
        .layers(x, &decoder.pass(&batch), 0..base.config().layer_count, |_, x| {
            out.push(x.to_vec2()?);
            Ok(())
        })
        .unwrap();
    out
}

/// The paper's eq. 7, word for word, in float64.
fn angle(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    (dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt())).clamp(-1.0, 1.0).acos() / PI
}

#[test]
fn every_cell_is_the_papers_formula() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    let windows = windows(5, 32);
    for position in [TokenPosition::Last, TokenPosition::Mean] {
        let measured = measure(&rig, &base, &windows, &spec(position));
        let all: Vec<_> = windows.iter().map(|w| streams(&rig, &base, w)).collect();
        for n in 1..=6 {
            assert_eq!(measured.by_len[n - 1].len(), 6 - n + 1);
            for l in 0..=6 - n {
                let samples: Vec<f64> = all
                    .iter()
                    .map(|seams| {
                        let count = seams[0].len();
                        let first = if position == TokenPosition::Last { count - 1 } else { 0 };
                        let angles = (first..count).map(|t| angle(&seams[l][t], &seams[l + n][t]));
                        angles.sum::<f64>() / (count - first) as f64
                    })
                    .collect();
                let mean = samples.iter().sum::<f64>() / 5.0;
                let spread = samples.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / 4.0;
                assert!((measured.by_len[n - 1][l] - mean).abs() < 1e-6, "{position:?} n {n} l {l}");
                assert!((measured.stderr[n - 1][l] - (spread / 5.0).sqrt()).abs() < 1e-6);
            }
        }
    }
}

#[test]
fn batching_and_padding_change_nothing() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::mistral());
    let windows = windows(7, 40);
    for position in [TokenPosition::Last, TokenPosition::Mean] {
        let by = |batch_size| {
            let spec = CalibrationSpec { batch_size, logit_lens: true, ..spec(position) };
            measure(&rig, &base, &windows, &spec)
        };
        let (one, many) = (by(1), by(5));
        assert_eq!((one.samples, one.tokens), (many.samples, many.tokens));
        let cells = |p: &LayerProfile| -> Vec<f64> {
            let rows = p.by_len.iter().chain(&p.stderr).flatten().chain(&p.influence).chain(&p.cross_axis);
            let halves = p.contribution.iter().flat_map(|c| [c.attention, c.mlp, c.mlp_stderr]);
            let lens = p.logit_lens.iter().flat_map(|r| [r.loss, r.agreement]);
            rows.chain(&p.relative_magnitude).chain(&p.norm).copied().chain(halves).chain(lens).collect()
        };
        let (one, many) = (cells(&one), cells(&many));
        assert_eq!(one.len(), 2 * 21 + 3 * 6 + 7 + 3 * 6 + 2 * 7);
        for (a, b) in one.iter().zip(many) {
            assert!((a - b).abs() < 1e-5 * a.abs().max(1.0), "{a} {b}");
        }
    }
}

#[test]
fn an_identity_layer_lies_at_distance_nothing() {
    for idle in [0, 3, 5] {
        let rig = Rig::new();
        let base = rig.base(&Tiny { identity: vec![idle], ..Tiny::llama() });
        let measured = measure(&rig, &base, &windows(4, 24), &spec(TokenPosition::Last));
        for (l, distance) in measured.by_len[0].iter().enumerate() {
            assert_eq!(*distance < 1e-6, l == idle, "layer {l}: {distance}");
        }
        assert!(measured.influence[idle].abs() < 1e-12);
        assert!(measured.relative_magnitude[idle].abs() < 1e-6);
        assert!((measured.norm[idle] - measured.norm[idle + 1]).abs() < 1e-9);
    }
}

#[test]
fn cosine_is_one_less_the_cosine() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    let windows = windows(1, 16);
    let angular = measure(&rig, &base, &windows, &spec(TokenPosition::Last));
    let cosine = CalibrationSpec { distance: Distance::Cosine, ..spec(TokenPosition::Last) };
    let cosine = measure(&rig, &base, &windows, &cosine);
    assert_eq!((angular.unit.as_str(), cosine.unit.as_str()), ("pi", "cosine"));
    for (a, c) in angular.by_len.iter().flatten().zip(cosine.by_len.iter().flatten()) {
        assert!((1.0 - (a * PI).cos() - c).abs() < 1e-9);
    }
    assert_eq!(cosine.influence, cosine.by_len[0]);
}

#[test]
fn progress_is_told_with_every_layer() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    measure(&rig, &base, &windows(7, 16), &spec(TokenPosition::Last));
    let done: Vec<(u64, u64)> = rig
        .ear
        .heard()
        .into_iter()
        .filter_map(|e| if let Event::Advanced { done, total, .. } = e { Some((done, total)) } else { None })
        .collect();
    assert_eq!(done, (1..=6).map(|layer| (layer, 6)).collect::<Vec<_>>());
}

#[test]
fn nan_in_the_weights_is_found_before_any_compute_and_named() {
    let rig = Rig::new();
    let dir = Tiny::llama().write_with(rig.path("base"), |w| {
        if w.name == "model.layers.2.mlp.up_proj.weight" {
            w.values[5] = f32::NAN;
        }
    });
    let base = Checkpoint::open(&dir).unwrap();
    // A run names its model by its content before it does anything else.
    let error = base.digest().unwrap_err().to_string();
    assert!(error.contains("model.layers.2.mlp.up_proj.weight") && error.contains("NaN"), "{error}");
}

#[test]
fn a_stream_that_overflows_names_the_layer_and_the_window() {
    let rig = Rig::new();
    let dir = Tiny::llama().write_with(rig.path("base"), |w| {
        if w.name == "model.layers.3.mlp.down_proj.weight" {
            w.values.iter_mut().for_each(|v| *v = 3e38);
        }
    });
    let base = Checkpoint::open(&dir).unwrap();
    let error = profile(&base, &windows(2, 16), &spec(TokenPosition::Last), 1, rig.cx(Stage::Profile));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("window 0") && error.contains("layer 3"), "{error}");
}

#[test]
fn halves_of_a_layer_are_told_apart_and_an_idle_one_adds_nothing() {
    let rig = Rig::new();
    let base = rig.base(&Tiny { identity: vec![3], ..Tiny::llama() });
    let windows = windows(4, 32);
    for position in [TokenPosition::Last, TokenPosition::Mean] {
        let measured = measure(&rig, &base, &windows, &spec(position));
        assert_eq!(measured.contribution.len(), 6);
        for (l, added) in measured.contribution.iter().enumerate() {
            let idle = l == 3;
            assert_eq!(
                (added.attention < 1e-6, added.mlp < 1e-6),
                (idle, idle),
                "{position:?} {l} {added:?}"
            );
        }
        // What a layer adds in all is at most what its halves do.
        let bound = |l: usize| {
            let added = measured.contribution[l];
            added.attention + added.mlp * (1.0 + added.attention)
        };
        assert!((0..6).all(|l| measured.relative_magnitude[l] < bound(l) * 1.5 + 1e-6));
    }
}

#[test]
fn the_lens_ends_where_the_model_does() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    let windows = windows(4, 32);
    let asked = CalibrationSpec { logit_lens: true, ..spec(TokenPosition::Last) };
    let lens = measure(&rig, &base, &windows, &asked).logit_lens;
    assert_eq!(lens.len(), 7);
    assert_eq!(lens[6].agreement, 1.0);
    let requests: Vec<Request> = windows.iter().map(|w| Request { tokens: w.clone(), from: 1 }).collect();
    let decoder = Decoder::open(&base, &rig.compute).unwrap();
    let scored = likelihoods(&decoder, &requests, "by hand", rig.cx(Stage::Eval)).unwrap();
    let tokens: usize = windows.iter().map(|w| w.len() - 1).sum();
    let loss = -scored.iter().map(|s| s.log_likelihood).sum::<f64>() / tokens as f64;
    assert!((lens[6].loss - loss).abs() < 1e-5, "{} {loss}", lens[6].loss);
    assert!(lens[0].agreement < 1.0 && lens[0].loss.is_finite());
}

#[test]
fn sampling_ends_when_the_nearest_block_is_sure_enough() {
    let rig = Rig::new();
    let base = rig.base(&Tiny { identity: vec![3], ..Tiny::llama() });
    let windows = windows(70, 24);
    let asked = |confidence| CalibrationSpec { confidence: Some(confidence), ..spec(TokenPosition::Last) };
    let sure = measure(&rig, &base, &windows, &asked(0.9));
    assert_eq!((sure.samples, sure.samples_asked, sure.stopped_early), (16, 70, true));
    assert!(sure.confidence[0] >= 0.9);
    let whole = measure(&rig, &base, &windows, &spec(TokenPosition::Last));
    assert_eq!((whole.samples, whole.stopped_early), (70, false));
    // The first sixteen windows alone come to the same.
    let first = measure(&rig, &base, &windows[..16], &spec(TokenPosition::Last));
    assert_eq!(sure.by_len, first.by_len);
}
