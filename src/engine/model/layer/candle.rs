//! The layer on candle tensors: any device, differentiable.

use candle_core::{DType, Device, Tensor};

use super::{HeadNorm, Layer, Linear, missing};
use crate::checkpoint::family::Qkv;
use crate::checkpoint::{Config, Role};
use crate::engine::Result;
use crate::engine::model::cache::LayerCache;
use crate::engine::model::ops;

/// Queries that attend at once. Bounds the score matrix to `heads × 256 × keys`
/// a sequence and skips the keys that no query of the block may see.
const QUERY_BLOCK: usize = 256;

/// What all layers of one forward pass share: positions and masks.
pub struct Pass {
    /// Cosine and sine for each of the model's rotations, `[len, pairs]`.
    rotations: Vec<(Tensor, Tensor)>,
    /// Position of the first token.
    start: usize,
    len: usize,
    /// Per distinct window of the model, per block of queries.
    masks: Vec<(Option<usize>, Vec<Attendable>)>,
}

/// What a block of queries may see.
struct Attendable {
    queries: std::ops::Range<usize>,
    keys: std::ops::Range<usize>,
    /// `[queries, keys]`: 0 or -inf; none when all is visible.
    mask: Option<Tensor>,
}

impl Pass {
    /// For tokens at positions `start..start + len`.
    pub fn new(config: &Config, start: usize, len: usize, dtype: DType, device: &Device) -> Result<Self> {
        let table = |values: Vec<f32>, pairs| Tensor::from_vec(values, (len, pairs), device)?.to_dtype(dtype);
        let mut rotations = Vec::new();
        for rope in &config.ropes {
            let (cos, sin) = rope.tables(start, len);
            rotations.push((table(cos, rope.pairs())?, table(sin, rope.pairs())?));
        }
        let mut windows: Vec<_> = config.layers.iter().map(|layer| layer.window).collect();
        windows.sort_unstable();
        windows.dedup();
        let mut masks = Vec::new();
        for window in windows {
            let blocks = (0..len).step_by(QUERY_BLOCK).map(|first| {
                Attendable::new(first..(first + QUERY_BLOCK).min(len), start, window, dtype, device)
            });
            masks.push((window, blocks.collect::<Result<Vec<_>>>()?));
        }
        Ok(Self { rotations, start, len, masks })
    }

    fn blocks(&self, window: Option<usize>) -> &[Attendable] {
        let found = self.masks.iter().find(|(w, _)| *w == window);
        &found.expect("every window of the model has masks. This is a bug.").1
    }
}

impl Attendable {
    fn new(
        queries: std::ops::Range<usize>,
        start: usize,
        window: Option<usize>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let sees = |q: usize, k: usize| k <= start + q && window.is_none_or(|w| start + q - k < w);
        let first_key = window.map_or(0, |w| (start + queries.start + 1).saturating_sub(w));
        let keys = first_key..start + queries.end;
        let cells = queries.clone().flat_map(|q| keys.clone().map(move |k| (q, k)));
        let mask: Vec<f32> = cells.map(|(q, k)| if sees(q, k) { 0.0 } else { f32::NEG_INFINITY }).collect();
        let mask = if mask.iter().all(|m| *m == 0.0) {
            None
        } else {
            Some(Tensor::from_vec(mask, (queries.len(), keys.len()), device)?.to_dtype(dtype)?)
        };
        Ok(Self { queries, keys, mask })
    }
}

