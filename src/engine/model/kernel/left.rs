//! The left side of a product: rows, in the form in which the processor multiplies them.

use rayon::prelude::*;

use super::buffer::{Buffer, words, words_mut};
use super::product::FEW;
use super::tile::TILE;
use super::{Path, Rounding, path, round, widen};

/// `[rows, depth]`.
#[derive(Clone)]
pub struct Left {
    pub rows: usize,
    pub depth: usize,
    pub(super) form: Form,
}

#[derive(Clone)]
pub(super) enum Form {
    /// As they are, row by row.
    Floats(Buffer),
    /// bfloat16 in pairs of neighbours, row by row; then what rounding took away, if that is wanted.
    Pairs(Vec<Buffer>),
    /// The same as tiles of 16 rows and 16 pairs, two below each other, then the next ones to the right.
    Tiles(Vec<Buffer>),
}

impl Left {
    /// Packs `x [rows, depth]`. `rounding` says how, where the processor multiplies bfloat16.
    pub fn new(x: &[f32], depth: usize, rounding: Option<Rounding>) -> Self {
        Self::from_rows(x.len() / depth.max(1), depth, rounding, |i, out| {
            out.copy_from_slice(&x[i * depth..(i + 1) * depth]);
        })
    }

    /// Packs the rows that `row(i, out)` writes.
    pub fn from_rows(
        rows: usize,
        depth: usize,
        rounding: Option<Rounding>,
        row: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let rounding = rounding.filter(|_| path() >= Path::Bf16);
        let form = match (rounding, path()) {
            (Some(rounding), Path::Amx) if rows > FEW => {
                Form::Tiles(packed(rows, depth, rounding, depth.div_ceil(32) * 16, &row, |row, r, out| {
                    tiles(row, r, out);
                }))
            }
            // Few rows have to give the numbers that many would, where they are rounded once.
            (Some(rounding), _) if rows > FEW || rounding == Rounding::Once => {
                let width = depth.div_ceil(2);
                Form::Pairs(packed(rows, depth, rounding, width, &row, |row, r, out| {
                    pairs(row, &mut out[r * width..][..width]);
                }))
            }
            _ => {
                let mut floats = Buffer::new(rows * depth);
                floats.par_chunks_mut(depth.max(1) * TILE).enumerate().for_each(|(tile, out)| {
                    out.chunks_mut(depth.max(1)).enumerate().for_each(|(i, out)| row(tile * TILE + i, out));
                });
                Form::Floats(floats)
            }
        };
        Self { rows, depth, form }
    }
}

/// Lets `pack` write rows `r` of a tile of `TILE × width` words; once more what rounding left, if asked.
fn packed(
    rows: usize,
    depth: usize,
    rounding: Rounding,
    width: usize,
    row: &(impl Fn(usize, &mut [f32]) + Sync),
    pack: impl Fn(&[f32], usize, &mut [u32]) + Sync,
) -> Vec<Buffer> {
    let size = rows.div_ceil(TILE) * TILE * width;
    let mut first = Buffer::new(size);
    let mut second = Buffer::new(if rounding == Rounding::Twice { size } else { 0 });
    let each = TILE * width;
    let tile = |(tile, (out, rest)): (usize, (&mut [f32], &mut [f32]))| {
        let mut values = Buffer::new(depth);
        for r in 0..TILE {
            match tile * TILE + r {
                i if i < rows => row(i, &mut values),
                _ => values.fill(0.0),
            }
            pack(&values, r, words_mut(out));
            if !rest.is_empty() {
                values.iter_mut().for_each(|v| *v -= widen(round(*v)));
                pack(&values, r, words_mut(rest));
            }
        }
    };
    if second.is_empty() {
        let tiles = first.par_chunks_mut(each).enumerate();
        tiles.for_each(|(i, out)| tile((i, (out, &mut []))));
        return vec![first];
    }
    first.par_chunks_mut(each).zip(second.par_chunks_mut(each)).enumerate().for_each(tile);
    vec![first, second]
}

/// Writes row `r` of a tile.
fn tiles(row: &[f32], r: usize, out: &mut [u32]) {
    let at = (r / 16) * 256 + (r % 16) * 16;
    for (values, out) in row.chunks(32).zip(out.chunks_mut(512)) {
        let out = &mut out[at..at + 16];
        if values.len() < 32 {
            out.fill(0);
        }
        pairs(values, &mut out[..values.len().div_ceil(2)]);
    }
}

