//! Gradients of matrices: sums over the rows of two tables.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::{Block, Buffer, floats_mut, words};
use super::product::Start;
use super::rows;
use super::tile::{self, Kind, Rows, STRIPS, Strips, TILE};

/// Rows of one task. Not more for fewer threads: sums are to be the same on every machine.
const ROWS: usize = 256;
/// Results of a matrix that is not small are found so many rows of it at a time, over all rows of the tables at once:
/// partial sums of all of them would be many times larger than the matrix.
const MANY: usize = 128;
/// Rows laid out at a time, and columns of one task at most: they stay in the second-level cache.
const DEPTH: usize = 32;
const WIDTH: usize = 1024;

/// `leftᵀ · right`, `[rank, columns]`: the gradient of a matrix. `left` has rows of `rank`; `right(i, first,
/// out)` writes columns `first..` of its row `i`.
pub fn outer(
    left: &[f32],
    rank: usize,
    columns: usize,
    right: impl Fn(usize, usize, &mut [f32]) + Sync,
) -> Buffer {
    let rows = left.len() / rank.max(1);
    if rows == 0 || columns == 0 {
        return Buffer::zeros(rank * columns);
    }
    let across = columns.div_ceil(WIDTH);
    let width = columns.div_ceil(across).div_ceil(16 * STRIPS) * 16 * STRIPS;
    if rank > MANY {
        let mut out = Buffer::zeros(rank * columns);
        out.par_chunks_mut(MANY * columns).enumerate().for_each(|(i, out)| {
            let left = Lefts { values: left, step: rank, first: i * MANY, count: out.len() / columns };
            for column in (0..columns).step_by(width) {
                add(&left, 0..rows, column..(column + width).min(columns), &right, (out, columns, column));
            }
        });
        return out;
    }
    let task = |task: usize| {
        let (row, column) = (task / across * ROWS, task % across * width);
        let columns = column.min(columns)..(column + width).min(columns);
        let mut out = Buffer::zeros(rank * columns.len());
        let left = Lefts { values: left, step: rank, first: 0, count: rank };
        let place = columns.len();
        add(&left, row..(row + ROWS).min(rows), columns, &right, (&mut out, place, 0));
        out
    };
    let tasks = rows.div_ceil(ROWS) * across;
    let parts: Vec<Buffer> = (0..tasks).into_par_iter().map(task).collect();
    let mut out = Buffer::new(rank * columns);
    for (i, out) in out.chunks_mut(columns).enumerate() {
        for (column, out) in out.chunks_mut(width).enumerate() {
            let row = |part: &'_ Buffer| i * (part.len() / rank)..(i + 1) * (part.len() / rank);
            out.copy_from_slice(&parts[column][row(&parts[column])]);
            for part in parts[column..].iter().step_by(across).skip(1) {
                rows::add_scaled(out, 1.0, &part[row(part)]);
            }
        }
    }
    out
}

/// Some columns of the left table.
struct Lefts<'a> {
    values: &'a [f32],
    /// From row to row.
    step: usize,
    first: usize,
    count: usize,
}

/// Adds the sum over some rows, for some columns of the right table, to the columns from `column` on of a result with
/// rows of `step`.
fn add(
    left: &Lefts,
    rows: Range<usize>,
    columns: Range<usize>,
    right: &impl Fn(usize, usize, &mut [f32]),
    (out, step, column): (&mut [f32], usize, usize),
) {
    let width = columns.len();
    let line = width.div_ceil(16);
    let mut table = Buffer::of_lines(DEPTH * line);
    for start in rows.clone().step_by(DEPTH) {
        let depth = DEPTH.min(rows.end - start);
        let values = floats_mut(table.lines_mut());
        for (i, row) in values.chunks_mut(16 * line).enumerate().take(depth) {
            right(start + i, columns.start, &mut row[..width]);
        }
        for first in (0..left.count).step_by(TILE) {
            let count = TILE.min(left.count - first);
            let place = start * left.step + left.first + first;
            let left = Rows { words: &words(left.values)[place..], row: 1, step: left.step };
            let mut out = Block::new(&mut out[first * step + column..], step, count, width);
            for column in (0..width).step_by(16 * STRIPS) {
                let right = Strips { lines: &table.lines()[column / 16..], strip: 1, line, depth };
                let mut out = out.columns(column..column + 16 * STRIPS);
                tile::sum(Kind::Float, left, right, Start::Target, &mut out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::chance::unit;

    #[test]
    fn sums_over_rows_agree_with_float64() {
        let values = |count: usize, key| -> Vec<f32> {
            (0..count).map(|i| unit(key, i as u64) as f32 - 0.5).collect()
        };
        for (rows, rank, columns) in [
            (1, 1, 1),
            (40, 8, 50),
            (300, 3, 96),
            (600, 33, 17),
            (31, 2, 2100),
            (0, 2, 3),
            (70, 300, 40),
            (9, 129, 2100),
        ] {
            let (left, right) = (values(rows * rank, 1), values(rows * columns, 2));
            let got = outer(&left, rank, columns, |i, first, out| {
                out.copy_from_slice(&right[i * columns + first..][..out.len()]);
            });
            assert_eq!(got.len(), rank * columns);
            for (at, got) in got.iter().enumerate() {
                let (i, j) = (at / columns, at % columns);
                let product =
                    |row: usize| f64::from(left[row * rank + i]) * f64::from(right[row * columns + j]);
                let want: f64 = (0..rows).map(product).sum();
                assert!((f64::from(*got) - want).abs() < 1e-4, "{i} {j}: {got} {want}");
            }
        }
    }
}
