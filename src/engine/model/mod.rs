//! The decoder and its files.

use candle_core::{DType, Device};

/// Where and how exactly to compute.
#[derive(Debug, Clone)]
pub struct Compute {
    pub device: Device,
    /// Type of activations and of weights while they are used.
    pub dtype: DType,
}
