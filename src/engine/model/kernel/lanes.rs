//! Vectors of float32: one source for AVX-512, for AVX2 and for any processor.
//!
//! What implements [`Lanes`] is a token that exists only where the processor has the instructions, so that
//! arithmetic with it is safe. [`vectorised!`] compiles a function once for each of them.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m512, _mm256_add_epi32, _mm256_add_ps, _mm256_and_ps, _mm256_andnot_ps, _mm256_castps_si256,
    _mm256_castsi256_ps, _mm256_div_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps,
    _mm256_mul_ps, _mm256_or_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps,
    _mm256_sub_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_div_ps,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_loadu_ps, _mm512_mask_storeu_ps, _mm512_max_ps,
    _mm512_min_ps, _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_sub_ps, _mm512_ternarylogic_epi32,
};

use super::{Path, path};

/// Arithmetic with vectors of [`Self::WIDTH`] values.
pub(super) trait Lanes: Copy {
    type F: Copy;
    const WIDTH: usize;

    fn splat(self, x: f32) -> Self::F;
    /// Values from `at` on, `fill` behind the end.
    fn load_or(self, fill: f32, x: &[f32], at: usize) -> Self::F;
    /// Writes values from `at` on, as far as there is room.
    fn store(self, out: &mut [f32], at: usize, x: Self::F);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a` where it is larger, else `b`, also where one is no number.
    fn larger(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a` where it is smaller, else `b`, also where one is no number.
    fn smaller(self, a: Self::F, b: Self::F) -> Self::F;
    /// The magnitude of `a` with the sign of `b`.
    fn signed(self, a: Self::F, b: Self::F) -> Self::F;
    /// 2ⁿ for the n that stands in the lowest bits.
    fn power(self, n: Self::F) -> Self::F;
    fn total(self, x: Self::F) -> f32;
    fn largest(self, x: Self::F) -> f32;

    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn load(self, x: &[f32], at: usize) -> Self::F {
        self.load_or(0.0, x, at)
    }

    /// eˣ to 2e-7 relative, without a branch; nearly 0 far below.
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn exp(self, x: Self::F) -> Self::F {
        /// 1.5 · 2²³: what is added to it is rounded to a whole number, which stands in its lowest bits.
        const ROUNDER: f32 = 12_582_912.0;
        let x = self.smaller(self.splat(88.0), self.larger(self.splat(-87.3), x));
        let rounded = self.fma(x, self.splat(std::f32::consts::LOG2_E), self.splat(ROUNDER));
        let whole = self.sub(rounded, self.splat(ROUNDER));
        // ln 2 in two parts: the first one times a small whole number is exact.
        let r = self.fma(whole, self.splat(2.121_944_4e-4), self.fma(whole, self.splat(-0.693_359_4), x));
        let tail = self.fma(r, self.splat(1.987_569_1e-4), self.splat(1.398_2e-3));
        let tail = self.fma(r, tail, self.splat(8.333_452e-3));
        let tail = self.fma(r, tail, self.splat(4.166_579_6e-2));
        let tail = self.fma(r, tail, self.splat(1.666_666_5e-1));
        let tail = self.fma(r, tail, self.splat(0.5));
        let power = self.fma(self.mul(r, r), tail, self.add(self.splat(1.0), r));
        self.mul(power, self.power(rounded))
    }

    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn tanh(self, x: Self::F) -> Self::F {
        self.sub(
            self.splat(1.0),
            self.div(self.splat(2.0), self.add(self.exp(self.add(x, x)), self.splat(1.0))),
        )
    }

