//! `AdamW` (Loshchilov & Hutter, arXiv 1711.05101) with moments that can be saved.

use candle_core::{Tensor, Var};

use crate::job::preset::QloraSettings;
use crate::job::spec::Schedule;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPS: f64 = 1e-8;

/// First and second moment of every variable, float32.
pub struct AdamW {
    pub first: Vec<Tensor>,
    pub second: Vec<Tensor>,
    pub weight_decay: f64,
}

impl AdamW {
    pub fn new(variables: &[Var], weight_decay: f64) -> candle_core::Result<Self> {
        let zeros = || variables.iter().map(|v| v.zeros_like()).collect::<candle_core::Result<Vec<_>>>();
        Ok(Self { first: zeros()?, second: zeros()?, weight_decay })
    }

    /// Optimizer step `step` (from 0) with one gradient a variable.
    pub fn update(
        &mut self,
        variables: &[Var],
        gradients: &[Tensor],
        step: u32,
        learning_rate: f64,
    ) -> candle_core::Result<()> {
        let t = f64::from(step) + 1.0;
        let (unbias1, unbias2) = (1.0 - BETA1.powf(t), 1.0 - BETA2.powf(t));
        for (i, (variable, gradient)) in variables.iter().zip(gradients).enumerate() {
            let first = ((&self.first[i] * BETA1)? + (gradient * (1.0 - BETA1))?)?;
            let second = ((&self.second[i] * BETA2)? + (gradient.sqr()? * (1.0 - BETA2))?)?;
            let direction = ((&first / unbias1)? / ((&second / unbias2)?.sqrt()? + EPS)?)?;
            let decayed = (variable.as_tensor() * (1.0 - learning_rate * self.weight_decay))?;
            variable.set(&(decayed - (direction * learning_rate)?)?)?;
            (self.first[i], self.second[i]) = (first, second);
        }
        Ok(())
    }
}

/// Scales all gradients so that their common norm is at most `most`; gives the norm before.
pub fn clip(gradients: &mut [Tensor], most: f64) -> candle_core::Result<f64> {
    let mut square = 0.0;
    for gradient in gradients.iter() {
        square += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let norm = square.sqrt();
    if norm > most {
        for gradient in gradients.iter_mut() {
            *gradient = (&*gradient * (most / norm))?;
        }
    }
    Ok(norm)
}

/// The learning rate of optimizer step `step` (from 0), as in transformers'
/// schedules: linear warm-up from 0, then the schedule's way down to 0.
pub fn learning_rate(settings: &QloraSettings, step: u32) -> f64 {
    let warmup = settings.warmup_steps;
    if step < warmup {
        return settings.learning_rate * f64::from(step) / f64::from(warmup);
    }
    let left = f64::from(settings.steps.saturating_sub(warmup).max(1));
    let done = f64::from(step - warmup) / left;
    settings.learning_rate
        * match settings.schedule {
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            Schedule::Linear => 1.0 - done,
            Schedule::Constant => 1.0,
        }
}
