//! The decoder: a loop over layers that we own. Between two layers lies one
//! tensor, the residual stream; everything else in the house happens there.

use std::ops::Range;

use candle_core::{DType, Tensor, Var};
use rayon::prelude::*;

use super::cache::KvCache;
use super::checkpoint::Checkpoint;
use super::kernel::left::Left;
use super::kernel::product::product;
use super::kernel::rows;
use super::layer::{Layer, Norm, Pass};
use super::weight::{Frozen, Weight, floats, with};
use super::{Compute, ops};
use crate::checkpoint::Config;
use crate::engine::{Error, Result};
use crate::job::spec::BaseBits;

/// A decoder ready to run. On the processor its weights stay in the mapped files; on another device, layers
/// that do not fit in memory together are read when their turn comes.
pub struct Decoder {
    checkpoint: Checkpoint,
    compute: Compute,
    /// `[vocab, h]`.
    embedding: Weight,
    /// Learned positions, `[max_position_embeddings, h]`.
    positions: Option<Tensor>,
    final_norm: Norm,
    /// `[vocab, h]`; the embedding when tied.
    head: Weight,
    /// `[vocab]`.
    head_bias: Option<Tensor>,
    layers: Vec<Stored>,
}

/// How a layer's weights are kept between uses.
enum Stored {
    /// Ready to run.
    Resident(Box<Layer>),
    /// In the mapped file only.
    OnDisk,
}

/// Rows of logits at a time: `rows × vocab` floats are the largest tensor of a forward pass.
const HEAD_ROWS: usize = 256;

/// Tokens sent through a checkpoint that was just written.
const PROOF_TOKENS: usize = 8;

/// Share of the free memory for activations that could be computed again: a third of a step's time is worth
/// memory that nobody uses, but not much of it.
const KEPT_SHARE: f64 = 0.05;

/// Share of the free memory that resident layers may take.
const RESIDENT_SHARE: f64 = 0.6;

impl Decoder {
    /// Opens a decoder for inference: resident if it fits in memory, else streamed layer by layer.
    pub fn open(checkpoint: &Checkpoint, compute: &Compute) -> Result<Self> {
        let fits = Self::fits(checkpoint, compute);
        Self::with_layers(checkpoint, compute, |index| {
            Ok(if fits {
                Stored::Resident(Box::new(Layer::load(checkpoint, index, compute)?))
            } else {
                Stored::OnDisk
            })
        })
    }

    /// Whether all layers fit in memory together.
    pub fn fits(checkpoint: &Checkpoint, compute: &Compute) -> bool {
        let needed = checkpoint.parameters() as f64 * compute.dtype.size_in_bytes() as f64;
        compute.native()
            || !compute.device.is_cpu()
            || available_memory_bytes().is_none_or(|free| needed < free * RESIDENT_SHARE)
    }

    /// Sends a few tokens through the checkpoint called `name`: it must give numbers.
    ///
    /// # Errors
    /// A model error when it does not.
    pub fn prove(&self, name: &str) -> Result<()> {
        let config = self.config();
        let len = PROOF_TOKENS.min(config.max_position_embeddings);
        let tokens: Vec<u32> = (0..len).map(|i| (i * 7919 % config.vocab_size) as u32).collect();
        let x = self.forward(&pad(&[&tokens], &self.compute)?)?.flatten_to(1)?;
        let sum = self.logits(&x)?.sum_all()?.to_scalar::<f32>()?;
        if sum.is_finite() {
            return Ok(());
        }
        Err(Error::model(format!(
            "{name}: the first tokens sent through it give numbers that are not finite; its values overflow in this \
             precision (try --precision f32), or the base is damaged"
        )))
    }

    /// Opens a decoder whose linear layers have the values that `bits` bits leave them, and are kept so.
    pub fn open_frozen(checkpoint: &Checkpoint, compute: &Compute, bits: BaseBits) -> Result<Self> {
        Self::with_layers(checkpoint, compute, |index| {
            let layer = match bits {
                BaseBits::Sixteen if compute.native() => Layer::load(checkpoint, index, compute)?,
                BaseBits::Sixteen => return Ok(Stored::OnDisk),
                BaseBits::Four | BaseBits::Eight => Layer::quantised(checkpoint, index, bits, compute)?,
            };
            Ok(Stored::Resident(Box::new(layer)))
        })
    }

