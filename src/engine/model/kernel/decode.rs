//! How stored values become numbers.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, _CMP_UNORD_Q, _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256,
    _mm512_add_epi32, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
    _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_cvtph_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_mask_or_epi32, _mm512_set1_epi32, _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_ps,
    _mm512_storeu_si512,
};

use super::{Path, path};

/// Stored values as numbers, one or sixteen at a time.
pub(super) trait Decode: Sync {
    fn value(&self, at: usize) -> f32;

    /// Values `at..at + 16`.
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn sixteen(&self, at: usize) -> [f32; 16] {
        std::array::from_fn(|i| self.value(at + i))
    }

    /// Has the processor fetch value `at`, which may be behind the end.
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn prefetch(&self, _at: usize) {}

    /// Values from `at` on; those from `next` on are asked for.
    fn floats(&self, at: usize, out: &mut [f32], next: usize) {
        let (many, rest) = out.as_chunks_mut::<16>();
        let whole = 16 * many.len();
        #[cfg(target_arch = "x86_64")]
        if super::wide() {
            // SAFETY: the processor has AVX-512.
            #[allow(unsafe_code)]
            unsafe {
                wide_floats(self, at, many, next);
            }
            rest.iter_mut().enumerate().for_each(|(i, out)| *out = self.value(at + whole + i));
            return;
        }
        many.iter_mut().enumerate().for_each(|(i, out)| *out = self.sixteen(at + 16 * i));
        rest.iter_mut().enumerate().for_each(|(i, out)| *out = self.value(at + whole + i));
    }

    /// Values from `at` on rounded to bfloat16, two in each word of `out`, which are whole sixteens; those from
    /// `next` on are asked for.
    ///
    /// # Panics
    /// On a path without AVX512-BF16.
    fn pairs(&self, at: usize, out: &mut [u32], next: usize) {
        assert!(path() >= Path::Bf16, "no bfloat16 here. This is a bug.");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has AVX-512 and AVX512-BF16.
        #[allow(unsafe_code)]
        unsafe {
            self.wide_many_pairs(at, out.as_chunks_mut().0, next);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (at, out, next);
    }

    /// [`Self::pairs`] in registers.
    ///
    /// # Safety
    /// The processor must have AVX-512 and AVX512-BF16.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")]
    unsafe fn wide_many_pairs(&self, at: usize, out: &mut [[u32; 16]], next: usize) {
        for (i, out) in out.iter_mut().enumerate() {
            self.prefetch(next + 32 * i);
            // SAFETY: the same as asked for here; sixteen words are written.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), self.wide_pairs(at + 32 * i)) }
        }
    }

    /// [`Self::sixteen`] by AVX-512.
    ///
    /// # Safety
    /// The processor must have AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    unsafe fn wide(&self, at: usize) -> __m512;

    /// The same as the low halves of words, rounded to bfloat16.
    ///
    /// # Safety
    /// The processor must have AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    #[inline]
    unsafe fn wide_halves(&self, at: usize) -> __m512i {
        // SAFETY: the same as asked for here.
        round_wide(unsafe { self.wide(at) })
    }

    /// Values `at..at + 32` rounded to bfloat16.
    ///
    /// # Safety
    /// The processor must have AVX-512 and AVX512-BF16.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")]
    #[inline]
    unsafe fn wide_pairs(&self, at: usize) -> __m512i {
        // SAFETY: the same as asked for here; both types are 512 plain bits.
        unsafe {
            let pairs = _mm512_cvtne2ps_pbh(self.wide(at + 16), self.wide(at));
            std::mem::transmute::<__m512bh, __m512i>(pairs)
        }
    }
}

/// # Safety
/// The processor must have AVX-512.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
unsafe fn wide_floats<D: Decode + ?Sized>(data: &D, at: usize, out: &mut [[f32; 16]], next: usize) {
    for (i, out) in out.iter_mut().enumerate() {
        data.prefetch(next + 16 * i);
        // SAFETY: the same as asked for here; sixteen floats are written.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), data.wide(at + 16 * i)) }
    }
}

/// [`super::round`] for sixteen.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn round_wide(x: __m512) -> __m512i {
    let bits = _mm512_castps_si512(x);
    let high = _mm512_srli_epi32::<16>(bits);
    let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
    let no_number = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    _mm512_mask_or_epi32(rounded, no_number, high, _mm512_set1_epi32(0x40))
}

