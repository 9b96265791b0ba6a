//! What happens between products, a row at a time: norm, rotation and activation, each in one pass forward and
//! one back.

use super::lanes::{Lanes, vectorised};
pub use super::logits::{Likelihood, Odds, SoftTarget, cross_entropy, finish_logits, likeliest, log_softmax};
pub use super::scores::Scoring;

vectorised! {
    /// Sum of products.
    pub fn product[v](a: &[f32], b: &[f32]) -> f32 {
        dot(v, a, b)
    }
}

/// Sum of products.
#[inline(always)]
#[allow(clippy::inline_always)]
fn dot<L: Lanes>(v: L, a: &[f32], b: &[f32]) -> f32 {
    let b = &b[..a.len()];
    let mut sum = v.splat(0.0);
    for at in (0..a.len()).step_by(L::WIDTH) {
        sum = v.fma(v.load(a, at), v.load(b, at), sum);
    }
    v.total(sum)
}

/// Sum of products in float64, of equally many values.
///
/// # Panics
/// When they are not.
pub fn exact_product(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "a product of rows that do not fit. This is a bug.");
    let whole = a.len() / 16 * 16;
    let rest: f64 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    #[cfg(target_arch = "x86_64")]
    if super::wide() {
        // SAFETY: the processor has AVX-512, and both have so many values.
        #[allow(unsafe_code)]
        return rest + unsafe { exact_product_wide(&a[..whole], &b[..whole]) };
    }
    let mut sums = [0f64; 16];
    for (a, b) in a.as_chunks::<16>().0.iter().zip(b.as_chunks::<16>().0) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    rest + sums.iter().sum::<f64>()
}

/// # Safety
/// The processor must have AVX-512; both of a multiple of sixteen values, equally many.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
unsafe fn exact_product_wide(a: &[f32], b: &[f32]) -> f64 {
    use std::arch::x86_64::{
        _mm256_loadu_ps, _mm512_add_pd, _mm512_cvtps_pd, _mm512_fmadd_pd, _mm512_reduce_add_pd,
        _mm512_setzero_pd,
    };
    let (mut low, mut high) = (_mm512_setzero_pd(), _mm512_setzero_pd());
    for (a, b) in a.as_chunks::<16>().0.iter().zip(b.as_chunks::<16>().0) {
        // SAFETY: each chunk has sixteen values, of which eight are read at a time.
        unsafe {
            let (a, b) = (a.as_ptr(), b.as_ptr());
            low = _mm512_fmadd_pd(
                _mm512_cvtps_pd(_mm256_loadu_ps(a)),
                _mm512_cvtps_pd(_mm256_loadu_ps(b)),
                low,
            );
            let (a, b) = (_mm256_loadu_ps(a.add(8)), _mm256_loadu_ps(b.add(8)));
            high = _mm512_fmadd_pd(_mm512_cvtps_pd(a), _mm512_cvtps_pd(b), high);
        }
    }
    _mm512_reduce_add_pd(_mm512_add_pd(low, high))
}

