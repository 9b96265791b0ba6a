//! Frozen matrices as they are stored, and how they are unpacked for products.

use bytes::Bytes;

use super::buffer::{Line, words_mut};
use super::product::FEW;
use super::quant::{Int8, Nf4};
use super::{round, wide};

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

    /// The values four bits leave of these (NF4).
    ///
    /// # Panics
    /// When there are not `rows * columns` values.
    pub fn nf4(values: &[f32], rows: usize, columns: usize) -> Self {
        assert_eq!(values.len(), rows * columns, "a whole matrix. This is a bug.");
        Self { rows, columns, data: Data::Nf4(Nf4::pack(values)) }
    }

    /// The values eight bits leave of these.
    ///
    /// # Panics
    /// When there are not `rows * columns` values.
    pub fn int8(values: &[f32], rows: usize, columns: usize) -> Self {
        assert_eq!(values.len(), rows * columns, "a whole matrix. This is a bug.");
        Self { rows, columns, data: Data::Int8(Int8::pack(values)) }
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
        let from = row * self.columns;
        decoded!(&self.data, |data| copy(data, from, out));
    }

    /// Writes a strip: the sixteen results from `first` on, a line for each step of the depth from `start` on;
    /// zero outside.
    pub(super) fn strip(&self, side: Side, first: usize, start: usize, out: &mut [Line]) {
        let place = Place { rows: self.rows, columns: self.columns, first, start };
        decoded!(&self.data, |data| strip(data, side, place, out));
    }

    /// The same rounded to bfloat16, a line for each two steps, the first one in the low half.
    pub(super) fn pairs(&self, side: Side, first: usize, start: usize, out: &mut [Line]) {
        let place = Place { rows: self.rows, columns: self.columns, first, start };
        decoded!(&self.data, |data| pairs(data, side, place, out));
    }
}

/// Stored values as numbers, sixteen at a time.
pub(super) trait Decode {
    fn value(&self, at: usize) -> f32;

    /// Values `at..at + 16`, all of them stored. `WIDE`: the processor has AVX-512.
    fn sixteen<const WIDE: bool>(&self, at: usize) -> [f32; 16];

    /// The same as the low halves of words, rounded.
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn halves<const WIDE: bool>(&self, at: usize) -> [u32; 16] {
        self.sixteen::<WIDE>(at).map(round)
    }
}

struct Bf16<'a>(&'a [u8]);
struct F16<'a>(&'a [u8]);
struct F32<'a>(&'a [u8]);

#[allow(clippy::inline_always)]
impl Decode for Bf16<'_> {
    #[inline(always)]
    fn value(&self, at: usize) -> f32 {
        super::widen(u32::from(u16::from_le_bytes([self.0[2 * at], self.0[2 * at + 1]])))
    }

    #[inline(always)]
    fn sixteen<const WIDE: bool>(&self, at: usize) -> [f32; 16] {
        self.halves::<WIDE>(at).map(super::widen)
    }

    #[inline(always)]
    fn halves<const WIDE: bool>(&self, at: usize) -> [u32; 16] {
        let bytes = &self.0[2 * at..2 * at + 32];
        #[cfg(target_arch = "x86_64")]
        if WIDE {
            use std::arch::x86_64::{__m512i, _mm256_loadu_si256, _mm512_cvtepu16_epi32};
            // SAFETY: 32 bytes in, sixteen words out; the processor has AVX-512 where `WIDE` is true.
            #[allow(unsafe_code)]
            return unsafe {
                let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bytes.as_ptr().cast()));
                std::mem::transmute::<__m512i, [u32; 16]>(words)
            };
        }
        std::array::from_fn(|i| u32::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])))
    }
}

