//! The decoder and its files: one decoder for every family, looped over layers.

pub mod cache;
pub mod checkpoint;
pub mod decoder;
pub mod generate;
pub mod layer;
pub mod lora;
pub mod ops;
pub mod quant;

use candle_core::{DType, Device};

pub use crate::checkpoint::Config;
pub use checkpoint::Checkpoint;
pub use decoder::{Decoder, pad};

/// Where and how exactly to compute.
#[derive(Debug, Clone)]
pub struct Compute {
    pub device: Device,
    /// Type of activations and of weights while they are used.
    pub dtype: DType,
}