impl Layer {
    /// The stream `[b, t, h]` leaving the layer, for the stream entering it.
    pub fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut LayerCache>,
    ) -> candle_core::Result<Tensor> {
        let normed = |norm: &Option<super::Norm>, x: &Tensor| match norm {
            Some(norm) => norm.forward(x),
            None => Ok(x.clone()),
        };
        let scaled =
            |y: Tensor| if self.shape.residual_scale == 1.0 { Ok(y) } else { y * self.shape.residual_scale };
        let read = normed(&self.attention_in, x)?;
        let attended = scaled(normed(&self.attention_out, &self.attend(&read, pass, cache)?)?)?;
        let stream = (x + attended)?;
        let entering = match (self.shape.parallel, &self.mlp_in) {
            (false, norm) => normed(norm, &stream)?,
            (true, Some(norm)) => norm.forward(x)?,
            (true, None) => read,
        };
        stream + scaled(normed(&self.mlp_out, &self.mlp(&entering)?)?)?
    }

    fn mlp(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let activation = self.shape.activation;
        if let Some(experts) = &self.experts {
            return experts.forward(&x.flatten_to(1)?, activation)?.reshape(x.shape());
        }
        let hidden = if let Some(gate_up) = self.linear(Role::GateUp) {
            let both = gate_up.forward(x)?.chunk(2, 2)?;
            (ops::activate(&both[0].contiguous()?, activation)? * &both[1])?
        } else {
            let up = self.role(Role::Up)?.forward(x)?;
            match self.linear(Role::Gate) {
                Some(gate) => (ops::activate(&gate.forward(x)?, activation)? * up)?,
                None => ops::activate(&up, activation)?,
            }
        };
        self.role(Role::Down)?.forward(&hidden)
    }

    fn role(&self, role: Role) -> candle_core::Result<&Linear> {
        self.linear(role).ok_or_else(|| missing(role))
    }

    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> candle_core::Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        debug_assert_eq!(t, pass.len);
        let s = self.shape;
        let [q, k, v] = self.queries_keys_values(x)?;
        let q = (pass.rotate(&self.q_norm.of_heads(&q)?, s.layer.rope)? * s.attention_scale)?;
        let mut k = pass.rotate(&self.k_norm.of_heads(&k)?, s.layer.rope)?;
        let mut v = v;
        if let Some(cache) = cache {
            (k, v) = cache.append(pass.start, &k, &v)?;
        }
        let group = s.heads / s.kv_heads;
        let mut outputs = Vec::new();
        for block in pass.blocks(s.layer.window) {
            // The queries of a group share their key/value head: stack them instead of repeating the keys.
            let (first, tq, tk) = (block.queries.start, block.queries.len(), block.keys.len());
            let q =
                q.narrow(2, first, tq)?.contiguous()?.reshape((b * s.kv_heads, group * tq, s.head_dim))?;
            let seen = |kv: &Tensor| {
                let kv = kv.narrow(2, block.keys.start, tk)?.contiguous()?;
                kv.reshape((b * s.kv_heads, tk, s.head_dim))
            };
            let mut scores = q.matmul(&seen(&k)?.t()?)?;
            if let Some(cap) = s.attention_cap {
                scores = ops::soft_cap(&scores, cap)?;
            }
            if let Some(mask) = &block.mask {
                scores = scores.reshape((b * s.heads, tq, tk))?.broadcast_add(mask)?;
                scores = scores.reshape((b * s.kv_heads, group * tq, tk))?;
            }
            let y = ops::softmax(&scores)?.matmul(&seen(&v)?)?;
            outputs.push(y.reshape((b, s.heads, tq, s.head_dim))?);
        }
        let y = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(&outputs, 2)? };
        let y = y.transpose(1, 2)?.contiguous()?.reshape((b, t, s.heads * s.head_dim))?;
        self.role(Role::Output)?.forward(&y)
    }

    /// Queries, keys and values by head, `[b, heads, t, head_dim]`, whichever way they are stored.
    fn queries_keys_values(&self, x: &Tensor) -> candle_core::Result<[Tensor; 3]> {
        let (b, t, _) = x.dims3()?;
        let (d, heads, kv) = (self.shape.head_dim, self.shape.heads, self.shape.kv_heads);
        let by_head = |y: &Tensor, n: usize| y.reshape((b, t, n, d))?.transpose(1, 2)?.contiguous();
        let [q, k, v] = match self.shape.qkv {
            Qkv::Apart(_) => [
                self.role(Role::Query)?.forward(x)?,
                self.role(Role::Key)?.forward(x)?,
                self.role(Role::Value)?.forward(x)?,
            ],
            Qkv::Rows(_) => {
                let y = self.role(Role::QueryKeyValue)?.forward(x)?;
                let rows = |first: usize, n: usize| y.narrow(2, first * d, n * d)?.contiguous();
                [rows(0, heads)?, rows(heads, kv)?, rows(heads + kv, kv)?]
            }
            Qkv::Heads(_) => {
                let y = self.role(Role::QueryKeyValue)?.forward(x)?.reshape((b, t, heads, 3, d))?;
                let part = |i: usize| y.narrow(3, i, 1)?.contiguous();
                [part(0)?, part(1)?, part(2)?]
            }
        };
        Ok([
            by_head(&self.q_norm.of_whole(&q)?, heads)?,
            by_head(&self.k_norm.of_whole(&k)?, kv)?,
            by_head(&v, kv)?,
        ])
    }
}

impl HeadNorm {
    /// Before the heads are told apart.
    fn of_whole(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Whole(norm) => norm.forward(x),
            Self::No | Self::Head(_) | Self::Each(..) => Ok(x.clone()),
        }
    }

    /// Over heads `[b, heads, t, head_dim]`.
    fn of_heads(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Head(norm) => norm.forward(x),
            Self::Each(norm, weights) => norm.forward(x)?.broadcast_mul(weights),
            Self::No | Self::Whole(_) => Ok(x.clone()),
        }
    }
}

impl Pass {
    /// Rotates `x [b, heads, t, head_dim]`, or the first dimensions of each head.
    fn rotate(&self, x: &Tensor, rope: Option<usize>) -> candle_core::Result<Tensor> {
        let Some(rope) = rope else { return Ok(x.clone()) };
        let (cos, sin) = &self.rotations[rope];
        let (rotated, all) = (2 * cos.dim(1)?, x.dim(3)?);
        if rotated == all {
            return ops::rope(x, cos, sin);
        }
        let turned = ops::rope(&x.narrow(3, 0, rotated)?.contiguous()?, cos, sin)?;
        Tensor::cat(&[&turned, &x.narrow(3, rotated, all - rotated)?], 3)?.contiguous()
    }
}

impl Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (b, t, k) = x.dims3()?;
        let x = x.reshape((b * t, k))?;
        let mut y = self.weight.product(&x)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(adapter) = &self.adapter {
            y = (&y + adapter.forward(&x)?.to_dtype(y.dtype())?)?;
        }
        y.reshape((b, t, ()))
    }
}
