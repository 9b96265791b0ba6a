//! Weights in 4 or 8 bits: NF4 with double quantisation as in QLoRA (Dettmers et al., arXiv 2305.14314,
//! sections 3.1-3.2; bitsandbytes' order of nibbles and block sizes), and blockwise absmax int8.
//!
//! They are unpacked on the way into a product, forward and backward alike, and nowhere kept.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256bh, __m256i, __m512, __m512bh, __m512i, _mm_loadl_epi64, _mm_loadu_si128, _mm_unpacklo_epi8,
    _mm512_broadcast_i64x4, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32,
    _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh, _mm512_mul_ps, _mm512_or_si512, _mm512_permutexvar_epi16,
    _mm512_permutexvar_ps, _mm512_set_epi32, _mm512_set1_ps, _mm512_slli_epi32, _mm512_srli_epi32,
    _mm512_srlv_epi32, _mm512_storeu_si512,
};
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::decode::loaded;
use super::decode::{Decode, fetch};

/// Weights that share one scale.
const BLOCK: usize = 64;
/// Scales that share one scale of their own.
const SCALE_BLOCK: usize = 256;

/// Four bits a weight. Cheap to clone.
#[derive(Clone)]
pub(super) struct Nf4 {
    /// Two weights a byte, the first in the high nibble.
    pub codes: Bytes,
    pub scales: Arc<Scales>,
}

/// Eight bits a weight. Cheap to clone.
#[derive(Clone)]
pub(super) struct Int8 {
    /// Signed.
    pub codes: Bytes,
    /// What a code of 1 is worth, for each block.
    pub scales: Arc<[f32]>,
}

/// The absolute maxima of all blocks, quantised themselves: 8-bit codes of
/// their distance from the mean, one float32 scale for 256 of them.
pub(super) struct Scales {
    codes: Vec<u8>,
    scales: Vec<f32>,
    mean: f32,
    /// [`DYNAMIC`]: a look at it costs a check each time.
    levels: &'static [f32; 256],
}

impl Nf4 {
    /// Packs `count` values; `values(first, out)` gives those from `first` on.
    pub fn pack(count: usize, values: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let (codes, maxima) = packed::<BLOCK>(count, 2, values, |block, codes| {
            let maximum = absolute_maximum(block);
            let inverse = if maximum > 0.0 { 1.0 / maximum } else { 0.0 };
            for (pair, code) in block.chunks(2).zip(codes) {
                let low = pair.get(1).map_or(0, |w| nearest_nf4(w * inverse));
                *code = nearest_nf4(pair[0] * inverse) << 4 | low;
            }
            maximum
        });
        Self { codes: codes.into(), scales: Arc::new(Scales::pack(&maxima)) }
    }
}

#[allow(clippy::inline_always)]
impl Decode for Nf4 {
    #[inline(always)]
    fn value(&self, at: usize) -> f32 {
        let code = self.codes[at / 2] >> (4 * (1 - at % 2)) & 15;
        NF4[usize::from(code)] * self.scales.of(at / BLOCK)
    }

    #[inline(always)]
    fn sixteen(&self, at: usize) -> [f32; 16] {
        if !at.is_multiple_of(16) {
            return std::array::from_fn(|i| self.value(at + i));
        }
        let scale = self.scales.of(at / BLOCK);
        let codes = &self.codes[at / 2..at / 2 + 8];
        std::array::from_fn(|i| NF4[usize::from(codes[i / 2] >> (4 * (1 - i % 2)) & 15)] * scale)
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    #[inline]
    unsafe fn wide(&self, at: usize) -> __m512 {
        if !at.is_multiple_of(16) {
            return across(self, at);
        }
        let codes = &self.codes[at / 2..at / 2 + 8];
        // SAFETY: eight bytes are read.
        let codes = unsafe { _mm_loadl_epi64(codes.as_ptr().cast()) };
        // Each byte twice; the first of the two gives its high nibble. Only four bits of an index count.
        let twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(codes, codes));
        let shifts = _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4);
        let values = _mm512_permutexvar_ps(_mm512_srlv_epi32(twice, shifts), loaded(&NF4));
        _mm512_mul_ps(values, _mm512_set1_ps(self.scales.of(at / BLOCK)))
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")]
    #[inline]
    unsafe fn wide_pairs(&self, at: usize) -> __m512i {
        if !at.is_multiple_of(32) {
            return pairs_across(self, at);
        }
        self.looked_up(at, table(self.scales.of(at / BLOCK)))
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")]
    unsafe fn wide_many_pairs(&self, at: usize, out: &mut [[u32; 16]], _next: usize) {
        for (i, out) in out.chunks_mut(2).enumerate() {
            let at = at + BLOCK * i;
            if at.is_multiple_of(BLOCK) {
                let table = table(self.scales.of(at / BLOCK));
                for (half, out) in out.iter_mut().enumerate() {
                    // SAFETY: sixteen words are written.
                    unsafe {
                        _mm512_storeu_si512(out.as_mut_ptr().cast(), self.looked_up(at + 32 * half, table));
                    }
                }
            } else {
                for (half, out) in out.iter_mut().enumerate() {
                    // SAFETY: the same as asked for here; sixteen words are written.
                    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), self.wide_pairs(at + 32 * half)) }
                }
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        fetch(&self.codes, at / 2);
    }
}

