//! What happens between products, a row at a time: norm, rotation, activation and shares of attention, each
//! in one pass forward and one back.

use std::ops::Range;

/// A function compiled twice: for any processor, and for one with AVX-512, which is used where it is there.
macro_rules! vectorised {
    ($(#[$doc:meta])* $access:vis fn $name:ident($($arg:ident: $kind:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$doc])*
        $access fn $name($($arg: $kind),*) $(-> $result)? {
            #[inline(always)]
            #[allow(clippy::inline_always)]
            fn plain($($arg: $kind),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                fn wide($($arg: $kind),*) $(-> $result)? {
                    plain($($arg),*)
                }
                if super::wide() {
                    // SAFETY: the features are there.
                    #[allow(unsafe_code)]
                    return unsafe { wide($($arg),*) };
                }
            }
            plain($($arg),*)
        }
    };
}

/// eˣ to 2e-7 relative, without a branch; 0 far below.
#[inline(always)]
#[allow(clippy::inline_always)]
fn exp(x: f32) -> f32 {
    /// 1.5 · 2²³: what is added to it is rounded to a whole number, which stands in its lowest bits.
    const ROUNDER: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUNDER;
    let whole = rounded - ROUNDER;
    // ln 2 in two parts: the first one times a small whole number is exact.
    let r = x - whole * 0.693_359_4 + whole * 2.121_944_4e-4;
    let tail =
        1.666_666_5e-1 + r * (4.166_579_6e-2 + r * (8.333_452e-3 + r * (1.398_2e-3 + r * 1.987_569_1e-4)));
    let power = 1.0 + r + r * r * (0.5 + r * tail);
    // The shift leaves of the rounder's own bits nothing.
    power * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
}

#[inline(always)]
#[allow(clippy::inline_always)]
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// The error function to 1.5e-7 (Abramowitz & Stegun, 7.1.26).
#[inline(always)]
#[allow(clippy::inline_always)]
fn erf(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs());
    let series =
        t * (0.254_829_6 + t * (-0.284_496_72 + t * (1.421_413_8 + t * (-1.453_152_1 + t * 1.061_405_4))));
    (1.0 - series * exp(-x * x)).copysign(x)
}

/// Sum of sixteen lanes of `f(i)`.
macro_rules! lanes {
    ($len:expr, $start:expr, |$i:ident, $sum:ident| $next:expr, |$a:ident, $b:ident| $join:expr) => {{
        let len = $len;
        let mut lanes = [$start; 16];
        let whole = len / 16 * 16;
        for first in (0..whole).step_by(16) {
            for lane in 0..16 {
                let ($i, $sum) = (first + lane, lanes[lane]);
                lanes[lane] = $next;
            }
        }
        for $i in whole..len {
            let $sum = lanes[0];
            lanes[0] = $next;
        }
        lanes.into_iter().fold($start, |$a, $b| $join)
    }};
}

/// Sum of products, in sixteen lanes.
#[inline(always)]
#[allow(clippy::inline_always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, b) = (&a[..a.len().min(b.len())], &b[..a.len().min(b.len())]);
    lanes!(a.len(), 0f32, |i, sum| sum + a[i] * b[i], |a, b| a + b)
}

vectorised! {
    /// Sum of products.
    pub fn product(a: &[f32], b: &[f32]) -> f32 {
        dot(a, b)
    }
}

vectorised! {
    /// Sum of products in float64.
    pub fn product_wide(a: &[f64], b: &[f64]) -> f64 {
        let (a, b) = (&a[..a.len().min(b.len())], &b[..a.len().min(b.len())]);
        lanes!(a.len(), 0f64, |i, sum| sum + a[i] * b[i], |a, b| a + b)
    }
}

vectorised! {
    /// `out += factor · x`.
    pub fn add_scaled(out: &mut [f32], factor: f32, x: &[f32]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out += factor * x;
        }
    }
}

/// A norm over the last dimension.
#[derive(Debug, Clone)]
pub struct Norm {
    pub weight: Vec<f32>,
    /// Of a layer norm (mean and variance); an RMS norm has none.
    pub bias: Option<Vec<f32>>,
    pub eps: f32,
}

