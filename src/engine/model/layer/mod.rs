//! One decoder layer.

mod back;
mod candle;
mod experts;
mod native;
mod pass;

use std::os::unix::fs::FileExt;

use candle_core::{DType, Tensor};

pub use back::Gradients;
pub use native::Trace;
pub use pass::Pass;

use self::experts::Experts;
use super::cache::LayerCache;
use super::checkpoint::Checkpoint;
use super::kernel::buffer::Buffer;
use super::kernel::map::Map;
use super::lora::Adapter;
use super::weight::Weight;
use super::{Compute, Memory, ops};
use crate::checkpoint::family::{Norm as NormKind, QkNorm, Qkv};
use crate::checkpoint::{Activation, Config, LayerShape, Role};
use crate::engine::{Error, Result};
use crate::job::spec::BaseFormat;

/// A decoder layer with its weights at hand: attention and MLP, each with the norms around it that the
/// family has. Cheap to clone.
#[derive(Clone)]
pub struct Layer {
    attention_in: Option<Norm>,
    attention_out: Option<Norm>,
    mlp_in: Option<Norm>,
    mlp_out: Option<Norm>,
    q_norm: HeadNorm,
    k_norm: HeadNorm,
    /// In the order of [`Config::linears`].
    linears: Vec<Linear>,
    experts: Option<Experts>,
    /// Our own kernels compute.
    native: bool,
    shape: Shape,
}

/// `y = x Wᵀ + bias (+ adapter)`.
#[derive(Clone)]
pub struct Linear {
    role: Role,
    weight: Weight,
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
    /// The weight itself is trained: `[outputs, inputs]`, its gradient is wanted.
    trained: Option<Tensor>,
}

/// A norm over the last dimension.
#[derive(Clone)]
pub struct Norm {
    weight: Tensor,
    /// Of a layer norm; an RMS norm has none.
    bias: Option<Tensor>,
    eps: f64,
}

/// Norm of queries or keys.
#[derive(Clone)]
enum HeadNorm {
    No,
    /// Over each head alike.
    Head(Norm),
    /// Over all heads together.
    Whole(Norm),
    /// Over each head, then times its own weight, `[heads, 1, head_dim]`.
    Each(Norm, Tensor),
}

#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    qkv: Qkv,
    activation: Activation,
    parallel: bool,
    attention_scale: f64,
    attention_cap: Option<f64>,
    residual_scale: f64,
    layer: LayerShape,
}

impl Layer {
    /// Reads layer `index` of a checkpoint.
    pub fn load(checkpoint: &Checkpoint, index: usize, compute: &Compute) -> Result<Self> {
        let config = checkpoint.config();
        let mut linears = Vec::new();
        for linear in config.linears(index) {
            let name = config.in_layer(index, linear.name);
            let weight = format!("{name}.weight");
            let bias = format!("{name}.bias");
            let bias = linear.bias.then(|| checkpoint.tensor(&bias, compute.dtype, &compute.device));
            linears.push(Linear {
                role: linear.role,
                weight: Weight::load(checkpoint, &weight, (linear.outputs, linear.inputs), compute)?,
                bias: bias.transpose()?,
                adapter: None,
                trained: None,
            });
        }
        let [attention_in, attention_out, mlp_in, mlp_out] = config.norms().map(|name| {
            name.map(|name| Norm::load(checkpoint, &config.in_layer(index, name), compute)).transpose()
        });
        let sparse = config.layers[index].sparse;
        Ok(Self {
            attention_in: attention_in?,
            attention_out: attention_out?,
            mlp_in: mlp_in?,
            mlp_out: mlp_out?,
            q_norm: HeadNorm::load(checkpoint, index, ("q", config.head_count), compute)?,
            k_norm: HeadNorm::load(checkpoint, index, ("k", config.kv_head_count), compute)?,
            linears,
            experts: if sparse { Some(Experts::load(checkpoint, index, compute)?) } else { None },
            native: compute.native() && !sparse,
            shape: Shape::of(config, index),
        })
    }
    /// The same layer with the values that `format` leaves its linear layers; `done(i)` hears that the weight
    /// of linear layer `i` was read.
    pub fn quantised(mut self, format: BaseFormat, compute: &Compute, done: impl Fn(usize)) -> Result<Self> {
        for (i, linear) in self.linears.iter_mut().enumerate() {
            linear.weight = linear.weight.quantised(format, compute)?;
            done(i);
        }
        Ok(self)
    }

    /// The same layer with the codes of its quantised weights in a file, of which the map is given.
    pub fn spilled(mut self, memory: &Memory) -> Result<(Self, Map)> {
        let file = memory.spill_file()?;
        let mut places = Vec::new();
        let mut end = 0;
        for codes in self.linears.iter().map(|linear| linear.weight.codes()) {
            let codes = codes.map_or(&[][..], |codes| codes);
            file.write_all_at(codes, end as u64)?;
            places.push(end..end + codes.len());
            end += codes.len();
        }
        let map = Map::open(&file)?;
        for (linear, place) in self.linears.iter_mut().zip(places) {
            linear.weight = linear.weight.with_codes(map.bytes(place));
        }
        Ok((self, map))
    }

