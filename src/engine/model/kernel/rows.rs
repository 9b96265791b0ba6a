//! What happens between products: norm, activation, softmax and rotation over rows of floats, each in one
//! pass forward and one back.

use std::ops::Range;

use rayon::prelude::*;

/// Floats per task: enough to be worth handing over.
const TASK: usize = 1 << 14;

/// A function compiled twice: for any processor, and for one with AVX-512, which is used where it is there.
macro_rules! vectorised {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $kind:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        fn $name($($arg: $kind),*) {
            #[inline(always)]
            #[allow(clippy::inline_always)]
            fn plain($($arg: $kind),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                fn wide($($arg: $kind),*) {
                    plain($($arg),*);
                }
                if super::wide() {
                    // SAFETY: the features are there.
                    #[allow(unsafe_code)]
                    unsafe {
                        wide($($arg),*);
                    }
                    return;
                }
            }
            plain($($arg),*);
        }
    };
}

/// eˣ to 2e-7 relative, without a branch; 0 far below.
#[inline(always)]
#[allow(clippy::inline_always)]
fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.3, 88.0);
    let whole = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0;
    // ln 2 in two parts: the first one times a small whole number is exact.
    let r = x - whole * 0.693_359_4 + whole * 2.121_944_4e-4;
    let tail =
        1.666_666_5e-1 + r * (4.166_579_6e-2 + r * (8.333_452e-3 + r * (1.398_2e-3 + r * 1.987_569_1e-4)));
    let power = 1.0 + r + r * r * (0.5 + r * tail);
    power * f32::from_bits(((whole as i32 + 127) as u32) << 23)
}

/// Sum of products, in sixteen lanes.
#[inline(always)]
#[allow(clippy::inline_always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// RMS norm of rows of `weight.len()` values.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    vectorised! {
        fn row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
            let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
            for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * w;
            }
        }
    }
    let mut out = vec![0f32; x.len()];
    let h = weight.len();
    each_row(h).call(&mut out, |i, out| row(&x[i * h..(i + 1) * h], weight, eps, out));
    out
}

/// The gradient of [`rms_norm`] for `x`.
pub fn rms_norm_back(x: &[f32], weight: &[f32], eps: f32, dy: &[f32]) -> Vec<f32> {
    vectorised! {
        fn row(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], out: &mut [f32]) {
            let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
            for ((out, dy), w) in out.iter_mut().zip(dy).zip(weight) {
                *out = dy * w;
            }
            let along = dot(out, x) * scale * scale / x.len() as f32;
            for (out, x) in out.iter_mut().zip(x) {
                *out = scale * (*out - along * x);
            }
        }
    }
    let mut out = vec![0f32; x.len()];
    let h = weight.len();
    each_row(h).call(&mut out, |i, out| {
        let at = i * h..(i + 1) * h;
        row(&x[at.clone()], weight, eps, &dy[at], out);
    });
    out
}

/// `silu(gate) · up`.
pub fn gated_silu(gate: &[f32], up: &[f32]) -> Vec<f32> {
    vectorised! {
        fn some(gate: &[f32], up: &[f32], out: &mut [f32]) {
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate / (1.0 + exp(-gate)) * up;
            }
        }
    }
    let mut out = vec![0f32; gate.len()];
    let parts = gate.par_chunks(TASK).zip(up.par_chunks(TASK));
    out.par_chunks_mut(TASK).zip(parts).for_each(|(out, (gate, up))| some(gate, up, out));
    out
}

/// The gradients of [`gated_silu`] for gate and up.
pub fn gated_silu_back(gate: &[f32], up: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    vectorised! {
        fn some(gate: &[f32], up: &[f32], dy: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
            for i in 0..gate.len().min(up.len()).min(dy.len()).min(d_gate.len()).min(d_up.len()) {
                let share = 1.0 / (1.0 + exp(-gate[i]));
                d_up[i] = dy[i] * gate[i] * share;
                d_gate[i] = dy[i] * up[i] * share * (1.0 + gate[i] * (1.0 - share));
            }
        }
    }
    let (mut d_gate, mut d_up) = (vec![0f32; gate.len()], vec![0f32; gate.len()]);
    let parts = gate.par_chunks(TASK).zip(up.par_chunks(TASK)).zip(dy.par_chunks(TASK));
    let out = d_gate.par_chunks_mut(TASK).zip(d_up.par_chunks_mut(TASK));
    out.zip(parts).for_each(|((d_gate, d_up), ((gate, up), dy))| some(gate, up, dy, d_gate, d_up));
    (d_gate, d_up)
}

