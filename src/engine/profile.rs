//! One pass over the calibration windows tells the distance across every block
//! of every length (arXiv 2403.17887, eq. 7), with standard errors.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::distance::{Gram, Mean};
use super::model::{Checkpoint, Decoder, pad};
use super::{Cx, Error, Result};
use crate::checkpoint::Dtype;
use crate::job::report::{LayerProfile, cross_axis};
use crate::job::spec::{CalibrationSpec, Distance, TokenPosition};

/// Streams kept at a time when every token counts.
const MAX_KEPT_BYTES: usize = 512 << 20;

/// Measures how far every block of layers turns the residual stream.
///
/// Windows may differ in length; the result does not depend on how they are batched.
///
/// # Errors
/// A model error that names the tensor or layer when weights or streams are not finite.
pub fn profile(
    checkpoint: &Checkpoint,
    windows: &[Vec<u32>],
    spec: &CalibrationSpec,
    cx: Cx,
) -> Result<LayerProfile> {
    if windows.iter().all(Vec::is_empty) {
        return Err(Error::data("the calibration corpus gives no window to measure on; give more text"));
    }
    check_finite(checkpoint)?;
    let decoder = Decoder::open(checkpoint, cx.compute)?;
    let layer_count = checkpoint.config().layer_count;
    let mut sums = Sums::new(layer_count, spec.distance);
    let total = windows.len() as u64;
    let mut done = 0;
    for batch in windows.chunks(batch_size(spec, checkpoint, windows)) {
        cx.check()?;
        let batch: Vec<&[u32]> = batch.iter().map(Vec::as_slice).filter(|w| !w.is_empty()).collect();
        if batch.is_empty() {
            continue;
        }
        let streams = streams(&decoder, &batch, spec.position)?;
        for sample in streams.samples(&batch, spec.distance) {
            sums.add(&sample);
        }
        done += batch.len() as u64;
        cx.advanced("measuring layers", done, total, "windows")?;
    }
    let tokens = windows.iter().map(|w| w.len() as u64).sum();
    Ok(sums.profile(spec.position, tokens))
}

/// Windows per pass: what was asked, less when all their tokens' streams would not fit.
fn batch_size(spec: &CalibrationSpec, checkpoint: &Checkpoint, windows: &[Vec<u32>]) -> usize {
    let asked = spec.batch_size.max(1) as usize;
    match spec.position {
        TokenPosition::Last => asked,
        TokenPosition::Mean => {
            let config = checkpoint.config();
            let longest = windows.iter().map(Vec::len).max().unwrap_or(1);
            let window_bytes = (config.layer_count + 1) * longest * config.hidden_size * size_of::<f32>();
            asked.min(MAX_KEPT_BYTES / window_bytes.max(1)).max(1)
        }
    }
}

/// The streams of one batch at every seam.
struct Streams {
    /// Seam by seam, `[tokens, h]`.
    by_seam: Vec<Vec<f32>>,
    hidden_size: usize,
    position: TokenPosition,
}

/// Runs the decoder over a batch and keeps the streams of the tokens that count.
fn streams(decoder: &Decoder, batch: &[&[u32]], position: TokenPosition) -> Result<Streams> {
    let config = decoder.config();
    let width = batch.iter().map(|w| w.len()).max().unwrap_or(0);
    // Rows of the flattened `[b * t, h]` stream that belong to a counted token, never to padding.
    let rows: Vec<u32> = batch
        .iter()
        .enumerate()
        .flat_map(|(i, window)| {
            let row = move |token: usize| (i * width + token) as u32;
            let first = match position {
                TokenPosition::Last => window.len() - 1,
                TokenPosition::Mean => 0,
            };
            (first..window.len()).map(row)
        })
        .collect();
    let rows = Tensor::new(rows, &decoder.compute().device)?;
    let mut by_seam = Vec::with_capacity(config.layer_count + 1);
    let mut keep = |seam: usize, x: &Tensor| -> Result<()> {
        let kept = x.flatten_to(1)?.index_select(&rows, 0)?.to_dtype(DType::F32)?;
        let values: Vec<f32> = kept.flatten_all()?.to_vec1()?;
        if values.iter().any(|v| !v.is_finite()) {
            return Err(not_finite(seam));
        }
        by_seam.push(values);
        Ok(())
    };
    let x = decoder.embed(&pad(batch, decoder.compute())?)?;
    keep(0, &x)?;
    decoder.layers(x, 0..config.layer_count, &mut keep)?;
    Ok(Streams { by_seam, hidden_size: config.hidden_size, position })
}