    /// The same layer with these adapters on its linear layers, in their order.
    #[must_use]
    pub fn with_adapters(mut self, adapters: impl IntoIterator<Item = (usize, Adapter)>) -> Self {
        for (linear, adapter) in adapters {
            self.linears[linear].adapter = Some(adapter);
        }
        self
    }

    /// The same layer with these weights, `[outputs, inputs]`, float32, on linear layers, of which the gradient is
    /// wanted.
    pub fn with_weights(
        mut self,
        weights: impl IntoIterator<Item = (usize, Tensor)>,
        compute: &Compute,
    ) -> candle_core::Result<Self> {
        for (linear, weight) in weights {
            self.linears[linear].weight = Weight::of(&weight, compute)?;
            self.linears[linear].trained = Some(weight);
        }
        Ok(self)
    }

    /// The stream `[rows, h]` leaving the layer, for the stream entering it: on our own kernels where they
    /// cover the layer and no graph is wanted, else by candle.
    pub fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut LayerCache>,
    ) -> candle_core::Result<Tensor> {
        if self.is_native() && !x.track_op() {
            self.forward_native(x, pass, cache)
        } else {
            self.forward_candle(x, pass, cache)
        }
    }

    /// The stream between attention and MLP, row by row, and the one leaving the layer.
    pub fn halves(&self, x: &Tensor, pass: &Pass) -> candle_core::Result<(Buffer, Tensor)> {
        if self.is_native() {
            return self.halves_native(x, pass);
        }
        let (middle, leaving) = self.halves_candle(x, pass, None)?;
        let middle: Vec<f32> = middle.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        Ok((Buffer::from_slice(&middle), leaving))
    }

    fn linear(&self, role: Role) -> Option<&Linear> {
        self.linears.iter().find(|linear| linear.role == role)
    }
}

impl Norm {
    /// Reads the norm `name` (without `.weight`) of the family's kind.
    pub fn load(checkpoint: &Checkpoint, name: &str, compute: &Compute) -> Result<Self> {
        let config = checkpoint.config();
        let read = |name: String, dtype| checkpoint.tensor(&name, dtype, &compute.device);
        let weight = format!("{name}.weight");
        let (weight, bias) = match config.family.norm {
            NormKind::Rms => (read(weight, compute.dtype)?, None),
            // Added in float32: 1 + weight has more digits than a 16-bit weight.
            NormKind::RmsPlusOne => ((read(weight, DType::F32)? + 1.0)?.to_dtype(compute.dtype)?, None),
            NormKind::Layer => {
                (read(weight, compute.dtype)?, Some(read(format!("{name}.bias"), compute.dtype)?))
            }
        };
        Ok(Self { weight, bias, eps: config.norm_eps })
    }

    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match &self.bias {
            None => ops::rms_norm(x, &self.weight, self.eps),
            Some(bias) => ops::layer_norm(x, &self.weight, bias, self.eps),
        }
    }
}

impl HeadNorm {
    fn load(
        checkpoint: &Checkpoint,
        index: usize,
        (which, heads): (&str, usize),
        compute: &Compute,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let name = |rest: &str| config.in_layer(index, &format!("self_attn.{which}_{rest}"));
        let read = |name: &str| checkpoint.tensor(name, compute.dtype, &compute.device);
        Ok(match config.qk_norm {
            QkNorm::No => Self::No,
            QkNorm::Head => Self::Head(Norm::load(checkpoint, &name("norm"), compute)?),
            QkNorm::Whole => Self::Whole(Norm::load(checkpoint, &name("norm"), compute)?),
            QkNorm::KeyShared => Self::Head(Norm::load(checkpoint, &name("layernorm"), compute)?),
            QkNorm::KeyEach => {
                let each = (0..heads).map(|head| read(&name(&format!("layernorm.norms.{head}.weight"))));
                let weights = Tensor::stack(&each.collect::<Result<Vec<_>>>()?, 0)?.unsqueeze(1)?;
                let weight = Tensor::ones(config.head_dim, compute.dtype, &compute.device)?;
                let bias = Some(weight.zeros_like()?);
                Self::Each(Norm { weight, bias, eps: config.norm_eps }, weights)
            }
        })
    }
}

impl Shape {
    fn of(config: &Config, index: usize) -> Self {
        Self {
            heads: config.head_count,
            kv_heads: config.kv_head_count,
            head_dim: config.head_dim,
            qkv: config.family.qkv,
            activation: config.activation,
            parallel: config.parallel,
            attention_scale: config.attention_scale,
            attention_cap: config.attention_cap,
            residual_scale: config.residual_scale,
            layer: config.layers[index],
        }
    }
}

/// The layer has no linear layer of this role, though its shape says so.
fn missing(role: Role) -> candle_core::Error {
    candle_core::Error::Msg(Error::bug(format!("a layer without {role:?}")).to_string())
}