impl Norm {
    pub fn row(&self, x: &[f32], out: &mut [f32]) {
        match &self.bias {
            None => rms_norm(x, &self.weight, self.eps, out),
            Some(bias) => layer_norm(x, &self.weight, bias, self.eps, out),
        }
    }

    /// Adds the gradient for `x` to `dx`, of the gradient `dy` for the norm of `x`.
    pub fn back(&self, x: &[f32], dy: &[f32], dx: &mut [f32]) {
        match self.bias {
            None => rms_norm_back(x, &self.weight, self.eps, dy, dx),
            Some(_) => layer_norm_back(x, &self.weight, self.eps, dy, dx),
        }
    }
}

vectorised! {
    fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * w;
        }
    }
}

vectorised! {
    fn rms_norm_back(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let n = x.len();
        let (weight, dy) = (&weight[..n], &dy[..n]);
        let scale = 1.0 / (dot(x, x) / n as f32 + eps).sqrt();
        let along = lanes!(n, 0f32, |i, sum| sum + dy[i] * weight[i] * x[i], |a, b| a + b);
        let along = along * scale * scale / n as f32;
        for (i, dx) in dx.iter_mut().enumerate().take(n) {
            *dx += scale * (dy[i] * weight[i] - along * x[i]);
        }
    }
}

/// Mean, and one over the deviation.
#[inline(always)]
#[allow(clippy::inline_always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = lanes!(x.len(), 0f32, |i, sum| sum + x[i], |a, b| a + b) / n;
    let square = |d: f32| d * d;
    let variance = lanes!(x.len(), 0f32, |i, sum| sum + square(x[i] - mean), |a, b| a + b) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

vectorised! {
    fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        let (mean, scale) = moments(x, eps);
        for (((out, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = (x - mean) * scale * w + b;
        }
    }
}

vectorised! {
    fn layer_norm_back(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let n = x.len();
        let (weight, dy) = (&weight[..n], &dy[..n]);
        let (mean, scale) = moments(x, eps);
        let level = lanes!(n, 0f32, |i, sum| sum + dy[i] * weight[i], |a, b| a + b) / n as f32;
        let along = lanes!(n, 0f32, |i, sum| sum + dy[i] * weight[i] * (x[i] - mean), |a, b| a + b);
        let along = along * scale * scale / n as f32;
        for (i, dx) in dx.iter_mut().enumerate().take(n) {
            *dx += scale * (dy[i] * weight[i] - level - along * (x[i] - mean));
        }
    }
}

/// What an MLP does to its inner values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bend {
    Silu,
    /// With the error function.
    Gelu,
    GeluTanh,
    Relu,
}

/// Value and slope.
#[inline(always)]
#[allow(clippy::inline_always)]
fn silu(x: f32) -> (f32, f32) {
    let share = 1.0 / (1.0 + exp(-x));
    (x * share, share * (1.0 + x * (1.0 - share)))
}

#[inline(always)]
#[allow(clippy::inline_always)]
fn gelu(x: f32) -> (f32, f32) {
    let below = 0.5 + 0.5 * erf(x * std::f32::consts::FRAC_1_SQRT_2);
    (x * below, below + x * 0.398_942_3 * exp(-0.5 * x * x))
}

#[inline(always)]
#[allow(clippy::inline_always)]
fn gelu_tanh(x: f32) -> (f32, f32) {
    let root = 0.797_884_6;
    let t = tanh(root * (x + 0.044_715 * x * x * x));
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * root * (1.0 + 0.134_145 * x * x))
}

#[inline(always)]
#[allow(clippy::inline_always)]
fn relu(x: f32) -> (f32, f32) {
    if x > 0.0 { (x, 1.0) } else { (0.0, 0.0) }
}

vectorised! {
    /// `out = bend(gate) · up`, or `bend(gate)` alone when `up` is empty.
    pub fn bent(bend: Bend, gate: &[f32], up: &[f32], out: &mut [f32]) {
        macro_rules! with {
            ($f:ident) => {
                if up.is_empty() {
                    for (out, x) in out.iter_mut().zip(gate) {
                        *out = $f(*x).0;
                    }
                } else {
                    for ((out, x), up) in out.iter_mut().zip(gate).zip(up) {
                        *out = $f(*x).0 * up;
                    }
                }
            };
        }
        match bend {
            Bend::Silu => with!(silu),
            Bend::Gelu => with!(gelu),
            Bend::GeluTanh => with!(gelu_tanh),
            Bend::Relu => with!(relu),
        }
    }
}

