//! Keys and values of the tokens read so far.

use candle_core::{DType, Device, Tensor};

use crate::checkpoint::Config;
use crate::engine::Result;

/// One cache per layer, for `batch` sequences of at most `capacity` tokens.
pub struct KvCache {
    pub layers: Vec<LayerCache>,
    /// Tokens read so far.
    pub len: usize,
}

/// Keys and values of one layer, each `[batch, kv_heads, capacity, head_dim]`.
pub struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl KvCache {
    pub fn new(
        config: &Config,
        batch: usize,
        capacity: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let shape = (batch, config.kv_head_count, capacity, config.head_dim);
        let layer = |_| {
            Ok(LayerCache {
                keys: Tensor::zeros(shape, dtype, device)?,
                values: Tensor::zeros(shape, dtype, device)?,
            })
        };
        Ok(Self { layers: (0..config.layer_count).map(layer).collect::<Result<_>>()?, len: 0 })
    }
}

impl LayerCache {
    /// Writes `k`, `v` `[b, kv_heads, t, head_dim]` at position `start`.
    pub fn write(&mut self, start: usize, k: &Tensor, v: &Tensor) -> candle_core::Result<()> {
        self.keys.slice_set(&k.contiguous()?, 2, start)?;
        self.values.slice_set(&v.contiguous()?, 2, start)
    }

    /// Keys and values up to position `end`.
    pub fn until(&self, end: usize) -> candle_core::Result<(Tensor, Tensor)> {
        Ok((self.keys.narrow(2, 0, end)?, self.values.narrow(2, 0, end)?))
    }

    /// Keys and values with all the room behind them.
    pub fn all(&self) -> (&Tensor, &Tensor) {
        (&self.keys, &self.values)
    }
}
