//! A frozen matrix in bfloat16, laid out for products with many rows at once.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::{Path, bf16, round, widen};

/// Columns of the result that a kernel computes at a time: three registers of sixteen floats.
pub(super) const PANEL: usize = 48;
/// Lines of a pair in a panel.
pub(super) const LINES: usize = PANEL / 16;
/// Rows of the result that a kernel computes at a time.
pub(super) const ROWS: usize = 8;
/// Rows that one task works on: their halves stay in the second-level cache while the panels pass.
const TASK_ROWS: usize = 64;
/// Pairs of inputs per pass: a panel of so many stays in the second-level cache.
const PASS_PAIRS: usize = 1024;

/// A cache line of pairs: for each of sixteen columns two neighbouring inputs, the first in the low half.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u32; 16]);

/// `W [n, k]`, for `x Wᵀ`.
pub struct Packed {
    n: usize,
    k: usize,
    /// `[panel][pair of inputs][3 lines]`, zeros behind the last column.
    lines: Vec<Line>,
}

/// How exactly the left side is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// To bfloat16: a relative error of 2⁻⁹ in each value.
    Once,
    /// To the sum of two bfloat16, 2⁻¹⁷: twice the work.
    Twice,
}

impl Packed {
    /// Packs `W [n, k]`, its rows in bfloat16.
    ///
    /// # Panics
    /// When there are not `n * k` values.
    pub fn new(rows: &[u16], n: usize, k: usize) -> Self {
        assert_eq!(rows.len(), n * k, "a whole matrix. This is a bug.");
        Self::fill(n, k, |panel, lines| {
            let rows = rows[panel * PANEL * k..].chunks_exact(k).take(PANEL);
            for (lane, row) in rows.enumerate() {
                let (pairs, last) = row.as_chunks::<2>();
                for (pair, lines) in pairs.iter().zip(lines.chunks_exact_mut(LINES)) {
                    lines[lane / 16].0[lane % 16] = u32::from(pair[0]) | u32::from(pair[1]) << 16;
                }
                if let ([last], Some(lines)) = (last, lines.chunks_exact_mut(LINES).last()) {
                    lines[lane / 16].0[lane % 16] = u32::from(*last);
                }
            }
        })
    }

    /// The same matrix for products from the other side: `Wᵀ` packed.
    #[must_use]
    pub fn turned(&self) -> Self {
        let pairs = self.k.div_ceil(2);
        // Rows 2p and 2p + 1 of `W` lie side by side in one panel, its columns in the halves of pairs.
        Self::fill(self.k, self.n, |panel, lines| {
            let first = panel * PANEL / 2;
            let columns = (pairs - first).min(PANEL / 2);
            for (pair, out) in lines.chunks_exact_mut(LINES).enumerate() {
                let (source, lane) = (2 * pair / PANEL, 2 * pair % PANEL);
                let at = (source * pairs + first) * LINES;
                let from = self.lines[at..at + columns * LINES].chunks_exact(LINES);
                for (column, from) in from.enumerate() {
                    let low = from[lane / 16].0[lane % 16];
                    let high = from[(lane + 1) / 16].0[(lane + 1) % 16];
                    let two = &mut out[2 * column / 16].0;
                    two[2 * column % 16] = low & 0xffff | high << 16;
                    two[2 * column % 16 + 1] = low >> 16 | high & 0xffff_0000;
                }
            }
        })
    }

    /// Lays out a matrix of `n` rows and `k` columns; `work(panel, lines)` fills the lines of a panel.
    fn fill(n: usize, k: usize, work: impl Fn(usize, &mut [Line]) + Sync) -> Self {
        let each = k.div_ceil(2) * LINES;
        let mut lines = vec![Line([0; 16]); n.div_ceil(PANEL) * each];
        lines.par_chunks_mut(each.max(1)).enumerate().for_each(|(panel, lines)| work(panel, lines));
        Self { n, k, lines }
    }

    /// Rows: outputs of the layer.
    pub fn outputs(&self) -> usize {
        self.n
    }

    /// Columns: inputs of the layer.
    pub fn inputs(&self) -> usize {
        self.k
    }