vectorised! {
    /// The gradients of [`bent`]: `gate` and `up` become theirs.
    pub fn bent_back(bend: Bend, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        macro_rules! with {
            ($f:ident) => {
                if up.is_empty() {
                    for (x, dy) in gate.iter_mut().zip(dy) {
                        *x = dy * $f(*x).1;
                    }
                } else {
                    for ((x, up), dy) in gate.iter_mut().zip(up).zip(dy) {
                        let (value, slope) = $f(*x);
                        *x = dy * *up * slope;
                        *up = dy * value;
                    }
                }
            };
        }
        match bend {
            Bend::Silu => with!(silu),
            Bend::Gelu => with!(gelu),
            Bend::GeluTanh => with!(gelu_tanh),
            Bend::Relu => with!(relu),
        }
    }
}

vectorised! {
    /// Rotates the first dimensions of a head in place: pairs `(i, i + pairs)` by the angles of its token;
    /// back when `sign` is -1.
    pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        let pairs = cos.len();
        let (low, high) = head.split_at_mut(pairs);
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (a, b) = (*low, *high);
            *low = a * cos - b * (sign * sin);
            *high = b * cos + a * (sign * sin);
        }
    }
}

/// How scores become shares: scaled, capped if there is a cap.
#[derive(Debug, Clone, Copy)]
pub struct Scoring {
    pub scale: f32,
    /// `cap · tanh(score / cap)`.
    pub cap: Option<f32>,
}

/// Scales values, and caps them if there is a cap above 0.
#[inline(always)]
#[allow(clippy::inline_always)]
fn scaled(values: &mut [f32], scale: f32, cap: f32) {
    if cap > 0.0 {
        for value in values.iter_mut() {
            *value = cap * tanh(*value * scale / cap);
        }
    } else {
        for value in values.iter_mut() {
            *value *= scale;
        }
    }
}

/// A row of scores becomes `exp(score - most)` over what it sees, zero elsewhere; gives their sum and `most`.
pub fn shares(scores: &mut [f32], seen: Range<usize>, scoring: Scoring) -> (f32, f32) {
    vectorised! {
        fn go(scores: &mut [f32], scale: f32, cap: f32) -> (f32, f32) {
            let mut scale = scale;
            if cap > 0.0 || scale <= 0.0 {
                scaled(scores, scale, cap);
                scale = 1.0;
            }
            let larger = |a: f32, b: f32| if b > a { b } else { a };
            let most = lanes!(scores.len(), f32::NEG_INFINITY, |i, most| larger(most, scores[i]), |a, b| larger(a, b));
            let most = most * scale;
            let (whole, rest) = scores.as_chunks_mut::<16>();
            let mut lanes = [0f32; 16];
            for sixteen in whole {
                for (score, sum) in sixteen.iter_mut().zip(&mut lanes) {
                    *score = exp(*score * scale - most);
                    *sum += *score;
                }
            }
            for (score, sum) in rest.iter_mut().zip(&mut lanes) {
                *score = exp(*score * scale - most);
                *sum += *score;
            }
            (lanes.iter().sum(), most)
        }
    }
    scores[..seen.start].fill(0.0);
    scores[seen.end..].fill(0.0);
    go(&mut scores[seen], scoring.scale, scoring.cap.unwrap_or(0.0))
}

