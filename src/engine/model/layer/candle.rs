//! The layer on candle tensors: any device, differentiable.

use candle_core::Tensor;

use super::pass::{Attendable, Group, Pass};
use super::{HeadNorm, Layer, Linear, missing};
use crate::checkpoint::Role;
use crate::checkpoint::family::Qkv;
use crate::engine::model::cache::LayerCache;
use crate::engine::model::ops;

/// Queries that attend at once. Bounds the score matrix to `heads × 256 × keys`
/// a sequence and skips the keys that no query of the block may see.
const QUERY_BLOCK: usize = 256;

impl Layer {
    pub(super) fn forward_candle(
        &self,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut LayerCache>,
    ) -> candle_core::Result<Tensor> {
        Ok(self.halves_candle(x, pass, cache)?.1)
    }

    /// The stream between attention and MLP, and the one leaving the layer.
    pub(super) fn halves_candle(
        &self,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut LayerCache>,
    ) -> candle_core::Result<(Tensor, Tensor)> {
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
        let leaving = (&stream + scaled(normed(&self.mlp_out, &self.mlp(&entering)?)?)?)?;
        Ok((stream, leaving))
    }

    fn mlp(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let activation = self.shape.activation;
        if let Some(experts) = &self.experts {
            return experts.forward(x, activation);
        }
        let hidden = if let Some(gate_up) = self.linear(Role::GateUp) {
            let both = gate_up.forward(x)?.chunk(2, 1)?;
            ops::gated(&both[0], &both[1], activation)?
        } else {
            let up = self.role(Role::Up)?.forward(x)?;
            match self.linear(Role::Gate) {
                Some(gate) => ops::gated(&gate.forward(x)?, &up, activation)?,
                None => ops::activate(&up, activation)?,
            }
        };
        self.role(Role::Down)?.forward(&hidden)
    }

    fn role(&self, role: Role) -> candle_core::Result<&Linear> {
        self.linear(role).ok_or_else(|| missing(role))
    }

    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> candle_core::Result<Tensor> {
        let s = self.shape;
        let [q, k, v] = self.queries_keys_values(x)?;
        let q = pass.rotate(&self.q_norm.of_heads(&q)?, s.layer.rope)?;
        let k = pass.rotate(&self.k_norm.of_heads(&k)?, s.layer.rope)?;
        let mut cache = cache;
        let gather = |group: &Group| {
            let (k, v) = match (&mut cache, group.slot) {
                (Some(cache), Some(slot)) => {
                    let slots = group.slots(slot);
                    cache.write(&slots, slot.read, &group.texts_of(&k)?, &group.texts_of(&v)?)?;
                    cache.until(&slots, slot.read + group.len)?
                }
                (None, None) => (group.with_past(&k)?, group.with_past(&v)?),
                (Some(_), None) | (None, Some(_)) => candle_core::bail!("half a cache. This is a bug."),
            };
            let past = k.dim(2)? - group.len;
            self.gather(&group.texts_of(&q)?, &k, &v, past)
        };
        let outputs = pass.groups().iter().map(gather).collect::<candle_core::Result<Vec<_>>>()?;
        self.role(Role::Output)?.forward(&Tensor::cat(&outputs, 0)?)
    }