    fn with_layers(
        checkpoint: &Checkpoint,
        compute: &Compute,
        mut store: impl FnMut(usize) -> Result<Stored>,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let names = config.family.names;
        let read = |name: String| checkpoint.tensor(&name, compute.dtype, &compute.device);
        let embedding = Weight::load_vocabulary(checkpoint, &config.embedding(), compute)?;
        let head = if config.tied {
            embedding.clone()
        } else {
            Weight::load_vocabulary(checkpoint, &format!("{}.weight", names.head), compute)?
        };
        let head_bias = config.family.head_bias.then(|| read(format!("{}.bias", names.head)));
        Ok(Self {
            embedding,
            positions: names.positions.map(|name| read(config.tensor(name))).transpose()?,
            head,
            head_bias: head_bias.transpose()?,
            final_norm: Norm::load(checkpoint, &format!("{}{}", config.base, names.final_norm), compute)?,
            layers: (0..config.layer_count).map(&mut store).collect::<Result<_>>()?,
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
            Stored::OnDisk => Layer::load(&self.checkpoint, index, &self.compute),
        }
    }

    /// Memory that a training step may keep activations in, instead of computing them again.
    pub fn room_bytes(&self) -> usize {
        available_memory_bytes().map_or(0, |free| (free * KEPT_SHARE) as usize)
    }

    /// Positions and masks for tokens at `start..start + len`.
    pub fn pass(&self, start: usize, len: usize) -> Result<Pass> {
        Pass::new(self.config(), start, len, self.compute.dtype, &self.compute.device)
    }

    /// Token ids `[b, t]` to the stream entering layer 0, `[b, t, h]`.
    pub fn embed(&self, tokens: &Tensor) -> Result<Tensor> {
        self.embed_from(0, tokens)
    }

    /// The same for tokens at positions `start..`.
    fn embed_from(&self, start: usize, tokens: &Tensor) -> Result<Tensor> {
        let (b, t) = tokens.dims2()?;
        let mut x = self.embedding.rows(&tokens.flatten_all()?, self.compute.dtype)?.reshape((b, t, ()))?;
        if self.config().embedding_scale != 1.0 {
            x = (x * self.config().embedding_scale)?;
        }
        if let Some(positions) = &self.positions {
            let most = positions.dim(0)?;
            if start + t > most {
                return Err(Error::spec(format!(
                    "a text of {} tokens, but the model has learned {most} positions",
                    start + t
                )));
            }
            x = x.broadcast_add(&positions.narrow(0, start, t)?)?;
        }
        Ok(x)
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

    /// The place in texts of `len` tokens from where on they must be read, with what `cache` holds of
    /// them. Usually its end; but some rotations turn all tokens anew when a text outgrows a length,
    /// and then the cache is emptied.
    pub fn unread(&self, cache: &mut KvCache, len: usize) -> usize {
        if cache.len > 0 && self.config().ropes.iter().any(|rope| rope.changes(cache.len, len)) {
            cache.len = 0;
        }
        cache.len
    }

    /// The next tokens `[b, t]` of sequences whose past is in `cache`; the stream as [`Self::forward`].
    pub fn step(&self, tokens: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let t = tokens.dim(1)?;
        let pass = self.pass(cache.len, t)?;
        let mut x = self.embed_from(cache.len, tokens)?;
        for (index, cache) in cache.layers.iter_mut().enumerate() {
            x = self.layer(index)?.forward(&x, &pass, Some(cache))?;
        }
        cache.len += t;
        Ok(x)
    }

    /// Final norm and head: streams `[n, h]` to logits `[n, vocab]`, float32.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.head_logits(&self.final_norm.forward(x)?)
    }

    /// The head alone, for normed streams `[n, h]`.
    fn head_logits(&self, normed: &Tensor) -> Result<Tensor> {
        let mut logits = self.head.product(normed)?;
        if let Some(bias) = &self.head_bias {
            logits = logits.broadcast_add(bias)?;
        }
        let mut logits = logits.to_dtype(DType::F32)?;
        if self.config().logit_scale != 1.0 {
            logits = (logits * self.config().logit_scale)?;
        }
        Ok(match self.config().final_cap {
            Some(cap) => ops::soft_cap(&logits, cap)?,
            None => logits,
        })
    }

    /// Negative log-likelihood of `targets[i]` after the stream `x[i]`, in nats, for `x [n, h]` as
    /// [`Self::forward`] gives it, and the gradient of `scale` times their sum for `x`. Works
    /// through the vocabulary a few rows at a time.
    pub fn token_nll_backward(&self, x: &Tensor, targets: &[u32], scale: f64) -> Result<(Vec<f32>, Tensor)> {
        if let Some(head) = self.head.frozen() {
            return self.token_nll_native(head, x, targets, scale as f32);
        }
        let scale = scale * self.config().logit_scale;
        let (mut nll, mut gradients) = (Vec::with_capacity(targets.len()), Vec::new());
        for (i, targets) in targets.chunks(HEAD_ROWS).enumerate() {
            let x = Var::from_tensor(&x.narrow(0, i * HEAD_ROWS, targets.len())?)?;
            let normed = self.final_norm.forward(&x)?;
            let logits = self.head_logits(&normed.detach())?;
            let (chunk, mut gap) = ops::cross_entropy(&logits, targets)?;
            if let Some(cap) = self.config().final_cap {
                // d/dx cap·tanh(x/cap) = 1 - tanh², and the capped logit is cap·tanh.
                gap = (gap * (1.0 - (logits / cap)?.sqr()?)?)?;
            }
            let upstream = (self.head.back(&gap.to_dtype(normed.dtype())?)? * scale)?;
            let mut store = ops::backward_from(&normed, &upstream)?;
            nll.extend(chunk);
            gradients.push(store.remove(&x).ok_or_else(|| Error::bug("the final norm gave no gradient"))?);
        }
        Ok((nll, Tensor::cat(&gradients, 0)?))
    }

    fn token_nll_native(
        &self,
        head: &Frozen,
        x: &Tensor,
        targets: &[u32],
        scale: f32,
    ) -> Result<(Vec<f32>, Tensor)> {
        let (n, h) = x.dims2()?;
        let config = self.config();
        let (logit_scale, cap) = (config.logit_scale as f32, config.final_cap.map(|cap| cap as f32));
        let norm = self.final_norm.native()?;
        let bias = self.head_bias.as_ref().map(floats).transpose()?;
        let mut dx = vec![0f32; n * h];
        let mut nll = vec![0f32; n];
        with(x, |x| {
            let chunks = x.chunks(HEAD_ROWS * h).zip(dx.chunks_mut(HEAD_ROWS * h));
            for ((x, dx), (nll, targets)) in
                chunks.zip(nll.chunks_mut(HEAD_ROWS).zip(targets.chunks(HEAD_ROWS)))
            {
                let normed = Left::from_rows(targets.len(), h, head.rounding, |i, out| {
                    norm.row(&x[i * h..(i + 1) * h], out);
                });
                let mut logits = product(&normed, &head.matrix, head.side(false));
                let vocab = logits.len() / targets.len();
                logits.par_chunks_mut(vocab).zip(nll).zip(targets).for_each(|((logits, nll), target)| {
                    if let Some(bias) = &bias {
                        rows::add_scaled(logits, 1.0, bias);
                    }
                    rows::finish_logits(logits, logit_scale, cap);
                    *nll = rows::cross_entropy(logits, *target as usize, cap, scale * logit_scale);
                });
                let d_normed =
                    product(&Left::new(&logits, vocab, head.rounding), &head.matrix, head.side(true));
                let rows = dx.par_chunks_mut(h).zip(x.par_chunks(h)).zip(d_normed.par_chunks(h));
                rows.for_each(|((dx, x), dy)| norm.back(x, dy, dx));
            }
        })?;
        Ok((nll, Tensor::from_vec(dx, (n, h), &self.compute.device)?))
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