/// A row of scores becomes its shares, and the gradient for the shares becomes that for the scores.
/// `log_sum` is the logarithm of the sum that the shares were divided by, `along` the share-weighted mean
/// gradient.
pub fn shares_back(
    scores: &mut [f32],
    d_shares: &mut [f32],
    seen: Range<usize>,
    scoring: Scoring,
    log_sum: f32,
    along: f32,
) {
    vectorised! {
        fn go(scores: &mut [f32], gradients: &mut [f32], scale: f32, cap: f32, log_sum: f32, along: f32) {
            if cap > 0.0 {
                for (score, gradient) in scores.iter_mut().zip(gradients) {
                    let t = tanh(*score * scale / cap);
                    *score = exp(cap * t - log_sum);
                    *gradient = *score * (*gradient - along) * (1.0 - t * t) * scale;
                }
            } else {
                for (score, gradient) in scores.iter_mut().zip(gradients) {
                    *score = exp(*score * scale - log_sum);
                    *gradient = *score * (*gradient - along) * scale;
                }
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

/// How likely tokens are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Likelihood {
    /// Sum over the tokens, in nats.
    pub log_likelihood: f64,
    /// Every token is the first of the likeliest at its place.
    pub greedy: bool,
}

/// Scales and caps a row of logits in place.
pub fn finish_logits(logits: &mut [f32], scale: f32, cap: Option<f32>) {
    vectorised! {
        fn go(logits: &mut [f32], scale: f32, cap: f32) {
            scaled(logits, scale, cap);
        }
    }
    if scale != 1.0 || cap.is_some() {
        go(logits, scale, cap.unwrap_or(0.0));
    }
}

vectorised! {
    /// The largest logit, and the sum of `exp(logit - largest)`.
    fn mass(logits: &[f32]) -> (f32, f64) {
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        let most = lanes!(logits.len(), f32::NEG_INFINITY, |i, most| larger(most, logits[i]), |a, b| larger(a, b));
        // Short sums in float32, their sum in float64.
        let mut sum = 0f64;
        for part in logits.chunks(1024) {
            sum += f64::from(lanes!(part.len(), 0f32, |i, sum| sum + exp(part[i] - most), |a, b| a + b));
        }
        (most, sum)
    }
}

/// How likely a token is, found out from one block of the vocabulary after another.
#[derive(Debug, Clone, Copy)]
pub struct Odds {
    token: usize,
    /// The token's own logit.
    own: f32,
    /// The largest logit so far, and where it is first.
    most: f32,
    best: usize,
    /// Sum of `exp(logit - most)`.
    sum: f64,
}

impl Odds {
    pub fn of(token: usize) -> Self {
        Self { token, own: f32::NAN, most: f32::NEG_INFINITY, best: usize::MAX, sum: 0.0 }
    }

    /// Takes in the finished logits of tokens `first..`.
    pub fn add(&mut self, logits: &[f32], first: usize) {
        let (most, sum) = mass(logits);
        if most > self.most {
            self.sum = self.sum * f64::from(self.most - most).exp() + sum;
            self.best = first + logits.iter().position(|logit| *logit >= most).unwrap_or(0);
            self.most = most;
        } else {
            self.sum += sum * f64::from(most - self.most).exp();
        }
        if let Some(own) = self.token.checked_sub(first).and_then(|place| logits.get(place)) {
            self.own = *own;
        }
    }

    pub fn likelihood(&self) -> Likelihood {
        Likelihood {
            log_likelihood: f64::from(self.own) - f64::from(self.most) - self.sum.ln(),
            greedy: self.best == self.token,
        }
    }
}

/// `-ln p(token)`, in nats; finished logits become `factor` times its gradient for the logits before they were
/// capped and scaled, the latter of which `factor` has to hold.
pub fn cross_entropy(logits: &mut [f32], token: usize, cap: Option<f32>, factor: f32) -> f32 {
    vectorised! {
        fn go(logits: &mut [f32], cap: f32, most: f32, share: f32, factor: f32) {
            if cap > 0.0 {
                for logit in logits.iter_mut() {
                    // d/dx cap·tanh(x/cap) = 1 - tanh², and the capped logit is cap·tanh.
                    let t = *logit / cap;
                    *logit = exp(*logit - most) * share * factor * (1.0 - t * t);
                }
            } else {
                for logit in logits.iter_mut() {
                    *logit = exp(*logit - most) * share * factor;
                }
            }
        }
    }
    let (most, sum) = mass(logits);
    let nll = f64::from(most) - f64::from(logits[token]) + sum.ln();
    let slope = cap.map_or(1.0, |cap| 1.0 - (logits[token] / cap).powi(2));
    go(logits, cap.unwrap_or(0.0), most, (1.0 / sum) as f32, factor);
    logits[token] -= factor * slope;
    nll as f32
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

    #[test]
    fn odds_do_not_depend_on_the_blocks_they_come_in() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 37 % 1001) as f32 - 500.0) / 40.0).collect();
        let sum: f64 = logits.iter().map(|v| f64::from(*v).exp()).sum();
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        for block in [1000, 333, 16, 1] {
            for token in [0, 17, best, 999] {
                let mut odds = Odds::of(token);
                for (i, part) in logits.chunks(block).enumerate() {
                    odds.add(part, i * block);
                }
                let found = odds.likelihood();
                assert!((found.log_likelihood - (f64::from(logits[token]) - sum.ln())).abs() < 1e-6);
                assert_eq!(found.greedy, token == best);
            }
        }
        // Of equal ones the first is meant.
        let mut odds = Odds::of(2);
        odds.add(&[1.0, 3.0], 0);
        odds.add(&[3.0, 0.0], 2);
        assert!(!odds.likelihood().greedy);
    }

    /// The slope of `f` at `x`, from the values around it.
    fn slope(f: impl Fn(f32) -> f64, x: f32) -> f64 {
        (f(x + 1e-2) - f(x - 1e-2)) / f64::from((x + 1e-2) - (x - 1e-2))
    }

    #[test]
    fn slopes_are_those_of_the_values() {
        for bend in [Bend::Silu, Bend::Gelu, Bend::GeluTanh, Bend::Relu] {
            let value = |x: f32| {
                let mut out = [0.0];
                bent(bend, &[x], &[2.0], &mut out);
                f64::from(out[0])
            };
            for i in -50..50 {
                let x = i as f32 / 10.0 + 0.03;
                let (mut gate, mut up) = ([x], [2.0]);
                bent_back(bend, &mut gate, &mut up, &[1.5]);
                assert!((f64::from(gate[0]) - 1.5 * slope(value, x)).abs() < 1e-3, "{bend:?} {x}: {gate:?}");
                assert!((f64::from(up[0]) - 1.5 * value(x) / 2.0).abs() < 1e-5, "{bend:?} {x}: {up:?}");
            }
        }
    }

    #[test]
    fn norms_back_are_the_gradients_of_norms() {
        let x: Vec<f32> = (0..37).map(|i| ((i * 7 % 11) as f32 - 5.0) / 3.0).collect();
        let dy: Vec<f32> = (0..37).map(|i| ((i * 5 % 13) as f32 - 6.0) / 4.0).collect();
        let weight: Vec<f32> = (0..37).map(|i| 1.0 + (i % 3) as f32 / 5.0).collect();
        for bias in [None, Some(vec![0.5; 37])] {
            let norm = Norm { weight: weight.clone(), bias, eps: 1e-5 };
            let sum = |x: &[f32]| {
                let mut out = vec![0.0; 37];
                norm.row(x, &mut out);
                out.iter().zip(&dy).map(|(a, b)| f64::from(a * b)).sum::<f64>()
            };
            let mut dx = vec![1.0; 37];
            norm.back(&x, &dy, &mut dx);
            for i in 0..37 {
                let moved = |v: f32| {
                    let mut x = x.clone();
                    x[i] = v;
                    sum(&x)
                };
                let want = slope(moved, x[i]) + 1.0;
                assert!((f64::from(dx[i]) - want).abs() < 2e-3, "{i}: {} {want}", dx[i]);
            }
        }
    }

    #[test]
    fn cross_entropy_agrees_with_float64_and_its_own_slope() {
        let logits: Vec<f32> = (0..100).map(|i| ((i * 37 % 101) as f32 - 50.0) / 10.0).collect();
        for cap in [None, Some(3.0)] {
            let nll = |raw: &[f32]| {
                let mut row = raw.to_vec();
                finish_logits(&mut row, 0.5, cap);
                let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
                (row.clone(), sum.ln() - f64::from(row[7]))
            };
            let (mut row, want) = nll(&logits);
            let got = cross_entropy(&mut row, 7, cap, 0.5 * 2.0);
            assert!((f64::from(got) - want).abs() < 1e-5, "{got} {want}");
            for i in [0, 7, 50, 99] {
                let moved = |v: f32| {
                    let mut raw = logits.clone();
                    raw[i] = v;
                    nll(&raw).1
                };
                let want = 2.0 * slope(moved, logits[i]);
                assert!((f64::from(row[i]) - want).abs() < 1e-3, "{i}: {} {want}", row[i]);
            }
        }
    }
}
