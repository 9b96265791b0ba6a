//! A tile of sums: up to 32 rows times up to three strips of sixteen columns, written where they belong.

use super::buffer::{Block, Line};
use super::product::Start;
use super::{Path, path};

/// Rows of a tile.
pub(super) const TILE: usize = 32;
/// Strips that a kernel works on at once: with eight rows their sums fill the registers.
pub(super) const STRIPS: usize = 3;

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

/// `out = start + left · right` for the rows and columns of `out`, which are no more than a tile has. A bias is
/// that of its columns.
///
/// # Panics
/// When a row or strip is not there for the whole depth.
pub(super) fn sum(kind: Kind, left: Rows, right: Strips, start: Start, out: &mut Block) {
    let (count, strips) = (out.rows(), out.width().div_ceil(16));
    if count == 0 || strips == 0 {
        return;
    }
    assert!(count <= TILE && strips <= STRIPS, "more than a tile. This is a bug.");
    let Some(deepest) = right.depth.checked_sub(1) else { return begin(start, out) };
    let last = (count - 1) * left.row + deepest * left.step;
    let last_line = (strips - 1) * right.strip + deepest * right.line;
    assert!(
        last < left.words.len() && last_line < right.lines.len(),
        "outside a side of a product. This is a bug."
    );
    if let Start::Bias(bias) = start {
        assert!(bias.len() >= out.width(), "a bias that does not fit. This is a bug.");
    }
    assert!(kind == Kind::Float || path() >= Path::Bf16, "no bfloat16 on this path. This is a bug.");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the processor has what its path says; all that is read was checked above, and what is written is
    // the block's.
    #[allow(unsafe_code)]
    unsafe {
        match (path(), kind) {
            (Path::Amx | Path::Bf16 | Path::Avx512, Kind::Float) => on_avx512(left, right, start, out),
            (_, Kind::Pair) => on_bf16(left, right, start, out),
            (Path::Avx2, Kind::Float) => on_avx2(left, right, start, out),
            (Path::Plain, Kind::Float) => plain(left, right, start, out),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    plain(left, right, start, out);
}

/// Writes what sums start with.
pub(super) fn begin(start: Start, out: &mut Block) {
    for i in 0..out.rows() {
        let row = out.row(i);
        match start {
            Start::Zero => row.fill(0.0),
            Start::Bias(bias) => row.copy_from_slice(&bias[..row.len()]),
            Start::Target => {}
        }
    }
}

/// So many of `rest` rows are worked on at once.
#[cfg(target_arch = "x86_64")]
fn at_once(rest: usize) -> usize {
    match rest {
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// Calls `registers` for all rows of `out`, as many at once as fit in registers.
#[cfg(target_arch = "x86_64")]
macro_rules! by_registers {
    ($pairs:literal, $left:expr, $right:expr, $start:expr, $out:expr) => {{
        let (count, strips) = ($out.rows(), $out.width().div_ceil(16));
        let mut first = 0;
        while first < count {
            let rows = at_once(count - first);
            match (rows, strips) {
                (1, 1) => registers::<1, 1, $pairs>($left, $right, $start, $out, first),
                (1, 2) => registers::<1, 2, $pairs>($left, $right, $start, $out, first),
                (1, _) => registers::<1, 3, $pairs>($left, $right, $start, $out, first),
                (2, 1) => registers::<2, 1, $pairs>($left, $right, $start, $out, first),
                (2, 2) => registers::<2, 2, $pairs>($left, $right, $start, $out, first),
                (2, _) => registers::<2, 3, $pairs>($left, $right, $start, $out, first),
                (4, 1) => registers::<4, 1, $pairs>($left, $right, $start, $out, first),
                (4, 2) => registers::<4, 2, $pairs>($left, $right, $start, $out, first),
                (4, _) => registers::<4, 3, $pairs>($left, $right, $start, $out, first),
                (_, 1) => registers::<8, 1, $pairs>($left, $right, $start, $out, first),
                (_, 2) => registers::<8, 2, $pairs>($left, $right, $start, $out, first),
                (_, _) => registers::<8, 3, $pairs>($left, $right, $start, $out, first),
            }
            first += rows;
        }
    }};
}

/// # Safety
/// The processor must have AVX-512; `left` and `right` must have all that `out` is the sum of.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn on_avx512(left: Rows, right: Strips, start: Start, out: &mut Block) {
    // SAFETY: the caller's.
    unsafe { by_registers!(false, left, right, start, out) }
}

/// # Safety
/// The same with AVX512-BF16.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
unsafe fn on_bf16(left: Rows, right: Strips, start: Start, out: &mut Block) {
    // SAFETY: the caller's.
    unsafe { by_registers!(true, left, right, start, out) }
}

/// The inner loop: `R × V` sums in registers, `V` lines of the right side and a value of each row at a time.
///
/// # Safety
/// The processor must have AVX-512, and AVX512-BF16 for `PAIRS`; `R` rows from `first` on and `V` strips, of
/// which the last may be cut short by the width of `out`, must be there for the whole depth.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, clippy::inline_always, clippy::needless_range_loop)]
#[inline(always)]
unsafe fn registers<const R: usize, const V: usize, const PAIRS: bool>(
    left: Rows,
    right: Strips,
    start: Start,
    out: &mut Block,
    first: usize,
) {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_load_ps,
        _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps,
    };
    let width = out.width();
    let mask = |j: usize| if j + 1 < V { 0xffff } else { u16::MAX >> (16 * V - width) };
    // SAFETY: all reads are within what the caller promises; a `Line` is 64 bytes and aligned so; lanes behind
    // the width of `out` are masked; and the vectors are 512 plain bits.
    unsafe {
        let place = out.start().add(first * out.step());
        let row = |i: usize, j: usize| place.add(i * out.step() + 16 * j);
        let mut acc: [[__m512; V]; R] = match start {
            Start::Zero => [[_mm512_setzero_ps(); V]; R],
            Start::Bias(bias) => {
                let bias = std::array::from_fn(|j| _mm512_maskz_loadu_ps(mask(j), bias.as_ptr().add(16 * j)));
                [bias; R]
            }
            Start::Target => {
                std::array::from_fn(|i| std::array::from_fn(|j| _mm512_maskz_loadu_ps(mask(j), row(i, j))))
            }
        };
        let words: [*const u32; R] = std::array::from_fn(|i| left.words.as_ptr().add((first + i) * left.row));
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
                _mm512_mask_storeu_ps(row(i, j), mask(j), acc[i][j]);
            }
        }
    }
}

