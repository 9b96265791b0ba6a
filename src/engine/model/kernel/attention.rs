//! Attention without its matrix of shares: a tile of 32 queries sees all its keys at once, so what is held is
//! one tile's scores, and the backward pass computes them again (Dao et al., arXiv 2205.14135).

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::{Buffer, Line, Shared, words};
use super::rows::{self, Scoring};
use super::tile::{self, Kind, Rows, STRIPS, Strips, Sums, TILE};
use super::unpack::{strips_of, turned_strips_of};

/// Queries of one task: the keys are laid out anew for each.
const QUERIES: usize = 128;

/// Where heads lie: that of head `j` at row `i` starts at `start + i * row + j * head`.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    pub values: &'a [f32],
    pub start: usize,
    pub row: usize,
    pub head: usize,
}

impl<'a> Heads<'a> {
    fn at(&self, row: usize, head: usize, dim: usize) -> &'a [f32] {
        &self.values[self.start + row * self.row + head * self.head..][..dim]
    }
}

/// Rows that follow one another in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Rows of its queries.
    pub queries: Range<usize>,
    /// Rows of the keys of its text up to the last query, in the order of the text: first those before the
    /// queries, which other sequences may share, then its own.
    pub keys: Vec<Range<usize>>,
}

impl Sequence {
    /// A text that begins and ends with these rows.
    pub fn alone(rows: Range<usize>) -> Self {
        Self { keys: vec![rows.clone()], queries: rows }
    }

    /// Keys before the first query.
    pub fn past(&self) -> usize {
        self.keys.iter().map(ExactSizeIterator::len).sum::<usize>() - self.queries.len()
    }

    /// Rows of keys `seen`, counted from the beginning of the text.
    fn key_rows(&self, seen: Range<usize>) -> impl Iterator<Item = usize> {
        let mut first = 0;
        self.keys.iter().flat_map(move |rows| {
            let within = |key: usize| rows.start + key.clamp(first, first + rows.len()) - first;
            let part = within(seen.start)..within(seen.end);
            first += rows.len();
            part
        })
    }
}

/// Causal attention of grouped heads.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    pub q: Heads<'a>,
    pub k: Heads<'a>,
    pub v: Heads<'a>,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub scoring: Scoring,
    /// How many tokens back a query sees, itself included.
    pub window: Option<usize>,
    pub sequences: &'a [Sequence],
}