/// What the sixteen codes stand for with this scale, in bfloat16; twice.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn table(scale: f32) -> __m512i {
    let values = _mm512_cvtneps_pbh(_mm512_mul_ps(loaded(&NF4), _mm512_set1_ps(scale)));
    // SAFETY: both types are 256 plain bits.
    #[allow(unsafe_code)]
    let values = unsafe { std::mem::transmute::<__m256bh, __m256i>(values) };
    _mm512_broadcast_i64x4(values)
}

impl Nf4 {
    /// Values `at..at + 32`, which are those of `table`.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    fn looked_up(&self, at: usize, table: __m512i) -> __m512i {
        let codes = &self.codes[at / 2..at / 2 + 16];
        // SAFETY: sixteen bytes are read.
        #[allow(unsafe_code)]
        let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
        // The high nibble in the low half, the low one in the high half. Of an index five bits count: above a
        // nibble there may be a bit of the other one, so the table holds each value twice.
        let places = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
        _mm512_permutexvar_epi16(places, table)
    }
}

/// Values that begin anywhere. Apart, and not inlined: where the rest is, is what time goes into.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[cold]
pub(super) fn across(data: &impl Decode, at: usize) -> __m512 {
    loaded(&data.sixteen(at))
}

/// The same for 32 values in bfloat16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
#[cold]
fn pairs_across(data: &impl Decode, at: usize) -> __m512i {
    let pairs = _mm512_cvtne2ps_pbh(loaded(&data.sixteen(at + 16)), loaded(&data.sixteen(at)));
    // SAFETY: both types are 512 plain bits.
    #[allow(unsafe_code)]
    unsafe {
        std::mem::transmute::<__m512bh, __m512i>(pairs)
    }
}

impl Int8 {
    /// Packs `count` values; `values(first, out)` gives those from `first` on.
    pub fn pack(count: usize, values: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let (codes, scales) = packed::<BLOCK>(count, 1, values, |block, codes| {
            let maximum = absolute_maximum(block);
            let inverse = if maximum > 0.0 { 127.0 / maximum } else { 0.0 };
            for (w, code) in block.iter().zip(codes) {
                *code = ((w * inverse).round() as i8).cast_unsigned();
            }
            maximum / 127.0
        });
        Self { codes: codes.into(), scales: scales.into() }
    }
}

/// Values that are unpacked at a time on their way to their codes.
const PIECE: usize = 64 * BLOCK;

/// The codes of `count` values, so many in a byte, and the scales of all blocks of `BLOCK` values: `encode(block, out)`
/// writes the codes of one block and gives its scale.
pub(super) fn packed<const BLOCK: usize>(
    count: usize,
    in_byte: usize,
    values: impl Fn(usize, &mut [f32]) + Sync,
    encode: impl Fn(&[f32], &mut [u8]) -> f32 + Sync,
) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0; count.div_ceil(in_byte)];
    let mut scales = vec![0.0; count.div_ceil(BLOCK)];
    let pieces = codes.par_chunks_mut(PIECE / in_byte).zip(scales.par_chunks_mut(PIECE / BLOCK)).enumerate();
    pieces.for_each(|(i, (codes, scales))| {
        let piece = &mut [0.0; PIECE][..PIECE.min(count - i * PIECE)];
        values(i * PIECE, piece);
        for ((block, codes), scale) in piece.chunks(BLOCK).zip(codes.chunks_mut(BLOCK / in_byte)).zip(scales)
        {
            *scale = encode(block, codes);
        }
    });
    (codes, scales)
}

#[allow(clippy::inline_always)]
impl Decode for Int8 {
    #[inline(always)]
    fn value(&self, at: usize) -> f32 {
        f32::from(self.codes[at].cast_signed()) * self.scales[at / BLOCK]
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    #[inline]
    unsafe fn wide(&self, at: usize) -> __m512 {
        if !at.is_multiple_of(16) {
            return across(self, at);
        }
        let codes = &self.codes[at..at + 16];
        // SAFETY: sixteen bytes are read.
        let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
        let values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
        _mm512_mul_ps(values, _mm512_set1_ps(self.scales[at / BLOCK]))
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        fetch(&self.codes, at);
    }
}

impl Scales {
    fn pack(maxima: &[f32]) -> Self {
        let mean = (maxima.iter().map(|m| f64::from(*m)).sum::<f64>() / maxima.len().max(1) as f64) as f32;
        let distances: Vec<f32> = maxima.iter().map(|m| m - mean).collect();
        let scales: Vec<f32> = distances.chunks(SCALE_BLOCK).map(absolute_maximum).collect();
        let code = |(i, distance): (usize, &f32)| {
            let scale = scales[i / SCALE_BLOCK];
            nearest_dynamic(if scale > 0.0 { distance / scale } else { 0.0 })
        };
        let codes = distances.iter().enumerate().map(code).collect();
        Self { codes, scales, mean, levels: &DYNAMIC }
    }

    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn of(&self, block: usize) -> f32 {
        self.levels[usize::from(self.codes[block])] * self.scales[block / SCALE_BLOCK] + self.mean
    }
}

fn absolute_maximum(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |m, w| m.max(w.abs()))
}