    /// `x Wᵀ`, `[m, n]`, for `x [m, k]`. Sums are in float32.
    ///
    /// # Panics
    /// When `x` is not of whole rows, or `path` computes elsewhere.
    pub fn product(&self, x: &[f32], rounding: Rounding, path: Path) -> Vec<f32> {
        assert!(x.len().is_multiple_of(self.k), "rows of {} values. This is a bug.", self.k);
        let m = x.len() / self.k;
        // Every value is written once; filling it with zeros first would cost as much as a small product.
        let mut out: Vec<f32> = Vec::with_capacity(m * self.n);
        if m == 0 || self.n == 0 {
            return out;
        }
        let left = Left::new(x, self.k, rounding);
        let panels = self.n.div_ceil(PANEL);
        // Few rows: tasks side by side along the columns instead.
        let groups = (8 / m.div_ceil(TASK_ROWS)).clamp(1, panels);
        let group = panels.div_ceil(groups);
        let rows = out.spare_capacity_mut()[..m * self.n].par_chunks_mut(TASK_ROWS * self.n).enumerate();
        let work = |(block, out): (usize, &mut [MaybeUninit<f32>])| {
            let first = block * TASK_ROWS;
            let columns = Columns::new(out, self.n);
            (0..panels).into_par_iter().step_by(group).for_each(|panel| {
                self.task(&left, first, columns, panel..(panel + group).min(panels), path);
            });
        };
        rows.for_each(work);
        // SAFETY: the tasks have written every column of every row.
        #[allow(unsafe_code)]
        unsafe {
            out.set_len(m * self.n);
        }
        out
    }

    /// Some panels of the result, for one block of rows.
    fn task(&self, left: &Left, first: usize, out: Columns, panels: std::ops::Range<usize>, path: Path) {
        let pairs = left.pairs;
        let rows = out.rows;
        let mut sums = [[0f32; PANEL]; ROWS];
        for start in (0..pairs).step_by(PASS_PAIRS) {
            let length = PASS_PAIRS.min(pairs - start);
            for panel in panels.clone() {
                let at = (panel * pairs + start) * LINES;
                let right = &self.lines[at..at + length * LINES];
                for row in (0..rows).step_by(ROWS) {
                    let count = ROWS.min(rows - row);
                    let width = PANEL.min(self.n - panel * PANEL);
                    if start == 0 {
                        sums = [[0f32; PANEL]; ROWS];
                    } else {
                        out.read(row, count, panel * PANEL, width, &mut sums);
                    }
                    for halves in &left.halves {
                        let rows: [&[u32]; ROWS] = std::array::from_fn(|i| {
                            let row = first + row + i.min(count - 1);
                            &halves[row * pairs + start..row * pairs + start + length]
                        });
                        match path {
                            Path::Avx512Bf16 => bf16::add(&rows, count, right, &mut sums),
                            Path::Plain => add(&rows, count, right, &mut sums),
                            Path::F32 => unreachable!("float32 is computed elsewhere. This is a bug."),
                        }
                    }
                    out.write(row, count, panel * PANEL, width, &sums);
                }
            }
        }
    }
}

/// The left side in halves: pairs of neighbouring values, each row filled up to whole pairs.
struct Left {
    pairs: usize,
    /// The rounded values, then what rounding took away.
    halves: Vec<Vec<u32>>,
}

impl Left {
    fn new(x: &[f32], k: usize, rounding: Rounding) -> Self {
        let pairs = k.div_ceil(2);
        let rounds = match rounding {
            Rounding::Once => 1,
            Rounding::Twice => 2,
        };
        let pack = |round_of: &(dyn Fn(f32) -> u32 + Sync)| {
            let mut halves = vec![0u32; x.len() / k * pairs];
            halves.par_chunks_mut(pairs).zip(x.par_chunks(k)).for_each(|(out, row)| {
                for (out, pair) in out.iter_mut().zip(row.chunks(2)) {
                    *out = round_of(pair[0]) | pair.get(1).map_or(0, |v| round_of(*v)) << 16;
                }
            });
            halves
        };
        let first = || {
            let mut halves = vec![0u32; x.len() / k * pairs];
            halves.par_chunks_mut(pairs).zip(x.par_chunks(k)).for_each(|(out, row)| bf16::pack(row, out));
            halves
        };
        let rest = |v: f32| round(v - widen(round(v)));
        Self { pairs, halves: (0..rounds).map(|i| if i == 0 { first() } else { pack(&rest) }).collect() }
    }
}

/// A block of whole rows of the result, that tasks write to side by side, each to columns of its own.
#[derive(Clone, Copy)]
struct Columns {
    start: *mut f32,
    rows: usize,
    n: usize,
}

// SAFETY: tasks get disjoint ranges of panels, so no two touch the same value.
#[allow(unsafe_code)]
unsafe impl Sync for Columns {}
// SAFETY: as above; the block it points into outlives the tasks, which end before `product` returns.
#[allow(unsafe_code)]
unsafe impl Send for Columns {}

impl Columns {
    fn new(out: &mut [MaybeUninit<f32>], n: usize) -> Self {
        Self { start: out.as_mut_ptr().cast(), rows: out.len() / n, n }
    }