impl Attention<'_> {
    /// Writes what the heads gather to `out`, rows of `heads × dim`, and the logarithm of each sum of
    /// exponentials to `log_sums`, rows of `heads`.
    pub fn forward(&self, out: &mut [f32], log_sums: &mut [f32]) {
        let out = Shared::new(out);
        let log_sums = Shared::new(log_sums);
        let mut tasks = Vec::new();
        for (i, sequence) in self.sequences.iter().enumerate() {
            for head in 0..self.kv_heads {
                let starts = (0..sequence.queries.len()).step_by(QUERIES);
                tasks.extend(starts.map(|q| (i, head, q..(q + QUERIES).min(sequence.queries.len()))));
            }
        }
        tasks.into_par_iter().for_each(|(i, kv_head, queries)| {
            let sequence = &self.sequences[i];
            if queries.len() <= 2 {
                self.gather_few(sequence, kv_head, queries, &out, &log_sums);
            } else {
                self.gather(sequence, kv_head, queries, &out, &log_sums);
            }
        });
    }

    /// Keys that a query sees, counted from the first key of the sequence.
    fn seen(&self, sequence: &Sequence, query: usize) -> Range<usize> {
        let end = sequence.past() + query + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    fn gather(
        &self,
        sequence: &Sequence,
        kv_head: usize,
        queries: Range<usize>,
        out: &Shared,
        log_sums: &Shared,
    ) {
        let d = self.dim;
        let first = self.seen(sequence, queries.start).start;
        let rows: Vec<usize> = sequence.key_rows(first..sequence.past() + queries.end).collect();
        let keys = rows.len();
        let key = |i: usize| self.k.at(rows[i], kv_head, d);
        let value = |i: usize| self.v.at(rows[i], kv_head, d);
        let mut turned_keys = Buffer::of_lines(keys.div_ceil(16) * d);
        turned_strips_of(key, keys, d, turned_keys.lines_mut());
        let mut values = Buffer::of_lines(d.div_ceil(16) * keys);
        strips_of(value, keys, d, values.lines_mut());
        let width = keys.div_ceil(16) * 16;
        let mut scores = Buffer::new(TILE * width);
        let group = self.heads / self.kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            for start in queries.clone().step_by(TILE) {
                let count = TILE.min(queries.end - start);
                let seen = |i: usize| {
                    let seen = self.seen(sequence, start + i);
                    seen.start - first..seen.end - first
                };
                let end = seen(count - 1).end;
                let strips = end.div_ceil(16);
                self.scores(
                    self.q,
                    sequence.queries.start + start,
                    head,
                    count,
                    strips,
                    turned_keys.lines(),
                    &mut scores,
                    width,
                );
                let mut share = [0f32; TILE];
                for (i, share) in share.iter_mut().enumerate().take(count) {
                    let row = &mut scores[i * width..i * width + strips * 16];
                    let (sum, most) = rows::shares(row, seen(i), self.scoring);
                    *share = 1.0 / sum;
                    let at = (sequence.queries.start + start + i) * self.heads + head;
                    log_sums.slice(at, 1)[0] = most + sum.ln();
                }
                let left = Rows { words: words(&scores), row: width, step: 1 };
                each_panel(left, values.lines(), keys, end, count, d, |i, columns, sums| {
                    let row = (sequence.queries.start + start + i) * self.heads + head;
                    for (out, sum) in out.slice(row * d + columns.start, columns.len()).iter_mut().zip(sums) {
                        *out = sum * share[i];
                    }
                });
            }
        }
    }

    /// For one or two queries the keys and values are read as they lie.
    fn gather_few(
        &self,
        sequence: &Sequence,
        kv_head: usize,
        queries: Range<usize>,
        out: &Shared,
        log_sums: &Shared,
    ) {
        let d = self.dim;
        let group = self.heads / self.kv_heads;
        for query in queries {
            let seen = self.seen(sequence, query);
            let mut scores = Buffer::new(seen.len());
            for head in kv_head * group..(kv_head + 1) * group {
                let q = self.q.at(sequence.queries.start + query, head, d);
                for (score, row) in scores.iter_mut().zip(sequence.key_rows(seen.clone())) {
                    *score = rows::product(q, self.k.at(row, kv_head, d));
                }
                let (sum, most) = rows::shares(&mut scores, 0..seen.len(), self.scoring);
                let row = (sequence.queries.start + query) * self.heads + head;
                log_sums.slice(row, 1)[0] = most + sum.ln();
                let out = out.slice(row * d, d);
                out.fill(0.0);
                for (share, row) in scores.iter().zip(sequence.key_rows(seen.clone())) {
                    rows::add_scaled(out, share / sum, self.v.at(row, kv_head, d));
                }
            }
        }
    }

    /// `left · strips` for a tile of rows of `heads`, to rows of `width`.
    #[allow(clippy::too_many_arguments)]
    fn scores(
        &self,
        left: Heads,
        row: usize,
        head: usize,
        count: usize,
        strips: usize,
        right: &[Line],
        out: &mut [f32],
        width: usize,
    ) {
        let words = &words(left.values)[left.start + row * left.row + head * left.head..];
        let left = Rows { words, row: left.row, step: 1 };
        each_panel(left, right, self.dim, self.dim, count, strips * 16, |i, columns, sums| {
            out[i * width + columns.start..i * width + columns.end].copy_from_slice(sums);
        });
    }

    /// The gradients for queries, keys and values, in the places of theirs in `gradients`, of the gradient
    /// `d_out` for what [`Self::forward`] gave. No sequence may have a past.
    pub fn backward(&self, out: &[f32], log_sums: &[f32], d_out: &[f32], gradients: &mut [f32]) {
        let gradients = Shared::new(gradients);
        let heads = self.kv_heads;
        (0..self.sequences.len() * heads).into_par_iter().for_each(|task| {
            self.scatter(&self.sequences[task / heads], task % heads, (out, log_sums, d_out), &gradients);
        });
    }

    #[allow(clippy::too_many_lines)]
    fn scatter(
        &self,
        sequence: &Sequence,
        kv_head: usize,
        (out, log_sums, d_out): (&[f32], &[f32], &[f32]),
        gradients: &Shared,
    ) {
        assert_eq!(sequence.past(), 0, "a backward pass over a shared past. This is a bug.");
        let (d, keys, base) = (self.dim, sequence.queries.len(), sequence.queries.start);
        let d_out = Heads { values: d_out, start: 0, row: self.heads * d, head: d };
        let out = Heads { values: out, ..d_out };
        let across = d.div_ceil(16);
        let key = |i: usize| self.k.at(base + i, kv_head, d);
        let mut turned_keys = Buffer::of_lines(keys.div_ceil(16) * d);
        turned_strips_of(key, keys, d, turned_keys.lines_mut());
        let mut turned_values = Buffer::of_lines(keys.div_ceil(16) * d);
        let value = |i: usize| self.v.at(base + i, kv_head, d);
        turned_strips_of(value, keys, d, turned_values.lines_mut());
        let mut straight_keys = Buffer::of_lines(across * keys);
        strips_of(key, keys, d, straight_keys.lines_mut());
        let width = keys.div_ceil(16) * 16;
        let (mut shares, mut d_shares) = (Buffer::new(TILE * width), Buffer::new(TILE * width));
        let (mut of_queries, mut of_out) = (Buffer::of_lines(across * TILE), Buffer::of_lines(across * TILE));
        let padded = across * 16;
        let (mut d_keys, mut d_values) = (Buffer::zeros(keys * padded), Buffer::zeros(keys * padded));
        let group = self.heads / self.kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            for start in (0..keys).step_by(TILE) {
                let count = TILE.min(keys - start);
                let end = start + count;
                // Whole tiles of keys that no query of this tile sees are left out.
                let begin = self.seen(sequence, start).start / 16 * 16;
                let strips = end.div_ceil(16) - begin / 16;
                let (k, v) =
                    (&turned_keys.lines()[begin / 16 * d..], &turned_values.lines()[begin / 16 * d..]);
                self.scores(self.q, base + start, head, count, strips, k, &mut shares, width);
                self.scores(d_out, base + start, head, count, strips, v, &mut d_shares, width);
                for i in 0..count {
                    let row = base + start + i;
                    let along = rows::product(out.at(row, head, d), d_out.at(row, head, d));
                    let seen = self.seen(sequence, start + i);
                    let seen = seen.start - begin..seen.end - begin;
                    let part = i * width..i * width + strips * 16;
                    let log_sum = log_sums[row * self.heads + head];
                    let (scores, gradients) = (&mut shares[part.clone()], &mut d_shares[part]);
                    rows::shares_back(scores, gradients, seen, self.scoring, log_sum, along);
                }
                let left = Rows { words: words(&d_shares), row: width, step: 1 };
                each_panel(
                    left,
                    &straight_keys.lines()[begin..],
                    keys,
                    end - begin,
                    count,
                    d,
                    |i, columns, sums| {
                        let at = self.q.start + (base + start + i) * self.q.row + head * self.q.head;
                        gradients.slice(at + columns.start, columns.len()).copy_from_slice(sums);
                    },
                );
                let query = |i: usize| self.q.at(base + start + i, head, d);
                strips_of(query, count, d, of_queries.lines_mut());
                strips_of(|i| d_out.at(base + start + i, head, d), count, d, of_out.lines_mut());
                for first in (begin..end).step_by(TILE) {
                    let many = TILE.min(end - first);
                    let add = |shares: &Buffer, right: &Buffer, sums: &mut Buffer| {
                        let words = &words(shares)[first - begin..];
                        let left = Rows { words, row: 1, step: width };
                        add_panels(left, right.lines(), count, many, across, &mut sums[first * padded..]);
                    };
                    add(&shares, &of_out, &mut d_values);
                    add(&d_shares, &of_queries, &mut d_keys);
                }
            }
        }
        for (from, to) in [(&d_keys, self.k), (&d_values, self.v)] {
            for i in 0..keys {
                let at = to.start + (base + i) * to.row + kv_head * to.head;
                gradients.slice(at, d).copy_from_slice(&from[i * padded..i * padded + d]);
            }
        }
    }
}