/// Which keys each query of a block sees.
#[derive(Debug, Clone, Copy)]
pub struct Visible {
    /// Queries of the block; rows of scores repeat them.
    pub queries: usize,
    pub keys: usize,
    /// Position of the first query, counted from the first key of the block.
    pub first: usize,
    /// How many tokens back attention sees, itself included.
    pub window: Option<usize>,
}

impl Visible {
    /// Places among the keys that a row of scores sees.
    pub fn of(&self, row: usize) -> Range<usize> {
        let end = (self.first + row % self.queries + 1).min(self.keys);
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// Softmax of `scale · scores` over the keys that each row sees, zero elsewhere.
pub fn softmax(scores: &[f32], scale: f32, visible: Visible) -> Vec<f32> {
    vectorised! {
        fn row(scores: &[f32], scale: f32, out: &mut [f32]) {
            let most = scores.iter().fold(f32::NEG_INFINITY, |most, score| if *score > most { *score } else { most });
            let mut lanes = [0f32; 16];
            let (whole, rest) = out.as_chunks_mut::<16>();
            let (scores_whole, scores_rest) = scores.as_chunks::<16>();
            for (out, scores) in whole.iter_mut().zip(scores_whole) {
                for i in 0..16 {
                    out[i] = exp((scores[i] - most) * scale);
                    lanes[i] += out[i];
                }
            }
            let mut sum = lanes.iter().sum::<f32>();
            for (out, score) in rest.iter_mut().zip(scores_rest) {
                *out = exp((score - most) * scale);
                sum += *out;
            }
            let share = 1.0 / sum;
            for out in out.iter_mut() {
                *out *= share;
            }
        }
    }
    let mut out = vec![0f32; scores.len()];
    let keys = visible.keys;
    each_row(keys).call(&mut out, |i, out| {
        let seen = visible.of(i);
        row(&scores[i * keys..(i + 1) * keys][seen.clone()], scale, &mut out[seen]);
    });
    out
}

/// The gradient of [`softmax`] for the scores, of what it gave and the gradient of that.
pub fn softmax_back(shares: &[f32], dy: &[f32], scale: f32, visible: Visible) -> Vec<f32> {
    vectorised! {
        fn row(shares: &[f32], dy: &[f32], scale: f32, out: &mut [f32]) {
            let along = dot(shares, dy);
            for ((out, share), dy) in out.iter_mut().zip(shares).zip(dy) {
                *out = scale * share * (dy - along);
            }
        }
    }
    let mut out = vec![0f32; shares.len()];
    let keys = visible.keys;
    each_row(keys).call(&mut out, |i, out| {
        let (seen, at) = (visible.of(i), i * keys..(i + 1) * keys);
        row(&shares[at.clone()][seen.clone()], &dy[at][seen.clone()], scale, &mut out[seen]);
    });
    out
}

/// Rotates the first dimensions of rows `[…, t, d]`: pairs `(i, i + pairs)` by the angles of their token,
/// `[t, pairs]`; back when `sign` is -1.
pub fn rotate(x: &[f32], d: usize, cos: &[f32], sin: &[f32], pairs: usize, sign: f32) -> Vec<f32> {
    vectorised! {
        fn row(x: &[f32], cos: &[f32], sin: &[f32], sign: f32, out: &mut [f32]) {
            let pairs = cos.len();
            let (x_low, x_high) = x.split_at(pairs);
            let (low, high) = out.split_at_mut(pairs);
            for i in 0..pairs.min(x_high.len()).min(sin.len()).min(high.len()) {
                let sin = sign * sin[i];
                low[i] = x_low[i] * cos[i] - x_high[i] * sin;
                high[i] = x_high[i] * cos[i] + x_low[i] * sin;
            }
            high[pairs..].copy_from_slice(&x_high[pairs..]);
        }
    }
    let mut out = vec![0f32; x.len()];
    let t = cos.len() / pairs;
    each_row(d).call(&mut out, |i, out| {
        let token = i % t * pairs..(i % t + 1) * pairs;
        row(&x[i * d..(i + 1) * d], &cos[token.clone()], &sin[token], sign, out);
    });
    out
}

/// Work on rows of one width, side by side.
struct EachRow(usize);

const fn each_row(width: usize) -> EachRow {
    EachRow(width)
}

impl EachRow {
    fn call(&self, out: &mut [f32], work: impl Fn(usize, &mut [f32]) + Sync) {
        let rows = (TASK / self.0).max(1);
        out.par_chunks_mut(rows * self.0).enumerate().for_each(|(task, out)| {
            for (i, row) in out.chunks_mut(self.0).enumerate() {
                work(task * rows + i, row);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_right_to_the_last_digits() {
        for i in -8000..8000 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) / want - 1.0).abs() < 3e-7, "{x}: {} {want}", exp(x));
        }
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(-1000.0) < 2e-38);
    }
}
