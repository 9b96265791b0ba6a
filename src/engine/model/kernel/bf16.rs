//! The processor's own products of bfloat16 (AVX512-BF16).

use super::packed::{LINES, Line, PANEL, ROWS};

/// Whether this processor has them.
pub fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Rounds a row of floats to bfloat16 pairs, the last one filled with zero.
pub fn pack(row: &[f32], out: &mut [u32]) {
    let (many, rest) = row.as_chunks::<32>();
    let (out, out_rest) = out.split_at_mut(many.len() * 16);
    #[cfg(target_arch = "x86_64")]
    let done = available() && {
        // SAFETY: the features are there.
        #[allow(unsafe_code)]
        unsafe {
            pack_many(many, out);
        }
        true
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = false;
    let plain = |row: &[f32], out: &mut [u32]| {
        for (out, pair) in out.iter_mut().zip(row.chunks(2)) {
            *out = super::round(pair[0]) | pair.get(1).map_or(0, |v| super::round(*v)) << 16;
        }
    };
    if !done {
        plain(many.as_flattened(), out);
    }
    plain(rest, out_rest);
}

/// # Safety
/// The processor must have AVX512F and AVX512-BF16.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_many(many: &[[f32; 32]], out: &mut [u32]) {
    use std::arch::x86_64::{__m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_storeu_si512};
    for (values, out) in many.iter().zip(out.as_chunks_mut::<16>().0) {
        // SAFETY: 32 floats in, 16 pairs out.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(16)));
            let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), halves);
        }
    }
}

/// `sums[i] += rows[i] · right` for the first `count` rows, all of one length.
///
/// # Panics
/// When the processor cannot, or lengths differ.
#[cfg(target_arch = "x86_64")]
pub fn add(rows: &[&[u32]; ROWS], count: usize, right: &[Line], sums: &mut [[f32; PANEL]; ROWS]) {
    assert!(available(), "no bfloat16 products on this processor. This is a bug.");
    let pairs = rows[0].len();
    assert!(
        rows.iter().all(|row| row.len() == pairs) && right.len() == pairs * LINES,
        "lengths. This is a bug."
    );
    // SAFETY: the features are there, and all lengths are those the kernel counts on.
    #[allow(unsafe_code)]
    unsafe {
        match count {
            1 => kernel::<1>(rows, right, sums),
            2 => kernel::<2>(rows, right, sums),
            3 | 4 => kernel::<4>(rows, right, sums),
            _ => kernel::<ROWS>(rows, right, sums),
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub fn add(_: &[&[u32]; ROWS], _: usize, _: &[Line], _: &mut [[f32; PANEL]; ROWS]) {
    unreachable!("`available` says no. This is a bug.")
}

/// The inner loop: 24 sums in registers, three lines of the right side and a pair of each row at a time.
///
/// # Safety
/// The processor must have AVX512F and AVX512-BF16; each of the first `N` rows must have a pair for every
/// three lines of `right`.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn kernel<const N: usize>(rows: &[&[u32]; ROWS], right: &[Line], sums: &mut [[f32; PANEL]; ROWS]) {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_load_si512, _mm512_loadu_ps, _mm512_set1_epi32,
        _mm512_storeu_ps,
    };
    // SAFETY: both are 512 plain bits.
    let halves = |x: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(x) };
    let rows: [*const u32; N] = std::array::from_fn(|i| rows[i].as_ptr());
    // SAFETY: 48 floats a row.
    let mut acc: [[_; 3]; N] = std::array::from_fn(|i| {
        std::array::from_fn(|j| unsafe { _mm512_loadu_ps(sums[i].as_ptr().add(16 * j)) })
    });
    let lines = right.as_ptr().cast::<__m512i>();
    for pair in 0..right.len() / 3 {
        // SAFETY: three lines for every pair; a `Line` is 64 bytes and aligned so.
        let b: [__m512bh; 3] =
            std::array::from_fn(|j| halves(unsafe { _mm512_load_si512(lines.add(3 * pair + j)) }));
        for i in 0..N {
            // SAFETY: each row has a pair for every three lines.
            let a = halves(_mm512_set1_epi32(unsafe { *rows[i].add(pair) }.cast_signed()));
            for j in 0..3 {
                acc[i][j] = _mm512_dpbf16_ps(acc[i][j], a, b[j]);
            }
        }
    }
    for (sums, acc) in sums.iter_mut().zip(acc) {
        for (j, acc) in acc.into_iter().enumerate() {
            // SAFETY: 48 floats a row.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr().add(16 * j), acc) };
        }
    }
}
