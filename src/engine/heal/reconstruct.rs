//! One kept layer in the place of those that went (LLM-Streamline, arXiv 2403.19135): the layer below each cut is
//! trained to give the stream that the base model has behind the cut. What enters it and what should leave it is kept
//! once; a step goes through that layer alone.

use candle_core::{DType, Tensor};

use super::backward::{Seam, Way, complete};
use super::beside::Beside;
use super::change::Changes;
use super::steps::{Slope, Steps, Taken};
use super::trainables::{Draw, Trainables};
use super::{Case, Remedy};
use crate::engine::chance::stream_key;
use crate::engine::model::layer::Layer;
use crate::engine::{Error, Result};
use crate::job::heal::ReconstructSettings;
use crate::job::report::Repaired;
use crate::job::training::{Defaults, Training, TrainingSpec};

/// Steps between resume points.
const KEPT_EVERY: u32 = 50;
const MAX_GRADIENT_NORM: f64 = 1.0;

/// Trains the layer below each cut, from the lowest on; what is behind sees the streams as they were mended.
pub fn heal(case: &Case, settings: &ReconstructSettings) -> Result<Remedy> {
    let mut beside = Beside::open(case)?;
    let (mut changes, mut repaired, mut curve) = (Changes::new(), Vec::new(), Vec::new());
    let (mut trainable_parameters, mut tokens, mut diverged_at) = (0, 0, None);
    for (index, (block, seam)) in case.cuts().into_iter().enumerate() {
        let Some(below) = seam.checked_sub(1) else {
            return Err(Error::spec("reconstruct changes the layer below the cut; keep layer 0"));
        };
        beside.go_to(block, seam, 1)?;
        let weights = Trainables::weights(case.source, below..seam, false, &case.cx.compute.device)?;
        let fit = Fit { case, settings, beside: &beside, index, below, weights: &weights };
        let error_before = fit.error(&beside.layer(below)?)?;
        let taken = fit.run()?;
        let layer = fit.layer(false)?;
        beside.through(&layer)?;
        repaired.push(Repaired { block, factor: 1.0, error_before, error_after: beside.error(index)? });
        trainable_parameters += weights.parameters();
        tokens += taken.tokens;
        curve.extend(taken.curve);
        diverged_at = diverged_at.or(taken.diverged_at);
        changes.extend(weights.changes(case.source.config()));
    }
    Ok(Remedy { tokens, repaired, trainable_parameters, curve, diverged_at, ..Remedy::new(case, changes) })
}

/// The fit of one layer.
struct Fit<'a> {
    case: &'a Case<'a>,
    settings: &'a ReconstructSettings,
    /// Where the stream enters the layer.
    beside: &'a Beside<'a>,
    /// Of the cut.
    index: usize,
    below: usize,
    weights: &'a Trainables,
}

impl Fit<'_> {
    fn run(&self) -> Result<Taken> {
        let batches = self.beside.batches() as u32;
        let steps = Steps {
            training: &self.training(batches * self.settings.epochs),
            scratch: self.case.scratch,
            name: &format!("reconstruct-{}", self.index),
            task: "training the layer below the cut",
            cx: self.case.cx,
        };
        steps.take(&self.weights.variables, &mut |step| self.slope(self.batch(step, batches)))
    }

    fn training(&self, steps: u32) -> Training {
        let spec = TrainingSpec {
            checkpoint_every: Some(KEPT_EVERY),
            max_gradient_norm: Some(MAX_GRADIENT_NORM),
            ..TrainingSpec::default()
        };
        let defaults = Defaults {
            learning_rate: self.settings.learning_rate,
            batch_size: 1,
            steps,
            warmup_steps: steps / 20,
            seq_len: self.settings.seq_len,
        };
        spec.settled(&defaults, self.settings.seq_len)
    }

    /// The batch of a step: every epoch in an order of its own.
    fn batch(&self, step: u32, batches: u32) -> usize {
        let (epoch, place) = (step / batches, step % batches);
        let mut order: Vec<u32> = (0..batches).collect();
        let key =
            |batch: &u32| stream_key(&[self.case.wound.spec.seed, 4, u64::from(epoch), u64::from(*batch)]);
        order.sort_by_key(key);
        order[place as usize] as usize
    }

    /// The layer with the weights as they are.
    fn layer(&self, tracked: bool) -> Result<Layer> {
        let layer = self.beside.layer(self.below)?;
        let draw = Draw { seed: 0, step: 0, micro_batch: 0 };
        self.weights.on(layer, self.below, draw, tracked, self.case.cx.compute)
    }

    /// What the stream lacks behind `layer`: the mean over all rows.
    fn error(&self, layer: &Layer) -> Result<f64> {
        let (mut sum, mut rows) = (0.0, 0);
        for batch in 0..self.beside.batches() {
            self.case.cx.check()?;
            let (entering, pass) = self.beside.entering(batch)?;
            let count = entering.dim(0)?;
            sum += self.lacking(batch, &layer.forward(&entering, pass, None)?)?.0 * count as f64;
            rows += count;
        }
        Ok(sum / rows.max(1) as f64)
    }

    /// What the stream `leaving` lacks of what is wanted, the mean over a batch's rows, and its gradient.
    fn lacking(&self, batch: usize, leaving: &Tensor) -> Result<(f64, Tensor)> {
        let wanted = self.beside.wanted(self.index, batch)?.to_device(leaving.device())?;
        let weight = 1.0 / leaving.dim(0)? as f64;
        Seam { layer: self.below + 1, wanted, weight }.lacking(leaving)
    }

    /// What the stream lacks behind the layer, on the mean of a batch's rows, and the gradients of the weights.
    fn slope(&self, batch: usize) -> Result<Slope> {
        let compute = self.case.cx.compute;
        let layer = self.layer(!self.beside.layer(self.below)?.is_native())?;
        let (entering, pass) = self.beside.entering(batch)?;
        let (leaving, trace) = if layer.is_native() {
            let (leaving, trace) = layer.forward_traced(&entering, pass)?;
            (leaving, Some(trace))
        } else {
            (layer.forward(&entering, pass, None)?.detach(), None)
        };
        let (lacking, upstream) = self.lacking(batch, &leaving)?;
        let upstream = upstream.to_dtype(compute.dtype)?;
        let mut gradients = vec![None; self.weights.variables.len()];
        let way = Way { entering: &entering, pass, trace };
        way.back(&layer, self.below, &upstream, false, self.weights, &mut gradients)?;
        let gradients = complete(gradients)?;
        let gradients =
            gradients.iter().map(|g| g.to_dtype(DType::F32)).collect::<candle_core::Result<_>>()?;
        let tokens = self.beside.windows(batch).sum::<usize>() as u64;
        Ok(Slope { loss: lacking, gradients, tokens })
    }
}