#[allow(clippy::inline_always)]
impl Decode for F16<'_> {
    #[inline(always)]
    fn value(&self, at: usize) -> f32 {
        half::f16::from_le_bytes([self.0[2 * at], self.0[2 * at + 1]]).to_f32()
    }

    #[inline(always)]
    fn sixteen<const WIDE: bool>(&self, at: usize) -> [f32; 16] {
        #[cfg(target_arch = "x86_64")]
        if WIDE {
            use std::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps, _mm512_storeu_ps};
            let bytes = &self.0[2 * at..2 * at + 32];
            let mut out = [0f32; 16];
            // SAFETY: 32 bytes in, sixteen floats out; the processor has AVX-512 where `WIDE` is true.
            #[allow(unsafe_code)]
            unsafe {
                _mm512_storeu_ps(
                    out.as_mut_ptr(),
                    _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())),
                );
            }
            return out;
        }
        std::array::from_fn(|i| self.value(at + i))
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
    fn sixteen<const WIDE: bool>(&self, at: usize) -> [f32; 16] {
        let bytes = &self.0[4 * at..4 * at + 64];
        let word = |i: usize| [bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]];
        std::array::from_fn(|i| f32::from_le_bytes(word(i)))
    }
}

fn copy(data: &impl Decode, from: usize, out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = data.value(from + i);
    }
}

/// Which part of a matrix a strip holds.
#[derive(Clone, Copy)]
struct Place {
    rows: usize,
    columns: usize,
    first: usize,
    start: usize,
}

impl Place {
    /// Sixteen values of a row from `column` on; zero outside the matrix.
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn values<const WIDE: bool>(&self, data: &impl Decode, row: usize, column: usize) -> [f32; 16] {
        if row < self.rows && column + 16 <= self.columns {
            return data.sixteen::<WIDE>(row * self.columns + column);
        }
        let value = |i: usize| {
            let inside = row < self.rows && column + i < self.columns;
            if inside { data.value(row * self.columns + column + i) } else { 0.0 }
        };
        std::array::from_fn(value)
    }

    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn halves<const WIDE: bool>(&self, data: &impl Decode, row: usize, column: usize) -> [u32; 16] {
        if row < self.rows && column + 16 <= self.columns {
            return data.halves::<WIDE>(row * self.columns + column);
        }
        self.values::<WIDE>(data, row, column).map(round)
    }
}

/// A function that calls `any` compiled for AVX-512 where that is there, else for any processor.
macro_rules! twice {
    (fn $name:ident($($argument:ident: $kind:ty),*) = $any:ident) => {
        fn $name<D: Decode>(data: &D, $($argument: $kind),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
                fn on_avx512<D: Decode>(data: &D, $($argument: $kind),*) {
                    $any::<D, true>(data, $($argument),*);
                }
                if wide() {
                    // SAFETY: the features are there.
                    #[allow(unsafe_code)]
                    unsafe {
                        on_avx512(data, $($argument),*);
                    }
                    return;
                }
            }
            $any::<D, false>(data, $($argument),*);
        }
    };
}

twice!(fn strip(side: Side, place: Place, out: &mut [Line]) = any_strip);
twice!(fn pairs(side: Side, place: Place, out: &mut [Line]) = any_pairs);
twice!(fn dot(at: usize, x: Dot, sums: &mut [f32; FEW]) = any_dot);

