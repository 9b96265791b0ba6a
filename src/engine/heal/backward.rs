//! Loss and adapter gradients, layer by layer through the seams.
//!
//! Forward keeps only the stream entering each layer. Backward takes the layers
//! in reverse: runs one again from its seam, this time with a graph, and pulls
//! the gradient through it. So one layer's graph is in memory at a time, and its
//! weights are unpacked twice instead of kept (activation checkpointing by construction).

use candle_core::{Tensor, Var};

use crate::engine::eval::loglikelihood::{Request, likelihoods};
use crate::engine::model::checkpoint::LINEARS;
use crate::engine::model::layer::Layer;
use crate::engine::model::lora::{Adapter, Dropout, stream_key};
use crate::engine::model::{Config, Decoder, ops, pad};
use crate::engine::{Cx, Error, Result};
use crate::job::preset::QloraSettings;

/// The adapters of all layers, as variables: `A` and `B` in turn, by layer and linear.
pub struct Adapters {
    pub variables: Vec<Var>,
    /// Indices into [`LINEARS`], ascending.
    pub targets: Vec<usize>,
    scale: f64,
    dropout: f64,
}

/// What identifies one micro-batch, for the draws of dropout.
#[derive(Clone, Copy)]
pub struct Draw {
    pub seed: u64,
    pub step: u32,
    pub micro_batch: usize,
}

impl Adapters {
    /// Fresh adapters on every layer.
    ///
    /// # Errors
    /// A spec error when a target is no linear layer.
    pub fn new(
        config: &Config,
        settings: &QloraSettings,
        seed: u64,
        device: &candle_core::Device,
    ) -> Result<Self> {
        let mut targets = Vec::new();
        for target in &settings.targets {
            let found = LINEARS.iter().position(|(name, _)| name == target);
            targets.push(found.ok_or_else(|| {
                let names = LINEARS.map(|(name, _)| name).join(", ");
                Error::spec(format!(
                    "heal target \"{target}\" is no linear layer of this model; there are {names}"
                ))
            })?);
        }
        targets.sort_unstable();
        targets.dedup();
        let rank = settings.rank as usize;
        let scale = settings.alpha / f64::from(settings.rank);
        let mut variables = Vec::new();
        for layer in 0..config.layer_count {
            for target in &targets {
                let key = stream_key(&[seed, layer as u64, *target as u64]);
                let adapter = Adapter::new(rank, config.linear_shape(*target), scale, key, device)?;
                variables.push(Var::from_tensor(&adapter.a)?);
                variables.push(Var::from_tensor(&adapter.b)?);
            }
        }
        Ok(Self { variables, targets, scale, dropout: settings.dropout })
    }

    pub fn layer_count(&self) -> usize {
        self.variables.len() / (2 * self.targets.len())
    }

    /// Trained parameters.
    pub fn parameters(&self) -> u64 {
        self.variables.iter().map(|v| v.elem_count() as u64).sum()
    }

    /// The adapter on `LINEARS[target]` of `layer`, without dropout and gradient.
    pub fn trained(&self, layer: usize, target: usize) -> Option<Adapter> {
        let place = self.targets.iter().position(|t| *t == target)?;
        let at = 2 * (layer * self.targets.len() + place);
        let value = |i: usize| self.variables[i].as_detached_tensor();
        Some(Adapter { a: value(at), b: value(at + 1), scale: self.scale, dropout: None })
    }

    /// The variables of one layer, in the order of [`Self::variables`].
    fn of_layer(&self, layer: usize) -> std::ops::Range<usize> {
        let each = 2 * self.targets.len();
        layer * each..(layer + 1) * each
    }

    fn on(&self, layer: Layer, index: usize, draw: Draw, tracked: bool) -> Layer {
        let adapters = std::array::from_fn(|target| {
            let mut adapter = self.trained(index, target)?;
            if tracked {
                let place = self.targets.iter().position(|t| *t == target)?;
                let at = self.of_layer(index).start + 2 * place;
                adapter.a = self.variables[at].as_tensor().clone();
                adapter.b = self.variables[at + 1].as_tensor().clone();
            }
            if self.dropout > 0.0 {
                let Draw { seed, step, micro_batch } = draw;
                let parts = [seed, u64::from(step), micro_batch as u64, index as u64, target as u64];
                adapter.dropout = Some(Dropout { rate: self.dropout, key: stream_key(&parts) });
            }
            Some(adapter)
        });
        layer.with_adapters(&adapters)
    }
}

