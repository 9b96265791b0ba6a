//! `AdamW` (Loshchilov & Hutter, arXiv 1711.05101) with moments that can be saved, in float32 or in 8 bits each.

use std::collections::HashMap;
use std::sync::LazyLock;

use candle_core::{DType, Device, Result, Tensor, Var};
use rayon::prelude::*;

use crate::job::training::{MomentBits, Schedule, Training};

/// Values that share a scale.
const BLOCK: usize = 256;
/// Variables with fewer values keep their moments in float32, as bitsandbytes does.
const LEAST_IN_8_BITS: usize = 4096;

/// First and second moment of every variable.
pub struct AdamW {
    moments: Vec<[Moment; 2]>,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
}

/// A running mean of gradients, or of their squares.
enum Moment {
    Floats(Vec<f32>),
    /// Codes of a table, and the largest size in each block (Dettmers et al., arXiv 2110.02861).
    Codes {
        codes: Vec<u8>,
        scales: Vec<f32>,
        table: &'static Table,
    },
}

impl AdamW {
    pub fn new(variables: &[Var], training: &Training) -> Self {
        let moment = |count: usize, table: fn() -> &'static Table| match training.moment_bits {
            MomentBits::Eight if count >= LEAST_IN_8_BITS => Moment::Codes {
                codes: vec![table().zero(); count],
                scales: vec![0.0; count.div_ceil(BLOCK)],
                table: table(),
            },
            MomentBits::Eight | MomentBits::ThirtyTwo => Moment::Floats(vec![0.0; count]),
        };
        let both = |v: &Var| [moment(v.elem_count(), Table::signed), moment(v.elem_count(), Table::unsigned)];
        Self {
            moments: variables.iter().map(both).collect(),
            betas: [training.beta1, training.beta2],
            eps: training.eps,
            weight_decay: training.weight_decay,
        }
    }

    /// Optimizer step `step` (from 0) with one gradient a variable.
    pub fn update(
        &mut self,
        variables: &[Var],
        gradients: &[Tensor],
        step: u32,
        learning_rate: f64,
    ) -> Result<()> {
        let t = f64::from(step) + 1.0;
        let [beta1, beta2] = self.betas;
        let (unbias1, unbias2) = (1.0 - beta1.powf(t), 1.0 - beta2.powf(t));
        let kept = (1.0 - learning_rate * self.weight_decay) as f32;
        let rule = Rule {
            betas: [beta1 as f32, beta2 as f32],
            rate: (learning_rate / unbias1) as f32,
            unbias: (1.0 / unbias2.sqrt()) as f32,
            eps: self.eps as f32,
            kept,
        };
        for ((variable, gradient), [first, second]) in variables.iter().zip(gradients).zip(&mut self.moments)
        {
            let mut values: Vec<f32> = variable.flatten_all()?.to_vec1()?;
            let gradient: Vec<f32> = gradient.flatten_all()?.to_vec1()?;
            let moments = first.blocks().into_par_iter().zip(second.blocks());
            values.par_chunks_mut(BLOCK).zip(gradient.par_chunks(BLOCK)).zip(moments).for_each(
                |((values, gradient), (first, second))| rule.apply(values, gradient, first, second),
            );
            variable.set(
                &Tensor::from_vec(values, variable.shape(), &Device::Cpu)?.to_device(variable.device())?,
            )?;
        }
        Ok(())
    }

    /// All moments, by names to save them under.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut out = Vec::new();
        for (i, moments) in self.moments.iter().enumerate() {
            for (moment, which) in moments.iter().zip(["first", "second"]) {
                let name = format!("{which}.{i}");
                match moment {
                    Moment::Floats(values) => {
                        out.push((name, Tensor::from_slice(values, values.len(), &Device::Cpu)?));
                    }
                    Moment::Codes { codes, scales, .. } => {
                        out.push((
                            format!("{name}.scales"),
                            Tensor::from_slice(scales, scales.len(), &Device::Cpu)?,
                        ));
                        out.push((name, Tensor::from_slice(codes, codes.len(), &Device::Cpu)?));
                    }
                }
            }
        }
        Ok(out)
    }

    /// Takes the moments of [`Self::tensors`] back; says whether all were there and fit.
    pub fn restore(&mut self, tensors: &mut HashMap<String, Tensor>) -> Result<bool> {
        for (i, moments) in self.moments.iter_mut().enumerate() {
            for (moment, which) in moments.iter_mut().zip(["first", "second"]) {
                let mut take = |name: String, count: usize, dtype: DType| {
                    tensors
                        .remove(&name)
                        .filter(|saved| saved.elem_count() == count && saved.dtype() == dtype)
                };
                let name = format!("{which}.{i}");
                match moment {
                    Moment::Floats(values) => {
                        let Some(saved) = take(name, values.len(), DType::F32) else { return Ok(false) };
                        *values = saved.flatten_all()?.to_vec1()?;
                    }
                    Moment::Codes { codes, scales, .. } => {
                        let of_scales = take(format!("{name}.scales"), scales.len(), DType::F32);
                        let (Some(of_codes), Some(of_scales)) =
                            (take(name, codes.len(), DType::U8), of_scales)
                        else {
                            return Ok(false);
                        };
                        *codes = of_codes.flatten_all()?.to_vec1()?;
                        *scales = of_scales.flatten_all()?.to_vec1()?;
                    }
                }
            }
        }
        Ok(true)
    }
}