/// Has the processor fetch the cache line of byte `at`, which may be behind the end.
#[inline(always)]
#[allow(clippy::inline_always)]
pub(super) fn fetch(bytes: &[u8], at: usize) {
    // SAFETY: a hint, which no address makes fail; the pointer is never read.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(at).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, at);
}

/// Sixteen values of two bytes from value `at` on.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
fn sixteen_halves(bytes: &[u8], at: usize) -> __m256i {
    let bytes = &bytes[2 * at..2 * at + 32];
    // SAFETY: 32 bytes are read.
    #[allow(unsafe_code)]
    unsafe {
        _mm256_loadu_si256(bytes.as_ptr().cast())
    }
}

/// Sixteen values that were gathered one by one.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn loaded(values: &[f32; 16]) -> __m512 {
    // SAFETY: sixteen floats are read.
    #[allow(unsafe_code)]
    unsafe {
        _mm512_loadu_ps(values.as_ptr())
    }
}

/// Little-endian bytes.
pub(super) struct Bf16<'a>(pub &'a [u8]);
/// Little-endian bytes.
pub(super) struct F16<'a>(pub &'a [u8]);
/// Little-endian bytes.
pub(super) struct F32<'a>(pub &'a [u8]);

#[allow(clippy::inline_always)]
impl Decode for Bf16<'_> {
    #[inline(always)]
    fn value(&self, at: usize) -> f32 {
        super::widen(u32::from(u16::from_le_bytes([self.0[2 * at], self.0[2 * at + 1]])))
    }

    #[inline(always)]
    fn sixteen(&self, at: usize) -> [f32; 16] {
        let bytes = &self.0[2 * at..2 * at + 32];
        let half = |i: usize| u32::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]));
        std::array::from_fn(|i| super::widen(half(i)))
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        fetch(self.0, 2 * at);
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    #[inline]
    unsafe fn wide(&self, at: usize) -> __m512 {
        // SAFETY: the same as asked for here.
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(unsafe { self.wide_halves(at) }))
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    #[inline]
    unsafe fn wide_halves(&self, at: usize) -> __m512i {
        _mm512_cvtepu16_epi32(sixteen_halves(self.0, at))
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")]
    #[inline]
    unsafe fn wide_pairs(&self, at: usize) -> __m512i {
        let bytes = &self.0[2 * at..2 * at + 64];
        // SAFETY: 64 bytes are read.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }
}

#[allow(clippy::inline_always)]
impl Decode for F16<'_> {
    #[inline(always)]
    fn value(&self, at: usize) -> f32 {
        half::f16::from_le_bytes([self.0[2 * at], self.0[2 * at + 1]]).to_f32()
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        fetch(self.0, 2 * at);
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    #[inline]
    unsafe fn wide(&self, at: usize) -> __m512 {
        _mm512_cvtph_ps(sixteen_halves(self.0, at))
    }
}

#[allow(clippy::inline_always)]
impl Decode for F32<'_> {
    #[inline(always)]
    fn value(&self, at: usize) -> f32 {
        let b = &self.0[4 * at..4 * at + 4];
        f32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        fetch(self.0, 4 * at);
    }

    #[inline(always)]
    fn sixteen(&self, at: usize) -> [f32; 16] {
        let bytes = &self.0[4 * at..4 * at + 64];
        let word = |i: usize| [bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]];
        std::array::from_fn(|i| f32::from_le_bytes(word(i)))
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    #[inline]
    unsafe fn wide(&self, at: usize) -> __m512 {
        let bytes = &self.0[4 * at..4 * at + 64];
        // SAFETY: 64 bytes are read.
        unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) }
    }
}
