//! Products of a few rows: each row of the matrix is read once, as it is stored, and multiplied with all of
//! them. What takes the time is the memory.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::{Buffer, words, words_mut};
use super::decode::Decode;
use super::lanes::vectorised;
use super::left::Form;
use super::product::{Out, Start, Term};
use super::{round, widen};

/// Results of one task: not so few that handing it out takes longer, and some tasks for each thread.
const LEAST: usize = 32;
const MOST: usize = 512;
const EACH: usize = 4;
/// Products that take longer than it takes to wake another thread.
const WORTH_HANDING_OUT: usize = 1 << 15;
/// Rows of the matrix, and of the left side, that are multiplied at once: their sums fill half the registers.
const BLOCK: usize = 4;

/// The left side of some results.
#[derive(Clone, Copy)]
pub(super) struct Few<'a> {
    pub form: &'a Form,
    pub rows: usize,
    pub depth: usize,
}

/// As [`super::product::sum`], all matrices by their rows.
pub(super) fn sum(terms: &[Term], out: &Out, start: Start) {
    let results = terms.first().map_or(0, |term| term.right.rows);
    let task =
        results.div_ceil(EACH * rayon::current_num_threads()).next_multiple_of(BLOCK).clamp(LEAST, MOST);
    let run = |i: usize| {
        let mut start = start;
        for Term { left, right, .. } in terms.iter().filter(|term| term.left.depth > 0) {
            let few = Few { form: &left.form, rows: out.rows, depth: left.depth };
            right.dots(i * task..((i + 1) * task).min(results), few, start, out);
            start = Start::Target;
        }
    };
    let work: usize = terms.iter().map(|term| term.right.rows * term.right.columns * out.rows).sum();
    if work < WORTH_HANDING_OUT {
        (0..results.div_ceil(task)).for_each(run);
    } else {
        (0..results.div_ceil(task)).into_par_iter().for_each(run);
    }
}

/// Writes the products of `few` with rows `results` of a matrix, after what they start with.
pub(super) fn dots(data: &impl Decode, results: Range<usize>, few: Few, start: Start, out: &Out) {
    match few.form {
        Form::Floats(values) => floats(data, values, results, few, start, out),
        Form::Pairs(parts) => {
            for (part, start) in parts.iter().zip([start, Start::Target]) {
                pairs(data, words(part), results.clone(), few, start, out);
            }
        }
        Form::Tiles(_) => unreachable!("few rows in tiles. This is a bug."),
    }
}

/// Where the rows of a block begin that stand for results `first..end`, and how many count: the last one stands
/// in where there are fewer.
fn block(first: usize, end: usize, depth: usize) -> ([usize; BLOCK], usize) {
    (std::array::from_fn(|k| (first + k).min(end - 1) * depth), (end - first).min(BLOCK))
}

/// Calls `sums` for so many rows, as many at once as fit in registers.
macro_rules! by_rows {
    ($rows:expr, |$row:ident| $sums:ident($($argument:expr),*), |$done:ident| $write:expr) => {{
        let mut $row = 0;
        while $row < $rows {
            $row += match $rows - $row {
                4.. => {
                    let $done = $sums::<4>($($argument),*);
                    $write
                }
                2.. => {
                    let $done = $sums::<2>($($argument),*);
                    $write
                }
                _ => {
                    let $done = $sums::<1>($($argument),*);
                    $write
                }
            };
        }
    }};
}

/// Writes the first `count` sums of each row; gives how many rows that were.
fn write(out: &Out, row: usize, column: usize, count: usize, start: Start, sums: &[[f32; BLOCK]]) -> usize {
    for (i, sums) in sums.iter().enumerate() {
        out.finish(row + i, column, start, &sums[..count]);
    }
    sums.len()
}

/// Products in float32.
fn floats(data: &impl Decode, x: &[f32], results: Range<usize>, few: Few, start: Start, out: &Out) {
    let depth = few.depth;
    let mut scratch = Buffer::new(BLOCK * depth);
    for first in results.clone().step_by(BLOCK) {
        let (at, count) = block(first, results.end, depth);
        for (at, row) in at.into_iter().zip(scratch.chunks_mut(depth)) {
            // The rows behind these are the next ones.
            data.floats(at, row, at + BLOCK * depth);
        }
        let w: [&[f32]; BLOCK] = std::array::from_fn(|k| &scratch[k * depth..(k + 1) * depth]);
        by_rows!(few.rows, |row| float_sums(w, &x[row * depth..]), |sums| {
            write(out, row, first, count, start, &sums)
        });
    }
}

