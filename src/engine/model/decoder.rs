//! The decoder: a loop over layers that we own. Between two layers lies one
//! tensor, the residual stream; everything else in the house happens there.

use std::ops::Range;

use candle_core::{DType, Tensor, Var};

use super::cache::KvCache;
use super::checkpoint::{Checkpoint, EMBEDDING, FINAL_NORM, HEAD};
use super::config::Config;
use super::layer::{Layer, Pass};
use super::quant::QuantizedLayer;
use super::{Compute, ops};
use crate::engine::{Error, Result};
use crate::job::spec::BaseBits;

/// A decoder ready to run. Layers that do not fit in memory together are read
/// from the mapped checkpoint when their turn comes.
pub struct Decoder {
    checkpoint: Checkpoint,
    compute: Compute,
    /// `[vocab, h]`.
    embedding: Tensor,
    final_norm: Tensor,
    /// `[vocab, h]`; the embedding when tied.
    head: Tensor,
    layers: Vec<Stored>,
}

/// How a layer's weights are kept between uses.
enum Stored {
    /// Ready to run.
    Resident(Box<Layer>),
    /// Packed to 4 or 8 bits.
    Packed(QuantizedLayer),
    /// In the mapped file only.
    OnDisk,
}

/// Rows of logits at a time: `rows × vocab` floats are the largest tensor of a forward pass.
const HEAD_ROWS: usize = 256;

/// Share of the free memory that resident layers may take.
const RESIDENT_SHARE: f64 = 0.6;

impl Decoder {
    /// Opens a decoder for inference: resident if it fits in memory, else streamed layer by layer.
    pub fn open(checkpoint: &Checkpoint, compute: &Compute) -> Result<Self> {
        let needed = checkpoint.parameters() as f64 * compute.dtype.size_in_bytes() as f64;
        let fits = !compute.device.is_cpu()
            || available_memory_bytes().is_none_or(|free| needed < free * RESIDENT_SHARE);
        Self::with_layers(checkpoint, compute, |index| {
            Ok(if fits {
                Stored::Resident(Box::new(Layer::load(checkpoint, index, compute)?))
            } else {
                Stored::OnDisk
            })
        })
    }

    /// Opens a decoder whose layers stay on disk until used.
    pub fn open_streamed(checkpoint: &Checkpoint, compute: &Compute) -> Result<Self> {
        Self::with_layers(checkpoint, compute, |_| Ok(Stored::OnDisk))
    }

    /// Opens a decoder whose linear layers are kept in `bits` bits and unpacked when used.
    pub fn open_frozen(checkpoint: &Checkpoint, compute: &Compute, bits: BaseBits) -> Result<Self> {
        Self::with_layers(checkpoint, compute, |index| {
            Ok(match bits {
                BaseBits::Sixteen => Stored::OnDisk,
                BaseBits::Four | BaseBits::Eight => {
                    Stored::Packed(QuantizedLayer::pack(checkpoint, index, bits)?)
                }
            })
        })
    }

    fn with_layers(
        checkpoint: &Checkpoint,
        compute: &Compute,
        mut store: impl FnMut(usize) -> Result<Stored>,
    ) -> Result<Self> {
        let read = |name: &str| checkpoint.tensor(name, compute.dtype, &compute.device);
        let embedding = read(EMBEDDING)?;
        let head = if checkpoint.config().tied { embedding.clone() } else { read(HEAD)? };
        Ok(Self {
            embedding,
            head,
            final_norm: read(FINAL_NORM)?,
            layers: (0..checkpoint.config().layer_count).map(&mut store).collect::<Result<_>>()?,
            checkpoint: checkpoint.clone(),
            compute: compute.clone(),
        })
    }

    pub fn config(&self) -> &Config {
        self.checkpoint.config()
    }

    pub fn compute(&self) -> &Compute {
        &self.compute
    }

    /// Layer `index`, its weights ready to use. Dropping it frees them unless they are resident.
    pub fn layer(&self, index: usize) -> Result<Layer> {
        match &self.layers[index] {
            Stored::Resident(layer) => Ok(Layer::clone(layer)),
            Stored::Packed(packed) => packed.unpack(&self.checkpoint, index, &self.compute),
            Stored::OnDisk => Layer::load(&self.checkpoint, index, &self.compute),
        }
    }

    /// Positions and masks for tokens at `start..start + len`.
    pub fn pass(&self, start: usize, len: usize) -> Result<Pass> {
        Pass::new(self.config(), start, len, self.compute.dtype, &self.compute.device)
    }

