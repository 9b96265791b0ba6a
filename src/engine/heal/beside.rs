//! The base model and what healing has left of it, side by side on the same text: at each cut it is seen what the
//! stream behind it should be, and what it is. A layer of each is in memory at a time.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::Case;
use crate::engine::model::layer::{Layer, Pass};
use crate::engine::model::streams::Streams;
use crate::engine::model::weight::with;
use crate::engine::model::{Checkpoint, Decoder};
use crate::engine::{Cx, Result};
use crate::job::report::{Block, Repaired};

/// Windows that go through a layer together.
const WINDOWS: usize = 8;

pub struct Beside<'a> {
    base: Walker,
    healed: Walker,
    /// The first layers that are the same in both.
    alike: usize,
    /// By block: how many times smaller the healed model's stream is behind it than the base's, by what other
    /// methods did to its layers.
    sizes: &'a [f64],
    cx: Cx<'a>,
}

/// The streams of one model at a seam.
struct Walker {
    decoder: Decoder,
    passes: Vec<Pass>,
    streams: Streams,
    /// The next layer to go through.
    at: usize,
}

impl Walker {
    fn open(checkpoint: &Checkpoint, windows: &[Vec<u32>], cx: Cx) -> Result<Self> {
        let decoder = Decoder::open(checkpoint, cx.compute)?;
        let texts: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
        let (passes, streams) = decoder.packed(&texts, WINDOWS)?;
        Ok(Self { decoder, passes, streams, at: 0 })
    }

    fn go_to(&mut self, layer: usize, task: &str, cx: Cx) -> Result<()> {
        let layers: Vec<usize> = (self.at..layer).collect();
        let last = self.passes.len() - 1;
        self.decoder.carry(&mut self.streams, &self.passes, &layers, |done, batch, _| {
            if batch == last {
                cx.advanced(task, done as u64 + 1, layer as u64, "layers")
            } else {
                cx.check()
            }
        })?;
        self.at = layer;
        Ok(())
    }
}

impl<'a> Beside<'a> {
    pub fn open(case: &'a Case) -> Result<Self> {
        let windows = &case.windows.train;
        Ok(Self {
            base: Walker::open(case.wound.base, windows, case.cx)?,
            healed: Walker::open(case.source, windows, case.cx)?,
            alike: alike(case.wound.base, case.source)?,
            sizes: case.sizes,
            cx: case.cx,
        })
    }

    /// Goes on to block `index` of the cut, which begins at layer `seam` of the healed model: the base to behind it,
    /// the healed model to `before` layers before it.
    pub fn go_to(&mut self, block: Block, seam: usize, before: usize) -> Result<()> {
        // What both do alike is done once.
        let together = self.alike.min(seam - before);
        if self.healed.at == 0 && self.base.at < together {
            self.base.go_to(together, "through both models", self.cx)?;
            (self.healed.streams, self.healed.at) = (self.base.streams.copy()?, together);
        }
        self.base.go_to(block.layers().end as usize, "through the base model", self.cx)?;
        self.healed.go_to(seam - before, "through the pruned model", self.cx)
    }

    pub fn batches(&self) -> usize {
        self.base.streams.len()
    }

    /// Rows of each window of a batch, in their order.
    pub fn windows(&self, batch: usize) -> impl Iterator<Item = usize> {
        self.base.passes[batch].sequences().iter().map(|text| text.queries.len())
    }

    /// What the stream behind block `index` should be, on the healed model's scale: `[rows, h]`, float32.
    pub fn wanted(&self, index: usize, batch: usize) -> Result<Tensor> {
        Ok((here(&self.base.streams.get(batch)?)? / self.sizes[index])?)
    }

    /// The healed model's stream where it stands: `[rows, h]`, float32.
    pub fn found(&self, batch: usize) -> Result<Tensor> {
        here(&self.healed.streams.get(batch)?)
    }

    /// The same as it is, and the texts it is of.
    pub fn entering(&self, batch: usize) -> Result<(Tensor, &Pass)> {
        Ok((self.healed.streams.get(batch)?, &self.healed.passes[batch]))
    }

    /// Layer `index` of the healed model, as its checkpoint has it.
    pub fn layer(&self, index: usize) -> Result<Layer> {
        self.healed.decoder.layer(index)
    }

