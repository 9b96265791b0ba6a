//! QLoRA (Dettmers et al., arXiv 2305.14314): adapters trained over a frozen,
//! quantised base, then merged into the *original* weights.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::adamw::{AdamW, clip, learning_rate};
use super::backward::{Adapters, Draw, loss_and_gradients, next_tokens};
use super::change::Change;
use super::resume::Progress;
use super::teacher::Teacher;
use super::windows::Windows;
use super::{Case, Remedy};
use crate::checkpoint::LinearShape;
use crate::engine::chance::stream_key;
use crate::engine::model::kernel::rows::SoftTarget;
use crate::engine::model::lora::Adapter;
use crate::engine::model::{Checkpoint, Decoder};
use crate::engine::{Cx, Error, Result};
use crate::job::preset::QloraSettings;
use crate::job::report::LossPoint;

/// Gradient norm that larger ones are scaled down to, as in transformers' Trainer.
const MAX_GRADIENT_NORM: f64 = 1.0;
/// Tokens per micro-batch, or fewer where the memory is too little for so many; an optimizer step accumulates
/// as many as it needs.
const MICRO_BATCH_TOKENS: usize = 1024;

impl Windows {
    /// Numbers of the windows of optimizer step `step`: every epoch in an order of its own.
    fn batch(&self, step: u32, batch_size: u32, seed: u64) -> Vec<usize> {
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

/// What training left behind.
pub struct Trained {
    pub adapters: Adapters,
    pub curve: Vec<LossPoint>,
    pub tokens: u64,
}

/// Trains adapters and has them merged.
pub fn heal(case: &Case, settings: &QloraSettings) -> Result<Remedy> {
    let teacher = settings.distill.as_ref();
    let teacher = teacher.map(|spec| Teacher::open(case.wound.base, spec, case.cx.compute)).transpose()?;
    let seed = case.wound.spec.seed;
    let trained = train(case.source, settings, case.windows, teacher, seed, case.scratch, case.cx)?;
    let config = case.source.config();
    let merge = |(layer, linear, adapter): (usize, LinearShape, Adapter)| {
        (format!("{}.weight", config.in_layer(layer, linear.name)), Change::Merge(adapter))
    };
    let changes = trained.adapters.trained().map(merge).collect();
    Ok(Remedy {
        trainable_parameters: trained.adapters.parameters(),
        tokens: trained.tokens,
        curve: trained.curve,
        adapters: Some(trained.adapters),
        ..Remedy::new(case, changes)
    })
}

/// Trains adapters for `pruned` on the text, or on what a teacher makes of it. Progress is kept in `scratch` every
/// `checkpoint_every` steps, and when asked to stop; a later call goes on from there
/// and ends with the very same bytes.
pub fn train(
    pruned: &Checkpoint,
    settings: &QloraSettings,
    windows: &Windows,
    mut teacher: Option<Teacher>,
    seed: u64,
    scratch: &Path,
    cx: Cx,
) -> Result<Trained> {
    let compute = cx.compute;
    let adapters = Adapters::new(pruned.config(), settings, stream_key(&[seed, 1]), &compute.device)?;
    let mut optimizer = AdamW::new(&adapters.variables, settings.weight_decay)?;
    let file: PathBuf = scratch.join("qlora.safetensors");
    let mut progress = match Progress::load(&file, &adapters, &mut optimizer, &compute.device)? {
        Some(progress) => {
            cx.note(format!("healing goes on from optimizer step {}", progress.step));
            progress
        }
        None => Progress::default(),
    };
    let frozen = Decoder::open_frozen(pruned, compute, settings.bits)?;
    while progress.step < settings.steps {
        if let Err(stop) = cx.check() {
            progress.save(&file, &adapters, &optimizer)?;
            return Err(stop);
        }
        let batch = windows.batch(progress.step, settings.batch_size, stream_key(&[seed, 2]));
        let mut lessons = Vec::new();
        for number in batch {
            let window = windows.train[number].as_slice();
            let targets = match &mut teacher {
                Some(teacher) => teacher.targets(number, window)?,
                None => next_tokens(&[window]),
            };
            lessons.push(Lesson { window, targets });
        }
        let begun = (Instant::now(), progress.tokens);
        let (point, norm) =
            step(&frozen, &adapters, &mut optimizer, settings, &mut lessons, seed, &mut progress)?;
        let tokens_per_s = (progress.tokens - begun.1) as f64 / begun.0.elapsed().as_secs_f64();
        cx.measured("loss", u64::from(point.step), point.loss);
        cx.measured("learning_rate", u64::from(point.step), point.learning_rate);
        cx.measured("gradient_norm", u64::from(point.step), norm);
        cx.measured("tokens_per_s", u64::from(point.step), tokens_per_s);
        if progress.step % settings.checkpoint_every == 0 {
            progress.save(&file, &adapters, &optimizer)?;
        }
        cx.advanced("training adapters", u64::from(progress.step), u64::from(settings.steps), "steps")
            .or_else(|stop| {
                progress.save(&file, &adapters, &optimizer)?;
                Err(stop)
            })?;
    }
    let Progress { curve, tokens, .. } = progress;
    Ok(Trained { adapters, curve, tokens })
}

/// A window and what should be predicted for every token of it but the first.
struct Lesson<'a> {
    window: &'a [u32],
    targets: Vec<SoftTarget>,
}

/// One optimizer step; also the norm of the gradient before it was clipped.
fn step(
    frozen: &Decoder,
    adapters: &Adapters,
    optimizer: &mut AdamW,
    settings: &QloraSettings,
    batch: &mut [Lesson],
    seed: u64,
    progress: &mut Progress,
) -> Result<(LossPoint, f64)> {
    let step = progress.step;
    let predicted: usize = batch.iter().map(|lesson| lesson.targets.len()).sum();
    let scale = 1.0 / predicted.max(1) as f64;
    let longest = batch.iter().map(|lesson| lesson.window.len()).max().unwrap_or(1);
    let mut loss = 0.0;
    let mut gradients = Vec::new();
    let tokens = MICRO_BATCH_TOKENS.min(frozen.rows_at_once());
    for (micro_batch, lessons) in batch.chunks_mut((tokens / longest).max(1)).enumerate() {
        let draw = Draw { seed: stream_key(&[seed, 3]), step, micro_batch };
        let windows: Vec<&[u32]> = lessons.iter().map(|lesson| lesson.window).collect();
        let targets: Vec<SoftTarget> =
            lessons.iter_mut().flat_map(|lesson| std::mem::take(&mut lesson.targets)).collect();
        let (nll, new) = loss_and_gradients(frozen, adapters, &windows, &targets, scale, draw)?;
        loss += nll * scale;
        gradients = if gradients.is_empty() {
            new
        } else {
            gradients.iter().zip(&new).map(|(a, b)| a + b).collect::<candle_core::Result<_>>()?
        };
    }
    let norm = clip(&mut gradients, MAX_GRADIENT_NORM)?;
    if !loss.is_finite() || !norm.is_finite() {
        return Err(Error::spec(format!(
            "healing diverged: the loss or its gradient is not finite at optimizer step {step}; lower learning_rate"
        )));
    }
    let learning_rate = learning_rate(settings, step);
    optimizer.update(&adapters.variables, &gradients, step, learning_rate)?;
    let point = LossPoint { step, loss, learning_rate };
    progress.curve.push(point);
    progress.step += 1;
    progress.tokens += batch.iter().map(|lesson| lesson.window.len() as u64).sum::<u64>();
    Ok((point, norm))
}
