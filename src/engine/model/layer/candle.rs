//! The layer on candle tensors: any device, differentiable.

use candle_core::{DType, Device, Tensor};

use super::{Layer, Linear};
use crate::engine::Result;
use crate::engine::model::cache::LayerCache;
use crate::engine::model::config::Config;
use crate::engine::model::ops;

/// Queries that attend at once. Bounds the score matrix to `heads × 256 × keys`
/// a sequence and skips the keys that no query of the block may see.
const QUERY_BLOCK: usize = 256;

/// What all layers of one forward pass share: positions and masks.
pub struct Pass {
    cos: Tensor,
    sin: Tensor,
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
        let (cos, sin) = config.rope.tables(start, len, device)?;
        let mut windows = config.windows.clone();
        windows.sort_unstable();
        windows.dedup();
        let mut masks = Vec::new();
        for window in windows {
            let blocks = (0..len).step_by(QUERY_BLOCK).map(|first| {
                Attendable::new(first..(first + QUERY_BLOCK).min(len), start, window, dtype, device)
            });
            masks.push((window, blocks.collect::<Result<Vec<_>>>()?));
        }
        Ok(Self { cos: cos.to_dtype(dtype)?, sin: sin.to_dtype(dtype)?, start, len, masks })
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
        let eps = self.shape.norm_eps;
        let attended = self.attend(&ops::rms_norm(x, &self.input_norm, eps)?, pass, cache)?;
        let x = (x + attended)?;
        let normed = ops::rms_norm(&x, &self.post_attention_norm, eps)?;
        let [_, _, _, _, gate, up, down] = &self.linears;
        let hidden = ops::gated_silu(&gate.forward(&normed)?, &up.forward(&normed)?)?;
        x + down.forward(&hidden)?
    }

    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> candle_core::Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        debug_assert_eq!(t, pass.len);
        let s = self.shape;
        let [q, k, v, o, ..] = &self.linears;
        let heads = |y: Tensor, n: usize| y.reshape((b, t, n, s.head_dim))?.transpose(1, 2)?.contiguous();
        let q = ops::rope(&heads(q.forward(x)?, s.heads)?, &pass.cos, &pass.sin)?;
        let q = (q * (1.0 / (s.head_dim as f64).sqrt()))?;
        let mut k = ops::rope(&heads(k.forward(x)?, s.kv_heads)?, &pass.cos, &pass.sin)?;
        let mut v = heads(v.forward(x)?, s.kv_heads)?;
        if let Some(cache) = cache {
            (k, v) = cache.append(pass.start, &k, &v)?;
        }
        let group = s.heads / s.kv_heads;
        let mut outputs = Vec::new();
        for block in pass.blocks(s.window) {
            // The queries of a group share their key/value head: stack them instead of repeating the keys.
            let (first, tq, tk) = (block.queries.start, block.queries.len(), block.keys.len());
            let q =
                q.narrow(2, first, tq)?.contiguous()?.reshape((b * s.kv_heads, group * tq, s.head_dim))?;
            let seen = |kv: &Tensor| {
                let kv = kv.narrow(2, block.keys.start, tk)?.contiguous()?;
                kv.reshape((b * s.kv_heads, tk, s.head_dim))
            };
            let mut scores = q.matmul(&seen(&k)?.t()?)?;
            if let Some(mask) = &block.mask {
                scores = scores.reshape((b * s.heads, tq, tk))?.broadcast_add(mask)?;
                scores = scores.reshape((b * s.kv_heads, group * tq, tk))?;
            }
            let y = ops::softmax(&scores)?.matmul(&seen(&v)?)?;
            outputs.push(y.reshape((b, s.heads, tq, s.head_dim))?);
        }
        let y = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(&outputs, 2)? };
        o.forward(&y.transpose(1, 2)?.contiguous()?.reshape((b, t, s.heads * s.head_dim))?)
    }
}

impl Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (b, t, k) = x.dims3()?;
        let x = x.reshape((b * t, k))?;
        let mut y = ops::frozen_product(&x, &self.weight)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(adapter) = &self.adapter {
            y = (&y + adapter.forward(&x)?.to_dtype(y.dtype())?)?;
        }
        y.reshape((b, t, ()))
    }
}