    /// Goes through `layer` in the place of the healed model's next one.
    pub fn through(&mut self, layer: &Layer) -> Result<()> {
        for batch in 0..self.batches() {
            self.cx.check()?;
            let leaving =
                layer.forward(&self.healed.streams.get(batch)?, &self.healed.passes[batch], None)?;
            self.healed.streams.set(batch, &leaving)?;
        }
        self.healed.decoder.release(self.healed.at);
        self.healed.at += 1;
        Ok(())
    }

    /// Has the healed model's stream be another.
    pub fn repair(&mut self, batch: usize, x: &Tensor) -> Result<()> {
        let compute = self.healed.decoder.compute();
        let x = x.to_dtype(compute.dtype)?.to_device(&compute.device)?;
        self.healed.streams.set(batch, &x)
    }

    /// Goes through the next layer of the healed model. `see(batch, what its MLP gives, what leaves the layer)`, both
    /// `[rows, h]`, float32.
    pub fn through_layer(
        &mut self,
        mut see: impl FnMut(&Self, usize, &Tensor, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let layer: Layer = self.healed.decoder.layer(self.healed.at)?;
        for batch in 0..self.batches() {
            self.cx.check()?;
            let x = self.healed.streams.get(batch)?;
            let (middle, leaving) = layer.halves(&x, &self.healed.passes[batch])?;
            self.healed.streams.set(batch, &leaving)?;
            let leaving = here(&leaving)?;
            let given = (&leaving - Tensor::from_slice(&middle, leaving.shape(), &Device::Cpu)?)?;
            see(self, batch, &given, &leaving)?;
        }
        self.healed.decoder.release(self.healed.at);
        self.healed.at += 1;
        Ok(())
    }

    /// How far the healed model's stream is from what is wanted behind block `index`: the mean over tokens of the
    /// square of what it lacks, relative to the square of what is wanted.
    pub fn error(&self, index: usize) -> Result<f64> {
        let (mut sum, mut rows) = (0.0, 0);
        for batch in 0..self.batches() {
            let each = relative_errors(&self.wanted(index, batch)?, &self.found(batch)?)?;
            sum += each.iter().sum::<f64>();
            rows += each.len();
        }
        Ok(sum / rows.max(1) as f64)
    }

    /// Calls `repair`, and says what came of it behind block `index`.
    pub fn repaired(
        &mut self,
        index: usize,
        block: Block,
        repair: impl FnOnce(&mut Self) -> Result<f64>,
    ) -> Result<Repaired> {
        let error_before = self.error(index)?;
        let factor = repair(self)?;
        Ok(Repaired { block, factor, error_before, error_after: self.error(index)? })
    }
}

/// The first layers that have the same bytes in both, if embeddings have.
fn alike(base: &Checkpoint, healed: &Checkpoint) -> Result<usize> {
    let same = |prefix: &str, but: &str| -> Result<bool> {
        let of = |checkpoint: &Checkpoint| -> Vec<String> {
            let names = checkpoint.index().tensors.keys();
            names.filter(|name| name.starts_with(prefix) && !name.starts_with(but)).cloned().collect()
        };
        let names = of(base);
        for name in &names {
            let (a, b) = (base.mapped(name)?, healed.info(name).map(|_| healed.mapped(name)).transpose()?);
            let same = b.is_some_and(|b| a == b);
            base.release(name);
            healed.release(name);
            if !same {
                return Ok(false);
            }
        }
        Ok(names == of(healed))
    };
    let config = base.config();
    if !same(config.base, &config.layers_prefix())? {
        return Ok(0);
    }
    let most = config.layer_count.min(healed.config().layer_count);
    for layer in 0..most {
        if !same(&config.in_layer(layer, ""), "\0")? {
            return Ok(layer);
        }
    }
    Ok(most)
}

/// By row of both.
fn relative_errors(wanted: &Tensor, found: &Tensor) -> Result<Vec<f64>> {
    let h = wanted.dim(1)?;
    let each = |wanted: &[f32], found: &[f32]| {
        let row = |(wanted, found): (&[f32], &[f32])| {
            let lacking: f64 = wanted.iter().zip(found).map(|(w, f)| f64::from(w - f).powi(2)).sum();
            lacking / wanted.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().max(f64::MIN_POSITIVE)
        };
        wanted.par_chunks(h).zip(found.par_chunks(h)).map(row).collect()
    };
    Ok(with(wanted, |wanted| with(found, |found| each(wanted, found)))??)
}

/// On the processor, in float32.
fn here(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)
}