/// Rows that AVX2 works on at once: with two vectors each their sums are half of its registers.
#[cfg(target_arch = "x86_64")]
const AVX2_ROWS: usize = 4;

/// # Safety
/// The processor must have AVX2 and FMA; `left` and `right` must have all that `out` is the sum of.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, clippy::needless_range_loop)]
#[target_feature(enable = "avx2,fma")]
unsafe fn on_avx2(left: Rows, right: Strips, start: Start, out: &mut Block) {
    use std::arch::x86_64::{
        __m256, _mm256_fmadd_ps, _mm256_load_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };
    for strip in 0..out.width().div_ceil(16) {
        for first in (0..out.rows()).step_by(AVX2_ROWS) {
            // The last row stands in where there are fewer.
            let last = out.rows() - 1 - first;
            let row = |i: usize| left.words[(first + i.min(last)) * left.row..].as_ptr();
            let words: [*const u32; AVX2_ROWS] = std::array::from_fn(row);
            let mut acc: [[__m256; 2]; AVX2_ROWS] = [[_mm256_setzero_ps(); 2]; AVX2_ROWS];
            for p in 0..right.depth {
                // SAFETY: the caller has checked the last line and the last word of every row; a `Line` is two
                // vectors and aligned as such.
                unsafe {
                    let line = right.lines.as_ptr().add(strip * right.strip + p * right.line).cast::<f32>();
                    let b = [_mm256_load_ps(line), _mm256_load_ps(line.add(8))];
                    for i in 0..AVX2_ROWS {
                        let a = _mm256_set1_ps(f32::from_bits(*words[i].add(p * left.step)));
                        acc[i] = [_mm256_fmadd_ps(a, b[0], acc[i][0]), _mm256_fmadd_ps(a, b[1], acc[i][1])];
                    }
                }
            }
            for (i, acc) in acc.iter().enumerate().take(last + 1) {
                let mut sums = [0f32; 16];
                // SAFETY: sixteen floats are written.
                unsafe {
                    _mm256_storeu_ps(sums.as_mut_ptr(), acc[0]);
                    _mm256_storeu_ps(sums.as_mut_ptr().add(8), acc[1]);
                }
                finish(out, first + i, 16 * strip, start, &sums);
            }
        }
    }
}

/// A strip at a time, four rows at a time, in plain Rust.
fn plain(left: Rows, right: Strips, start: Start, out: &mut Block) {
    for strip in 0..out.width().div_ceil(16) {
        for first in (0..out.rows()).step_by(4) {
            let count = 4.min(out.rows() - first);
            let mut acc = [[0f32; 16]; 4];
            for p in 0..right.depth {
                let line = &right.lines[strip * right.strip + p * right.line].0;
                for (i, acc) in acc.iter_mut().enumerate() {
                    // The last row stands in where there are fewer.
                    let row = first + i.min(count - 1);
                    let a = f32::from_bits(left.words[row * left.row + p * left.step]);
                    for j in 0..16 {
                        acc[j] += a * line[j];
                    }
                }
            }
            for (i, acc) in acc.iter().enumerate().take(count) {
                finish(out, first + i, 16 * strip, start, acc);
            }
        }
    }
}

/// Writes sums to columns `column..` of a row, after what they start with.
pub(super) fn finish(out: &mut Block, row: usize, column: usize, start: Start, sums: &[f32]) {
    let out = &mut out.row(row)[column..];
    match start {
        Start::Zero => out.iter_mut().zip(sums).for_each(|(out, sum)| *out = *sum),
        Start::Bias(bias) => {
            out.iter_mut().zip(sums).zip(&bias[column..]).for_each(|((out, sum), bias)| *out = bias + sum);
        }
        Start::Target => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum),
    }
}