    /// What queries `[b, heads, t, head_dim]` gather from keys and values `[b, kv_heads, past + t, head_dim]`,
    /// row by row: `[b · t, heads · head_dim]`.
    fn gather(&self, q: &Tensor, k: &Tensor, v: &Tensor, past: usize) -> candle_core::Result<Tensor> {
        let s = self.shape;
        let (b, _, t, d) = q.dims4()?;
        let group = s.heads / s.kv_heads;
        let mut outputs = Vec::new();
        for first in (0..t).step_by(QUERY_BLOCK) {
            let block = Attendable::new(first..(first + QUERY_BLOCK).min(t), past, s.layer.window);
            // The queries of a group share their key/value head: stack them instead of repeating the keys.
            let (tq, tk) = (block.queries.len(), block.keys.len());
            let q = q.narrow(2, first, tq)?.contiguous()?.reshape((b * s.kv_heads, group * tq, d))?;
            let seen = |kv: &Tensor| {
                kv.narrow(2, block.keys.start, tk)?.contiguous()?.reshape((b * s.kv_heads, tk, d))
            };
            let scores = q.matmul(&seen(k)?.t()?)?;
            let mask = block.mask(scores.dtype(), scores.device())?;
            let shares = ops::attention_shares(&scores, s.attention_scale, s.attention_cap, mask.as_ref())?;
            outputs.push(shares.matmul(&seen(v)?)?.reshape((b, s.heads, tq, d))?);
        }
        let y = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(&outputs, 2)? };
        y.transpose(1, 2)?.contiguous()?.reshape((b * t, s.heads * d))
    }

    /// Queries, keys and values by head, `[heads, rows, head_dim]`, whichever way they are stored.
    fn queries_keys_values(&self, x: &Tensor) -> candle_core::Result<[Tensor; 3]> {
        let n = x.dim(0)?;
        let (d, heads, kv) = (self.shape.head_dim, self.shape.heads, self.shape.kv_heads);
        let by_head = |y: &Tensor, heads: usize| y.reshape((n, heads, d))?.transpose(0, 1)?.contiguous();
        let [q, k, v] = match self.shape.qkv {
            Qkv::Apart(_) => [
                self.role(Role::Query)?.forward(x)?,
                self.role(Role::Key)?.forward(x)?,
                self.role(Role::Value)?.forward(x)?,
            ],
            Qkv::Rows(_) => {
                let y = self.role(Role::QueryKeyValue)?.forward(x)?;
                let rows = |first: usize, n: usize| y.narrow(1, first * d, n * d)?.contiguous();
                [rows(0, heads)?, rows(heads, kv)?, rows(heads + kv, kv)?]
            }
            Qkv::Heads(_) => {
                let y = self.role(Role::QueryKeyValue)?.forward(x)?.reshape((n, heads, 3, d))?;
                let part = |i: usize| y.narrow(2, i, 1)?.contiguous()?.reshape((n, heads * d));
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

impl Group {
    /// Its rows of `x [heads, rows, head_dim]`, text by text: `[texts, heads, len, head_dim]`.
    fn texts_of(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (heads, _, d) = x.dims3()?;
        let rows = x.narrow(1, self.first, self.texts * self.len)?;
        rows.reshape((heads, self.texts, self.len, d))?.transpose(0, 1)?.contiguous()
    }

    /// The same with the rows before them.
    fn with_past(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        if self.past.is_empty() {
            return self.texts_of(x);
        }
        let own = self.first..self.first + self.len;
        let parts =
            self.past.iter().chain(std::iter::once(&own)).map(|rows| x.narrow(1, rows.start, rows.len()));
        Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 1)?.unsqueeze(0)
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

    /// Over heads `[heads, rows, head_dim]`.
    fn of_heads(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Head(norm) => norm.forward(x),
            Self::Each(norm, weights) => norm.forward(x)?.broadcast_mul(weights),
            Self::No | Self::Whole(_) => Ok(x.clone()),
        }
    }
}

impl Pass {
    /// Rotates `x [heads, rows, head_dim]`, or the first dimensions of each head.
    fn rotate(&self, x: &Tensor, rope: Option<usize>) -> candle_core::Result<Tensor> {
        let Some((cos, sin)) = self.table(rope)? else { return Ok(x.clone()) };
        ops::rope(&x.unsqueeze(0)?, cos, sin)?.squeeze(0)
    }
}

impl Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut y = match &self.trained {
            None => self.weight.product(x)?,
            // candle's own product, whose backward gives the gradient of the weight as well.
            Some(weight) => x.matmul(&weight.to_dtype(x.dtype())?.t()?)?,
        };
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(adapter) = &self.adapter {
            y = (&y + adapter.forward(x)?.to_dtype(y.dtype())?)?;
        }
        Ok(y)
    }
}
