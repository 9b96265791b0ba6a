//! Sums of products of rows with frozen matrices: the one operation that most time goes into.

use rayon::prelude::*;

use super::amx;
use super::buffer::{Block, Buffer, Line, Shared, words};
use super::few;
use super::left::{Form, Left};
use super::matrix::{Matrix, Side};
pub use super::outer::outer;
use super::tile::{self, Kind, Rows, STRIPS, Strips, TILE};
use super::unpack::Grid;

/// So few rows are not worth unpacking a matrix for: they are multiplied with it as it lies.
pub(super) const FEW: usize = 16;
/// Lines of unpacked strips that stay in the second-level cache, 768 KiB.
const CACHED_LINES: usize = 12 << 10;
/// Rows that are worth unpacking a matrix for once more, so that a thread has something to do.
const WORTH_ROWS: usize = 512;

/// `left · right`.
#[derive(Clone, Copy)]
pub struct Term<'a> {
    pub left: &'a Left,
    pub right: &'a Matrix,
    pub side: Side,
}

impl<'a> Term<'a> {
    pub fn new(left: &'a Left, right: &'a Matrix, side: Side) -> Self {
        Self { left, right, side }
    }
}

/// Where results go: columns `first..` of rows of `width` values.
pub struct Target<'a> {
    pub values: &'a mut [f32],
    pub width: usize,
    pub first: usize,
}

/// What results are added to.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    Zero,
    /// One value for each result.
    Bias(&'a [f32]),
    /// What the target holds.
    Target,
}

impl Start<'_> {
    /// The same from column `first` on; after the first pass over a result, it is that what is there.
    fn of(self, first: usize, first_pass: bool) -> Self {
        match self {
            _ if !first_pass => Start::Target,
            Start::Bias(bias) => Start::Bias(&bias[first..]),
            Start::Zero | Start::Target => self,
        }
    }
}

/// `x Wᵀ` or `x W` alone.
pub fn product(left: &Left, right: &Matrix, side: Side) -> Buffer {
    let results = right.results(side);
    let mut out = Buffer::new(left.rows * results);
    sum(&[Term::new(left, right, side)], Target { values: &mut out, width: results, first: 0 }, Start::Zero);
    out
}

/// Writes the sum of `terms` to `target`, after what it starts with.
///
/// # Panics
/// When shapes do not fit.
pub fn sum(terms: &[Term], target: Target, start: Start) {
    let Some(one) = terms.first() else { return };
    let (rows, results) = (one.left.rows, one.right.results(one.side));
    for term in terms {
        assert!(
            term.left.rows == rows
                && term.right.results(term.side) == results
                && term.right.depth(term.side) == term.left.depth,
            "a sum of products that do not fit. This is a bug."
        );
    }
    if rows == 0 || results == 0 {
        return;
    }
    assert!(
        target.first + results <= target.width && target.values.len() == rows * target.width,
        "a target that does not fit. This is a bug."
    );
    if let Start::Bias(bias) = start {
        assert_eq!(bias.len(), results, "a bias that does not fit. This is a bug.");
    }
    let out = Out { values: Shared::new(target.values), rows, width: target.width, first: target.first };
    if terms.iter().all(|term| term.left.depth == 0) {
        return tile::begin(start, &mut out.block(0, rows, 0, results));
    }
    if rows <= FEW && terms.iter().all(|term| term.side == Side::Rows) {
        return few::sum(terms, &out, start);
    }
    let work = Work { terms, passes: passes(terms), rows, results, start, out };
    work.run();
}

/// A stretch of the depth of a term, that is unpacked at once.
#[derive(Clone, Copy)]
struct Piece {
    term: usize,
    start: usize,
    /// Lines of a strip.
    lines: usize,
}

/// What of each term is added in which pass over the result. Nearly always it is one.
fn passes(terms: &[Term]) -> Vec<Vec<Piece>> {
    let most = CACHED_LINES / (4 * STRIPS);
    let mut passes: Vec<Vec<Piece>> = vec![Vec::new()];
    let mut filled = 0;
    for (i, term) in terms.iter().enumerate() {
        let lines = |depth: usize| match term.left.form {
            Form::Floats(_) => depth,
            Form::Pairs(_) => depth.div_ceil(2),
            Form::Tiles(_) => depth.div_ceil(32) * 16,
        };
        // Whole tiles.
        let each = (most * term.left.depth / lines(term.left.depth).max(1) / 64 * 64).max(64);
        for start in (0..term.left.depth).step_by(each) {
            let depth = each.min(term.left.depth - start);
            let piece = Piece { term: i, start, lines: lines(depth) };
            if filled + piece.lines > most && filled > 0 {
                passes.push(Vec::new());
                filled = 0;
            }
            filled += piece.lines;
            passes.last_mut().expect("there is one. This is a bug.").push(piece);
        }
    }
    passes
}