/// The 16 levels of NF4: quantiles of the normal distribution, scaled to
/// [-1, 1], with an exact zero (arXiv 2305.14314, appendix E).
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

fn nearest_nf4(x: f32) -> u8 {
    // Half-way points between the levels, compared all at once: no branches.
    static MIDDLES: LazyLock<[f32; 15]> =
        LazyLock::new(|| std::array::from_fn(|i| f32::midpoint(NF4[i], NF4[i + 1])));
    MIDDLES.iter().map(|m| u8::from(x > *m)).sum()
}

/// bitsandbytes' signed dynamic 8-bit map: seven decades, each with twice the
/// levels of the one below, and the values 0 and 1.
static DYNAMIC: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut levels = vec![0.0, 1.0];
    for decade in 0..7 {
        let count = 1 << decade;
        let magnitude = 10f64.powi(decade - 6);
        for i in 0..count {
            let edge = |i: i32| 0.1 + 0.9 * f64::from(i) / f64::from(count);
            let middle = f64::midpoint(edge(i), edge(i + 1)) * magnitude;
            levels.extend([middle, -middle]);
        }
    }
    levels.sort_by(f64::total_cmp);
    std::array::from_fn(|i| levels[i] as f32)
});

fn nearest_dynamic(x: f32) -> u8 {
    let above = DYNAMIC.partition_point(|level| *level < x).min(255);
    let below = above.saturating_sub(1);
    let nearest = if x - DYNAMIC[below] <= DYNAMIC[above] - x { below } else { above };
    nearest as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::chance::unit;
    use crate::engine::model::kernel::matrix::Matrix;

    /// Sum of twelve uniforms: near enough to normal.
    fn normal(count: usize) -> Vec<f32> {
        let one = |i: usize| (0..12).map(|j| unit(7, (i * 12 + j) as u64)).sum::<f64>() - 6.0;
        (0..count).map(|i| one(i) as f32 * 0.02).collect()
    }

    fn values(matrix: &Matrix) -> Vec<f32> {
        let mut out = vec![0.0; matrix.rows * matrix.columns];
        for (i, out) in out.chunks_mut(matrix.columns).enumerate() {
            matrix.row(i, out);
        }
        out
    }

    fn relative_error(matrix: &Matrix, weights: &[f32]) -> f64 {
        let unpacked = values(matrix);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = unpacked.iter().zip(weights).map(|(a, b)| square(a - b)).sum();
        (error / weights.iter().map(|w| square(*w)).sum::<f64>()).sqrt()
    }

    #[test]
    fn nf4_keeps_normal_weights_to_the_error_the_format_has() {
        let weights = normal(1 << 16);
        let error = relative_error(&Matrix::floats(&weights, 256, 256).nf4(false), &weights);
        assert!((0.085..0.097).contains(&error), "{error}");
    }

    #[test]
    fn int8_is_an_order_closer() {
        let weights = normal(1 << 16);
        let error = relative_error(&Matrix::floats(&weights, 256, 256).int8(false), &weights);
        assert!(error < 0.01, "{error}");
    }

    #[test]
    fn levels_come_back_as_they_were_and_odd_sizes_work() {
        let weights: Vec<f32> = NF4.iter().cycle().take(64 * 3 + 5).copied().collect();
        let unpacked = values(&Matrix::floats(&weights, 1, weights.len()).nf4(false));
        // The last block's maximum is below 1 and moves the mean of the scales a little.
        for (got, want) in unpacked.iter().zip(&weights).take(64 * 3) {
            assert!((got - want).abs() < 0.01, "{got} {want}");
        }
        let zeros = vec![0.0; 100];
        let matrix = Matrix::floats(&zeros, 10, 10);
        assert_eq!(values(&matrix.nf4(false)), zeros);
        assert_eq!(values(&matrix.int8(false)), zeros);
    }

    #[test]
    fn a_matrix_stored_turned_is_quantised_as_the_one_it_stands_for() {
        // More than a piece, and no whole number of blocks in a row or in all.
        let (rows, columns) = (77, 131);
        let weights = normal(rows * columns);
        let turned: Vec<f32> = (0..rows * columns).map(|i| weights[i % rows * columns + i / rows]).collect();
        let straight = Matrix::floats(&weights, rows, columns);
        let turned = Matrix::floats(&turned, columns, rows);
        assert_eq!(values(&turned.nf4(true)), values(&straight.nf4(false)));
        assert_eq!(values(&turned.int8(true)), values(&straight.int8(false)));
    }

    #[test]
    fn the_dynamic_map_is_ascending_and_whole() {
        assert!(DYNAMIC.windows(2).all(|w| w[0] < w[1]));
        assert!((DYNAMIC[255] - 1.0).abs() < 1e-9);
        for (i, level) in DYNAMIC.iter().enumerate() {
            assert_eq!(usize::from(nearest_dynamic(*level)), i);
        }
    }
}
