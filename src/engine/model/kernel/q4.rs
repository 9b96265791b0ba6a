//! Weights in the 4 bits of GGML's `Q4_0`: for each 32 of them a scale in float16, and sixteen equal steps of it. The
//! same values as in a file of llama.cpp's, so that adapters are trained over the base that will be served.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m512, _mm_and_si128, _mm_loadl_epi64, _mm_set1_epi8, _mm_srli_epi16, _mm_unpacklo_epi8,
    _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_sub_epi32,
};
use std::sync::Arc;

use bytes::Bytes;
use half::f16;

use super::decode::{Decode, fetch};
#[cfg(target_arch = "x86_64")]
use super::quant::across;
use super::quant::packed;

/// Weights that share one scale.
const BLOCK: usize = 32;
/// The code of zero.
const ZERO: i32 = 8;

/// Four bits a weight. Cheap to clone.
#[derive(Clone)]
pub(super) struct Q4 {
    /// Two weights a byte, the first in the low nibble.
    pub codes: Bytes,
    /// What a step is worth, for each block.
    pub scales: Arc<[f16]>,
}

impl Q4 {
    /// Packs `count` values; `values(first, out)` gives those from `first` on.
    pub fn pack(count: usize, values: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let (codes, steps) = packed::<BLOCK>(count, 2, values, |block, codes| {
            // The largest value is eight steps below zero, whatever its sign: there is one step less above.
            let largest = block.iter().fold(0f32, |m, w| if w.abs() > m.abs() { *w } else { m });
            let step = largest / -8.0;
            let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
            // Half a step up, so that cutting off rounds.
            let code = |w: f32| ((w * inverse + (ZERO as f32 + 0.5)) as u8).min(15);
            for (pair, byte) in block.chunks(2).zip(codes) {
                *byte = code(pair[0]) | pair.get(1).map_or(ZERO as u8, |w| code(*w)) << 4;
            }
            step
        });
        Self { codes: codes.into(), scales: steps.into_iter().map(f16::from_f32).collect() }
    }

    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn code(&self, at: usize) -> f32 {
        let code = self.codes[at / 2] >> (4 * (at % 2)) & 15;
        (i32::from(code) - ZERO) as f32
    }
}

#[allow(clippy::inline_always)]
impl Decode for Q4 {
    #[inline(always)]
    fn value(&self, at: usize) -> f32 {
        self.code(at) * self.scales[at / BLOCK].to_f32()
    }

    #[inline(always)]
    fn sixteen(&self, at: usize) -> [f32; 16] {
        if !at.is_multiple_of(16) {
            return std::array::from_fn(|i| self.value(at + i));
        }
        let scale = self.scales[at / BLOCK].to_f32();
        std::array::from_fn(|i| self.code(at + i) * scale)
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
        // A byte's low nibble, then its high one.
        let fifteen = _mm_set1_epi8(15);
        let low = _mm_and_si128(codes, fifteen);
        let high = _mm_and_si128(_mm_srli_epi16::<4>(codes), fifteen);
        let codes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
        let steps = _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(ZERO)));
        _mm512_mul_ps(steps, _mm512_set1_ps(self.scales[at / BLOCK].to_f32()))
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        fetch(&self.codes, at / 2);
    }
}
