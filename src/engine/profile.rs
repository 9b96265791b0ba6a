//! One pass over the calibration windows tells the distance across every block
//! of every length (arXiv 2403.17887, eq. 7), with standard errors.

use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

use super::distance::{Gram, Mean};
use super::model::streams::Streams;
use super::model::{Batch, Checkpoint, Decoder};
use super::{Cx, Error, Result};
use crate::job::report::LayerProfile;
use crate::job::spec::{CalibrationSpec, Distance, TokenPosition};

/// Measures how far every block of layers turns the residual stream.
///
/// Windows may differ in length; the result does not depend on how they are batched. All of them go through one
/// layer before the next: what is in memory of the weights is one layer where all do not fit.
///
/// # Errors
/// A model error that names layer and window when a stream is not finite.
pub fn profile(
    checkpoint: &Checkpoint,
    windows: &[Vec<u32>],
    spec: &CalibrationSpec,
    cx: Cx,
) -> Result<LayerProfile> {
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).filter(|w| !w.is_empty()).collect();
    if windows.is_empty() {
        return Err(Error::data("the calibration corpus gives no window to measure on; give more text"));
    }
    let decoder = Decoder::open(checkpoint, cx.compute)?;
    let parts = parts(&windows, spec.batch_size as usize, decoder.rows_at_once());
    let seams = seams(&decoder, &windows, &parts, spec.position, cx)?;
    let mut sums = Sums::new(decoder.config().layer_count, spec.distance);
    for (part, windows_of) in parts.iter().enumerate() {
        for tokens in counted(&windows[windows_of.clone()], spec.position) {
            cx.check()?;
            sums.add(&seams.sample(part, tokens, spec.distance, cx)?);
        }
    }
    let tokens = windows.iter().map(|w| w.len() as u64).sum();
    Ok(sums.profile(spec.position, tokens))
}

/// Windows that go through a layer together: at most `most` of them, and `rows` tokens.
fn parts(windows: &[&[u32]], most: usize, rows: usize) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut filled = 0;
    for (i, window) in windows.iter().enumerate() {
        match parts.last_mut() {
            Some(part) if part.len() < most && filled + window.len() <= rows => {
                part.end = i + 1;
                filled += window.len();
            }
            _ => {
                parts.push(i..i + 1);
                filled = window.len();
            }
        }
    }
    parts
}

/// Where the tokens that count lie for each window, in a table of all that count.
fn counted(windows: &[&[u32]], position: TokenPosition) -> Vec<Range<usize>> {
    let mut next = 0;
    let range = |window: &&[u32]| {
        next += match position {
            TokenPosition::Last => 1,
            TokenPosition::Mean => window.len(),
        };
        next
    };
    let ends: Vec<usize> = windows.iter().map(range).collect();
    std::iter::once(0).chain(ends.iter().copied()).zip(ends.iter().copied()).map(|(a, b)| a..b).collect()
}

/// The streams of the tokens that count, at every seam: one table for each seam and part.
struct Seams {
    tables: Streams,
    parts: usize,
    seams: usize,
    width: usize,
}

/// Runs all windows through all layers and keeps the streams of the tokens that count.
fn seams(
    decoder: &Decoder,
    windows: &[&[u32]],
    parts: &[Range<usize>],
    position: TokenPosition,
    cx: Cx,
) -> Result<Seams> {
    let (layer_count, width) = (decoder.config().layer_count, decoder.config().hidden_size);
    let batches: Vec<Batch> = parts.iter().map(|part| Batch::of(&windows[part.clone()])).collect();
    let rows: Vec<Vec<u32>> = batches.iter().map(|batch| counted_rows(batch, position)).collect();
    let sizes = (0..=layer_count).flat_map(|_| rows.iter().map(Vec::len));
    let mut seams = Seams {
        tables: Streams::new(sizes, width, decoder.compute())?,
        parts: parts.len(),
        seams: layer_count + 1,
        width,
    };
    let mut keep = |seam: usize, part: usize, x: &Tensor| {
        cx.check()?;
        let kept = x.index_select(&Tensor::new(&rows[part][..], x.device())?, 0)?;
        if !kept.abs()?.sum_all()?.to_dtype(candle_core::DType::F32)?.to_scalar::<f32>()?.is_finite() {
            let first = parts[part].start;
            let of = counted(&windows[parts[part].clone()], position);
            return Err(not_finite(seam, first, &of, &kept)?);
        }
        seams.tables.set(seam * parts.len() + part, &kept)
    };
    let mut streams = decoder.streams(&batches)?;
    for part in 0..parts.len() {
        keep(0, part, &streams.get(part)?)?;
    }
    let passes: Vec<_> = batches.iter().map(|batch| decoder.pass(batch)).collect();
    let layers: Vec<usize> = (0..layer_count).collect();
    decoder.carry(&mut streams, &passes, &layers, |layer, part, x| {
        keep(layer + 1, part, x)?;
        if part + 1 < parts.len() {
            return Ok(());
        }
        cx.advanced("measuring layers", layer as u64 + 1, layer_count as u64, "layers")
    })?;
    Ok(seams)
}

/// Rows of a batch that count.
fn counted_rows(batch: &Batch, position: TokenPosition) -> Vec<u32> {
    let of = |text: &Range<usize>| match position {
        TokenPosition::Last => text.end - 1..text.end,
        TokenPosition::Mean => text.clone(),
    };
    batch.sequences.iter().flat_map(|text| of(&text.queries)).map(|row| row as u32).collect()
}