/// One sum, to be cut into tasks.
struct Work<'a> {
    terms: &'a [Term<'a>],
    passes: Vec<Vec<Piece>>,
    rows: usize,
    results: usize,
    start: Start<'a>,
    out: Out,
}

impl Work<'_> {
    fn run(&self) {
        let panel = self.panel();
        let strips = self.results.div_ceil(16);
        let panels = strips.div_ceil(panel);
        let lines = self.passes.iter().map(|pass| depth_of(pass)).max().unwrap_or(1);
        let threads = rayon::current_num_threads();
        // As many panels as stay in the cache, but several tasks for each thread.
        let cached = (CACHED_LINES / (lines * panel)).max(1);
        let wide = cached.min(panels.div_ceil(4 * threads)).max(1) * panel;
        let across = strips.div_ceil(wide);
        let down = (4 * threads).div_ceil(across).min(self.rows.div_ceil(WORTH_ROWS)).max(1);
        let tall = self.rows.div_ceil(down).div_ceil(TILE) * TILE;
        let down = self.rows.div_ceil(tall);
        (0..across * down).into_par_iter().for_each(|task| {
            let (row, strip) = (task % down * tall, task / down * wide);
            self.task(row..(row + tall).min(self.rows), strip..(strip + wide).min(strips));
        });
    }

    /// Strips that the kernel of these terms works on at once.
    fn panel(&self) -> usize {
        let tiles = self.terms.iter().any(|term| matches!(term.left.form, Form::Tiles(_)));
        if tiles { amx::STRIPS } else { STRIPS }
    }

    fn task(&self, rows: std::ops::Range<usize>, strips: std::ops::Range<usize>) {
        let panel = self.panel();
        let tiles = (panel == amx::STRIPS).then(amx::Tiles::new);
        for (number, pass) in self.passes.iter().enumerate() {
            let depth = depth_of(pass);
            let mut scratch = Buffer::of_lines(strips.len() * depth);
            self.unpack(pass, strips.clone(), depth, scratch.lines_mut());
            let lines = scratch.lines();
            for row in rows.clone().step_by(TILE) {
                let count = TILE.min(rows.end - row);
                for first in strips.clone().step_by(panel) {
                    let column = 16 * first;
                    let width = (16 * panel.min(strips.end - first)).min(self.results - column);
                    let mut block = self.out.block(row, count, column, width);
                    let mut start = self.start.of(column, number == 0);
                    let mut at = (first - strips.start) * depth;
                    for piece in pass {
                        let right = Strips { lines: &lines[at..], strip: depth, line: 1, depth: piece.lines };
                        self.add(*piece, row, right, tiles.as_ref(), start, &mut block);
                        start = Start::Target;
                        at += piece.lines;
                    }
                }
            }
        }
    }

    fn unpack(&self, pass: &[Piece], strips: std::ops::Range<usize>, depth: usize, lines: &mut [Line]) {
        let mut at = 0;
        for piece in pass {
            let Term { left, right, side } = self.terms[piece.term];
            let grid = Grid { strips: strips.len(), apart: depth, lines: piece.lines };
            match left.form {
                Form::Floats(_) => right.strips(side, 16 * strips.start, piece.start, grid, &mut lines[at..]),
                Form::Pairs(_) | Form::Tiles(_) => {
                    right.pairs(side, 16 * strips.start, piece.start, grid, &mut lines[at..]);
                }
            }
            at += piece.lines;
        }
    }

    /// Writes what `piece` gives from `row` on, after what it starts with.
    fn add(
        &self,
        piece: Piece,
        row: usize,
        right: Strips,
        tiles: Option<&amx::Tiles>,
        mut start: Start,
        out: &mut Block,
    ) {
        let left = self.terms[piece.term].left;
        match (&left.form, tiles) {
            (Form::Floats(values), _) => {
                let words = &words(values)[row * left.depth + piece.start..];
                tile::sum(Kind::Float, Rows { words, row: left.depth, step: 1 }, right, start, out);
            }
            (Form::Pairs(parts), _) => {
                let width = left.depth.div_ceil(2);
                for part in parts {
                    let words = &words(part)[row * width + piece.start / 2..];
                    tile::sum(Kind::Pair, Rows { words, row: width, step: 1 }, right, start, out);
                    start = Start::Target;
                }
            }
            (Form::Tiles(parts), Some(tiles)) => {
                let each = left.depth.div_ceil(32) * 512;
                for part in parts {
                    let words = &words(part)[row / TILE * each + piece.start / 32 * 512..];
                    tiles.sum(words, right, start, out);
                    start = Start::Target;
                }
            }
            (Form::Tiles(_), None) => unreachable!("tiles without tile registers. This is a bug."),
        }
    }
}