/// One step's numbers.
struct Rule {
    betas: [f32; 2],
    /// Learning rate over what the first moment lacks at first.
    rate: f32,
    /// One over the root of what the second moment lacks at first.
    unbias: f32,
    eps: f32,
    /// What weight decay leaves.
    kept: f32,
}

impl Rule {
    fn apply(&self, values: &mut [f32], gradient: &[f32], mut first: Block, mut second: Block) {
        let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
        let (m, v) = (&mut m[..values.len()], &mut v[..values.len()]);
        first.read(m);
        second.read(v);
        let [beta1, beta2] = self.betas;
        for ((value, g), (m, v)) in values.iter_mut().zip(gradient).zip(m.iter_mut().zip(v.iter_mut())) {
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *value = *value * self.kept - self.rate * *m / (v.sqrt() * self.unbias + self.eps);
        }
        first.write(m);
        second.write(v);
    }
}

/// A block of a moment.
enum Block<'a> {
    Floats(&'a mut [f32]),
    Codes { codes: &'a mut [u8], scale: &'a mut f32, table: &'static Table },
}

impl Moment {
    fn blocks(&mut self) -> Vec<Block<'_>> {
        match self {
            Self::Floats(values) => values.chunks_mut(BLOCK).map(Block::Floats).collect(),
            Self::Codes { codes, scales, table } => {
                let blocks = codes.chunks_mut(BLOCK).zip(scales);
                blocks.map(|(codes, scale)| Block::Codes { codes, scale, table }).collect()
            }
        }
    }
}

impl Block<'_> {
    fn read(&self, out: &mut [f32]) {
        match self {
            Self::Floats(values) => out.copy_from_slice(values),
            Self::Codes { codes, scale, table } => {
                for (out, code) in out.iter_mut().zip(codes.iter()) {
                    *out = table.values[usize::from(*code)] * **scale;
                }
            }
        }
    }

    fn write(&mut self, values: &[f32]) {
        match self {
            Self::Floats(out) => out.copy_from_slice(values),
            Self::Codes { codes, scale, table } => {
                **scale = values.iter().fold(0.0, |most: f32, value| most.max(value.abs()));
                let by = if **scale > 0.0 { 1.0 / **scale } else { 0.0 };
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = table.code(value * by);
                }
            }
        }
    }
}

/// What 8 bits stand for, from small to large: fine steps near zero and coarse ones near one, as bitsandbytes'
/// `create_dynamic_map` has them.
struct Table {
    values: Vec<f32>,
}

impl Table {
    /// From -1 to 1.
    fn signed() -> &'static Self {
        static TABLE: LazyLock<Table> = LazyLock::new(|| Table::of(true));
        &TABLE
    }

    /// From 0 to 1.
    fn unsigned() -> &'static Self {
        static TABLE: LazyLock<Table> = LazyLock::new(|| Table::of(false));
        &TABLE
    }

    /// Each power of ten has twice as many steps as the one below it.
    fn of(signed: bool) -> Self {
        let mut values = vec![0.0, 1.0];
        for exponent in 0..7 {
            let steps = if signed { 1 << exponent } else { 2 << exponent };
            let width = 0.9 / f64::from(steps);
            for step in 0..steps {
                let middle = 0.1 + width * (f64::from(step) + 0.5);
                let value = middle * 10f64.powi(exponent - 6);
                values.push(value);
                if signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f64::total_cmp);
        Self { values: values.into_iter().map(|value| value as f32).collect() }
    }

    /// The code of the value nearest to `value`.
    fn code(&self, value: f32) -> u8 {
        let above = self.values.partition_point(|v| *v < value).min(self.values.len() - 1);
        let below = above.saturating_sub(1);
        let nearer = if value - self.values[below] < self.values[above] - value { below } else { above };
        nearer as u8
    }

    fn zero(&self) -> u8 {
        self.code(0.0)
    }
}

