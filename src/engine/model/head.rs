//! Where the stream is read: the final norm, and the head that says which token comes next.

use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;

use super::checkpoint::Checkpoint;
use super::kernel::buffer::Buffer;
use super::kernel::left::Left;
use super::kernel::matrix::Side;
use super::kernel::product::{outer, product};
use super::kernel::rows::{self, Odds, SoftTarget};
use super::layer::Norm;
use super::weight::{Frozen, Weight, floats, with};
use super::{Compute, ops};
use crate::engine::{Error, Result};

/// Rows of logits at a time: `rows × vocab` floats are the largest table of a step.
const ROWS: usize = 256;
/// Rows whose likelihoods are found at once, and logits of each that are held: two megabytes a core.
const LIKELIHOOD_ROWS: usize = 512;
const VOCABULARY_BLOCK: usize = 2048;

/// Final norm and head. Cheap to clone.
#[derive(Clone)]
pub struct Head {
    norm: Norm,
    /// `[vocab, h]`; the embedding when tied.
    weight: Weight,
    /// `[vocab]`.
    bias: Option<Tensor>,
    scale: f64,
    cap: Option<f64>,
    /// The gradient of the weight is wanted.
    trained: bool,
}

/// What comes of the loss at the head.
pub struct HeadLoss {
    /// Cross-entropy of each row, in nats.
    pub nll: Vec<f32>,
    /// Gradient for the stream leaving the last layer, `[n, h]`.
    pub stream: Tensor,
    /// Gradient for the weight, `[vocab, h]`, where it is trained.
    pub weight: Option<Tensor>,
}

impl Head {
    pub fn load(checkpoint: &Checkpoint, embedding: &Weight, compute: &Compute) -> Result<Self> {
        let config = checkpoint.config();
        let names = config.family.names;
        let bias = config.family.head_bias.then(|| format!("{}.bias", names.head));
        let bias = bias.map(|name| checkpoint.tensor(&name, compute.dtype, &compute.device));
        Ok(Self {
            norm: Norm::load(checkpoint, &format!("{}{}", config.base, names.final_norm), compute)?,
            weight: if config.tied {
                embedding.clone()
            } else {
                Weight::load_vocabulary(checkpoint, &format!("{}.weight", names.head), compute)?
            },
            bias: bias.transpose()?,
            scale: config.logit_scale,
            cap: config.final_cap,
            trained: false,
        })
    }

    /// The same with a weight `[vocab, h]`, float32, of which the gradient is wanted.
    pub fn trained(&self, weight: &Tensor, compute: &Compute) -> Result<Self> {
        Ok(Self { weight: Weight::of(weight, compute)?, trained: true, ..self.clone() })
    }

