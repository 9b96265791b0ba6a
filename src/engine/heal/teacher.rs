//! The base model as a teacher (knowledge distillation: Hinton et al., arXiv 1503.02531): what it predicts on the text
//! of healing is what the pruned model should.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use candle_core::{DType, Tensor};

use super::Case;
use super::backward::{Seam, next_tokens};
use crate::engine::Result;
use crate::engine::model::kernel::rows::{SoftTarget, likeliest};
use crate::engine::model::{Batch, Checkpoint, Compute, Decoder};
use crate::job::report::Block;
use crate::job::training::DistillSpec;

/// Predicts each window once: the likeliest tokens at every place, and the streams behind the cuts where they are
/// taught, go to a file that is gone with the run. A window is predicted by itself, so a run that was killed and
/// predicts it again comes to the same.
pub struct Teacher {
    base: Decoder,
    spec: DistillSpec,
    cuts: Vec<Cut>,
    file: File,
    /// By window: where its predictions begin in the file.
    places: HashMap<usize, u64>,
    end: u64,
}

/// A cut whose stream is taught.
struct Cut {
    /// The layer that the stream enters: of the base, and of the pruned model.
    base: usize,
    pruned: usize,
    /// How many times smaller the stream of the pruned model is there, by what healing did before.
    size: f64,
}

/// A token and its share in the file.
const PAIR_BYTES: usize = 8;

impl Teacher {
    pub fn open(base: &Checkpoint, spec: &DistillSpec, compute: &Compute) -> Result<Self> {
        let top_k = spec.top_k.min(base.config().vocab_size as u32);
        Ok(Self {
            base: Decoder::open(base, compute)?,
            spec: DistillSpec { top_k, ..spec.clone() },
            cuts: Vec::new(),
            file: compute.memory.spill_file()?,
            places: HashMap::new(),
            end: 0,
        })
    }

    /// The teacher of a case, who knows where it was cut.
    pub fn of(case: &Case, spec: &DistillSpec) -> Result<Self> {
        let mut teacher = Self::open(case.wound.base, spec, case.cx.compute)?;
        if spec.seam > 0.0 {
            let cuts = case.cuts().into_iter().zip(case.sizes);
            let cut = |((block, pruned), size): ((Block, usize), &f64)| Cut {
                base: block.layers().end as usize,
                pruned,
                size: *size,
            };
            teacher.cuts = cuts.map(cut).collect();
        }
        Ok(teacher)
    }

    /// What should be predicted for every token of window `number` but the first: by `weight` what the base predicts,
    /// for the rest the token itself.
    pub fn targets(&mut self, number: usize, window: &[u32]) -> Result<Vec<SoftTarget>> {
        let top_k = self.spec.top_k as usize;
        let mut bytes = vec![0; self.pairs_bytes(window)];
        let place = self.place(number, window)?;
        self.file.read_exact_at(&mut bytes, place)?;
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

    /// The lowest layer of the pruned model that a stream which is taught enters.
    pub fn lowest_seam(&self) -> Option<usize> {
        self.cuts.iter().map(|cut| cut.pruned).min()
    }

    /// What the stream should be behind the cuts that are taught, for every token of window `number`.
    pub fn seams(&mut self, number: usize, window: &[u32]) -> Result<Vec<Seam>> {
        let mut place = self.place(number, window)? + self.pairs_bytes(window) as u64;
        let (width, compute) = (self.base.config().hidden_size, self.base.compute());
        let mut bytes = vec![0; window.len() * width * size_of::<f32>()];
        let mut out = Vec::new();
        for cut in &self.cuts {
            self.file.read_exact_at(&mut bytes, place)?;
            place += bytes.len() as u64;
            let values: Vec<f32> =
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            let wanted = Tensor::from_vec(values, (window.len(), width), &compute.device)?;
            out.push(Seam { layer: cut.pruned, wanted: (wanted / cut.size)?, weight: self.spec.seam });
        }
        Ok(out)
    }

    /// Bytes of the predictions of a window; those of its streams follow.
    fn pairs_bytes(&self, window: &[u32]) -> usize {
        window.len().saturating_sub(1) * self.spec.top_k as usize * PAIR_BYTES
    }

    /// Where a window begins in the file, which it is written to when it is asked for first.
    fn place(&mut self, number: usize, window: &[u32]) -> Result<u64> {
        if let Some(place) = self.places.get(&number) {
            return Ok(*place);
        }
        let bytes = self.predict(window)?;
        self.file.write_all_at(&bytes, self.end)?;
        let place = self.end;
        self.places.insert(number, place);
        self.end += bytes.len() as u64;
        Ok(place)
    }

    /// The likeliest tokens at each place with their probabilities among themselves, then the streams.
    fn predict(&self, window: &[u32]) -> Result<Vec<u8>> {
        let batch = Batch::of(&[window]);
        let layer_count = self.base.config().layer_count;
        let mut streams = vec![Vec::new(); self.cuts.len()];
        let x = self.base.layers(
            self.base.embed(&batch)?,
            &self.base.pass(&batch),
            0..layer_count,
            |at, x| {
                for (_, stream) in self.cuts.iter().zip(&mut streams).filter(|(cut, _)| cut.base == at) {
                    *stream = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                }
                Ok(())
            },
        )?;
        let top_k = self.spec.top_k as usize;
        let shares = |_: usize, predicted: &[f32]| {
            let likeliest = likeliest(predicted, top_k);
            let sum: f64 = likeliest.iter().map(|(_, log)| f64::from(*log).exp()).sum();
            let share = |(token, log): (u32, f32)| (token, (f64::from(log).exp() / sum) as f32);
            likeliest.into_iter().map(share).collect::<SoftTarget>()
        };
        let all = self.base.each_prediction(&x.narrow(0, 0, window.len() - 1)?, shares)?;
        let pairs =
            all.into_iter().flatten().flat_map(|(token, share)| [token.to_le_bytes(), share.to_le_bytes()]);
        let values = streams.into_iter().flatten().map(f32::to_le_bytes);
        Ok(pairs.chain(values).flatten().collect())
    }
}