/// Hands out `left · right` row by row, in panels of columns; strips of `right` lie `strip` lines apart.
fn each_panel(
    left: Rows,
    right: &[Line],
    strip: usize,
    depth: usize,
    count: usize,
    width: usize,
    mut each: impl FnMut(usize, Range<usize>, &[f32]),
) {
    let mut sums: Sums = [[0.0; 16 * STRIPS]; TILE];
    for first in (0..width.div_ceil(16)).step_by(STRIPS) {
        let many = STRIPS.min(width.div_ceil(16) - first);
        sums[..count].fill([0.0; 16 * STRIPS]);
        let lines = Strips { lines: &right[first * strip..], strip, line: 1, depth };
        tile::add(Kind::Float, left, lines, count, many, &mut sums);
        let columns = first * 16..((first + many) * 16).min(width);
        for (i, sums) in sums.iter().enumerate().take(count) {
            each(i, columns.clone(), &sums[..columns.len()]);
        }
    }
}

/// `out += left · right` for rows of `16 × across` values.
fn add_panels(left: Rows, right: &[Line], depth: usize, count: usize, across: usize, out: &mut [f32]) {
    let width = 16 * across;
    let mut sums: Sums = [[0.0; 16 * STRIPS]; TILE];
    for first in (0..across).step_by(STRIPS) {
        let many = STRIPS.min(across - first);
        let part = |i: usize| i * width + 16 * first..i * width + 16 * (first + many);
        for (i, sums) in sums.iter_mut().enumerate().take(count) {
            sums[..16 * many].copy_from_slice(&out[part(i)]);
        }
        let lines = Strips { lines: &right[first * depth..], strip: depth, line: 1, depth };
        tile::add(Kind::Float, left, lines, count, many, &mut sums);
        for (i, sums) in sums.iter().enumerate().take(count) {
            out[part(i)].copy_from_slice(&sums[..16 * many]);
        }
    }
}
