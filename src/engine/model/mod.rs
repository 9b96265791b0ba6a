//! The decoder and its files: one decoder for every family, looped over layers.

pub mod cache;
pub mod checkpoint;
pub mod decoder;
mod fused;
pub mod generate;
pub mod kernel;
pub mod layer;
pub mod lora;
pub mod ops;
pub mod quant;
pub mod weight;

use candle_core::{DType, Device};

pub use crate::checkpoint::Config;
pub use checkpoint::Checkpoint;
pub use decoder::{Decoder, pad};
pub use kernel::Rounding;
pub use weight::Weight;

/// Where and how exactly to compute.
#[derive(Debug, Clone)]
pub struct Compute {
    pub device: Device,
    /// Type of activations and of weights while they are used.
    pub dtype: DType,
    /// How products with frozen weights round on a processor that multiplies bfloat16; in float32 without.
    pub rounding: Option<Rounding>,
}

impl Compute {
    /// On the processor, in float32; products with frozen weights by `rounding` where the processor can.
    pub fn cpu(rounding: Option<Rounding>) -> Self {
        let rounding = rounding.filter(|_| kernel::path() != kernel::Path::F32);
        Self { device: Device::Cpu, dtype: DType::F32, rounding }
    }

    /// Bytes of a weight while it is used.
    pub fn weight_bytes(&self) -> usize {
        if self.rounding.is_some() { 2 } else { self.dtype.size_in_bytes() }
    }

    /// What results depend on, for records.
    pub fn name(&self) -> String {
        let device = if self.device.is_cpu() { "cpu" } else { "cuda" };
        let rounding = match self.rounding {
            None => "",
            Some(Rounding::Once) => " bf16",
            Some(Rounding::Twice) => " high",
        };
        format!("{device} {}{rounding}", self.dtype.as_str())
    }
}
