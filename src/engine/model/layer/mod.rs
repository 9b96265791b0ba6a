//! One decoder layer.

mod candle;

use candle_core::Tensor;

pub use candle::Pass;

use super::checkpoint::{Checkpoint, LINEARS, linear_name};
use super::lora::Adapter;
use super::{Compute, config::Config};
use crate::engine::Result;

/// A decoder layer with its weights at hand: pre-norm attention and gated MLP.
/// Cheap to clone.
#[derive(Clone)]
pub struct Layer {
    input_norm: Tensor,
    post_attention_norm: Tensor,
    /// In the order of [`LINEARS`].
    linears: [Linear; 7],
    shape: Shape,
}

/// `y = x Wᵀ + bias (+ adapter)`.
#[derive(Clone)]
pub struct Linear {
    /// `[outputs, inputs]`, frozen.
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    pub adapter: Option<Adapter>,
}

#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    norm_eps: f64,
    window: Option<usize>,
}

impl Layer {
    /// Reads layer `index` of a checkpoint.
    pub fn load(checkpoint: &Checkpoint, index: usize, compute: &Compute) -> Result<Self> {
        let weight = |i: usize| {
            checkpoint.tensor(&format!("{}.weight", linear_name(index, i)), compute.dtype, &compute.device)
        };
        Self::with_weights(checkpoint, index, compute, weight)
    }

    /// Reads norms and biases of layer `index`; `weight(i)` gives the weight of `LINEARS[i]`.
    pub fn with_weights(
        checkpoint: &Checkpoint,
        index: usize,
        compute: &Compute,
        weight: impl Fn(usize) -> Result<Tensor>,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let read = |name: &str| checkpoint.tensor(name, compute.dtype, &compute.device);
        let norm = |name: &str| read(&format!("model.layers.{index}.{name}.weight"));
        let mut linears = Vec::with_capacity(LINEARS.len());
        for i in 0..LINEARS.len() {
            let bias = config.linear_bias(i).then(|| read(&format!("{}.bias", linear_name(index, i))));
            linears.push(Linear { weight: weight(i)?, bias: bias.transpose()?, adapter: None });
        }
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            post_attention_norm: norm("post_attention_layernorm")?,
            linears: linears.try_into().unwrap_or_else(|_| unreachable!("seven linears. This is a bug.")),
            shape: Shape::of(config, index),
        })
    }

    /// The same layer with these adapters on `LINEARS[i]`.
    #[must_use]
    pub fn with_adapters(mut self, adapters: &[Option<Adapter>; 7]) -> Self {
        for (linear, adapter) in self.linears.iter_mut().zip(adapters) {
            linear.adapter.clone_from(adapter);
        }
        self
    }
}

impl Shape {
    fn of(config: &Config, index: usize) -> Self {
        Self {
            heads: config.head_count,
            kv_heads: config.kv_head_count,
            head_dim: config.head_dim,
            norm_eps: config.norm_eps,
            window: config.windows[index],
        }
    }
}