/// Rounds a row of floats to bfloat16 pairs, the last one filled with zero.
fn pairs(row: &[f32], out: &mut [u32]) {
    let (many, rest) = row.as_chunks::<32>();
    let (out, out_rest) = out.split_at_mut(many.len() * 16);
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: who packs pairs is on a path with AVX512-BF16 (`Left::from_rows`).
        #[allow(unsafe_code)]
        unsafe {
            pack_many(many, out);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no bfloat16 here. This is a bug.");
    for (out, pair) in out_rest.iter_mut().zip(rest.chunks(2)) {
        *out = round(pair[0]) | pair.get(1).map_or(0, |v| round(*v)) << 16;
    }
}

/// # Safety
/// The processor must have AVX-512 and AVX512-BF16.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_many(many: &[[f32; 32]], out: &mut [u32]) {
    use std::arch::x86_64::{__m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_storeu_si512};
    for (values, out) in many.iter().zip(out.as_chunks_mut::<16>().0) {
        // SAFETY: 32 floats in, 16 pairs out.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(16)));
            let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), halves);
        }
    }
}

impl Left {
    /// Memory it takes.
    pub fn bytes(&self) -> usize {
        match &self.form {
            Form::Floats(floats) => 4 * floats.len(),
            Form::Pairs(parts) | Form::Tiles(parts) => parts.iter().map(|part| 4 * part.len()).sum(),
        }
    }

    /// Values `first..` of row `i`, as they were rounded.
    ///
    /// # Panics
    /// When `first` is odd.
    pub fn read(&self, i: usize, first: usize, out: &mut [f32]) {
        assert!(first.is_multiple_of(2), "pairs are read whole. This is a bug.");
        match &self.form {
            Form::Floats(floats) => out.copy_from_slice(&floats[i * self.depth + first..][..out.len()]),
            Form::Pairs(parts) => {
                let at = i * self.depth.div_ceil(2) + first / 2;
                for (number, part) in parts.iter().enumerate() {
                    unpack(&words(part)[at..], out, number > 0);
                }
            }
            Form::Tiles(parts) => {
                let each = self.depth.div_ceil(32) * 512;
                let row = (i / TILE) * each + (i % TILE / 16) * 256 + (i % 16) * 16;
                for (number, part) in parts.iter().enumerate() {
                    let (mut out, mut pair) = (&mut *out, first / 2);
                    while !out.is_empty() {
                        // To the end of this tile.
                        let (now, later) = out.split_at_mut(out.len().min(32 - pair % 16 * 2));
                        unpack(&words(part)[row + pair / 16 * 512 + pair % 16..], now, number > 0);
                        (out, pair) = (later, pair + now.len().div_ceil(2));
                    }
                }
            }
        }
    }
}

/// Pairs as floats, written or added.
fn unpack(pairs: &[u32], out: &mut [f32], add: bool) {
    let whole = out.len() / 16 * 16;
    let (many, rest) = out.split_at_mut(whole);
    let (pairs, pairs_rest) = pairs.split_at(whole / 2);
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: who packed pairs is on a path with AVX512-BF16 (`Left::from_rows`).
        #[allow(unsafe_code)]
        unsafe {
            unpack_many(pairs.as_chunks().0, many.as_chunks_mut().0, add);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no bfloat16 here. This is a bug.");
    for (out, pair) in rest.chunks_mut(2).zip(pairs_rest) {
        for (half, out) in out.iter_mut().enumerate() {
            let value = widen(pair >> (16 * half) & 0xffff);
            *out = if add { *out + value } else { value };
        }
    }
}

/// # Safety
/// The processor must have AVX-512.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
unsafe fn unpack_many(pairs: &[[u32; 8]], out: &mut [[f32; 16]], add: bool) {
    use std::arch::x86_64::{
        _mm256_loadu_si256, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_loadu_ps,
        _mm512_slli_epi32, _mm512_storeu_ps,
    };
    for (pairs, out) in pairs.iter().zip(out) {
        // SAFETY: eight pairs in, sixteen floats out.
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(pairs.as_ptr().cast()));
            let mut values = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves));
            if add {
                values = _mm512_add_ps(values, _mm512_loadu_ps(out.as_ptr()));
            }
            _mm512_storeu_ps(out.as_mut_ptr(), values);
        }
    }
}