    /// Token ids `[b, t]` to the stream entering layer 0, `[b, t, h]`.
    pub fn embed(&self, tokens: &Tensor) -> Result<Tensor> {
        let (b, t) = tokens.dims2()?;
        Ok(self.embedding.embedding(&tokens.flatten_all()?)?.reshape((b, t, ()))?)
    }

    /// Runs layers `range` on the stream `x [b, t, h]`; `visit(l, stream)` sees the stream entering
    /// layer `l` for each seam `l` behind a layer run: `range.start + 1 ..= range.end`.
    pub fn layers(
        &self,
        x: Tensor,
        range: Range<usize>,
        mut visit: impl FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let pass = self.pass(0, x.dim(1)?)?;
        let mut x = x;
        for index in range {
            x = self.layer(index)?.forward(&x, &pass, None)?;
            visit(index + 1, &x)?;
        }
        Ok(x)
    }

    /// Token ids `[b, t]` to the stream leaving the last layer, `[b, t, h]`, before the final norm.
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        self.layers(self.embed(tokens)?, 0..self.config().layer_count, |_, _| Ok(()))
    }

    /// An empty cache for `batch` sequences of at most `capacity` tokens.
    pub fn cache(&self, batch: usize, capacity: usize) -> Result<KvCache> {
        KvCache::new(self.config(), batch, capacity, self.compute.dtype, &self.compute.device)
    }

    /// The next tokens `[b, t]` of sequences whose past is in `cache`; the stream as [`Self::forward`].
    pub fn step(&self, tokens: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let t = tokens.dim(1)?;
        let pass = self.pass(cache.len, t)?;
        let mut x = self.embed(tokens)?;
        for (index, cache) in cache.layers.iter_mut().enumerate() {
            x = self.layer(index)?.forward(&x, &pass, Some(cache))?;
        }
        cache.len += t;
        Ok(x)
    }

    /// Final norm and head: streams `[n, h]` to logits `[n, vocab]`, float32.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let x = ops::rms_norm(x, &self.final_norm, self.config().norm_eps)?;
        Ok(x.matmul(&self.head.t()?)?.to_dtype(DType::F32)?)
    }

    /// Negative log-likelihood of `targets[i]` after the stream `x[i]`, in nats, for `x [n, h]` as
    /// [`Self::forward`] gives it, and the gradient of `scale` times their sum for `x`. Works
    /// through the vocabulary a few rows at a time.
    pub fn token_nll_backward(&self, x: &Tensor, targets: &[u32], scale: f64) -> Result<(Vec<f32>, Tensor)> {
        let (mut nll, mut gradients) = (Vec::with_capacity(targets.len()), Vec::new());
        for (i, targets) in targets.chunks(HEAD_ROWS).enumerate() {
            let x = Var::from_tensor(&x.narrow(0, i * HEAD_ROWS, targets.len())?)?;
            let normed = ops::rms_norm(&x, &self.final_norm, self.config().norm_eps)?;
            let logits = normed.detach().matmul(&self.head.t()?)?.to_dtype(DType::F32)?;
            let (chunk, gap) = ops::cross_entropy(&logits, targets)?;
            let upstream = (gap.to_dtype(normed.dtype())?.matmul(&self.head)? * scale)?;
            let mut store = ops::backward_from(&normed, &upstream)?;
            nll.extend(chunk);
            gradients.push(store.remove(&x).ok_or_else(|| Error::bug("the final norm gave no gradient"))?);
        }
        Ok((nll, Tensor::cat(&gradients, 0)?))
    }
}

/// Sequences of token ids, right-padded with 0 to one `[b, t]` tensor. Attention
/// is causal, so what stands behind a sequence's end changes nothing before it.
pub fn pad(sequences: &[&[u32]], compute: &Compute) -> Result<Tensor> {
    let t = sequences.iter().map(|s| s.len()).max().unwrap_or(0);
    if t == 0 {
        return Err(Error::bug("an empty batch"));
    }
    let mut ids = vec![0; sequences.len() * t];
    for (row, sequence) in ids.chunks_mut(t).zip(sequences) {
        row[..sequence.len()].copy_from_slice(sequence);
    }
    Ok(Tensor::from_vec(ids, (sequences.len(), t), &compute.device)?)
}

/// `MemAvailable` of Linux; none where it cannot be read.
fn available_memory_bytes() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<f64>().ok().map(|kib| kib * 1024.0)
}
