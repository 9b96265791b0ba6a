//! Frozen matrices as they are stored, and how they are unpacked for products.

use std::ops::Range;

use bytes::Bytes;

use super::buffer::Line;
use super::decode::{Bf16, Decode, F16, F32};
use super::few::{self, Few};
use super::product::{Out, Start};
use super::q4::Q4;
use super::quant::{Int8, Nf4};
use super::unpack::{self, Grid, Place};

/// A matrix `[rows, columns]` as it is stored. Cheap to clone.
#[derive(Clone)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    data: Data,
}

/// Values row by row, little-endian.
#[derive(Clone)]
enum Data {
    Bf16(Bytes),
    F16(Bytes),
    F32(Bytes),
    Nf4(Nf4),
    Q4(Q4),
    Int8(Int8),
}

/// Type of stored values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    Bf16,
    F16,
    F32,
}

/// From which side a matrix is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `x Wᵀ`: one result for each row of `W`.
    Rows,
    /// `x W`: one result for each column.
    Columns,
}

impl Side {
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Rows => Self::Columns,
            Self::Columns => Self::Rows,
        }
    }
}

/// The work, compiled for each way of storing values.
macro_rules! decoded {
    ($stored:expr, |$data:ident| $work:expr) => {
        match $stored {
            Data::Bf16(bytes) => {
                let $data = &Bf16(bytes);
                $work
            }
            Data::F16(bytes) => {
                let $data = &F16(bytes);
                $work
            }
            Data::F32(bytes) => {
                let $data = &F32(bytes);
                $work
            }
            Data::Nf4($data) => $work,
            Data::Q4($data) => $work,
            Data::Int8($data) => $work,
        }
    };
}

impl Matrix {
    /// A matrix over stored bytes, which are not copied.
    ///
    /// # Panics
    /// When there are not `rows * columns` values.
    pub fn stored(bytes: Bytes, stored: Stored, rows: usize, columns: usize) -> Self {
        let (data, size) = match stored {
            Stored::Bf16 => (Data::Bf16(bytes.clone()), 2),
            Stored::F16 => (Data::F16(bytes.clone()), 2),
            Stored::F32 => (Data::F32(bytes.clone()), 4),
        };
        assert_eq!(bytes.len(), rows * columns * size, "a whole matrix. This is a bug.");
        Self { rows, columns, data }
    }

    /// A copy of float32 values.
    pub fn floats(values: &[f32], rows: usize, columns: usize) -> Self {
        let mut bytes = vec![0; 4 * values.len()];
        bytes.chunks_exact_mut(4).zip(values).for_each(|(out, v)| out.copy_from_slice(&v.to_le_bytes()));
        Self::stored(bytes.into(), Stored::F32, rows, columns)
    }

    /// The values that four bits leave of it (NF4), or of what it is `turned`.
    #[must_use]
    pub fn nf4(&self, turned: bool) -> Self {
        let pack = |count| Nf4::pack(count, |first, out| self.values(first, turned, out));
        self.packed(turned, |count| Data::Nf4(pack(count)))
    }

    /// The same as GGML's `Q4_0` has it.
    #[must_use]
    pub fn q4(&self, turned: bool) -> Self {
        let pack = |count| Q4::pack(count, |first, out| self.values(first, turned, out));
        self.packed(turned, |count| Data::Q4(pack(count)))
    }

    /// The values that eight bits leave of it, or of what it is `turned`.
    #[must_use]
    pub fn int8(&self, turned: bool) -> Self {
        let pack = |count| Int8::pack(count, |first, out| self.values(first, turned, out));
        self.packed(turned, |count| Data::Int8(pack(count)))
    }

    fn packed(&self, turned: bool, pack: impl Fn(usize) -> Data) -> Self {
        let (rows, columns) = if turned { (self.columns, self.rows) } else { (self.rows, self.columns) };
        Self { rows, columns, data: pack(rows * columns) }
    }

    /// Its values from place `first` on, counted row by row through it or what it is turned.
    fn values(&self, first: usize, turned: bool, out: &mut [f32]) {
        decoded!(&self.data, |data| {
            for (at, out) in (first..).zip(out) {
                let at = if turned { at % self.rows * self.columns + at / self.rows } else { at };
                *out = data.value(at);
            }
        });
    }

    /// What a quantised matrix mostly is: the codes of its values.
    pub fn codes(&self) -> Option<&Bytes> {
        match &self.data {
            Data::Nf4(nf4) => Some(&nf4.codes),
            Data::Q4(q4) => Some(&q4.codes),
            Data::Int8(int8) => Some(&int8.codes),
            Data::Bf16(_) | Data::F16(_) | Data::F32(_) => None,
        }
    }

    /// The same matrix with its codes kept elsewhere.
    #[must_use]
    pub fn with_codes(&self, codes: Bytes) -> Self {
        let data = match &self.data {
            Data::Nf4(nf4) => Data::Nf4(Nf4 { codes, ..nf4.clone() }),
            Data::Q4(q4) => Data::Q4(Q4 { codes, ..q4.clone() }),
            Data::Int8(int8) => Data::Int8(Int8 { codes, ..int8.clone() }),
            data @ (Data::Bf16(_) | Data::F16(_) | Data::F32(_)) => data.clone(),
        };
        Self { data, ..*self }
    }

    /// Its rows `range` alone, of a matrix that is stored by rows.
    ///
    /// # Panics
    /// When they are outside, or the matrix is quantised.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Self {
        let part = |bytes: &Bytes, size: usize| {
            bytes.slice(range.start * self.columns * size..range.end * self.columns * size)
        };
        let data = match &self.data {
            Data::Bf16(bytes) => Data::Bf16(part(bytes, 2)),
            Data::F16(bytes) => Data::F16(part(bytes, 2)),
            Data::F32(bytes) => Data::F32(part(bytes, 4)),
            Data::Nf4(_) | Data::Q4(_) | Data::Int8(_) => {
                unreachable!("a part of a quantised matrix. This is a bug.")
            }
        };
        Self { rows: range.len(), columns: self.columns, data }
    }

    /// Results of a product from this side.
    pub fn results(&self, side: Side) -> usize {
        match side {
            Side::Rows => self.rows,
            Side::Columns => self.columns,
        }
    }

    /// Values that each result is summed over.
    pub fn depth(&self, side: Side) -> usize {
        self.results(side.other())
    }

    /// All values of a row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        self.values(row * self.columns, false, out);
    }

    /// Writes strips of sixteen results from `first` on, a line for each step of the depth from `start` on; zero
    /// outside.
    pub(super) fn strips(&self, side: Side, first: usize, start: usize, grid: Grid, out: &mut [Line]) {
        let place = Place { rows: self.rows, columns: self.columns, first, start };
        decoded!(&self.data, |data| unpack::strips(data, side, place, grid, out));
    }

    /// The same rounded to bfloat16, a line for each two steps, the first one in the low half.
    pub(super) fn pairs(&self, side: Side, first: usize, start: usize, grid: Grid, out: &mut [Line]) {
        let place = Place { rows: self.rows, columns: self.columns, first, start };
        decoded!(&self.data, |data| unpack::pairs(data, side, place, grid, out));
    }

    /// Writes the products of `few` rows with its rows `results` (see [`few::dots`]).
    pub(super) fn dots(&self, results: Range<usize>, few: Few, start: Start, out: &Out) {
        decoded!(&self.data, |data| few::dots(data, results, few, start, out));
    }
}