fn depth_of(pass: &[Piece]) -> usize {
    pass.iter().map(|piece| piece.lines).sum()
}

/// A target that tasks write to side by side, each to places of its own.
pub(super) struct Out {
    values: Shared,
    pub rows: usize,
    width: usize,
    first: usize,
}

impl Out {
    /// `count` rows from `row` on, `width` results from `column` on.
    ///
    /// # Panics
    /// When they are outside the target.
    pub fn block(&self, row: usize, count: usize, column: usize, width: usize) -> Block<'_> {
        assert!(
            row + count <= self.rows && self.first + column + width <= self.width,
            "outside the result. This is a bug."
        );
        self.values.block(row * self.width + self.first + column, self.width, count, width)
    }

    /// Writes sums of a row from `column` on, after what they start with.
    pub fn finish(&self, row: usize, column: usize, start: Start, sums: &[f32]) {
        let mut block = self.block(row, 1, column, sums.len());
        tile::finish(&mut block, 0, 0, start.of(column, true), sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::chance::unit;
    use crate::engine::model::kernel::{Path, Rounding, path, round, widen};

    fn values(count: usize, key: u64) -> Vec<f32> {
        (0..count).map(|i| unit(key, i as u64) as f32 - 0.5).collect()
    }

    fn halves(values: &[f32]) -> Vec<f32> {
        values.iter().map(|v| widen(round(*v))).collect()
    }

    /// The product in float64.
    fn exact(x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize), side: Side) -> Vec<f64> {
        let right = |j: usize, c: usize| match side {
            Side::Rows => w[j * k + c],
            Side::Columns => w[c * n + j],
        };
        let sum = |i: usize, j: usize| (0..k).map(|c| f64::from(x[i * k + c]) * f64::from(right(j, c))).sum();
        (0..m * n).map(|at| sum(at / n, at % n)).collect()
    }

    #[test]
    fn products_agree_with_float64_on_odd_shapes_from_both_sides() {
        for (m, n, k) in
            [(1, 1, 1), (1, 48, 64), (3, 49, 33), (17, 5, 1), (33, 96, 10), (70, 100, 2500), (129, 7, 4500)]
        {
            for side in [Side::Rows, Side::Columns] {
                let (x, w) = (values(m * k, 1), halves(&values(n * k, 2)));
                let shape = if side == Side::Rows { (n, k) } else { (k, n) };
                let stored: Vec<u8> = w.iter().flat_map(|v| (round(*v) as u16).to_le_bytes()).collect();
                let as_halves =
                    Matrix::stored(stored.into(), super::super::matrix::Stored::Bf16, shape.0, shape.1);
                let matrices = [as_halves, Matrix::floats(&w, shape.0, shape.1)];
                let want = exact(&x, &w, (m, n, k), side);
                for (rounding, tolerance) in
                    [(None, 1e-5), (Some(Rounding::Once), 1e-2), (Some(Rounding::Twice), 1e-4)]
                {
                    for matrix in &matrices {
                        let got = product(&Left::new(&x, k, rounding), matrix, side);
                        for (got, want) in got.iter().zip(&want) {
                            let error = (f64::from(*got) - want).abs() / ((k as f64).sqrt() * 0.1);
                            assert!(
                                error < tolerance,
                                "{:?} {m}x{k}x{n} {side:?} {rounding:?}: {got} {want}",
                                path()
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn terms_are_summed_onto_what_is_there() {
        let (m, n) = (40, 50);
        for rounding in [None, Some(Rounding::Once)] {
            let (x, y) = (halves(&values(m * 70, 1)), halves(&values(m * 3, 2)));
            let (w, v) = (halves(&values(n * 70, 3)), halves(&values(3 * n, 4)));
            let mut want = exact(&x, &w, (m, n, 70), Side::Rows);
            for (want, more) in want.iter_mut().zip(exact(&y, &v, (m, n, 3), Side::Columns)) {
                *want += more;
            }
            let (x, y) = (Left::new(&x, 70, rounding), Left::new(&y, 3, rounding));
            let (w, v) = (Matrix::floats(&w, n, 70), Matrix::floats(&v, 3, n));
            let terms = [Term::new(&x, &w, Side::Rows), Term::new(&y, &v, Side::Columns)];
            let bias = values(n, 5);
            for (start, first) in [(Start::Target, 2.0), (Start::Bias(&bias), 0.0), (Start::Zero, 0.0)] {
                let width = n + 9;
                let mut out = vec![2.0; m * width];
                sum(&terms, Target { values: &mut out, width, first: 4 }, start);
                for (at, out) in out.iter().enumerate() {
                    let (i, j) = (at / width, at % width);
                    let inside = (4..4 + n).contains(&j);
                    let begin =
                        if let Start::Bias(bias) = start { bias[j.clamp(4, 3 + n) - 4] } else { first };
                    let want = if inside { want[i * n + j - 4] + f64::from(begin) } else { 2.0 };
                    assert!((f64::from(*out) - want).abs() < 1e-4, "{i} {j}: {out} {want}");
                }
            }
        }
    }

    #[test]
    fn however_values_are_stored_they_are_multiplied_as_they_are_read() {
        for (n, k) in [(5, 64), (9, 96), (70, 50), (20, 208), (3, 17)] {
            let w = values(n * k, 2);
            let floats = Matrix::floats(&w, n, k);
            let f16: Vec<u8> = w.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
            let f16 = Matrix::stored(f16.into(), super::super::matrix::Stored::F16, n, k);
            for matrix in [floats.nf4(false), floats.q4(false), floats.int8(false), f16] {
                let mut read = vec![0.0; n * k];
                read.chunks_mut(k).enumerate().for_each(|(i, row)| matrix.row(i, row));
                for (m, side) in [(1, Side::Rows), (7, Side::Rows), (40, Side::Rows), (40, Side::Columns)] {
                    let (results, depth) = (matrix.results(side), matrix.depth(side));
                    let x = values(m * depth, 1);
                    let want = exact(&x, &read, (m, results, depth), side);
                    for (rounding, tolerance) in [(None, 1e-5), (Some(Rounding::Once), 1e-2)] {
                        let got = product(&Left::new(&x, depth, rounding), &matrix, side);
                        for (got, want) in got.iter().zip(&want) {
                            let error = (f64::from(*got) - want).abs() / ((depth as f64).sqrt() * 0.1);
                            assert!(error < tolerance, "{m}x{depth}x{results} {rounding:?}: {got} {want}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn sums_over_nothing_are_what_they_start_with() {
        for rows in [1, 40] {
            let (x, w) = (values(rows * 50, 1), values(20 * 50, 2));
            let (none, empty) = (Left::from_rows(rows, 0, None, |_, _| {}), Matrix::floats(&[], 20, 0));
            let (left, right) = (Left::new(&x, 50, None), Matrix::floats(&w, 20, 50));
            let bias = values(20, 3);
            let both = [Term::new(&none, &empty, Side::Rows), Term::new(&left, &right, Side::Rows)];
            for (terms, factor) in [(&both[..1], 0.0), (&both[..], 1.0)] {
                let mut out = vec![f32::NAN; rows * 20];
                sum(terms, Target { values: &mut out, width: 20, first: 0 }, Start::Bias(&bias));
                let want = exact(&x, &w, (rows, 20, 50), Side::Rows);
                for (i, (out, want)) in out.iter().zip(want).enumerate() {
                    let want = factor * want + f64::from(bias[i % 20]);
                    assert!((f64::from(*out) - want).abs() < 1e-4, "{i}: {out} {want}");
                }
            }
        }
    }

    #[test]
    fn a_row_gives_the_same_alone_and_among_many() {
        let (n, k) = (40, 100);
        let (x, w) = (values(64 * k, 1), Matrix::floats(&values(n * k, 2), n, k));
        for rounding in [None, Some(Rounding::Once)] {
            let all = product(&Left::new(&x, k, rounding), &w, Side::Rows);
            let one = product(&Left::new(&x[k..2 * k], k, rounding), &w, Side::Rows);
            for (a, b) in one.iter().zip(&all[n..2 * n]) {
                // Float weights are rounded among many only.
                let tolerance = if rounding.is_some() && path() >= Path::Bf16 { 2e-2 } else { 1e-5 };
                assert!((a - b).abs() < tolerance, "{a} {b}");
            }
        }
    }

    #[test]
    fn rows_read_back_are_what_is_multiplied() {
        let (rows, depth) = (37, 45);
        let x = values(rows * depth, 1);
        for (rounding, tolerance) in
            [(None, 0.0), (Some(Rounding::Once), 2e-3), (Some(Rounding::Twice), 1e-5)]
        {
            let left = Left::new(&x, depth, rounding);
            let mut row = vec![0.0; depth];
            for (i, want) in x.chunks(depth).enumerate() {
                left.read(i, 0, &mut row);
                assert!(row.iter().zip(want).all(|(a, b)| (a - b).abs() <= tolerance), "{rounding:?} {i}");
            }
        }
    }
}
