//! The layer on candle tensors: any device, differentiable.

use candle_core::{DType, Device, Tensor};

use super::{HeadNorm, Layer, Linear, missing};
use crate::checkpoint::family::Qkv;
use crate::checkpoint::{Config, Role};
use crate::engine::Result;
use crate::engine::model::cache::LayerCache;
use crate::engine::model::ops;
use crate::engine::model::weight::floats;

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
    blocks: Vec<(Option<usize>, Vec<Attendable>)>,
}

/// Cosines and sines by token.
pub struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
}

impl Angles {
    /// Those of the `token`-th token of the pass.
    pub fn of(&self, token: usize) -> (&[f32], &[f32]) {
        let at = token * self.pairs..(token + 1) * self.pairs;
        (&self.cos[at.clone()], &self.sin[at])
    }
}

/// What a block of queries may see.
struct Attendable {
    queries: std::ops::Range<usize>,
    keys: std::ops::Range<usize>,
    /// Position of the first query, counted from the first key.
    first: usize,
    window: Option<usize>,
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
        let mut blocks = Vec::new();
        for window in windows {
            let block = |first| Attendable::new(first..(first + QUERY_BLOCK).min(len), start, window);
            blocks.push((window, (0..len).step_by(QUERY_BLOCK).map(block).collect()));
        }
        Ok(Self { rotations, start, len, blocks })
    }

    /// Position of the first token.
    pub fn start(&self) -> usize {
        self.start
    }

    /// The angles of one of the model's rotations.
    pub fn angles(&self, rope: Option<usize>) -> candle_core::Result<Option<Angles>> {
        let Some((cos, sin)) = rope.map(|rope| &self.rotations[rope]) else { return Ok(None) };
        Ok(Some(Angles { cos: floats(cos)?, sin: floats(sin)?, pairs: cos.dim(1)? }))
    }

    fn blocks(&self, window: Option<usize>) -> &[Attendable] {
        let found = self.blocks.iter().find(|(w, _)| *w == window);
        &found.expect("every window of the model has blocks. This is a bug.").1
    }
}

impl Attendable {
    fn new(queries: std::ops::Range<usize>, start: usize, window: Option<usize>) -> Self {
        let first_key = window.map_or(0, |w| (start + queries.start + 1).saturating_sub(w));
        let keys = first_key..start + queries.end;
        let first = start + queries.start - first_key;
        Self { queries, keys, first, window }
    }

    /// `[queries, keys]`: 0 or -inf; none when all is visible.
    fn mask(&self, dtype: DType, device: &Device) -> candle_core::Result<Option<Tensor>> {
        let (queries, keys) = (self.queries.len(), self.keys.len());
        let mut mask = vec![f32::NEG_INFINITY; queries * keys];
        for (query, row) in mask.chunks_exact_mut(keys).enumerate() {
            let end = self.first + query + 1;
            row[self.window.map_or(0, |window| end.saturating_sub(window))..end].fill(0.0);
        }
        if mask.iter().all(|m| *m == 0.0) {
            return Ok(None);
        }
        Tensor::from_vec(mask, (queries, keys), device)?.to_dtype(dtype).map(Some)
    }
}

impl Layer {
    pub(super) fn forward_candle(
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
        let (b, t, _) = x.dims3()?;
        debug_assert_eq!(t, pass.len);
        let s = self.shape;
        let [q, k, v] = self.queries_keys_values(x)?;
        let q = pass.rotate(&self.q_norm.of_heads(&q)?, s.layer.rope)?;
        let mut k = pass.rotate(&self.k_norm.of_heads(&k)?, s.layer.rope)?;
        let mut v = v;
        if let Some(cache) = cache {
            cache.write(pass.start, &k, &v)?;
            (k, v) = cache.until(pass.start + t)?;
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
            let scores = q.matmul(&seen(&k)?.t()?)?;
            let mask = block.mask(scores.dtype(), scores.device())?;
            let shares = ops::attention_shares(&scores, s.attention_scale, s.attention_cap, mask.as_ref())?;
            let y = shares.matmul(&seen(&v)?)?;
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
        ops::rope(x, cos, sin)
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