/// The products of the first `ROWS` rows of `x` with the rows of `w`.
fn float_sums<const ROWS: usize>(w: [&[f32]; BLOCK], x: &[f32]) -> [[f32; BLOCK]; ROWS] {
    vectorised! {
        fn go[v](w: [&[f32]; BLOCK], x: &[&[f32]], sums: &mut [[f32; BLOCK]]) {
            #[inline(always)]
            #[allow(clippy::inline_always)]
            fn sized<const ROWS: usize, L: lanes::Lanes>(
                v: L,
                w: [&[f32]; BLOCK],
                x: &[&[f32]],
                out: &mut [[f32; BLOCK]],
            ) {
                let mut sums = [[v.splat(0.0); BLOCK]; ROWS];
                for at in (0..w[0].len()).step_by(L::WIDTH) {
                    let mut values = [v.splat(0.0); ROWS];
                    for (value, x) in values.iter_mut().zip(x) {
                        *value = v.load(x, at);
                    }
                    for j in 0..BLOCK {
                        let w = v.load(w[j], at);
                        for i in 0..ROWS {
                            sums[i][j] = v.fma(w, values[i], sums[i][j]);
                        }
                    }
                }
                for (out, sums) in out.iter_mut().zip(sums) {
                    for (out, sum) in out.iter_mut().zip(sums) {
                        *out = v.total(sum);
                    }
                }
            }
            match x.len() {
                4 => sized::<4, L>(v, w, x, sums),
                2 => sized::<2, L>(v, w, x, sums),
                _ => sized::<1, L>(v, w, x, sums),
            }
        }
    }
    let depth = w[0].len();
    let rows: [&[f32]; ROWS] = std::array::from_fn(|i| &x[i * depth..(i + 1) * depth]);
    let mut sums = [[0.0; BLOCK]; ROWS];
    go(w, &rows, &mut sums);
    sums
}

/// Products of bfloat16.
fn pairs(data: &impl Decode, x: &[u32], results: Range<usize>, few: Few, start: Start, out: &Out) {
    let (depth, width) = (few.depth, few.depth.div_ceil(2));
    let whole = depth / 32 * 32;
    let mut scratch = Buffer::new(BLOCK * whole / 2);
    for first in results.clone().step_by(BLOCK) {
        let (at, count) = block(first, results.end, depth);
        let mut rest = words_mut(&mut scratch);
        let w: [&[u32]; BLOCK] = at.map(|at| {
            let (row, more) = std::mem::take(&mut rest).split_at_mut(whole / 2);
            rest = more;
            // The rows behind these are the next ones.
            data.pairs(at, row, at + BLOCK * depth);
            &*row
        });
        by_rows!(few.rows, |row| pair_sums(w, &x[row * width..], width), |sums| {
            let mut sums = sums;
            for (i, sums) in sums.iter_mut().enumerate() {
                for k in whole..depth {
                    let x = widen(x[(row + i) * width + k / 2] >> (16 * (k % 2)) & 0xffff);
                    sums.iter_mut()
                        .zip(at)
                        .for_each(|(sum, at)| *sum += x * widen(round(data.value(at + k))));
                }
            }
            write(out, row, first, count, start, &sums)
        });
    }
}

/// The products of the first `ROWS` rows of `x`, `width` pairs each, with the rows of `w`.
fn pair_sums<const ROWS: usize>(w: [&[u32]; BLOCK], x: &[u32], width: usize) -> [[f32; BLOCK]; ROWS] {
    let rows: [&[u32]; ROWS] = std::array::from_fn(|i| &x[i * width..(i + 1) * width]);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: who packed pairs is on a path with AVX512-BF16 (`Left::from_rows`).
    #[allow(unsafe_code)]
    unsafe {
        pair_sums_wide(w, rows)
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no bfloat16 here: {}. This is a bug.", rows.len() + w.len());
}

/// # Safety
/// The processor must have AVX-512 and AVX512-BF16.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pair_sums_wide<const ROWS: usize>(w: [&[u32]; BLOCK], x: [&[u32]; ROWS]) -> [[f32; BLOCK]; ROWS] {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_reduce_add_ps, _mm512_setzero_ps,
    };
    let steps = w[0].len() / 16;
    assert!(
        w.iter().all(|row| row.len() == 16 * steps) && x.iter().all(|row| row.len() >= 16 * steps),
        "rows of one length. This is a bug."
    );
    let mut lanes = [[_mm512_setzero_ps(); BLOCK]; ROWS];
    for step in 0..steps {
        // SAFETY: all rows have `steps` times sixteen words; both types are 512 plain bits.
        unsafe {
            let load = |row: &[u32]| {
                std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(
                    row.as_ptr().add(16 * step).cast(),
                ))
            };
            let x = x.map(load);
            for j in 0..BLOCK {
                let w = load(w[j]);
                for i in 0..ROWS {
                    lanes[i][j] = _mm512_dpbf16_ps(lanes[i][j], w, x[i]);
                }
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