    /// The place of `width` values of a row.
    fn place(&self, row: usize, column: usize, width: usize) -> *mut f32 {
        assert!(row < self.rows && column + width <= self.n, "outside the result. This is a bug.");
        // SAFETY: inside the block by the assertion.
        #[allow(unsafe_code)]
        unsafe {
            self.start.add(row * self.n + column)
        }
    }

    fn read(&self, row: usize, count: usize, column: usize, width: usize, sums: &mut [[f32; PANEL]; ROWS]) {
        for (i, sums) in sums.iter_mut().enumerate().take(count) {
            let place = self.place(row + i, column, width);
            // SAFETY: `place` has room for `width` values, which this task alone touches.
            #[allow(unsafe_code)]
            unsafe {
                std::ptr::copy_nonoverlapping(place, sums.as_mut_ptr(), width);
            }
        }
    }

    fn write(&self, row: usize, count: usize, column: usize, width: usize, sums: &[[f32; PANEL]; ROWS]) {
        for (i, sums) in sums.iter().enumerate().take(count) {
            let place = self.place(row + i, column, width);
            // SAFETY: as in `read`.
            #[allow(unsafe_code)]
            unsafe {
                std::ptr::copy_nonoverlapping(sums.as_ptr(), place, width);
            }
        }
    }
}

/// `sums += rows · right`, in plain Rust.
fn add(rows: &[&[u32]; ROWS], count: usize, right: &[Line], sums: &mut [[f32; PANEL]; ROWS]) {
    for (sums, row) in sums.iter_mut().zip(rows).take(count) {
        for (pair, lines) in row.iter().zip(right.chunks_exact(LINES)) {
            let (low, high) = (widen(pair & 0xffff), widen(pair >> 16));
            for (sum, value) in sums.iter_mut().zip(lines.iter().flat_map(|line| &line.0)) {
                *sum += low * widen(value & 0xffff) + high * widen(value >> 16);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::model::kernel;
    use crate::engine::model::lora::unit;

    fn values(count: usize, key: u64) -> Vec<f32> {
        (0..count).map(|i| unit(key, i as u64) as f32 - 0.5).collect()
    }

    /// The product in float64, of what the right side is in bfloat16.
    fn exact(x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
        let sum = |i: usize, j: usize| {
            let right = |c: usize| f64::from(widen(round(w[j * k + c])));
            (0..k).map(|c| f64::from(x[i * k + c]) * right(c)).sum()
        };
        (0..m * n).map(|at| sum(at / n, at % n)).collect()
    }

    #[test]
    fn every_path_agrees_with_float64_on_odd_shapes() {
        let paths = [Path::Plain, kernel::path()].into_iter().filter(|path| *path != Path::F32);
        for path in paths {
            for shape in [(1, 1, 1), (1, 48, 64), (3, 49, 33), (8, 96, 10), (70, 100, 2500), (129, 7, 129)] {
                let (m, n, k) = shape;
                let (x, w) = (values(m * k, 1), values(n * k, 2));
                let halves: Vec<u16> = w.iter().map(|v| round(*v) as u16).collect();
                let packed = Packed::new(&halves, n, k);
                let want = exact(&x, &w, shape);
                // Turned twice it is itself, and turned once the other matrix.
                assert!(packed.turned().turned().lines.iter().zip(&packed.lines).all(|(a, b)| a.0 == b.0));
                let other: Vec<u16> = (0..n * k).map(|at| halves[at % n * k + at / n]).collect();
                let other = Packed::new(&other, k, n);
                assert!(packed.turned().lines.iter().zip(&other.lines).all(|(a, b)| a.0 == b.0), "{shape:?}");
                for (rounding, tolerance) in [(Rounding::Once, 1e-2), (Rounding::Twice, 1e-4)] {
                    let got = packed.product(&x, rounding, path);
                    let scale = (k as f64).sqrt() * 0.1;
                    for (got, want) in got.iter().zip(&want) {
                        let error = (f64::from(*got) - want).abs() / scale;
                        assert!(error < tolerance, "{path:?} {shape:?} {rounding:?}: {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_and_keeps_what_is_no_number() {
        for x in [0.0, -0.0, 1.0, 1.003_906_3, 1.011_718_8, -3.3e38, 1e-40, f32::INFINITY, f32::NEG_INFINITY]
        {
            assert_eq!(widen(round(x)).to_bits(), half::bf16::from_f32(x).to_f32().to_bits(), "{x}");
        }
        assert!(widen(round(f32::NAN)).is_nan());
        assert!(widen(round(f32::from_bits(0x7fff_ffff))).is_nan());
    }
}