/// Scales all gradients so that their common norm is at most `most`; gives the norm before.
pub fn clip(gradients: &mut [Tensor], most: f64) -> Result<f64> {
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
pub fn learning_rate(training: &Training, step: u32) -> f64 {
    let warmup = training.warmup_steps;
    if step < warmup {
        return training.learning_rate * f64::from(step) / f64::from(warmup);
    }
    let left = f64::from(training.steps.saturating_sub(warmup).max(1));
    let done = f64::from(step - warmup) / left;
    training.learning_rate
        * match training.schedule {
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            Schedule::Linear => 1.0 - done,
            Schedule::Constant => 1.0,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::chance::unit;
    use crate::job::training::{Defaults, TrainingSpec};

    fn training(moment_bits: MomentBits) -> Training {
        let defaults =
            Defaults { learning_rate: 0.01, batch_size: 1, steps: 100, warmup_steps: 0, seq_len: 8 };
        let spec = TrainingSpec { moment_bits, weight_decay: Some(0.1), ..TrainingSpec::default() };
        spec.settled(&defaults, 8)
    }

    /// Sixty steps towards a target from zero.
    fn trained(training: &Training, count: usize) -> Vec<f32> {
        let values = |key| (0..count).map(|i| unit(key, i as u64) as f32 * 2.0 - 1.0).collect::<Vec<_>>();
        let target = Tensor::from_vec(values(1), count, &Device::Cpu).unwrap();
        let variables = [Var::zeros(count, DType::F32, &Device::Cpu).unwrap()];
        let mut optimizer = AdamW::new(&variables, training);
        for step in 0..60 {
            let gradient = (variables[0].as_tensor() - &target).unwrap();
            let rate = learning_rate(training, step);
            optimizer.update(&variables, &[gradient], step, rate).unwrap();
        }
        variables[0].to_vec1().unwrap()
    }

    #[test]
    fn steps_are_those_of_the_formula_in_float64() {
        let training = training(MomentBits::ThirtyTwo);
        for (i, got) in trained(&training, 5).into_iter().enumerate() {
            let target = f64::from(unit(1, i as u64) as f32 * 2.0 - 1.0);
            let (mut x, mut m, mut v) = (0.0f64, 0.0, 0.0);
            for step in 0..60 {
                let (g, rate) = (x - target, learning_rate(&training, step));
                m = 0.9 * m + 0.1 * g;
                v = 0.999 * v + 0.001 * g * g;
                let t = f64::from(step + 1).round() as i32;
                let (m, v): (f64, f64) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.999f64.powi(t)));
                x = x * (1.0 - rate * 0.1) - rate * m / (v.sqrt() + 1e-8);
            }
            assert!((f64::from(got) - x).abs() < 1e-5, "{got} {x}");
        }
    }

    #[test]
    fn moments_in_8_bits_lead_to_nearly_the_same() {
        let count = 5000;
        let (exact, eight) =
            (trained(&training(MomentBits::ThirtyTwo), count), trained(&training(MomentBits::Eight), count));
        let off: f64 = exact.iter().zip(&eight).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>();
        assert!(exact != eight, "the same to the last bit: nothing was quantised");
        assert!(off / (count as f64) < 0.02, "{}", off / count as f64);
    }

    #[test]
    fn eight_bits_hold_256_values_and_each_is_its_own_nearest() {
        for table in [Table::signed(), Table::unsigned()] {
            assert_eq!(table.values.len(), 256);
            for (code, value) in table.values.iter().enumerate() {
                assert_eq!(usize::from(table.code(*value)), code);
            }
        }
        assert!(Table::unsigned().values[0] == 0.0 && Table::signed().values[0] < -0.99);
    }
}
