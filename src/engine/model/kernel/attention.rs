//! Attention without its matrix of shares: a tile of 32 queries sees all its keys at once, so what is held is
//! one tile's scores, and the backward pass computes them again (Dao et al., arXiv 2205.14135).

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::{Block, Buffer, Line, Shared, words};
use super::product::Start;
use super::rows;
use super::scores::{self, Scoring};
use super::tile::{self, Kind, Rows, STRIPS, Strips, TILE};
use super::unpack::{strips_of, turned_strips_of};

/// Queries of one task: the keys are laid out anew for each.
const QUERIES: usize = 128;

/// Products of queries with keys that take longer than it takes to wake another thread.
const WORTH_HANDING_OUT: usize = 1 << 17;

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
        &self.from(row, head)[..dim]
    }

    /// All from that of a head on.
    fn from(&self, row: usize, head: usize) -> &'a [f32] {
        &self.values[self.start + row * self.row + head * self.head..]
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

    /// Rows of keys `seen`, counted from the beginning of the text, as far as they lie together.
    fn key_ranges(&self, seen: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut first = 0;
        self.keys.iter().map(move |rows| {
            let within = |key: usize| rows.start + key.clamp(first, first + rows.len()) - first;
            let part = within(seen.start)..within(seen.end);
            first += rows.len();
            part
        })
    }

    /// The same one by one.
    fn key_rows(&self, seen: Range<usize>) -> impl Iterator<Item = usize> {
        self.key_ranges(seen).flatten()
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
        let run = |(i, kv_head, queries): (usize, usize, Range<usize>)| {
            let sequence: &Sequence = &self.sequences[i];
            if queries.len() <= 2 {
                self.gather_few(sequence, kv_head, queries, &out, &log_sums);
            } else {
                self.gather(sequence, kv_head, queries, &out, &log_sums);
            }
        };
        let seen = |sequence: &Sequence| sequence.queries.len() * (sequence.past() + sequence.queries.len());
        let work = self.sequences.iter().map(seen).sum::<usize>() * self.heads * self.dim;
        if work < WORTH_HANDING_OUT {
            tasks.into_iter().for_each(run);
        } else {
            tasks.into_par_iter().for_each(run);
        }
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
                    let (sum, most) = scores::shares(row, seen(i), self.scoring);
                    *share = 1.0 / sum;
                    let at = (sequence.queries.start + start + i) * self.heads + head;
                    log_sums.slice(at, 1)[0] = most + sum.ln();
                }
                let left = Rows { words: words(&scores), row: width, step: 1 };
                let row = |i: usize| ((sequence.queries.start + start + i) * self.heads + head) * d;
                let mut out = out.block(row(0), self.heads * d, count, d);
                panels(left, values.lines(), keys, end, Start::Zero, &mut out);
                for (i, share) in share.iter().enumerate().take(count) {
                    out.row(i).iter_mut().for_each(|v| *v *= share);
                }
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
                let mut rest = &mut scores[..];
                for rows in sequence.key_ranges(seen.clone()).filter(|rows| !rows.is_empty()) {
                    let (part, more) = rest.split_at_mut(rows.len());
                    scores::few_scores(q, self.k.from(rows.start, kv_head), self.k.row, part);
                    rest = more;
                }
                let (sum, most) = scores::shares(&mut scores, 0..seen.len(), self.scoring);
                let row = (sequence.queries.start + query) * self.heads + head;
                log_sums.slice(row, 1)[0] = most + sum.ln();
                let out = out.slice(row * d, d);
                out.fill(0.0);
                let mut rest = &scores[..];
                for rows in sequence.key_ranges(seen.clone()).filter(|rows| !rows.is_empty()) {
                    let (part, more) = rest.split_at(rows.len());
                    scores::gather_few(part, 1.0 / sum, self.v.from(rows.start, kv_head), self.v.row, out);
                    rest = more;
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
        let mut out = Block::new(out, width, count, strips * 16);
        panels(left, right, self.dim, self.dim, Start::Zero, &mut out);
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
                    scores::shares_back(scores, gradients, seen, self.scoring, log_sum, along);
                }
                let left = Rows { words: words(&d_shares), row: width, step: 1 };
                let at = self.q.start + (base + start) * self.q.row + head * self.q.head;
                let mut d_queries = gradients.block(at, self.q.row, count, d);
                panels(left, &straight_keys.lines()[begin..], keys, end - begin, Start::Zero, &mut d_queries);
                let query = |i: usize| self.q.at(base + start + i, head, d);
                strips_of(query, count, d, of_queries.lines_mut());
                strips_of(|i| d_out.at(base + start + i, head, d), count, d, of_out.lines_mut());
                for first in (begin..end).step_by(TILE) {
                    let many = TILE.min(end - first);
                    let add = |shares: &Buffer, right: &Buffer, sums: &mut Buffer| {
                        let words = &words(shares)[first - begin..];
                        let left = Rows { words, row: 1, step: width };
                        let mut out = Block::new(&mut sums[first * padded..], padded, many, padded);
                        panels(left, right.lines(), count, count, Start::Target, &mut out);
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

/// `out = start + left · right`, panel by panel; strips of `right` lie `strip` lines apart.
fn panels(left: Rows, right: &[Line], strip: usize, depth: usize, start: Start, out: &mut Block) {
    for first in (0..out.width()).step_by(16 * STRIPS) {
        let right = Strips { lines: &right[first / 16 * strip..], strip, line: 1, depth };
        tile::sum(Kind::Float, left, right, start, &mut out.columns(first..first + 16 * STRIPS));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::chance::unit;

    /// Queries and keys in one table, as a layer has them.
    struct Case {
        values: Vec<f32>,
        heads: usize,
        kv_heads: usize,
        dim: usize,
        scoring: Scoring,
        window: Option<usize>,
        sequences: Vec<Sequence>,
    }

    impl Case {
        fn width(&self) -> usize {
            (self.heads + 2 * self.kv_heads) * self.dim
        }

        fn attention(&self) -> Attention<'_> {
            let heads = |start| Heads { values: &self.values, start, row: self.width(), head: self.dim };
            Attention {
                q: heads(0),
                k: heads(self.heads * self.dim),
                v: heads((self.heads + self.kv_heads) * self.dim),
                heads: self.heads,
                kv_heads: self.kv_heads,
                dim: self.dim,
                scoring: self.scoring,
                window: self.window,
                sequences: &self.sequences,
            }
        }

        /// What the heads gather, and the logarithms of the sums, in float64.
        fn exact(&self, values: &[f64]) -> (Vec<f64>, Vec<f64>) {
            let (d, width, group) = (self.dim, self.width(), self.heads / self.kv_heads);
            let rows = self.values.len() / width;
            let (mut out, mut logs) = (vec![0.0; rows * self.heads * d], vec![0.0; rows * self.heads]);
            for (sequence, query, head) in self.sequences.iter().flat_map(|sequence| {
                let queries = 0..sequence.queries.len();
                queries.flat_map(move |query| (0..self.heads).map(move |head| (sequence, query, head)))
            }) {
                let at = |row: usize, head: usize| &values[row * width + head * d..][..d];
                let row = sequence.queries.start + query;
                let end = sequence.past() + query + 1;
                let seen = self.window.map_or(0, |window| end.saturating_sub(window))..end;
                let keys: Vec<usize> = sequence.key_rows(seen).collect();
                let scores = keys.iter().map(|key| {
                    let (q, k) = (at(row, head), at(*key, self.heads + head / group));
                    let score =
                        q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() * f64::from(self.scoring.scale);
                    self.scoring
                        .cap
                        .map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                        .exp()
                });
                let scores: Vec<f64> = scores.collect();
                let sum: f64 = scores.iter().sum();
                logs[row * self.heads + head] = sum.ln();
                for (key, score) in keys.iter().zip(scores) {
                    let v = at(*key, self.heads + self.kv_heads + head / group);
                    let out = &mut out[(row * self.heads + head) * d..][..d];
                    out.iter_mut().zip(v).for_each(|(out, v)| *out += score / sum * v);
                }
            }
            (out, logs)
        }
    }

    fn values(count: usize, key: u64) -> Vec<f32> {
        (0..count).map(|i| unit(key, i as u64) as f32 * 4.0 - 2.0).collect()
    }

    fn case(heads: usize, kv_heads: usize, dim: usize, lengths: &[usize]) -> Case {
        let mut end = 0;
        let mut next = |len: &usize| {
            end += len;
            Sequence::alone(end - len..end)
        };
        let sequences: Vec<Sequence> = lengths.iter().map(&mut next).collect();
        let values = values(end * (heads + 2 * kv_heads) * dim, 1);
        let scoring = Scoring { scale: 1.0 / (dim as f32).sqrt(), cap: None };
        Case { values, heads, kv_heads, dim, scoring, window: None, sequences }
    }

    fn cases() -> Vec<Case> {
        let mut cases = vec![
            case(2, 1, 16, &[33, 2, 1]),
            case(3, 3, 10, &[17, 40]),
            case(4, 2, 56, &[150]),
            case(1, 1, 64, &[3]),
        ];
        cases.push(Case { window: Some(5), ..case(2, 2, 24, &[70]) });
        let capped = Scoring { scale: 0.7, cap: Some(2.0) };
        cases.push(Case { scoring: capped, ..case(2, 1, 8, &[20]) });
        cases
    }

    fn close(got: &[f32], want: &[f64], what: &str) {
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((f64::from(*got) - want).abs() < 2e-4 * (1.0 + want.abs()), "{what} {i}: {got} {want}");
        }
    }

    fn widened(values: &[f32]) -> Vec<f64> {
        values.iter().copied().map(f64::from).collect()
    }

    #[test]
    fn heads_gather_what_float64_says() {
        let mut cases = cases();
        // Two texts with a beginning in common.
        let mut shared = case(2, 1, 16, &[60]);
        shared.sequences = vec![
            Sequence::alone(0..20),
            Sequence { queries: 20..40, keys: vec![0..20, 20..40] },
            Sequence { queries: 40..60, keys: vec![0..20, 40..60] },
        ];
        cases.push(shared);
        for case in cases {
            let rows = case.values.len() / case.width();
            let (mut out, mut logs) = (vec![0.0; rows * case.heads * case.dim], vec![0.0; rows * case.heads]);
            case.attention().forward(&mut out, &mut logs);
            let want = case.exact(&widened(&case.values));
            close(&out, &want.0, "gathered");
            close(&logs, &want.1, "log sum");
        }
    }

    #[test]
    fn the_backward_pass_gives_the_slopes_of_the_forward_pass() {
        for case in cases() {
            let rows = case.values.len() / case.width();
            let size = rows * case.heads * case.dim;
            let (mut out, mut logs) = (vec![0.0; size], vec![0.0; rows * case.heads]);
            case.attention().forward(&mut out, &mut logs);
            let d_out = values(size, 2);
            let mut gradients = vec![f32::NAN; case.values.len()];
            case.attention().backward(&out, &logs, &d_out, &mut gradients);
            assert!(gradients.iter().all(|gradient| gradient.is_finite()));
            let sum = |values: &[f64]| {
                case.exact(values).0.iter().zip(&d_out).map(|(a, b)| a * f64::from(*b)).sum::<f64>()
            };
            // A few of them: each takes two passes in float64.
            for i in (0..case.values.len()).step_by(case.values.len() / 24) {
                let moved = |by: f64| {
                    let mut values = widened(&case.values);
                    values[i] += by;
                    sum(&values)
                };
                let want = (moved(1e-4) - moved(-1e-4)) / 2e-4;
                assert!((f64::from(gradients[i]) - want).abs() < 1e-3, "{i}: {} {want}", gradients[i]);
            }
        }
    }
}