vectorised! {
    /// `out += factor · x`.
    pub fn add_scaled[v](out: &mut [f32], factor: f32, x: &[f32]) {
        let x = &x[..out.len()];
        let factor = v.splat(factor);
        for at in (0..x.len()).step_by(L::WIDTH) {
            v.store(out, at, v.fma(factor, v.load(x, at), v.load(out, at)));
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
    fn rms_norm[v](x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let (weight, out) = (&weight[..x.len()], &mut out[..x.len()]);
        let scale = v.splat(1.0 / (dot(v, x, x) / x.len() as f32 + eps).sqrt());
        for at in (0..x.len()).step_by(L::WIDTH) {
            v.store(out, at, v.mul(v.mul(v.load(x, at), scale), v.load(weight, at)));
        }
    }
}

vectorised! {
    fn rms_norm_back[v](x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let n = x.len();
        let (weight, dy, dx) = (&weight[..n], &dy[..n], &mut dx[..n]);
        let (mut square, mut along) = (v.splat(0.0), v.splat(0.0));
        for at in (0..n).step_by(L::WIDTH) {
            let (x, dy) = (v.load(x, at), v.mul(v.load(dy, at), v.load(weight, at)));
            square = v.fma(x, x, square);
            along = v.fma(dy, x, along);
        }
        let scale = 1.0 / (v.total(square) / n as f32 + eps).sqrt();
        let along = v.splat(-v.total(along) * scale * scale / n as f32);
        let scale = v.splat(scale);
        for at in (0..n).step_by(L::WIDTH) {
            let dy = v.mul(v.load(dy, at), v.load(weight, at));
            let inner = v.fma(along, v.load(x, at), dy);
            v.store(dx, at, v.fma(scale, inner, v.load(dx, at)));
        }
    }
}

/// Mean, and one over the deviation.
#[inline(always)]
#[allow(clippy::inline_always)]
fn moments<L: Lanes>(v: L, x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mut sum = v.splat(0.0);
    for at in (0..x.len()).step_by(L::WIDTH) {
        sum = v.add(sum, v.load(x, at));
    }
    let mean = v.total(sum) / n;
    let mut square = v.splat(0.0);
    for at in (0..x.len()).step_by(L::WIDTH) {
        let distance = v.sub(v.load_or(mean, x, at), v.splat(mean));
        square = v.fma(distance, distance, square);
    }
    (mean, 1.0 / (v.total(square) / n + eps).sqrt())
}

vectorised! {
    fn layer_norm[v](x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        let n = x.len();
        let (weight, bias, out) = (&weight[..n], &bias[..n], &mut out[..n]);
        let (mean, scale) = moments(v, x, eps);
        let (mean, scale) = (v.splat(mean), v.splat(scale));
        for at in (0..n).step_by(L::WIDTH) {
            let normed = v.mul(v.sub(v.load(x, at), mean), scale);
            v.store(out, at, v.fma(normed, v.load(weight, at), v.load(bias, at)));
        }
    }
}

vectorised! {
    fn layer_norm_back[v](x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let n = x.len();
        let (weight, dy, dx) = (&weight[..n], &dy[..n], &mut dx[..n]);
        let (mean, scale) = moments(v, x, eps);
        let (mut level, mut along) = (v.splat(0.0), v.splat(0.0));
        for at in (0..n).step_by(L::WIDTH) {
            let dy = v.mul(v.load(dy, at), v.load(weight, at));
            level = v.add(level, dy);
            along = v.fma(dy, v.sub(v.load(x, at), v.splat(mean)), along);
        }
        let level = v.splat(v.total(level) / n as f32);
        let along = v.splat(-v.total(along) * scale * scale / n as f32);
        for at in (0..n).step_by(L::WIDTH) {
            let dy = v.sub(v.mul(v.load(dy, at), v.load(weight, at)), level);
            let inner = v.fma(along, v.sub(v.load(x, at), v.splat(mean)), dy);
            v.store(dx, at, v.fma(v.splat(scale), inner, v.load(dx, at)));
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

/// Value and slope of each kind.
#[inline(always)]
#[allow(clippy::inline_always)]
fn bend_of<L: Lanes>(v: L, bend: Bend, x: L::F) -> (L::F, L::F) {
    let (one, half) = (v.splat(1.0), v.splat(0.5));
    match bend {
        Bend::Silu => {
            let share = v.div(one, v.add(one, v.exp(v.sub(v.splat(0.0), x))));
            (v.mul(x, share), v.mul(share, v.fma(x, v.sub(one, share), one)))
        }
        Bend::Gelu => {
            let below = v.fma(half, v.erf(v.mul(x, v.splat(std::f32::consts::FRAC_1_SQRT_2))), half);
            let density = v.mul(v.splat(0.398_942_3), v.exp(v.mul(v.splat(-0.5), v.mul(x, x))));
            (v.mul(x, below), v.fma(x, density, below))
        }
        Bend::GeluTanh => {
            let (root, square) = (v.splat(0.797_884_6), v.mul(x, x));
            let t = v.tanh(v.mul(v.mul(root, x), v.fma(v.splat(0.044_715), square, one)));
            let below = v.fma(half, t, half);
            let inner = v.mul(root, v.fma(v.splat(0.134_145), square, one));
            let slope = v.mul(v.sub(one, v.mul(t, t)), inner);
            (v.mul(x, below), v.fma(v.mul(half, x), slope, below))
        }
        Bend::Relu => {
            let zero = v.splat(0.0);
            // Above 0 it is larger than the smallest number by far.
            let slope = v.smaller(one, v.mul(v.larger(x, zero), v.splat(f32::MAX)));
            (v.larger(x, zero), slope)
        }
    }
}

/// Calls `$f` for the kind of bend as a constant, so that no loop asks for it.
macro_rules! each_bend {
    ($bend:expr, $f:ident($($arg:expr),*)) => {
        match $bend {
            Bend::Silu => $f($($arg,)* Bend::Silu),
            Bend::Gelu => $f($($arg,)* Bend::Gelu),
            Bend::GeluTanh => $f($($arg,)* Bend::GeluTanh),
            Bend::Relu => $f($($arg,)* Bend::Relu),
        }
    };
}

vectorised! {
    /// `out = bend(gate) · up`, or `bend(gate)` alone when `up` is empty.
    pub fn bent[v](bend: Bend, gate: &[f32], up: &[f32], out: &mut [f32]) {
        #[inline(always)]
        #[allow(clippy::inline_always)]
        fn go<L: Lanes>(v: L, gate: &[f32], up: &[f32], out: &mut [f32], bend: Bend) {
            let out = &mut out[..gate.len()];
            for at in (0..gate.len()).step_by(L::WIDTH) {
                let value = bend_of(v, bend, v.load(gate, at)).0;
                let value = if up.is_empty() { value } else { v.mul(value, v.load(up, at)) };
                v.store(out, at, value);
            }
        }
        each_bend!(bend, go(v, gate, up, out));
    }
}

vectorised! {
    /// The gradients of [`bent`]: `gate` and `up` become theirs.
    pub fn bent_back[v](bend: Bend, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        #[inline(always)]
        #[allow(clippy::inline_always)]
        fn go<L: Lanes>(v: L, gate: &mut [f32], up: &mut [f32], dy: &[f32], bend: Bend) {
            let dy = &dy[..gate.len()];
            for at in (0..dy.len()).step_by(L::WIDTH) {
                let (value, slope) = bend_of(v, bend, v.load(gate, at));
                let mut dy = v.load(dy, at);
                if !up.is_empty() {
                    let factor = v.load(up, at);
                    v.store(up, at, v.mul(dy, value));
                    dy = v.mul(dy, factor);
                }
                v.store(gate, at, v.mul(dy, slope));
            }
        }
        each_bend!(bend, go(v, gate, up, dy));
    }
}

vectorised! {
    /// Rotates the first dimensions of a head in place: pairs `(i, i + pairs)` by the angles of its token;
    /// back when `sign` is -1.
    pub fn rotate[v](head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        let pairs = cos.len();
        let (low, high) = head.split_at_mut(pairs);
        let (high, sin) = (&mut high[..pairs], &sin[..pairs]);
        for at in (0..pairs).step_by(L::WIDTH) {
            let (cos, sin) = (v.load(cos, at), v.mul(v.load(sin, at), v.splat(sign)));
            let (a, b) = (v.load(low, at), v.load(high, at));
            v.store(low, at, v.sub(v.mul(a, cos), v.mul(b, sin)));
            v.store(high, at, v.fma(a, sin, v.mul(b, cos)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