fn not_finite(seam: usize) -> Error {
    let place = match seam.checked_sub(1) {
        None => "the embedding".to_owned(),
        Some(layer) => format!("layer {layer}"),
    };
    Error::model(format!(
        "the residual stream is no longer finite behind {place}: its values overflow; \
         try --precision f32, or fetch the model again"
    ))
}

impl Streams {
    /// What each window of the batch says.
    fn samples(&self, batch: &[&[u32]], distance: Distance) -> Vec<Sample> {
        let mut next = 0;
        let ranges: Vec<std::ops::Range<usize>> = batch
            .iter()
            .map(|window| {
                let count = match self.position {
                    TokenPosition::Last => 1,
                    TokenPosition::Mean => window.len(),
                };
                next += count;
                next - count..next
            })
            .collect();
        ranges.into_iter().map(|tokens| self.sample(tokens, distance)).collect()
    }

    /// The mean over some tokens. Summed in token order, so that threads change nothing.
    fn sample(&self, tokens: std::ops::Range<usize>, distance: Distance) -> Sample {
        let h = self.hidden_size;
        let seams = self.by_seam.len();
        let count = tokens.len() as f64;
        let by_token: Vec<Sample> = tokens
            .into_par_iter()
            .map(|token| {
                let streams: Vec<&[f32]> =
                    self.by_seam.iter().map(|s| &s[token * h..(token + 1) * h]).collect();
                Sample::of(&Gram::new(&streams), seams, distance)
            })
            .collect();
        let mut mean = Sample::default();
        for token in &by_token {
            mean.add(token, 1.0 / count);
        }
        mean
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
        let stderr = |means: &[Mean]| means.iter().map(Mean::stderr).collect::<Vec<f64>>();
        let (influence, relative_magnitude) = (values(&self.influence), values(&self.relative_magnitude));
        LayerProfile {
            layer_count: self.layer_count as u32,
            samples: self.samples,
            tokens,
            position,
            unit: self.unit.into(),
            by_len: self.rows(Mean::value),
            stderr: self.rows(Mean::stderr),
            cross_axis: cross_axis(&influence, &relative_magnitude),
            influence,
            relative_magnitude,
            norm: values(&self.norm),
            influence_stderr: stderr(&self.influence),
            relative_magnitude_stderr: stderr(&self.relative_magnitude),
            cross_axis_stderr: Vec::new(),
            norm_stderr: stderr(&self.norm),
            contribution: Vec::new(),
            ablation: Vec::new(),
            logit_lens: Vec::new(),
            confidence: Vec::new(),
            samples_asked: self.samples,
            stopped_early: false,
        }
    }

    /// The flat cells as rows: row `n-1` has one entry per block of length `n`.
    fn rows(&self, value: impl Fn(&Mean) -> f64) -> Vec<Vec<f64>> {
        let mut cells = self.distances.iter().map(value);
        (1..=self.layer_count).map(|n| cells.by_ref().take(self.layer_count - n + 1).collect()).collect()
    }
}

/// Damaged weights are found before anything is computed with them.
fn check_finite(checkpoint: &Checkpoint) -> Result<()> {
    let names: Vec<&str> = checkpoint.names().collect();
    let damaged = names.par_iter().find_first(|name| {
        let (Some(info), Ok(bytes)) = (checkpoint.info(name), checkpoint.bytes(name)) else { return false };
        !all_finite(info.dtype, bytes)
    });
    match damaged {
        None => Ok(()),
        Some(name) => Err(Error::model(format!(
            "{}: tensor {name} holds NaN or infinite values; the checkpoint is damaged, fetch or export it again",
            checkpoint.dir().display()
        ))),
    }
}

/// A float is finite unless all bits of its exponent are set.
fn all_finite(dtype: Dtype, bytes: &[u8]) -> bool {
    let halves = |exponent: u16| {
        bytes.chunks_exact(2).all(|b| u16::from_le_bytes([b[0], b[1]]) & exponent != exponent)
    };
    match dtype {
        Dtype::Bf16 => halves(0x7f80),
        Dtype::F16 => halves(0x7c00),
        Dtype::F32 => bytes.chunks_exact(4).all(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite()),
        // Nothing else is computed with; opening the decoder says so.
        _ => true,
    }
}
