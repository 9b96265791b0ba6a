//! Optimizer steps, whatever they descend: clipped, told, kept, and taken back where they diverge.

use std::path::Path;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};

use super::adamw::{AdamW, clip, learning_rate};
use super::resume::{Points, Progress};
use crate::engine::{Cx, Error, Result};
use crate::job::report::LossPoint;
use crate::job::training::Training;

/// The loss at one step, and where it rises.
pub struct Slope {
    pub loss: f64,
    /// One for each variable.
    pub gradients: Vec<Tensor>,
    /// What it was measured on.
    pub tokens: u64,
}

/// Steps to be taken.
pub struct Steps<'a> {
    pub training: &'a Training,
    /// Where progress is kept, and under which name.
    pub scratch: &'a Path,
    pub name: &'a str,
    /// What a person is told that is done.
    pub task: &'a str,
    pub cx: Cx<'a>,
}

/// How far the steps came.
pub struct Taken {
    pub curve: Vec<LossPoint>,
    pub tokens: u64,
    /// The step at which loss or gradient was no number, if there was one: the variables are what they were before it.
    pub diverged_at: Option<u32>,
}

impl Steps<'_> {
    /// Takes all steps. Progress is kept every `checkpoint_every` steps, every few minutes, and when asked to stop; a
    /// later call goes on from there and ends with the very same bytes. `slope` gives the loss of a step and its
    /// gradients.
    ///
    /// # Errors
    /// Those of `slope`, and a spec error where the first steps diverge.
    pub fn take(&self, variables: &[Var], slope: &mut dyn FnMut(u32) -> Result<Slope>) -> Result<Taken> {
        let Self { training, cx, .. } = *self;
        let mut optimizer = AdamW::new(variables, training);
        let mut points = Points::new(self.scratch, self.name);
        let mut progress = points.newest(variables, &mut optimizer, self.device())?.unwrap_or_default();
        if progress.step > 0 && progress.step < training.steps {
            cx.note(format!("healing goes on from optimizer step {}", progress.step));
        }
        let mut diverged_at = None;
        while progress.step < training.steps {
            if let Err(stop) = cx.check() {
                points.keep_now(&progress, variables, &optimizer)?;
                return Err(stop);
            }
            let (begun, step) = (Instant::now(), progress.step);
            let Slope { loss, mut gradients, tokens } = slope(step)?;
            let norm = clip(&mut gradients, training.max_gradient_norm)?;
            if !loss.is_finite() || !norm.is_finite() {
                diverged_at = Some(step);
                progress = self.before_divergence(&points, variables, &mut optimizer, step)?;
                break;
            }
            let learning_rate = learning_rate(training, step);
            optimizer.update(variables, &gradients, step, learning_rate)?;
            progress.curve.push(LossPoint { step, loss, learning_rate });
            progress.step += 1;
            progress.tokens += tokens;
            for (name, value) in [
                ("loss", loss),
                ("learning_rate", learning_rate),
                ("gradient_norm", norm),
                ("tokens_per_s", tokens as f64 / begun.elapsed().as_secs_f64()),
            ] {
                cx.measured(name, u64::from(step), value);
            }
            points.keep(progress.step % training.checkpoint_every == 0, &progress, variables, &optimizer)?;
            cx.advanced(self.task, u64::from(progress.step), u64::from(training.steps), "steps").or_else(
                |stop| {
                    points.keep_now(&progress, variables, &optimizer)?;
                    Err(stop)
                },
            )?;
        }
        // What comes after may be interrupted as well: these steps are done.
        points.keep_now(&progress, variables, &optimizer)?;
        let Progress { curve, tokens, .. } = progress;
        Ok(Taken { curve, tokens, diverged_at })
    }

    /// Goes back to the last state that is kept and was good.
    fn before_divergence(
        &self,
        points: &Points,
        variables: &[Var],
        optimizer: &mut AdamW,
        step: u32,
    ) -> Result<Progress> {
        let last = points.steady(variables, optimizer, self.device())?;
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

    fn device(&self) -> &Device {
        &self.cx.compute.device
    }
}