/// Sum of the negative log-likelihoods of all predicted tokens of `windows`, in
/// nats, and the gradient of `scale` times that sum for every variable.
pub fn loss_and_gradients(
    decoder: &Decoder,
    adapters: &Adapters,
    windows: &[&[u32]],
    scale: f64,
    draw: Draw,
) -> Result<(f64, Vec<Tensor>)> {
    let tokens = pad(windows, decoder.compute())?;
    let pass = decoder.pass(0, tokens.dim(1)?)?;
    let layer_count = decoder.config().layer_count;
    let mut seams = vec![decoder.embed(&tokens)?];
    for index in 0..layer_count {
        let layer = adapters.on(decoder.layer(index)?, index, draw, false);
        seams.push(layer.forward(&seams[index], &pass, None)?);
    }
    let last = seams.pop().ok_or_else(|| Error::bug("no stream"))?;
    let (nll, mut upstream) = head_backward(decoder, &last, windows, scale)?;
    let mut gradients: Vec<Option<Tensor>> = vec![None; adapters.variables.len()];
    for index in (0..layer_count).rev() {
        let entering = seams.pop().ok_or_else(|| Error::bug("a seam is missing"))?;
        let layer = adapters.on(decoder.layer(index)?, index, draw, true);
        // Nothing is trained below layer 0: its input needs no gradient.
        let leaf = if index == 0 { None } else { Some(Var::from_tensor(&entering)?) };
        let x = leaf.as_ref().map_or(&entering, |v| v.as_tensor());
        let mut store = ops::backward_from(&layer.forward(x, &pass, None)?, &upstream)?;
        for i in adapters.of_layer(index) {
            gradients[i] = store.remove(&adapters.variables[i]);
        }
        if let Some(leaf) = leaf {
            upstream = store.remove(&leaf).ok_or_else(|| Error::bug("the stream lost its gradient"))?;
        }
    }
    let gradients: Option<Vec<Tensor>> = gradients.into_iter().collect();
    Ok((nll, gradients.ok_or_else(|| Error::bug("an adapter got no gradient"))?))
}

/// Loss at the head, and its gradient for the stream `[b, t, h]` leaving the last layer.
fn head_backward(decoder: &Decoder, x: &Tensor, windows: &[&[u32]], scale: f64) -> Result<(f64, Tensor)> {
    let (b, t, h) = x.dims3()?;
    let (rows, targets) = predictions(windows, t);
    let predicting = x.reshape((b * t, h))?.index_select(&Tensor::new(&rows[..], x.device())?, 0)?;
    let (nll, gradient) = decoder.token_nll_backward(&predicting, &targets, scale)?;
    let rows = Tensor::new(&rows[..], x.device())?;
    let all = Tensor::zeros((b * t, h), x.dtype(), x.device())?.index_add(&rows, &gradient, 0)?;
    Ok((nll.iter().map(|n| f64::from(*n)).sum(), all.reshape((b, t, h))?))
}

/// Mean negative log-likelihood per predicted token, in nats, without adapters.
pub fn mean_loss(decoder: &Decoder, windows: &[Vec<u32>], cx: Cx) -> Result<f64> {
    let requests: Vec<Request> = windows.iter().map(|w| Request { tokens: w.clone(), from: 1 }).collect();
    let scored = likelihoods(decoder, &requests, "judging on held-out windows", cx)?;
    let predicted: usize = windows.iter().map(|w| w.len() - 1).sum();
    Ok(-scored.iter().map(|s| s.log_likelihood).sum::<f64>() / predicted.max(1) as f64)
}

/// Rows of the flattened batch `[b · t]` that predict a token, and the tokens they predict.
fn predictions(windows: &[&[u32]], t: usize) -> (Vec<u32>, Vec<u32>) {
    let places = windows.iter().enumerate().flat_map(|(b, w)| (1..w.len()).map(move |i| (b, i)));
    places.map(|(b, i)| ((b * t + i - 1) as u32, windows[b][i])).unzip()
}