#[inline(always)]
#[allow(clippy::inline_always)]
fn any_strip<D: Decode, const WIDE: bool>(data: &D, side: Side, place: Place, out: &mut [Line]) {
    match side {
        Side::Columns => {
            for (i, line) in out.iter_mut().enumerate() {
                line.0 = place.values::<WIDE>(data, place.start + i, place.first);
            }
        }
        Side::Rows => {
            for (i, lines) in out.chunks_mut(16).enumerate() {
                let column = place.start + 16 * i;
                let row = |i: usize| place.values::<WIDE>(data, place.first + i, column).map(f32::to_bits);
                let block = std::array::from_fn(row);
                write::<WIDE>(block, lines);
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::inline_always)]
fn any_pairs<D: Decode, const WIDE: bool>(data: &D, side: Side, place: Place, out: &mut [Line]) {
    match side {
        Side::Columns => {
            for (i, line) in out.iter_mut().enumerate() {
                let row = place.start + 2 * i;
                let low = place.halves::<WIDE>(data, row, place.first);
                let high = place.halves::<WIDE>(data, row + 1, place.first);
                let line = words_mut(&mut line.0);
                for i in 0..16 {
                    line[i] = low[i] | high[i] << 16;
                }
            }
        }
        Side::Rows => {
            for (i, lines) in out.chunks_mut(16).enumerate() {
                let column = place.start + 32 * i;
                let block = std::array::from_fn(|i| {
                    let row = place.first + i;
                    let [a, b] = [column, column + 16].map(|c| place.halves::<WIDE>(data, row, c));
                    let both = |i: usize| if i < 16 { a[i] } else { b[i - 16] };
                    std::array::from_fn(|i| both(2 * i) | both(2 * i + 1) << 16)
                });
                write::<WIDE>(block, lines);
            }
        }
    }
}

/// Writes a block of sixteen rows as lines of its columns, as many as there are.
#[inline(always)]
#[allow(clippy::inline_always)]
fn write<const WIDE: bool>(block: [[u32; 16]; 16], lines: &mut [Line]) {
    #[cfg(target_arch = "x86_64")]
    if WIDE && let Ok(lines) = <&mut [Line; 16]>::try_from(&mut *lines) {
        // SAFETY: the processor has AVX-512 where `WIDE` is true.
        #[allow(unsafe_code)]
        unsafe {
            turn(&block, lines);
        }
        return;
    }
    for (i, line) in lines.iter_mut().enumerate() {
        words_mut(&mut line.0).copy_from_slice(&block.map(|row| row[i]));
    }
}

/// # Safety
/// The processor must have AVX-512.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn turn(block: &[[u32; 16]; 16], lines: &mut [Line; 16]) {
    use std::arch::x86_64::{
        __m512i, _mm512_loadu_si512, _mm512_shuffle_i32x4, _mm512_store_si512, _mm512_unpackhi_epi32,
        _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };
    // SAFETY: a row is 64 bytes.
    let mut r: [__m512i; 16] =
        std::array::from_fn(|i| unsafe { _mm512_loadu_si512(block[i].as_ptr().cast()) });
    let mut t = r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for i in 0..4 {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for i in 0..4 {
        t[i] = _mm512_shuffle_i32x4::<0x88>(r[i], r[4 + i]);
        t[4 + i] = _mm512_shuffle_i32x4::<0xdd>(r[i], r[4 + i]);
        t[8 + i] = _mm512_shuffle_i32x4::<0x88>(r[8 + i], r[12 + i]);
        t[12 + i] = _mm512_shuffle_i32x4::<0xdd>(r[8 + i], r[12 + i]);
    }
    for i in 0..4 {
        r[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[8 + i]);
        r[8 + i] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[8 + i]);
        r[4 + i] = _mm512_shuffle_i32x4::<0x88>(t[4 + i], t[12 + i]);
        r[12 + i] = _mm512_shuffle_i32x4::<0xdd>(t[4 + i], t[12 + i]);
    }
    for (line, row) in lines.iter_mut().zip(r) {
        // SAFETY: a `Line` is 64 bytes and aligned so.
        unsafe { _mm512_store_si512(std::ptr::from_mut(line).cast(), row) };
    }
}

/// Rows of floats as strips: `[strip][depth]`, for sums over `depth` rows of a table that is written anew each
/// time. `row(i)` gives row `i`.
pub(super) fn strips_of<'a>(row: impl Fn(usize) -> &'a [f32], depth: usize, width: usize, out: &mut [Line]) {
    for i in 0..depth {
        for (strip, values) in row(i)[..width].chunks(16).enumerate() {
            let line = &mut out[strip * depth + i].0;
            line[..values.len()].copy_from_slice(values);
            line[values.len()..].fill(0.0);
        }
    }
}