    /// Streams `[n, h]` to logits `[n, vocab]`, float32.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.of_normed(&self.norm.forward(x)?)
    }

    /// What `of(row, logarithms of the probabilities of all tokens)` makes of each row of `x [n, h]`.
    pub fn each_prediction<T: Send>(
        &self,
        x: &Tensor,
        of: impl Fn(usize, &[f32]) -> T + Sync,
    ) -> Result<Vec<T>> {
        let (n, _) = x.dims2()?;
        let mut out = Vec::with_capacity(n);
        for first in (0..n).step_by(ROWS) {
            let logits = self.logits(&x.narrow(0, first, ROWS.min(n - first))?)?;
            let vocab = logits.dim(1)?;
            let mut rows: Vec<f32> = logits.flatten_all()?.to_vec1()?;
            let each = rows.par_chunks_mut(vocab).enumerate().map(|(row, predicted)| {
                rows::log_softmax(predicted);
                of(first + row, predicted)
            });
            out.par_extend(each);
        }
        Ok(out)
    }

    /// How likely `targets[i]` is after the stream `x[i]`, for `x [n, h]`, and which token is the likeliest.
    pub fn odds(&self, x: &Tensor, targets: &[u32]) -> Result<Vec<Odds>> {
        match self.native()? {
            Some(head) => head.odds(x, targets),
            None => self.odds_candle(x, targets),
        }
    }

    fn odds_candle(&self, x: &Tensor, targets: &[u32]) -> Result<Vec<Odds>> {
        let mut out = Vec::with_capacity(targets.len());
        for (i, targets) in targets.chunks(ROWS).enumerate() {
            let logits = self.logits(&x.narrow(0, i * ROWS, targets.len())?)?;
            let vocab = logits.dim(1)?;
            let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
            let rows = logits.par_chunks(vocab).zip(targets);
            out.par_extend(rows.map(|(row, id)| {
                let mut odds = Odds::of(*id as usize);
                odds.add(row, 0);
                odds
            }));
        }
        Ok(out)
    }

    /// Cross-entropy of `targets[i]` and what is predicted after the stream `x[i]`, for `x [n, h]`, and the gradients
    /// of `scale` times their sum. Works through the rows a few at a time.
    pub fn backward(&self, x: &Tensor, targets: &[SoftTarget], scale: f64) -> Result<HeadLoss> {
        match self.native()? {
            Some(head) => head.backward(x, targets, scale as f32, self.trained),
            None => self.backward_candle(x, targets, scale * self.scale),
        }
    }

    fn backward_candle(&self, x: &Tensor, targets: &[SoftTarget], scale: f64) -> Result<HeadLoss> {
        let (mut nll, mut gradients) = (Vec::with_capacity(targets.len()), Vec::new());
        let mut d_weight: Option<Tensor> = None;
        for (i, targets) in targets.chunks(ROWS).enumerate() {
            let x = Var::from_tensor(&x.narrow(0, i * ROWS, targets.len())?)?;
            let normed = self.norm.forward(&x)?;
            let logits = self.of_normed(&normed.detach())?;
            let (chunk, mut gap) = ops::cross_entropy(&logits, targets)?;
            if let Some(cap) = self.cap {
                // d/dx cap·tanh(x/cap) = 1 - tanh², and the capped logit is cap·tanh.
                gap = (gap * (1.0 - (logits / cap)?.sqr()?)?)?;
            }
            if self.trained {
                let more = (gap.t()?.matmul(&normed.detach().to_dtype(DType::F32)?)? * scale)?;
                d_weight = Some(match d_weight {
                    None => more,
                    Some(sum) => (sum + more)?,
                });
            }
            let upstream = (self.weight.back(&gap.to_dtype(normed.dtype())?)? * scale)?;
            let mut store = ops::backward_from(&normed, &upstream)?;
            nll.extend(chunk);
            gradients.push(store.remove(&x).ok_or_else(|| Error::bug("the final norm gave no gradient"))?);
        }
        Ok(HeadLoss { nll, stream: Tensor::cat(&gradients, 0)?, weight: d_weight })
    }

    /// The head alone, for normed streams `[n, h]`.
    fn of_normed(&self, normed: &Tensor) -> Result<Tensor> {
        let mut logits = self.weight.product(normed)?;
        if let Some(bias) = &self.bias {
            logits = logits.broadcast_add(bias)?;
        }
        let mut logits = logits.to_dtype(DType::F32)?;
        if self.scale != 1.0 {
            logits = (logits * self.scale)?;
        }
        Ok(match self.cap {
            Some(cap) => ops::soft_cap(&logits, cap)?,
            None => logits,
        })
    }

    /// On our own kernels, where they can take it.
    fn native(&self) -> Result<Option<Native<'_>>> {
        let Some(weight) = self.weight.frozen() else { return Ok(None) };
        Ok(Some(Native {
            weight,
            norm: self.norm.native()?,
            bias: self.bias.as_ref().map(floats).transpose()?,
            scale: self.scale as f32,
            cap: self.cap.map(|cap| cap as f32),
        }))
    }
}

