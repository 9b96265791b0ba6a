//! The decoder and its files: one decoder for every family, looped over layers.

pub mod batch;
pub mod cache;
pub mod checkpoint;
pub mod cuts;
pub mod decoder;
pub mod generate;
pub mod head;
pub mod kernel;
pub mod layer;
pub mod lora;
pub mod measure;
pub mod memory;
pub mod ops;
pub mod streams;
pub mod weight;

use candle_core::{DType, Device};

pub use crate::checkpoint::Config;
pub use batch::Batch;
pub use checkpoint::Checkpoint;
pub use decoder::Decoder;
pub use kernel::Rounding;
pub use memory::Memory;
pub use weight::Weight;

/// Where and how exactly to compute.
#[derive(Debug, Clone)]
pub struct Compute {
    pub device: Device,
    /// Type of activations and of weights while they are used.
    pub dtype: DType,
    /// How products with frozen weights round on a processor that multiplies bfloat16; not at all without.
    pub rounding: Option<Rounding>,
    /// Changes no result.
    pub memory: Memory,
}

impl Compute {
    /// On the processor, in float32; products with frozen weights by `rounding` where the processor
    /// multiplies bfloat16.
    pub fn cpu(rounding: Option<Rounding>) -> Self {
        let rounding = rounding.filter(|_| kernel::enabled() && kernel::path() >= kernel::Path::Bf16);
        Self { device: Device::Cpu, dtype: DType::F32, rounding, memory: Memory::default() }
    }

    /// Whether our own kernels compute: then weights stay as they are stored.
    pub fn native(&self) -> bool {
        self.device.is_cpu() && self.dtype == DType::F32 && kernel::enabled()
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