    /// The error function to 1.5e-7 (Abramowitz & Stegun, 7.1.26).
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn erf(self, x: Self::F) -> Self::F {
        let magnitude = self.signed(x, self.splat(1.0));
        let t = self.div(self.splat(1.0), self.fma(self.splat(0.327_591_1), magnitude, self.splat(1.0)));
        let series = self.fma(t, self.splat(1.061_405_4), self.splat(-1.453_152_1));
        let series = self.fma(t, series, self.splat(1.421_413_8));
        let series = self.fma(t, series, self.splat(-0.284_496_72));
        let series = self.mul(t, self.fma(t, series, self.splat(0.254_829_6)));
        let below = self.exp(self.sub(self.splat(0.0), self.mul(x, x)));
        self.signed(self.sub(self.splat(1.0), self.mul(series, below)), x)
    }
}

/// Which vectors this process computes with.
#[derive(Clone, Copy)]
pub(super) enum Vectors {
    Plain(Plain),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

pub(super) fn vectors() -> Vectors {
    match path() {
        #[cfg(target_arch = "x86_64")]
        Path::Avx2 => Vectors::Avx2(Avx2(())),
        #[cfg(target_arch = "x86_64")]
        Path::Avx512 | Path::Bf16 | Path::Amx => Vectors::Avx512(Avx512(())),
        _ => Vectors::Plain(Plain),
    }
}

/// A function over `$v`, any [`Lanes`], compiled for each of them; the one that the processor has is called.
macro_rules! vectorised {
    (
        $(#[$doc:meta])*
        $access:vis fn $name:ident[$v:ident]($($arg:ident: $kind:ty),* $(,)?) $(-> $result:ty)? $body:block
    ) => {
        $(#[$doc])*
        $access fn $name($($arg: $kind),*) $(-> $result)? {
            use $crate::engine::model::kernel::lanes;

            #[inline(always)]
            #[allow(clippy::inline_always)]
            fn any<L: lanes::Lanes>($v: L, $($arg: $kind),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
            fn wide(v: lanes::Avx512, $($arg: $kind),*) $(-> $result)? {
                any(v, $($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn narrow(v: lanes::Avx2, $($arg: $kind),*) $(-> $result)? {
                any(v, $($arg),*)
            }

            match lanes::vectors() {
                lanes::Vectors::Plain(v) => any(v, $($arg),*),
                // SAFETY: there is a token, so there are the instructions.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                lanes::Vectors::Avx2(v) => unsafe { narrow(v, $($arg),*) },
                // SAFETY: there is a token, so there are the instructions.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                lanes::Vectors::Avx512(v) => unsafe { wide(v, $($arg),*) },
            }
        }
    };
}
pub(super) use vectorised;

/// Any processor.
#[derive(Clone, Copy)]
pub(super) struct Plain;

/// The processor has AVX2 and FMA: only [`vectors`] makes one.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// The processor has AVX-512: only [`vectors`] makes one.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// `$name(a, b)` lane by lane.
macro_rules! plain {
    ($($name:ident |$a:ident, $b:ident| $result:expr;)*) => {
        $(#[inline(always)]
        fn $name(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
            std::array::from_fn(|i| {
                let ($a, $b) = (a[i], b[i]);
                $result
            })
        })*
    };
}

#[allow(clippy::inline_always)]
impl Lanes for Plain {
    type F = [f32; 8];
    const WIDTH: usize = 8;

    plain! {
        add |a, b| a + b;
        sub |a, b| a - b;
        mul |a, b| a * b;
        div |a, b| a / b;
        larger |a, b| if a > b { a } else { b };
        smaller |a, b| if a < b { a } else { b };
        signed |a, b| a.copysign(b);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 8] {
        [x; 8]
    }

    #[inline(always)]
    fn load_or(self, fill: f32, x: &[f32], at: usize) -> [f32; 8] {
        let x = &x[at..];
        match x.first_chunk() {
            Some(whole) => *whole,
            None => std::array::from_fn(|i| x.get(i).copied().unwrap_or(fill)),
        }
    }

    #[inline(always)]
    fn store(self, out: &mut [f32], at: usize, x: [f32; 8]) {
        let out = &mut out[at..];
        let count = out.len().min(8);
        out[..count].copy_from_slice(&x[..count]);
    }

    #[inline(always)]
    fn fma(self, a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn power(self, n: [f32; 8]) -> [f32; 8] {
        n.map(|n| f32::from_bits(n.to_bits().wrapping_add(127) << 23))
    }

    #[inline(always)]
    fn total(self, x: [f32; 8]) -> f32 {
        x.iter().sum()
    }

    #[inline(always)]
    fn largest(self, x: [f32; 8]) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
    }
}

/// `$name` by instruction `$op`.
#[cfg(target_arch = "x86_64")]
macro_rules! by {
    ($vector:ty: $($name:ident($($arg:ident),*) $op:ident;)*) => {
        $(#[inline(always)]
        fn $name(self, $($arg: $vector),*) -> $vector {
            // SAFETY: the token says that the processor has the instruction.
            #[allow(unsafe_code)]
            unsafe {
                $op($($arg),*)
            }
        })*
    };
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::inline_always, unsafe_code)]
impl Lanes for Avx512 {
    type F = __m512;
    const WIDTH: usize = 16;

    by! { __m512:
        add(a, b) _mm512_add_ps;
        sub(a, b) _mm512_sub_ps;
        mul(a, b) _mm512_mul_ps;
        div(a, b) _mm512_div_ps;
        fma(a, b, c) _mm512_fmadd_ps;
        larger(a, b) _mm512_max_ps;
        smaller(a, b) _mm512_min_ps;
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load_or(self, fill: f32, x: &[f32], at: usize) -> __m512 {
        let x = &x[at..];
        // SAFETY: as above; sixteen values are read, or those that are there.
        unsafe {
            if x.len() >= 16 {
                _mm512_loadu_ps(x.as_ptr())
            } else {
                _mm512_mask_loadu_ps(self.splat(fill), (1 << x.len()) - 1, x.as_ptr())
            }
        }
    }

    #[inline(always)]
    fn store(self, out: &mut [f32], at: usize, x: __m512) {
        let out = &mut out[at..];
        // SAFETY: as above; sixteen values are written, or those that there is room for.
        unsafe {
            if out.len() >= 16 {
                _mm512_storeu_ps(out.as_mut_ptr(), x);
            } else {
                _mm512_mask_storeu_ps(out.as_mut_ptr(), (1 << out.len()) - 1, x);
            }
        }
    }

    #[inline(always)]
    fn signed(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above. The table takes the bits of `a` but the first, which is that of `b`.
        unsafe {
            let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
            let sign = _mm512_set1_epi32(i32::MIN);
            _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0b1100_1010>(sign, b, a))
        }
    }

    #[inline(always)]
    fn power(self, n: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let n = _mm512_add_epi32(_mm512_castps_si512(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
        }
    }

    #[inline(always)]
    fn total(self, x: __m512) -> f32 {
        // SAFETY: as above.
        unsafe { _mm512_reduce_add_ps(x) }
    }

    #[inline(always)]
    fn largest(self, x: __m512) -> f32 {
        // SAFETY: as above.
        unsafe { _mm512_reduce_max_ps(x) }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::inline_always, unsafe_code)]
impl Lanes for Avx2 {
    type F = __m256;
    const WIDTH: usize = 8;

    by! { __m256:
        add(a, b) _mm256_add_ps;
        sub(a, b) _mm256_sub_ps;
        mul(a, b) _mm256_mul_ps;
        div(a, b) _mm256_div_ps;
        fma(a, b, c) _mm256_fmadd_ps;
        larger(a, b) _mm256_max_ps;
        smaller(a, b) _mm256_min_ps;
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    fn load_or(self, fill: f32, x: &[f32], at: usize) -> __m256 {
        let some = Plain.load_or(fill, x, at);
        // SAFETY: as above; eight values are read.
        unsafe { _mm256_loadu_ps(some.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, out: &mut [f32], at: usize, x: __m256) {
        let mut all = [0.0; 8];
        // SAFETY: as above; eight values are written.
        unsafe { _mm256_storeu_ps(all.as_mut_ptr(), x) }
        Plain.store(out, at, all);
    }

    #[inline(always)]
    fn signed(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            _mm256_or_ps(_mm256_andnot_ps(sign, a), _mm256_and_ps(sign, b))
        }
    }

    #[inline(always)]
    fn power(self, n: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe {
            let n = _mm256_add_epi32(_mm256_castps_si256(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
        }
    }

    #[inline(always)]
    fn total(self, x: __m256) -> f32 {
        let mut all = [0.0; 8];
        self.store(&mut all, 0, x);
        Plain.total(all)
    }

    #[inline(always)]
    fn largest(self, x: __m256) -> f32 {
        let mut all = [0.0; 8];
        self.store(&mut all, 0, x);
        Plain.largest(all)
    }
}

#[cfg(test)]
mod tests {
    vectorised! {
        fn functions[v](x: &[f32], out: &mut [Vec<f32>; 3]) {
            for at in (0..x.len()).step_by(L::WIDTH) {
                let x = v.load(x, at);
                v.store(&mut out[0], at, v.exp(x));
                v.store(&mut out[1], at, v.tanh(x));
                v.store(&mut out[2], at, v.erf(x));
            }
        }
    }

    #[test]
    fn functions_are_right_to_the_last_digits() {
        let x: Vec<f32> = (-8003..8000).map(|i| i as f32 / 100.0).collect();
        let mut out = std::array::from_fn(|_| vec![0.0; x.len()]);
        functions(&x, &mut out);
        for (i, x) in x.iter().enumerate() {
            let x = f64::from(*x);
            assert!((f64::from(out[0][i]) / x.exp() - 1.0).abs() < 3e-7, "{x}: {} {}", out[0][i], x.exp());
            assert!((f64::from(out[1][i]) - x.tanh()).abs() < 3e-7, "{x}: {} {}", out[1][i], x.tanh());
            // A series of the error function, as far as it converges fast.
            if x.abs() < 3.0 {
                let (mut term, mut erf) = (x, x);
                for n in 1..60 {
                    term *= -x * x / f64::from(n);
                    erf += term / f64::from(2 * n + 1);
                }
                erf *= std::f64::consts::FRAC_2_SQRT_PI;
                assert!((f64::from(out[2][i]) - erf).abs() < 4e-7, "{x}: {} {erf}", out[2][i]);
            }
        }
        let mut out = std::array::from_fn(|_| vec![0.0; 4]);
        functions(&[f32::NEG_INFINITY, -1000.0, f32::NAN, f32::INFINITY], &mut out);
        assert!(out[0][0] < 2e-38 && out[0][1] < 2e-38 && out[0][2].is_nan() && out[0][3].is_finite());
        assert_eq!((out[1][1], out[1][3], out[2][1], out[2][3]), (-1.0, 1.0, -1.0, 1.0));
    }

    #[test]
    fn what_is_behind_the_end_is_neither_read_nor_written() {
        vectorised! {
            fn sums[v](x: &[f32], out: &mut [f32]) -> (f32, f32) {
                let (mut sum, mut most) = (v.splat(0.0), v.splat(f32::NEG_INFINITY));
                for at in (0..x.len()).step_by(L::WIDTH) {
                    sum = v.add(sum, v.load(x, at));
                    most = v.larger(v.load_or(f32::NEG_INFINITY, x, at), most);
                    v.store(out, at, v.signed(v.load(x, at), v.splat(1.0)));
                }
                (v.total(sum), v.largest(most))
            }
        }
        for len in 1..70 {
            let x: Vec<f32> = (0..=len).map(|i| -1.0 - i as f32).collect();
            let mut out = vec![0.5; len + 1];
            let (sum, most) = sums(&x[..len], &mut out[..len]);
            assert_eq!((sum, most), (x[..len].iter().sum(), -1.0));
            assert!(out[..len].iter().zip(&x).all(|(a, b)| *a == -b) && out[len] == 0.5);
        }
    }
}
