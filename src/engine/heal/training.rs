//! Training by optimizer steps on the text itself, or on what a teacher makes of it: adapters or weights alike.

use std::path::Path;

use candle_core::Tensor;

use super::backward::{Objective, Seam, loss_and_gradients, next_tokens};
use super::prefix::Prefix;
use super::steps::{Slope, Steps, Taken};
use super::teacher::Teacher;
use super::trainables::{Draw, Trainables};
use super::windows::Windows;
use super::{Case, Remedy};
use crate::engine::chance::stream_key;
use crate::engine::model::kernel::rows::SoftTarget;
use crate::engine::model::{Checkpoint, Decoder};
use crate::engine::{Cx, Error, Result};
use crate::job::report::FailureKind;
use crate::job::training::{BaseFormat, Training};

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
    pub base: BaseFormat,
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
    pub taken: Taken,
}

impl<'a> Course<'a> {
    /// The course of a case.
    pub fn of(case: &'a Case, base: BaseFormat, training: &'a Training) -> Result<Self> {
        let teacher = training.distill.as_ref().map(|spec| Teacher::of(case, spec)).transpose()?;
        let &Case { source, windows, scratch, cx, wound, .. } = case;
        Ok(Self { source, base, training, windows, teacher, seed: wound.spec.seed, scratch, cx })
    }

    /// Trains, and can be stopped and gone on with at every step.
    pub fn run(mut self, trainables: Trainables) -> Result<Trained> {
        let Self { training, cx, .. } = self;
        let frozen = Decoder::open_frozen(self.source, cx.compute, self.base)?;
        let mut prefix = self.prefix(&frozen, &trainables)?;
        let mut micro_batch = MICRO_BATCH_TOKENS.min(frozen.rows_at_once());
        let steps = Steps { training, scratch: self.scratch, name: "training", task: "training", cx };
        let taken = steps.take(&trainables.variables, &mut |step| {
            self.slope(&frozen, &trainables, &mut prefix, &mut micro_batch, step)
        })?;
        Ok(Trained { trainables, taken })
    }

    /// What to keep of the layers below all that is trained or taught; nothing where no window is seen twice.
    fn prefix(&self, frozen: &Decoder, trainables: &Trainables) -> Result<Option<Prefix>> {
        let taught = self.teacher.as_ref().and_then(Teacher::lowest_seam);
        let layer = taught.map_or(trainables.lowest(), |seam| seam.min(trainables.lowest()));
        let again = self.training.windows() > self.windows.train.len();
        (layer > 0 && again).then(|| Prefix::new(frozen, layer, self.windows)).transpose()
    }

    /// Loss and gradients of a step; with smaller micro-batches from now on where they do not fit.
    fn slope(
        &mut self,
        frozen: &Decoder,
        trainables: &Trainables,
        prefix: &mut Option<Prefix>,
        micro_batch: &mut usize,
        step: u32,
    ) -> Result<Slope> {
        let lessons = self.lessons(step)?;
        let (loss, gradients) = loop {
            match self.gradients(frozen, trainables, prefix, &lessons, *micro_batch, step) {
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
        let tokens = lessons.iter().map(|lesson| lesson.window.len() as u64).sum();
        Ok(Slope { loss, gradients, tokens })
    }

    /// The windows of a step, and what is to be learnt of each.
    fn lessons(&mut self, step: u32) -> Result<Vec<Lesson<'a>>> {
        let windows = self.windows;
        let batch = windows.batch(step, self.training.batch_size, stream_key(&[self.seed, 2]));
        let lesson = |number: usize| {
            let window = windows.train[number].as_slice();
            Ok(match &mut self.teacher {
                None => Lesson { number, window, targets: next_tokens(&[window]), seams: Vec::new() },
                Some(teacher) => Lesson {
                    number,
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
        prefix: &mut Option<Prefix>,
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
            let numbered = lessons.iter().map(|lesson| (lesson.number, lesson.window));
            let known = prefix.as_mut().map(|prefix| prefix.entering(frozen, numbered)).transpose()?;
            let (sum, new) = loss_and_gradients(frozen, trainables, &windows, known, &objective, draw)?;
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
    /// Of the window among those to work on.
    number: usize,
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
        let Trained { trainables, taken } = trained;
        Self {
            trainable_parameters: trainables.parameters(),
            tokens: taken.tokens,
            curve: taken.curve,
            diverged_at: taken.diverged_at,
            ..Self::new(case, trainables.changes(case.source.config()))
        }
    }
}
