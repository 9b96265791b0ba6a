//! One pass over the calibration windows tells the distance across every block
//! of every length (arXiv 2403.17887, eq. 7), with standard errors.

mod lens;
mod sums;

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use self::lens::Lens;
use self::sums::{Sample, Sums};
use super::distance::Gram;
use super::model::batch::{batches, nothing};
use super::model::kernel::rows::exact_product;
use super::model::streams::Streams;
use super::model::weight::with;
use super::model::{Batch, Checkpoint, Decoder};
use super::{Cx, Error, Result};
use crate::job::report::LayerProfile;
use crate::job::spec::{CalibrationSpec, TokenPosition};

/// Windows between two looks at how sure the nearest block is.
const ROUND: usize = 16;

/// Measures how far every block of layers turns the residual stream, and what else one pass tells of each layer.
///
/// Windows may differ in length; the result does not depend on how they are batched. All of them go through one
/// layer before the next: what is in memory of the weights is one layer where all do not fit. Where the spec asks
/// for a confidence only, windows come in rounds of sixteen, until it is reached for the nearest block of `len`
/// layers.
///
/// # Errors
/// A model error that names layer and window when a stream is not finite.
pub fn profile(
    checkpoint: &Checkpoint,
    windows: &[Vec<u32>],
    spec: &CalibrationSpec,
    len: usize,
    cx: Cx,
) -> Result<LayerProfile> {
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).filter(|w| !w.is_empty()).collect();
    if windows.is_empty() {
        return Err(Error::data("the calibration corpus gives no window to measure on; give more text"));
    }
    let decoder = Decoder::open(checkpoint, cx.compute)?;
    let mut sums = Sums::new(decoder.config().layer_count, spec.distance);
    let mut lens = spec.logit_lens.then(|| Lens::new(&windows, &decoder));
    let round = if spec.confidence.is_some() { ROUND } else { windows.len() };
    for (number, these) in windows.chunks(round).enumerate() {
        let parts = batches(these, decoder.rows_at_once(), spec.batch_size as usize, nothing);
        let pass = Pass { decoder: &decoder, windows: these, first: number * round, parts: &parts, spec, cx };
        for sample in pass.samples(lens.as_mut())? {
            sums.add(&sample);
        }
        if spec.confidence.is_some_and(|asked| sums.confidence(len) >= asked) {
            break;
        }
    }
    let tokens = windows[..sums.samples()].iter().map(|w| w.len() as u64).sum();
    let mut profile = sums.profile(spec.position, tokens);
    profile.samples_asked = windows.len() as u32;
    profile.stopped_early = sums.samples() < windows.len();
    if let Some(lens) = lens {
        profile.logit_lens = lens.readings();
    }
    Ok(profile)
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

/// Windows that go through the model together.
struct Pass<'a> {
    decoder: &'a Decoder,
    windows: &'a [&'a [u32]],
    /// Place of the first of them among all windows.
    first: usize,
    parts: &'a [Range<usize>],
    spec: &'a CalibrationSpec,
    cx: Cx<'a>,
}

/// Norms of what attention and MLP of a layer add, relative to the stream they add it to: the mean over the
/// tokens of a window that count.
type Added = [f64; 2];

