//! Keys and values of the tokens read so far.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::checkpoint::Config;
use crate::engine::Result;

/// One cache per layer, with slots for texts of at most `capacity` tokens.
pub struct KvCache {
    pub layers: Vec<LayerCache>,
    /// Tokens read so far of the text in each slot.
    pub read: Vec<usize>,
}

/// Where a text lies in a cache, and how many tokens of it are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    pub index: usize,
    pub read: usize,
}

/// Keys and values of one layer, each `[slots, kv_heads, capacity, head_dim]`.
pub struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl KvCache {
    pub fn new(
        config: &Config,
        slots: usize,
        capacity: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let shape = (slots, config.kv_head_count, capacity, config.head_dim);
        let layer = |_| {
            Ok(LayerCache {
                keys: Tensor::zeros(shape, dtype, device)?,
                values: Tensor::zeros(shape, dtype, device)?,
            })
        };
        Ok(Self { layers: (0..config.layer_count).map(layer).collect::<Result<_>>()?, read: vec![0; slots] })
    }

    /// Bytes a slot for `capacity` tokens takes, in all layers together.
    pub fn slot_bytes(config: &Config, capacity: usize, dtype: DType) -> usize {
        2 * config.layer_count * config.kv_head_count * capacity * config.head_dim * dtype.size_in_bytes()
    }

    pub fn slot(&self, index: usize) -> Slot {
        Slot { index, read: self.read[index] }
    }
}

impl LayerCache {
    /// Writes `k`, `v` `[slots, kv_heads, t, head_dim]` into `slots` at position `start`.
    pub fn write(
        &mut self,
        slots: &Range<usize>,
        start: usize,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<()> {
        let of = |all: &Tensor| all.narrow(0, slots.start, slots.len());
        of(&self.keys)?.slice_set(&k.contiguous()?, 2, start)?;
        of(&self.values)?.slice_set(&v.contiguous()?, 2, start)
    }

    /// Keys and values in `slots` up to position `end`.
    pub fn until(&self, slots: &Range<usize>, end: usize) -> candle_core::Result<(Tensor, Tensor)> {
        let of = |all: &Tensor| all.narrow(0, slots.start, slots.len())?.narrow(2, 0, end);
        Ok((of(&self.keys)?, of(&self.values)?))
    }

    /// Keys and values with all the room behind them.
    pub fn all(&self) -> (&Tensor, &Tensor) {
        (&self.keys, &self.values)
    }
}
