//! The base model as a teacher (knowledge distillation: Hinton et al., arXiv 1503.02531): what it predicts on the text
//! of healing is what the pruned model should.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use candle_core::Tensor;

use super::backward::next_tokens;
use crate::engine::Result;
use crate::engine::model::kernel::rows::{SoftTarget, likeliest};
use crate::engine::model::{Batch, Checkpoint, Compute, Decoder};
use crate::job::heal::DistillSpec;

/// Predicts each window once: the likeliest tokens at every place go to a file that is gone with the run. A window is
/// predicted by itself, so a run that was killed and predicts it again comes to the same.
pub struct Teacher {
    base: Decoder,
    spec: DistillSpec,
    file: File,
    /// By window: where its predictions begin in the file.
    places: HashMap<usize, u64>,
    end: u64,
}

/// A token and its share in the file.
const PAIR_BYTES: usize = 8;

impl Teacher {
    pub fn open(base: &Checkpoint, spec: &DistillSpec, compute: &Compute) -> Result<Self> {
        let top_k = spec.top_k.min(base.config().vocab_size as u32);
        Ok(Self {
            base: Decoder::open(base, compute)?,
            spec: DistillSpec { top_k, ..spec.clone() },
            file: compute.memory.spill_file()?,
            places: HashMap::new(),
            end: 0,
        })
    }

    /// What should be predicted for every token of window `number` but the first: by `weight` what the base predicts,
    /// for the rest the token itself.
    pub fn targets(&mut self, number: usize, window: &[u32]) -> Result<Vec<SoftTarget>> {
        let top_k = self.spec.top_k as usize;
        let mut bytes = vec![0; window.len().saturating_sub(1) * top_k * PAIR_BYTES];
        match self.places.get(&number) {
            Some(place) => self.file.read_exact_at(&mut bytes, *place)?,
            None => {
                self.predict(window, &mut bytes)?;
                self.file.write_all_at(&bytes, self.end)?;
                self.places.insert(number, self.end);
                self.end += bytes.len() as u64;
            }
        }
        let weight = self.spec.weight as f32;
        let pair = |pair: &[u8]| {
            let (token, share) = pair.split_at(PAIR_BYTES / 2);
            let four = |bytes: &[u8]| [bytes[0], bytes[1], bytes[2], bytes[3]];
            (u32::from_le_bytes(four(token)), weight * f32::from_le_bytes(four(share)))
        };
        let mut targets = next_tokens(&[window]);
        for (target, taught) in targets.iter_mut().zip(bytes.chunks(top_k * PAIR_BYTES)) {
            target[0].1 = 1.0 - weight;
            target.extend(taught.chunks(PAIR_BYTES).map(pair));
        }
        Ok(targets)
    }

    /// Writes the likeliest tokens at each place with their probabilities among themselves.
    fn predict(&self, window: &[u32], out: &mut [u8]) -> Result<()> {
        let x: Tensor = self.base.forward(&Batch::of(&[window]))?;
        let top_k = self.spec.top_k as usize;
        let shares = |_: usize, predicted: &[f32]| {
            let likeliest = likeliest(predicted, top_k);
            let sum: f64 = likeliest.iter().map(|(_, log)| f64::from(*log).exp()).sum();
            let share = |(token, log): (u32, f32)| (token, (f64::from(log).exp() / sum) as f32);
            likeliest.into_iter().map(share).collect::<SoftTarget>()
        };
        let all = self.base.each_prediction(&x.narrow(0, 0, window.len() - 1)?, shares)?;
        for ((token, share), out) in all.into_iter().flatten().zip(out.chunks_mut(PAIR_BYTES)) {
            out[..4].copy_from_slice(&token.to_le_bytes());
            out[4..].copy_from_slice(&share.to_le_bytes());
        }
        Ok(())
    }
}
