//! Products of a few rows: each row of the matrix is read once, as it is stored, and multiplied with all of
//! them. What takes the time is the memory.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_loadu_ps, _mm512_reduce_add_ps, _mm512_setzero_ps};

use rayon::prelude::*;

use super::decode::Decode;
use super::left::Form;
use super::product::{FEW, Out, Start, Term};
use super::wide;

/// Results of one task.
const TASK: usize = 32;
/// Rows of the matrix, and of the left side, that are multiplied at once: their sums fill half the registers.
const BLOCK: usize = 4;

/// Rows to be multiplied with `results` rows of a matrix, which are no more than [`TASK`].
#[derive(Clone, Copy)]
pub(super) struct Dots<'a> {
    pub values: &'a [f32],
    pub rows: usize,
    pub results: usize,
}

/// As [`super::product::sum`], all matrices by their rows.
pub(super) fn sum(terms: &[Term], out: &Out, start: Start) {
    let results = terms.first().map_or(0, |term| term.right.rows);
    (0..results.div_ceil(TASK)).into_par_iter().for_each(|task| {
        let first = task * TASK;
        let width = TASK.min(results - first);
        let mut sums = [0f32; FEW * TASK];
        for term in terms {
            let Form::Floats(values) = &term.left.form else {
                unreachable!("few rows are kept as floats. This is a bug.")
            };
            term.right.dots(first, Dots { values, rows: out.rows, results: width }, &mut sums);
        }
        for (row, sums) in sums.chunks(TASK).enumerate().take(out.rows) {
            out.finish(row, first, start, &sums[..width]);
        }
    });
}

/// `out[i * TASK + j] += x[i] · W[first + j]`, for rows of `depth` values.
pub(super) fn dots(data: &impl Decode, first: usize, depth: usize, x: Dots, out: &mut [f32]) {
    let whole = depth / 16 * 16;
    for j in (0..x.results).step_by(BLOCK) {
        // The last row stands in where there are fewer.
        let at: [usize; BLOCK] = std::array::from_fn(|k| (first + (j + k).min(x.results - 1)) * depth);
        let mut i = 0;
        while i < x.rows {
            let row = |k: usize| &x.values[(i + k) * depth..(i + k) * depth + whole];
            let out = &mut out[i * TASK + j..];
            let count = (x.results - j).min(BLOCK);
            i += match x.rows - i {
                4.. => block(data, at, [row(0), row(1), row(2), row(3)], count, out),
                2.. => block(data, at, [row(0), row(1)], count, out),
                _ => block(data, at, [row(0)], count, out),
            };
        }
    }
    for (i, j) in (0..x.rows).flat_map(|i| (0..x.results).map(move |j| (i, j))) {
        for k in whole..depth {
            out[i * TASK + j] += x.values[i * depth + k] * data.value((first + j) * depth + k);
        }
    }
}

/// Adds the products of `ROWS` rows with those at `at`, as far as they count; gives `ROWS`.
#[inline(always)]
#[allow(clippy::inline_always)]
fn block<const ROWS: usize>(
    data: &impl Decode,
    at: [usize; BLOCK],
    rows: [&[f32]; ROWS],
    count: usize,
    out: &mut [f32],
) -> usize {
    let sums = block_sums(data, at, rows);
    for (i, sums) in sums.iter().enumerate() {
        for (out, sum) in out[i * TASK..].iter_mut().zip(sums).take(count) {
            *out += sum;
        }
    }
    ROWS
}

#[inline(always)]
#[allow(clippy::inline_always)]
fn block_sums<const ROWS: usize>(
    data: &impl Decode,
    at: [usize; BLOCK],
    rows: [&[f32]; ROWS],
) -> [[f32; BLOCK]; ROWS] {
    #[cfg(target_arch = "x86_64")]
    if wide() {
        // SAFETY: the processor has AVX-512.
        #[allow(unsafe_code)]
        return unsafe { block_sums_wide(data, at, rows) };
    }
    let mut sums = [[0f32; BLOCK]; ROWS];
    for (j, at) in at.into_iter().enumerate() {
        let mut lanes = [[0f32; 16]; ROWS];
        for start in (0..rows[0].len()).step_by(16) {
            let w = data.sixteen(at + start);
            for (lanes, row) in lanes.iter_mut().zip(rows) {
                for ((lane, w), x) in lanes.iter_mut().zip(w).zip(&row[start..start + 16]) {
                    *lane += w * x;
                }
            }
        }
        for (sums, lanes) in sums.iter_mut().zip(lanes) {
            sums[j] = lanes.iter().sum();
        }
    }
    sums
}

/// # Safety
/// The processor must have AVX-512.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
unsafe fn block_sums_wide<const ROWS: usize>(
    data: &impl Decode,
    at: [usize; BLOCK],
    rows: [&[f32]; ROWS],
) -> [[f32; BLOCK]; ROWS] {
    let mut lanes = [[_mm512_setzero_ps(); BLOCK]; ROWS];
    let depth = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == depth), "rows of one length. This is a bug.");
    for start in (0..depth / 16 * 16).step_by(16) {
        let mut x = [_mm512_setzero_ps(); ROWS];
        for (x, row) in x.iter_mut().zip(rows) {
            // SAFETY: `start + 16` is not behind the end of a row.
            *x = unsafe { _mm512_loadu_ps(row.as_ptr().add(start)) };
        }
        for j in 0..BLOCK {
            // SAFETY: the processor has AVX-512.
            let w = unsafe { data.wide(at[j] + start) };
            for i in 0..ROWS {
                lanes[i][j] = _mm512_fmadd_ps(w, x[i], lanes[i][j]);
            }
        }
    }
    let mut sums = [[0f32; BLOCK]; ROWS];
    for (sums, lanes) in sums.iter_mut().zip(lanes) {
        for (sum, lanes) in sums.iter_mut().zip(lanes) {
            *sum = _mm512_reduce_add_ps(lanes);
        }
    }
    sums
}
