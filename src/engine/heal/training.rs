//! Training by optimizer steps on the text itself, or on what a teacher makes of it: adapters or weights alike.

use std::path::Path;
use std::time::Instant;

use candle_core::Tensor;

use super::adamw::{AdamW, clip, learning_rate};
use super::backward::{Objective, Seam, loss_and_gradients, next_tokens};
use super::resume::{Points, Progress};
use super::teacher::Teacher;
use super::trainables::{Draw, Trainables};
use super::windows::Windows;
use super::{Case, Remedy};
use crate::engine::chance::stream_key;
use crate::engine::model::kernel::rows::SoftTarget;
use crate::engine::model::{Checkpoint, Decoder};
use crate::engine::{Cx, Error, Result};
use crate::job::report::{FailureKind, LossPoint};
use crate::job::training::{BaseBits, Training};

/// Tokens per micro-batch, or fewer where the memory is too little for so many; an optimizer step accumulates
/// as many as it needs.
const MICRO_BATCH_TOKENS: usize = 1024;

impl Windows {
    /// Numbers of the windows of optimizer step `step`: every epoch in an order of its own.
    pub fn batch(&self, step: u32, batch_size: u32, seed: u64) -> Vec<usize> {
        let n = self.train.len() as u64;
        let first = u64::from(step) * u64::from(batch_size);
        let mut order = (u64::MAX, Vec::new());
        (first..first + u64::from(batch_size))
            .map(|i| {
                let epoch = i / n;
                if order.0 != epoch {
                    let mut places: Vec<u64> = (0..n).collect();
                    places.sort_by_key(|p| stream_key(&[seed, epoch, *p]));
                    order = (epoch, places);
                }
                order.1[(i % n) as usize] as usize
            })
            .collect()
    }
}

/// A training to be done.
pub struct Course<'a> {
    pub source: &'a Checkpoint,
    /// How the frozen linear layers are kept.
    pub bits: BaseBits,
    pub training: &'a Training,
    pub windows: &'a Windows,
    pub teacher: Option<Teacher>,
    pub seed: u64,
    /// Where progress is kept.
    pub scratch: &'a Path,
    pub cx: Cx<'a>,
}

/// What training left behind.
pub struct Trained {
    pub trainables: Trainables,
    pub curve: Vec<LossPoint>,
    pub tokens: u64,
    /// The optimizer step at which the loss was no number, if there was one: what is left is from before it.
    pub diverged_at: Option<u32>,
}

impl<'a> Course<'a> {
    /// The course of a case.
    pub fn of(case: &'a Case, bits: BaseBits, training: &'a Training) -> Result<Self> {
        let teacher = training.distill.as_ref().map(|spec| Teacher::of(case, spec)).transpose()?;
        let &Case { source, windows, scratch, cx, wound, .. } = case;
        Ok(Self { source, bits, training, windows, teacher, seed: wound.spec.seed, scratch, cx })
    }

    /// Trains. Progress is kept in `scratch` every `checkpoint_every` steps, every few minutes, and when asked to
    /// stop; a later call goes on from there and ends with the very same bytes.
    pub fn run(mut self, trainables: Trainables) -> Result<Trained> {
        let Self { training, cx, .. } = self;
        let device = &cx.compute.device;
        let variables = &trainables.variables;
        let mut optimizer = AdamW::new(variables, training);
        let mut points = Points::new(self.scratch, "training");
        let mut progress = points.newest(variables, &mut optimizer, device)?.unwrap_or_default();
        if progress.step > 0 {
            cx.note(format!("healing goes on from optimizer step {}", progress.step));
        }
        let frozen = Decoder::open_frozen(self.source, cx.compute, self.bits)?;
        let mut micro_batch = MICRO_BATCH_TOKENS.min(frozen.rows_at_once());
        let mut diverged_at = None;
        while progress.step < training.steps {
            if let Err(stop) = cx.check() {
                points.keep_now(&progress, variables, &optimizer)?;
                return Err(stop);
            }
            let begun = (Instant::now(), progress.tokens);
            let Some(norm) =
                self.step(&frozen, &trainables, &mut optimizer, &mut micro_batch, &mut progress)?
            else {
                diverged_at = Some(progress.step);
                progress = self.before_divergence(&points, &trainables, &mut optimizer, progress.step)?;
                break;
            };
            let point = progress.curve[progress.curve.len() - 1];
            let tokens_per_s = (progress.tokens - begun.1) as f64 / begun.0.elapsed().as_secs_f64();
            cx.measured("loss", u64::from(point.step), point.loss);
            cx.measured("learning_rate", u64::from(point.step), point.learning_rate);
            cx.measured("gradient_norm", u64::from(point.step), norm);
            cx.measured("tokens_per_s", u64::from(point.step), tokens_per_s);
            points.keep(progress.step % training.checkpoint_every == 0, &progress, variables, &optimizer)?;
            cx.advanced("training", u64::from(progress.step), u64::from(training.steps), "steps").or_else(
                |stop| {
                    points.keep_now(&progress, variables, &optimizer)?;
                    Err(stop)
                },
            )?;
        }
        let Progress { curve, tokens, .. } = progress;
        Ok(Trained { trainables, curve, tokens, diverged_at })
    }