impl Pass<'_> {
    /// What each window says, in their order.
    fn samples(&self, mut lens: Option<&mut Lens>) -> Result<Vec<Sample>> {
        let (layer_count, width) = (self.decoder.config().layer_count, self.decoder.config().hidden_size);
        let batches: Vec<Batch> =
            self.parts.iter().map(|part| Batch::of(&self.windows[part.clone()])).collect();
        let rows: Vec<Vec<u32>> =
            batches.iter().map(|batch| counted_rows(batch, self.spec.position)).collect();
        let sizes = (0..=layer_count).flat_map(|_| rows.iter().map(Vec::len));
        let mut seams = Seams {
            tables: Streams::new(sizes, width, self.decoder.compute())?,
            parts: self.parts.len(),
            seams: layer_count + 1,
            width,
        };
        let mut keep = |seam: usize, part: usize, x: &Tensor| {
            self.cx.check()?;
            let kept = if rows[part].len() == x.dim(0)? {
                x.clone()
            } else {
                x.index_select(&Tensor::new(&rows[part][..], x.device())?, 0)?
            };
            if let Some(lens) = &mut lens {
                lens.read(self.decoder, seam, self.first + self.parts[part].start, &batches[part], x)?;
            }
            seams.tables.set(seam * self.parts.len() + part, &kept)
        };
        let mut streams = self.decoder.streams(&batches)?;
        for part in 0..self.parts.len() {
            keep(0, part, &streams.get(part)?)?;
        }
        let passes: Vec<_> = batches.iter().map(|batch| self.decoder.pass(batch)).collect();
        let layers: Vec<usize> = (0..layer_count).collect();
        // By layer and window.
        let mut added: Vec<Vec<Added>> = vec![Vec::new(); layer_count];
        let ranges: Vec<Vec<Range<usize>>> =
            self.parts.iter().map(|part| counted(&self.windows[part.clone()], self.spec.position)).collect();
        self.decoder.carry_by(&mut streams, &layers, |layer, index, part, x| {
            let (middle, leaving) = layer.halves(x, &passes[part])?;
            added[index].extend(means(&ranges[part], &each_added(x, &middle, &leaving, &rows[part])?));
            keep(index + 1, part, &leaving)?;
            if part + 1 == passes.len() {
                let task = "measuring layers";
                self.cx.advanced(task, index as u64 + 1, layer_count as u64, "layers")?;
            }
            Ok(leaving)
        })?;
        let places: Vec<(usize, Range<usize>)> = ranges
            .into_iter()
            .enumerate()
            .flat_map(|(part, all)| all.into_iter().map(move |t| (part, t)))
            .collect();
        let sample = |(part, tokens)| seams.sample(part, tokens, self.spec, self.cx);
        let mut samples = places.into_par_iter().map(sample).collect::<Result<Vec<Sample>>>()?;
        for (window, sample) in samples.iter_mut().enumerate() {
            if let Some(seam) = sample.not_finite() {
                return Err(not_finite(seam, self.first + window));
            }
            sample.added = added.iter().map(|windows| windows[window]).collect();
        }
        Ok(samples)
    }
}

/// What each counted row of a layer was given by attention and MLP.
fn each_added(x: &Tensor, middle: &[f32], leaving: &Tensor, rows: &[u32]) -> Result<Vec<Added>> {
    let h = x.dim(1)?;
    let each = |x: &[f32], leaving: &[f32]| {
        let of = |row: &u32| {
            let at = *row as usize * h..(*row as usize + 1) * h;
            let (x, middle, leaving) = (&x[at.clone()], &middle[at.clone()], &leaving[at]);
            let added = |before: &[f32], after: &[f32]| {
                let (old, new) = (exact_product(before, before), exact_product(after, after));
                let change = (old + new - 2.0 * exact_product(before, after)).max(0.0);
                (change / old.max(1e-24)).sqrt()
            };
            [added(x, middle), added(middle, leaving)]
        };
        rows.par_iter().map(of).collect()
    };
    let here = |x: &Tensor| Ok::<_, Error>(x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?);
    let (x, leaving) = (here(x)?, here(leaving)?);
    Ok(with(&x, |x| with(&leaving, |leaving| each(x, leaving)))??)
}

/// The mean over each range.
fn means(ranges: &[Range<usize>], each: &[Added]) -> Vec<Added> {
    let mean = |range: &Range<usize>| {
        let rows = &each[range.clone()];
        [0, 1].map(|half| rows.iter().map(|row| row[half]).sum::<f64>() / rows.len() as f64)
    };
    ranges.iter().map(mean).collect()
}

/// The streams of the tokens that count, at every seam: one table for each seam and part.
struct Seams {
    tables: Streams,
    parts: usize,
    seams: usize,
    width: usize,
}

/// Rows of a batch that count.
fn counted_rows(batch: &Batch, position: TokenPosition) -> Vec<u32> {
    let of = |text: &Range<usize>| match position {
        TokenPosition::Last => text.end - 1..text.end,
        TokenPosition::Mean => text.clone(),
    };
    batch.sequences.iter().flat_map(|text| of(&text.queries)).map(|row| row as u32).collect()
}

fn not_finite(seam: usize, window: usize) -> Error {
    let place = match seam.checked_sub(1) {
        None => "the embedding".to_owned(),
        Some(layer) => format!("layer {layer}"),
    };
    Error::model(format!(
        "the residual stream of calibration window {window} is no longer finite behind {place}: its values overflow; \
         try --precision f32, or fetch the model again"
    ))
}

/// Bytes of streams that are looked at together, by each core.
const LOOK_BYTES: usize = 4 << 20;

impl Seams {
    /// The mean over some of the tokens of a part.
    fn sample(&self, part: usize, tokens: Range<usize>, spec: &CalibrationSpec, cx: Cx) -> Result<Sample> {
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
            for token in 0..many {
                let streams: Vec<&[f32]> = by_seam.iter().map(|s| &s[token * h..(token + 1) * h]).collect();
                mean.add(&Sample::of(&Gram::new(&streams), self.seams, spec.distance), 1.0 / count as f64);
            }
        }
        Ok(mean)
    }
}