/// Final norm and head, for our own kernels.
struct Native<'a> {
    weight: &'a Frozen,
    norm: rows::Norm,
    bias: Option<Vec<f32>>,
    scale: f32,
    cap: Option<f32>,
}

impl Native<'_> {
    /// A block of the vocabulary at a time, so that logits never leave the cache.
    fn odds(&self, x: &Tensor, targets: &[u32]) -> Result<Vec<Odds>> {
        let h = x.dim(1)?;
        let matrix = &self.weight.matrix;
        let mut all: Vec<Odds> = targets.iter().map(|id| Odds::of(*id as usize)).collect();
        with(x, |x| {
            for (x, odds) in x.chunks(LIKELIHOOD_ROWS * h).zip(all.chunks_mut(LIKELIHOOD_ROWS)) {
                let normed = self.normed(x, h);
                for first in (0..matrix.rows).step_by(VOCABULARY_BLOCK) {
                    let block = first..(first + VOCABULARY_BLOCK).min(matrix.rows);
                    let width = block.len();
                    let mut logits = product(&normed, &matrix.part(block), Side::Rows);
                    logits.par_chunks_mut(width).zip(&mut *odds).for_each(|(logits, odds)| {
                        self.finish(logits, first);
                        odds.add(logits, first);
                    });
                }
            }
        })?;
        Ok(all)
    }

    fn backward(&self, x: &Tensor, targets: &[SoftTarget], scale: f32, trained: bool) -> Result<HeadLoss> {
        let (n, h) = x.dims2()?;
        let matrix = &self.weight.matrix;
        let mut d_weight = Buffer::zeros(if trained { matrix.rows * h } else { 0 });
        let mut dx = vec![0f32; n * h];
        let mut nll = vec![0f32; n];
        with(x, |x| {
            let chunks = x.chunks(ROWS * h).zip(dx.chunks_mut(ROWS * h));
            for ((x, dx), (nll, targets)) in chunks.zip(nll.chunks_mut(ROWS).zip(targets.chunks(ROWS))) {
                let normed = self.normed(x, h);
                let mut logits = product(&normed, matrix, self.weight.side(false));
                let vocab = logits.len() / targets.len();
                logits.par_chunks_mut(vocab).zip(nll).zip(targets).for_each(|((logits, nll), target)| {
                    self.finish(logits, 0);
                    *nll = rows::cross_entropy(logits, target, self.cap, scale * self.scale);
                });
                if trained {
                    let more = outer(&logits, vocab, h, |i, first, out| normed.read(i, first, out));
                    let rows = d_weight.par_chunks_mut(h).zip(more.par_chunks(h));
                    rows.for_each(|(d_weight, more)| rows::add_scaled(d_weight, 1.0, more));
                }
                let gradient = Left::new(&logits, vocab, self.weight.rounding);
                let d_normed = product(&gradient, matrix, self.weight.side(true));
                let rows = dx.par_chunks_mut(h).zip(x.par_chunks(h)).zip(d_normed.par_chunks(h));
                rows.for_each(|((dx, x), dy)| self.norm.back(x, dy, dx));
            }
        })?;
        let d_weight = trained.then(|| Tensor::from_slice(&d_weight, (matrix.rows, h), &Device::Cpu));
        Ok(HeadLoss {
            nll,
            stream: Tensor::from_vec(dx, (n, h), &Device::Cpu)?,
            weight: d_weight.transpose()?,
        })
    }

    /// The rows of a stream `[n, h]`, normed.
    fn normed(&self, x: &[f32], h: usize) -> Left {
        Left::from_rows(x.len() / h, h, self.weight.rounding, |i, out| {
            self.norm.row(&x[i * h..(i + 1) * h], out);
        })
    }

    /// Products with the head's rows `first..` become logits.
    fn finish(&self, products: &mut [f32], first: usize) {
        if let Some(bias) = &self.bias {
            rows::add_scaled(products, 1.0, &bias[first..first + products.len()]);
        }
        rows::finish_logits(products, self.scale, self.cap);
    }
}
