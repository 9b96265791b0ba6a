//! Matrices laid out for products: strips of sixteen results, a line for each step of the depth.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_castps_si512, _mm512_cvtne2ps_pbh, _mm512_loadu_si512, _mm512_or_si512,
    _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_store_si512, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::buffer::{Line, words_mut};
use super::decode::Decode;
#[cfg(target_arch = "x86_64")]
use super::decode::{loaded, round_wide};
use super::matrix::Side;
use super::{Path, path, wide};

/// How strips lie side by side.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub strips: usize,
    /// Lines from strip to strip, of which `lines` are written.
    pub apart: usize,
    pub lines: usize,
}

impl Grid {
    fn of<'a>(&self, strip: usize, out: &'a mut [Line]) -> &'a mut [Line] {
        &mut out[strip * self.apart..][..self.lines]
    }
}

/// Which part of a matrix strips hold.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub rows: usize,
    pub columns: usize,
    /// The first result of the first strip.
    pub first: usize,
    /// The first step of the depth.
    pub start: usize,
}

impl Place {
    /// The place of one strip alone.
    fn of(self, strip: usize) -> Self {
        Self { first: self.first + 16 * strip, ..self }
    }

    /// Where sixteen values of a row from `column` on are stored, when all of them are in the matrix.
    fn whole(&self, row: usize, column: usize) -> Option<usize> {
        (row < self.rows && column + 16 <= self.columns).then_some(row * self.columns + column)
    }

    /// Sixteen values of a row from `column` on; zero outside the matrix.
    fn values(&self, data: &impl Decode, row: usize, column: usize) -> [f32; 16] {
        if let Some(at) = self.whole(row, column) {
            return data.sixteen(at);
        }
        let value = |i: usize| {
            let inside = row < self.rows && column + i < self.columns;
            if inside { data.value(row * self.columns + column + i) } else { 0.0 }
        };
        std::array::from_fn(value)
    }

    /// The same by AVX-512.
    ///
    /// # Safety
    /// The processor must have AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    #[inline]
    unsafe fn wide_values(&self, data: &impl Decode, row: usize, column: usize) -> __m512i {
        _mm512_castps_si512(match self.whole(row, column) {
            // SAFETY: the same as asked for here.
            Some(at) => unsafe { data.wide(at) },
            None => loaded(&self.values(data, row, column)),
        })
    }

    /// # Safety
    /// The processor must have AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    #[inline]
    unsafe fn wide_halves(&self, data: &impl Decode, row: usize, column: usize) -> __m512i {
        match self.whole(row, column) {
            // SAFETY: the same as asked for here.
            Some(at) => unsafe { data.wide_halves(at) },
            None => round_wide(loaded(&self.values(data, row, column))),
        }
    }

    /// 32 values rounded to bfloat16.
    ///
    /// # Safety
    /// The processor must have AVX-512 and AVX512-BF16.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")]
    #[inline]
    unsafe fn wide_pairs(&self, data: &impl Decode, row: usize, column: usize) -> __m512i {
        if row < self.rows && column + 32 <= self.columns {
            // SAFETY: the same as asked for here.
            return unsafe { data.wide_pairs(row * self.columns + column) };
        }
        let [low, high] = [column, column + 16].map(|column| self.values(data, row, column));
        // SAFETY: both types are 512 plain bits.
        unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(loaded(&high), loaded(&low))) }
    }
}

/// Writes strips: sixteen results each, a line for each step of the depth; zero outside.
pub(super) fn strips(data: &impl Decode, side: Side, place: Place, grid: Grid, out: &mut [Line]) {
    #[cfg(target_arch = "x86_64")]
    if wide() {
        // SAFETY: the processor has AVX-512.
        #[allow(unsafe_code)]
        return unsafe { strips_wide(data, side, place, grid, out) };
    }
    for strip in 0..grid.strips {
        let (place, out) = (place.of(strip), grid.of(strip, out));
        match side {
            Side::Columns => {
                for (i, line) in out.iter_mut().enumerate() {
                    line.0 = place.values(data, place.start + i, place.first);
                }
            }
            Side::Rows => {
                for (i, lines) in out.chunks_mut(16).enumerate() {
                    let column = place.start + 16 * i;
                    let row = |i: usize| place.values(data, place.first + i, column).map(f32::to_bits);
                    write(&std::array::from_fn(row), lines);
                }
            }
        }
    }
}

/// Writes strips rounded to bfloat16, a line for each two steps of the depth, the first one in the low half.
///
/// # Panics
/// On a path without AVX512-BF16.
pub(super) fn pairs(data: &impl Decode, side: Side, place: Place, grid: Grid, out: &mut [Line]) {
    assert!(path() >= Path::Bf16, "no bfloat16 here. This is a bug.");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the processor has AVX-512 and AVX512-BF16.
    #[allow(unsafe_code)]
    unsafe {
        pairs_wide(data, side, place, grid, out);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, side, place, grid, out);
}

/// Writes a block of sixteen rows as lines of its columns, as many as there are.
fn write(block: &[[u32; 16]; 16], lines: &mut [Line]) {
    for (i, line) in lines.iter_mut().enumerate() {
        words_mut(&mut line.0).copy_from_slice(&block.map(|row| row[i]));
    }
}

// Loops, not closures, from here on: what is not compiled for AVX-512 is called for every sixteen values.

/// Rows that are read at a time, and asked for in advance.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 32;