    /// Goes back to the last state that is kept and was good.
    fn before_divergence(
        &self,
        points: &Points,
        trainables: &Trainables,
        optimizer: &mut AdamW,
        step: u32,
    ) -> Result<Progress> {
        let last = points.steady(&trainables.variables, optimizer, &self.cx.compute.device)?;
        let last = last.ok_or_else(|| {
            Error::spec(format!(
                "healing diverged: the loss or its gradient is not finite at optimizer step {step}; lower \
                 learning_rate"
            ))
        })?;
        self.cx.note(format!(
            "healing diverged at optimizer step {step} and ends with what it was after step {}; lower learning_rate",
            last.step
        ));
        Ok(last)
    }

    /// One optimizer step. Gives the norm of the gradient before it was clipped; nothing, and changes nothing, where
    /// loss or gradient are not finite.
    fn step(
        &mut self,
        frozen: &Decoder,
        trainables: &Trainables,
        optimizer: &mut AdamW,
        micro_batch: &mut usize,
        progress: &mut Progress,
    ) -> Result<Option<f64>> {
        let (step, training) = (progress.step, self.training);
        let lessons = self.lessons(step)?;
        let sums = loop {
            match self.gradients(frozen, trainables, &lessons, *micro_batch, step) {
                Err(Error::Failed(failure))
                    if failure.kind == FailureKind::OutOfMemory && *micro_batch == MICRO_BATCH_TOKENS =>
                {
                    *micro_batch /= 2;
                    self.cx.note(
                        "a micro-batch did not fit into the device's memory: half as many tokens from now on",
                    );
                }
                other => break other?,
            }
        };
        let (loss, mut gradients) = sums;
        let norm = clip(&mut gradients, training.max_gradient_norm)?;
        if !loss.is_finite() || !norm.is_finite() {
            return Ok(None);
        }
        let learning_rate = learning_rate(training, step);
        optimizer.update(&trainables.variables, &gradients, step, learning_rate)?;
        progress.curve.push(LossPoint { step, loss, learning_rate });
        progress.step += 1;
        progress.tokens += lessons.iter().map(|lesson| lesson.window.len() as u64).sum::<u64>();
        Ok(Some(norm))
    }

    /// The windows of a step, and what is to be learnt of each.
    fn lessons(&mut self, step: u32) -> Result<Vec<Lesson<'a>>> {
        let windows = self.windows;
        let batch = windows.batch(step, self.training.batch_size, stream_key(&[self.seed, 2]));
        let lesson = |number: usize| {
            let window = windows.train[number].as_slice();
            Ok(match &mut self.teacher {
                None => Lesson { window, targets: next_tokens(&[window]), seams: Vec::new() },
                Some(teacher) => Lesson {
                    window,
                    targets: teacher.targets(number, window)?,
                    seams: teacher.seams(number, window)?,
                },
            })
        };
        batch.into_iter().map(lesson).collect()
    }

    /// Mean loss of a step's lessons, and its gradients, some lessons at a time.
    fn gradients(
        &self,
        frozen: &Decoder,
        trainables: &Trainables,
        lessons: &[Lesson],
        micro_batch: usize,
        step: u32,
    ) -> Result<(f64, Vec<Tensor>)> {
        let predicted: usize = lessons.iter().map(|lesson| lesson.targets.len()).sum();
        let scale = 1.0 / predicted.max(1) as f64;
        let longest = lessons.iter().map(|lesson| lesson.window.len()).max().unwrap_or(1);
        let (mut loss, mut gradients) = (0.0, Vec::new());
        for (i, lessons) in lessons.chunks((micro_batch / longest).max(1)).enumerate() {
            let draw = Draw { seed: stream_key(&[self.seed, 3]), step, micro_batch: i };
            let windows: Vec<&[u32]> = lessons.iter().map(|lesson| lesson.window).collect();
            let targets: Vec<SoftTarget> =
                lessons.iter().flat_map(|lesson| lesson.targets.iter().cloned()).collect();
            let seams = seams_of(lessons)?;
            let objective = Objective { targets: &targets, seams: &seams, scale };
            let (sum, new) = loss_and_gradients(frozen, trainables, &windows, &objective, draw)?;
            loss += sum * scale;
            gradients = if gradients.is_empty() {
                new
            } else {
                gradients.iter().zip(&new).map(|(a, b)| a + b).collect::<candle_core::Result<_>>()?
            };
        }
        Ok((loss, gradients))
    }
}

/// A window, and what should be predicted for every token of it but the first, and what the stream should be behind the
/// cuts.
struct Lesson<'a> {
    window: &'a [u32],
    targets: Vec<SoftTarget>,
    seams: Vec<Seam>,
}

/// The seams of lessons that go through the model together.
fn seams_of(lessons: &[Lesson]) -> Result<Vec<Seam>> {
    let first = lessons.first().map_or(&[][..], |lesson| &lesson.seams);
    let together = |(i, seam): (usize, &Seam)| {
        let wanted: Vec<&Tensor> = lessons.iter().map(|lesson| &lesson.seams[i].wanted).collect();
        Ok(Seam { wanted: Tensor::cat(&wanted, 0)?, ..*seam })
    };
    first.iter().enumerate().map(together).collect()
}

impl Remedy {
    /// What a training comes to.
    pub(super) fn trained(case: &Case, trained: Trained) -> Self {
        let Trained { trainables, curve, tokens, diverged_at } = trained;
        Self {
            trainable_parameters: trainables.parameters(),
            tokens,
            curve,
            diverged_at,
            ..Self::new(case, trainables.changes(case.source.config()))
        }
    }
}
