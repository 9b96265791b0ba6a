//! A tile of sums: up to 32 rows times up to three strips of sixteen columns.

use super::buffer::Line;
use super::{Path, path};

/// Rows of a tile.
pub(super) const TILE: usize = 32;
/// Strips that a kernel works on at once: with eight rows their sums fill the registers.
pub(super) const STRIPS: usize = 3;

/// Rows of sums, a strip after the other.
pub(super) type Sums = [[f32; 16 * STRIPS]; TILE];

/// The left side, as bits: row `i` at depth `p` lies at `i * row + p * step`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub words: &'a [u32],
    pub row: usize,
    pub step: usize,
}

/// The right side: line `p` of strip `s` lies at `s * strip + p * line`.
#[derive(Clone, Copy)]
pub(super) struct Strips<'a> {
    pub lines: &'a [Line],
    pub strip: usize,
    pub line: usize,
    pub depth: usize,
}

/// What a word of the left side and a lane of the right one are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Float,
    /// Two bfloat16, each multiplied with its like.
    Pair,
}

/// `sums += left · right` for the first `count` rows and `strips` strips.
///
/// # Panics
/// When a row or strip is not there for the whole depth.
pub(super) fn add(kind: Kind, left: Rows, right: Strips, count: usize, strips: usize, sums: &mut Sums) {
    if count == 0 || strips == 0 || right.depth == 0 {
        return;
    }
    let last = (count - 1) * left.row + (right.depth - 1) * left.step;
    let last_line = (strips - 1) * right.strip + (right.depth - 1) * right.line;
    assert!(
        count <= TILE && strips <= STRIPS && last < left.words.len() && last_line < right.lines.len(),
        "outside a side of a product. This is a bug."
    );
    assert!(kind == Kind::Float || path() >= Path::Bf16, "no bfloat16 on this path. This is a bug.");
    let mut first = 0;
    while first < count {
        let rows = match count - first {
            8.. => 8,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let words = &left.words[first * left.row..];
        let (left, sums) = (Rows { words, ..left }, &mut sums[first..]);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has what its path says, and all that is read was checked above.
        #[allow(unsafe_code)]
        unsafe {
            match (path(), kind) {
                (Path::Amx | Path::Bf16 | Path::Avx512, Kind::Float) => {
                    on_avx512(left, right, rows, strips, sums);
                }
                (_, Kind::Pair) => on_bf16(left, right, rows, strips, sums),
                (Path::Avx2, Kind::Float) => on_avx2(left, right, rows, strips, sums),
                (Path::Plain, Kind::Float) => any(left, right, rows, strips, sums, |a, b, c| a * b + c),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        any(left, right, rows, strips, sums, |a, b, c| a * b + c);
        first += rows;
    }
}

/// Calls `registers` for so many rows and strips.
#[cfg(target_arch = "x86_64")]
macro_rules! sized {
    ($rows:expr, $strips:expr, $pairs:literal, $($argument:expr),*) => {
        match ($rows, $strips) {
            (1, 1) => registers::<1, 1, $pairs>($($argument),*),
            (1, 2) => registers::<1, 2, $pairs>($($argument),*),
            (1, _) => registers::<1, 3, $pairs>($($argument),*),
            (2, 1) => registers::<2, 1, $pairs>($($argument),*),
            (2, 2) => registers::<2, 2, $pairs>($($argument),*),
            (2, _) => registers::<2, 3, $pairs>($($argument),*),
            (4, 1) => registers::<4, 1, $pairs>($($argument),*),
            (4, 2) => registers::<4, 2, $pairs>($($argument),*),
            (4, _) => registers::<4, 3, $pairs>($($argument),*),
            (_, 1) => registers::<8, 1, $pairs>($($argument),*),
            (_, 2) => registers::<8, 2, $pairs>($($argument),*),
            (_, _) => registers::<8, 3, $pairs>($($argument),*),
        }
    };
}

/// # Safety
/// As [`registers`]; 1, 2, 4 or 8 rows, 1 to 3 strips.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn on_avx512(left: Rows, right: Strips, rows: usize, strips: usize, sums: &mut [[f32; 48]]) {
    // SAFETY: the caller's.
    unsafe { sized!(rows, strips, false, left, right, sums) }
}

/// # Safety
/// As [`registers`]; 1, 2, 4 or 8 rows, 1 to 3 strips.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
unsafe fn on_bf16(left: Rows, right: Strips, rows: usize, strips: usize, sums: &mut [[f32; 48]]) {
    // SAFETY: the caller's.
    unsafe { sized!(rows, strips, true, left, right, sums) }
}

/// The inner loop: `R × V` sums in registers, `V` lines of the right side and a value of each row at a time.
///
/// # Safety
/// The processor must have AVX-512, and AVX512-BF16 for `PAIRS`; `R` rows and `V` strips must be there for
/// the whole depth.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, clippy::inline_always, clippy::needless_range_loop)]
#[inline(always)]
unsafe fn registers<const R: usize, const V: usize, const PAIRS: bool>(
    left: Rows,
    right: Strips,
    sums: &mut [[f32; 48]],
) {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_load_ps,
        _mm512_loadu_ps, _mm512_set1_epi32, _mm512_storeu_ps,
    };
    // SAFETY: all reads are within what the caller promises; a `Line` is 64 bytes and aligned so; a row of
    // sums has room for three strips; and the vectors are 512 plain bits.
    unsafe {
        let mut acc: [[__m512; V]; R] =
            std::array::from_fn(|i| std::array::from_fn(|j| _mm512_loadu_ps(sums[i].as_ptr().add(16 * j))));
        let words: [*const u32; R] = std::array::from_fn(|i| left.words.as_ptr().add(i * left.row));
        let lines: [*const Line; V] = std::array::from_fn(|j| right.lines.as_ptr().add(j * right.strip));
        for p in 0..right.depth {
            let b: [__m512; V] = std::array::from_fn(|j| _mm512_load_ps(lines[j].add(p * right.line).cast()));
            for i in 0..R {
                let a: __m512i = _mm512_set1_epi32((*words[i].add(p * left.step)).cast_signed());
                for j in 0..V {
                    acc[i][j] = if PAIRS {
                        let (a, b) = (std::mem::transmute::<__m512i, __m512bh>(a), b[j]);
                        _mm512_dpbf16_ps(acc[i][j], a, std::mem::transmute::<__m512, __m512bh>(b))
                    } else {
                        _mm512_fmadd_ps(_mm512_castsi512_ps(a), b[j], acc[i][j])
                    };
                }
            }
        }
        for i in 0..R {
            for j in 0..V {
                _mm512_storeu_ps(sums[i].as_mut_ptr().add(16 * j), acc[i][j]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn on_avx2(left: Rows, right: Strips, rows: usize, strips: usize, sums: &mut [[f32; 48]]) {
    any(left, right, rows, strips, sums, f32::mul_add);
}

/// A strip at a time, four rows at a time, in plain Rust.
#[allow(clippy::inline_always)]
#[inline(always)]
fn any(
    left: Rows,
    right: Strips,
    rows: usize,
    strips: usize,
    sums: &mut [[f32; 48]],
    fused: impl Fn(f32, f32, f32) -> f32,
) {
    for strip in 0..strips {
        for first in (0..rows).step_by(4) {
            let count = 4.min(rows - first);
            let mut acc = [[0f32; 16]; 4];
            for p in 0..right.depth {
                let line = &right.lines[strip * right.strip + p * right.line].0;
                for (i, acc) in acc.iter_mut().enumerate() {
                    // The last row stands in where there are fewer.
                    let row = first + i.min(count - 1);
                    let a = f32::from_bits(left.words[row * left.row + p * left.step]);
                    for j in 0..16 {
                        acc[j] = fused(a, line[j], acc[j]);
                    }
                }
            }
            for (sums, acc) in sums[first..first + count].iter_mut().zip(acc) {
                for (sum, acc) in sums[16 * strip..].iter_mut().zip(acc) {
                    *sum += acc;
                }
            }
        }
    }
}