/// What is wrong with `kept`, the streams of windows `first..` whose rows are `of`.
fn not_finite(seam: usize, first: usize, of: &[Range<usize>], kept: &Tensor) -> Result<Error> {
    let values: Vec<Vec<f32>> = kept.to_dtype(candle_core::DType::F32)?.to_vec2()?;
    let broken = |rows: &Range<usize>| values[rows.clone()].iter().flatten().any(|v| !v.is_finite());
    let window = first + of.iter().position(broken).unwrap_or(0);
    let place = match seam.checked_sub(1) {
        None => "the embedding".to_owned(),
        Some(layer) => format!("layer {layer}"),
    };
    Ok(Error::model(format!(
        "the residual stream of calibration window {window} is no longer finite behind {place}: its values overflow; \
         try --precision f32, or fetch the model again"
    )))
}

/// Bytes of streams that are looked at together.
const LOOK_BYTES: usize = 32 << 20;

impl Seams {
    /// The mean over some of the tokens of a part. Summed in token order, so that threads change nothing.
    fn sample(&self, part: usize, tokens: Range<usize>, distance: Distance, cx: Cx) -> Result<Sample> {
        let h = self.width;
        let each = self.seams * h * size_of::<f32>();
        let (first, count) = (tokens.start, tokens.len());
        let mut mean = Sample::default();
        let at_once = (LOOK_BYTES / each).max(1);
        for start in (0..count).step_by(at_once) {
            cx.check()?;
            let many = at_once.min(count - start);
            let rows = |seam: usize| self.tables.rows(seam * self.parts + part, first + start, many);
            let by_seam = (0..self.seams).map(rows).collect::<Result<Vec<_>>>()?;
            let of_token = |token: usize| {
                let streams: Vec<&[f32]> = by_seam.iter().map(|s| &s[token * h..(token + 1) * h]).collect();
                Sample::of(&Gram::new(&streams), self.seams, distance)
            };
            let by_token: Vec<Sample> = (0..many).into_par_iter().map(of_token).collect();
            for token in &by_token {
                mean.add(token, 1.0 / count as f64);
            }
        }
        Ok(mean)
    }
}

/// One window's, or one token's, contribution to the profile.
#[derive(Default)]
struct Sample {
    /// `by_len[n-1][l]`, flattened.
    distances: Vec<f64>,
    influence: Vec<f64>,
    relative_magnitude: Vec<f64>,
    norm: Vec<f64>,
}

impl Sample {
    fn of(gram: &Gram, seams: usize, distance: Distance) -> Self {
        let layer_count = seams - 1;
        let blocks = (1..=layer_count).flat_map(|n| (0..=layer_count - n).map(move |l| (l, l + n)));
        Self {
            distances: blocks.map(|(a, b)| distance.from_cosine(gram.cosine(a, b))).collect(),
            influence: (0..layer_count).map(|l| 1.0 - gram.cosine(l, l + 1)).collect(),
            relative_magnitude: (0..layer_count).map(|l| gram.relative_change(l, l + 1)).collect(),
            norm: (0..seams).map(|l| gram.norm(l)).collect(),
        }
    }

    fn add(&mut self, other: &Self, weight: f64) {
        let pairs = [
            (&mut self.distances, &other.distances),
            (&mut self.influence, &other.influence),
            (&mut self.relative_magnitude, &other.relative_magnitude),
            (&mut self.norm, &other.norm),
        ];
        for (mine, theirs) in pairs {
            mine.resize(theirs.len(), 0.0);
            mine.iter_mut().zip(theirs).for_each(|(m, t)| *m += weight * t);
        }
    }
}

/// Running means over windows.
struct Sums {
    layer_count: usize,
    unit: &'static str,
    samples: u32,
    distances: Vec<Mean>,
    influence: Vec<Mean>,
    relative_magnitude: Vec<Mean>,
    norm: Vec<Mean>,
}

impl Sums {
    fn new(layer_count: usize, distance: Distance) -> Self {
        let empty = |count: usize| vec![Mean::default(); count];
        Self {
            layer_count,
            unit: distance.unit(),
            samples: 0,
            distances: empty(layer_count * (layer_count + 1) / 2),
            influence: empty(layer_count),
            relative_magnitude: empty(layer_count),
            norm: empty(layer_count + 1),
        }
    }

    fn add(&mut self, sample: &Sample) {
        self.samples += 1;
        let pairs = [
            (&mut self.distances, &sample.distances),
            (&mut self.influence, &sample.influence),
            (&mut self.relative_magnitude, &sample.relative_magnitude),
            (&mut self.norm, &sample.norm),
        ];
        for (means, values) in pairs {
            means.iter_mut().zip(values).for_each(|(m, v)| m.add(*v));
        }
    }

    fn profile(&self, position: TokenPosition, tokens: u64) -> LayerProfile {
        let values = |means: &[Mean]| means.iter().map(Mean::value).collect::<Vec<f64>>();
        LayerProfile {
            layer_count: self.layer_count as u32,
            samples: self.samples,
            tokens,
            position,
            unit: self.unit.into(),
            by_len: self.rows(Mean::value),
            stderr: self.rows(Mean::stderr),
            influence: values(&self.influence),
            relative_magnitude: values(&self.relative_magnitude),
            norm: values(&self.norm),
        }
    }

    /// The flat cells as rows: row `n-1` has one entry per block of length `n`.
    fn rows(&self, value: impl Fn(&Mean) -> f64) -> Vec<Vec<f64>> {
        let mut cells = self.distances.iter().map(value);
        (1..=self.layer_count).map(|n| cells.by_ref().take(self.layer_count - n + 1).collect()).collect()
    }
}