/// The same turned: a strip for each sixteen rows, a line for each of `width` values.
pub(super) fn turned_strips_of<'a>(
    row: impl Fn(usize) -> &'a [f32],
    rows: usize,
    width: usize,
    out: &mut [Line],
) {
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn any<const WIDE: bool>(rows: &[&[f32]], width: usize, out: &mut [Line]) {
        for (i, lines) in out[..width].chunks_mut(16).enumerate() {
            let value = |row: &&[f32], at: usize| row.get(at).copied().unwrap_or(0.0);
            let block = std::array::from_fn(|lane| match rows.get(lane) {
                Some(row) if row.len() >= 16 * i + 16 => {
                    std::array::from_fn(|at| row[16 * i..16 * i + 16][at].to_bits())
                }
                Some(row) => std::array::from_fn(|at| value(row, 16 * i + at).to_bits()),
                None => [0; 16],
            });
            write::<WIDE>(block, lines);
        }
    }
    for (strip, out) in out.chunks_mut(width).take(rows.div_ceil(16)).enumerate() {
        let sixteen: [&[f32]; 16] = std::array::from_fn(|i| {
            let i = 16 * strip + i;
            if i < rows { &row(i)[..width] } else { &[] }
        });
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn on_avx512(rows: &[&[f32]], width: usize, out: &mut [Line]) {
                any::<true>(rows, width, out);
            }
            if wide() {
                // SAFETY: the features are there.
                #[allow(unsafe_code)]
                unsafe {
                    on_avx512(&sixteen, width, out);
                }
                continue;
            }
        }
        any::<false>(&sixteen, width, out);
    }
}

/// Rows of floats to be multiplied with a row of a matrix.
#[derive(Clone, Copy)]
pub(super) struct Dot<'a> {
    pub values: &'a [f32],
    pub rows: usize,
}

impl Matrix {
    /// `sums[i] += x[i] · row`.
    pub(super) fn dot(&self, row: usize, x: Dot, sums: &mut [f32; FEW]) {
        let at = row * self.columns;
        decoded!(&self.data, |data| dot(data, at, x, sums));
    }
}

#[inline(always)]
#[allow(clippy::inline_always)]
fn any_dot<D: Decode, const WIDE: bool>(data: &D, at: usize, x: Dot, sums: &mut [f32; FEW]) {
    let depth = x.values.len() / x.rows;
    for (four, sums) in sums.chunks_mut(4).enumerate().take(x.rows.div_ceil(4)) {
        // The last row stands in where there are fewer.
        let rows: [&[f32]; 4] = std::array::from_fn(|i| {
            let row = (4 * four + i).min(x.rows - 1);
            &x.values[row * depth..(row + 1) * depth]
        });
        let whole = four_sums::<D, WIDE>(data, at, rows);
        for (i, (sum, whole)) in sums.iter_mut().zip(whole).enumerate() {
            *sum += whole;
            if !depth.is_multiple_of(16) {
                *sum += rest(data, at, rows[i]);
            }
        }
    }
}

/// Four sums of products over whole sixteens.
#[inline(always)]
#[allow(clippy::inline_always)]
fn four_sums<D: Decode, const WIDE: bool>(data: &D, at: usize, rows: [&[f32]; 4]) -> [f32; 4] {
    let whole = rows[0].len() / 16 * 16;
    #[cfg(target_arch = "x86_64")]
    if WIDE {
        use std::arch::x86_64::{
            __m512, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_reduce_add_ps, _mm512_setzero_ps,
        };
        let rows = rows.map(|row| &row[..whole]);
        // SAFETY: all reads are below `whole`; the processor has AVX-512 where `WIDE` is true.
        #[allow(unsafe_code)]
        return unsafe {
            let mut lanes = [_mm512_setzero_ps(); 4];
            for start in (0..whole).step_by(16) {
                let w = std::mem::transmute::<[f32; 16], __m512>(data.sixteen::<WIDE>(at + start));
                for i in 0..4 {
                    lanes[i] = _mm512_fmadd_ps(w, _mm512_loadu_ps(rows[i].as_ptr().add(start)), lanes[i]);
                }
            }
            lanes.map(|lanes| _mm512_reduce_add_ps(lanes))
        };
    }
    let mut lanes = [[0f32; 16]; 4];
    for start in (0..whole).step_by(16) {
        let w = data.sixteen::<WIDE>(at + start);
        for (lanes, row) in lanes.iter_mut().zip(rows) {
            for ((lane, w), x) in lanes.iter_mut().zip(w).zip(&row[start..start + 16]) {
                *lane += w * x;
            }
        }
    }
    lanes.map(|lanes| lanes.iter().sum())
}

/// What is left of a product behind whole sixteens.
#[inline(never)]
fn rest<D: Decode>(data: &D, at: usize, x: &[f32]) -> f32 {
    let first = x.len() / 16 * 16;
    x[first..].iter().enumerate().map(|(i, x)| data.value(at + first + i) * x).sum()
}
