//! How scores of attention become shares, and gradients of shares those of scores.

use std::ops::Range;

use super::lanes::vectorised;

/// How scores become shares: scaled, capped if there is a cap.
#[derive(Debug, Clone, Copy)]
pub struct Scoring {
    pub scale: f32,
    /// `cap · tanh(score / cap)`.
    pub cap: Option<f32>,
}

vectorised! {
    /// Scales values, and caps them if there is a cap above 0.
    pub(super) fn scaled[v](values: &mut [f32], scale: f32, cap: f32) {
        for at in (0..values.len()).step_by(L::WIDTH) {
            let mut value = v.mul(v.load(values, at), v.splat(scale));
            if cap > 0.0 {
                value = v.mul(v.splat(cap), v.tanh(v.mul(value, v.splat(1.0 / cap))));
            }
            v.store(values, at, value);
        }
    }
}

vectorised! {
    /// The products of `q` with keys that begin `step` values behind one another.
    pub(super) fn few_scores[v](q: &[f32], keys: &[f32], step: usize, out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            let key = &keys[i * step..][..q.len()];
            let mut sum = v.splat(0.0);
            for at in (0..q.len()).step_by(L::WIDTH) {
                sum = v.fma(v.load(q, at), v.load(key, at), sum);
            }
            *out = v.total(sum);
        }
    }
}

vectorised! {
    /// Adds `factor` times the sum of `shares` of values that begin `step` behind one another.
    pub(super) fn gather_few[v](shares: &[f32], factor: f32, values: &[f32], step: usize, out: &mut [f32]) {
        /// Vectors that are summed side by side: an addition waits for the one before.
        const SIDE: usize = 4;
        let width = out.len();
        for first in (0..width).step_by(SIDE * L::WIDTH) {
            let count = (width - first).div_ceil(L::WIDTH).min(SIDE);
            let mut sums = [v.splat(0.0); SIDE];
            for (i, share) in shares.iter().enumerate() {
                let value = &values[i * step..][..width];
                let share = v.splat(*share);
                for (j, sum) in sums.iter_mut().enumerate().take(count) {
                    *sum = v.fma(share, v.load(value, first + j * L::WIDTH), *sum);
                }
            }
            for (j, sum) in sums.into_iter().enumerate().take(count) {
                let at = first + j * L::WIDTH;
                v.store(out, at, v.fma(sum, v.splat(factor), v.load(out, at)));
            }
        }
    }
}

/// A row of scores becomes `exp(score - most)` over what it sees, zero elsewhere; gives their sum and `most`.
pub(super) fn shares(scores: &mut [f32], seen: Range<usize>, scoring: Scoring) -> (f32, f32) {
    vectorised! {
        fn go[v](scores: &mut [f32], scale: f32) -> (f32, f32) {
            let mut most = v.splat(f32::NEG_INFINITY);
            for at in (0..scores.len()).step_by(L::WIDTH) {
                most = v.larger(v.load_or(f32::NEG_INFINITY, scores, at), most);
            }
            let most = v.largest(most) * scale;
            let mut sum = v.splat(0.0);
            for at in (0..scores.len()).step_by(L::WIDTH) {
                let score = v.load_or(f32::NEG_INFINITY, scores, at);
                let share = v.exp(v.fma(score, v.splat(scale), v.splat(-most)));
                sum = v.add(sum, share);
                v.store(scores, at, share);
            }
            (v.total(sum), most)
        }
    }
    scores[..seen.start].fill(0.0);
    scores[seen.end..].fill(0.0);
    let scores = &mut scores[seen];
    let mut scale = scoring.scale;
    if scoring.cap.is_some() || scale <= 0.0 {
        scaled(scores, scale, scoring.cap.unwrap_or(0.0));
        scale = 1.0;
    }
    go(scores, scale)
}

/// A row of scores becomes its shares, and the gradient for the shares becomes that for the scores.
/// `log_sum` is the logarithm of the sum that the shares were divided by, `along` the share-weighted mean
/// gradient.
pub(super) fn shares_back(
    scores: &mut [f32],
    d_shares: &mut [f32],
    seen: Range<usize>,
    scoring: Scoring,
    log_sum: f32,
    along: f32,
) {
    vectorised! {
        fn go[v](scores: &mut [f32], gradients: &mut [f32], scale: f32, cap: f32, log_sum: f32, along: f32) {
            let gradients = &mut gradients[..scores.len()];
            for at in (0..scores.len()).step_by(L::WIDTH) {
                let mut score = v.mul(v.load(scores, at), v.splat(scale));
                let mut slope = v.splat(scale);
                if cap > 0.0 {
                    let t = v.tanh(v.mul(score, v.splat(1.0 / cap)));
                    score = v.mul(v.splat(cap), t);
                    slope = v.mul(slope, v.sub(v.splat(1.0), v.mul(t, t)));
                }
                let share = v.exp(v.sub(score, v.splat(log_sum)));
                v.store(scores, at, share);
                let distance = v.sub(v.load(gradients, at), v.splat(along));
                v.store(gradients, at, v.mul(v.mul(share, slope), distance));
            }
        }
    }
    for row in [&mut *scores, &mut *d_shares] {
        row[..seen.start].fill(0.0);
        row[seen.end..].fill(0.0);
    }
    let (scores, gradients) = (&mut scores[seen.clone()], &mut d_shares[seen]);
    go(scores, gradients, scoring.scale, scoring.cap.unwrap_or(0.0), log_sum, along);
}