/// # Safety
/// The processor must have AVX-512.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
unsafe fn strips_wide(data: &impl Decode, side: Side, place: Place, grid: Grid, out: &mut [Line]) {
    match side {
        Side::Columns => {
            // A few rows of all strips at a time, as they lie.
            for i in (0..grid.lines).step_by(AHEAD) {
                let lines = AHEAD.min(grid.lines - i);
                for strip in 0..grid.strips {
                    let column = place.first + 16 * strip;
                    let out = &mut out[strip * grid.apart + i..][..lines];
                    for (j, line) in out.iter_mut().enumerate() {
                        let row = place.start + i + j;
                        data.prefetch((row + AHEAD) * place.columns + column);
                        // SAFETY: the processor has AVX-512.
                        store(line, unsafe { place.wide_values(data, row, column) });
                    }
                }
            }
        }
        Side::Rows => {
            for strip in 0..grid.strips {
                let place = place.of(strip);
                for (i, lines) in grid.of(strip, out).chunks_mut(16).enumerate() {
                    let mut block = [_mm512_setzero_si512(); 16];
                    for (j, values) in block.iter_mut().enumerate() {
                        let (row, column) = (place.first + j, place.start + 16 * i);
                        data.prefetch((row + 16) * place.columns + column);
                        // SAFETY: the processor has AVX-512.
                        *values = unsafe { place.wide_values(data, row, column) };
                    }
                    turned(block, lines);
                }
            }
        }
    }
}

/// # Safety
/// The processor must have AVX-512 and AVX512-BF16.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")]
unsafe fn pairs_wide(data: &impl Decode, side: Side, place: Place, grid: Grid, out: &mut [Line]) {
    match side {
        Side::Columns => {
            // A few rows of all strips at a time, as they lie.
            for i in (0..grid.lines).step_by(AHEAD / 2) {
                let lines = (AHEAD / 2).min(grid.lines - i);
                for strip in 0..grid.strips {
                    let column = place.first + 16 * strip;
                    let out = &mut out[strip * grid.apart + i..][..lines];
                    for (j, line) in out.iter_mut().enumerate() {
                        let row = place.start + 2 * (i + j);
                        data.prefetch((row + AHEAD) * place.columns + column);
                        data.prefetch((row + AHEAD + 1) * place.columns + column);
                        // SAFETY: the processor has AVX-512.
                        let (low, high) = unsafe {
                            (place.wide_halves(data, row, column), place.wide_halves(data, row + 1, column))
                        };
                        store(line, _mm512_or_si512(low, _mm512_slli_epi32::<16>(high)));
                    }
                }
            }
        }
        Side::Rows => {
            for strip in 0..grid.strips {
                let place = place.of(strip);
                for (i, lines) in grid.of(strip, out).chunks_mut(16).enumerate() {
                    let column = place.start + 32 * i;
                    let mut block = [_mm512_setzero_si512(); 16];
                    for (j, pairs) in block.iter_mut().enumerate() {
                        let row = place.first + j;
                        data.prefetch((row + 16) * place.columns + column);
                        // SAFETY: the processor has AVX-512 and AVX512-BF16.
                        *pairs = unsafe { place.wide_pairs(data, row, column) };
                    }
                    turned(block, lines);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
fn store(line: &mut Line, values: __m512i) {
    // SAFETY: a `Line` is 64 bytes and aligned so.
    #[allow(unsafe_code)]
    unsafe {
        _mm512_store_si512(std::ptr::from_mut(line).cast(), values);
    }
}

/// [`write()`] for a block in registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
fn turned(mut r: [__m512i; 16], lines: &mut [Line]) {
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
        store(line, row);
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
    for (strip, out) in out.chunks_mut(width).take(rows.div_ceil(16)).enumerate() {
        let mut sixteen: [&[f32]; 16] = [&[]; 16];
        for (i, values) in sixteen.iter_mut().enumerate().take(rows - 16 * strip) {
            *values = &row(16 * strip + i)[..width];
        }
        #[cfg(target_arch = "x86_64")]
        if wide() {
            // SAFETY: the processor has AVX-512.
            #[allow(unsafe_code)]
            unsafe {
                turn_wide(&sixteen, out);
            }
            continue;
        }
        for (i, lines) in out.chunks_mut(16).enumerate() {
            write(&std::array::from_fn(|lane| part(sixteen[lane], 16 * i)), lines);
        }
    }
}

/// Sixteen values from `start` on as words, zero behind the end.
fn part(row: &[f32], start: usize) -> [u32; 16] {
    std::array::from_fn(|i| row.get(start + i).copied().unwrap_or(0.0).to_bits())
}

/// # Safety
/// The processor must have AVX-512.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
unsafe fn turn_wide(rows: &[&[f32]; 16], out: &mut [Line]) {
    for (i, lines) in out.chunks_mut(16).enumerate() {
        let mut block = [_mm512_setzero_si512(); 16];
        for (words, row) in block.iter_mut().zip(rows) {
            *words = match row.get(16 * i..16 * i + 16) {
                // SAFETY: sixteen words are read.
                Some(whole) => unsafe { _mm512_loadu_si512(whole.as_ptr().cast()) },
                // SAFETY: the same.
                None => unsafe { _mm512_loadu_si512(part(row, 16 * i).as_ptr().cast()) },
            };
        }
        turned(block, lines);
    }
}
