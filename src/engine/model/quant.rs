//! Frozen weights in 4 or 8 bits: NF4 with double quantisation as in QLoRA
//! (Dettmers et al., arXiv 2305.14314, sections 3.1-3.2; bitsandbytes' order of
//! nibbles and block sizes), and blockwise absmax int8.
//!
//! Weights are unpacked one layer at a time, when the layer's turn comes, so
//! forward and backward see exactly the same function.

use std::sync::LazyLock;

use rayon::prelude::*;

use super::Compute;
use super::checkpoint::Checkpoint;
use super::layer::Layer;
use super::weight::Weight;
use crate::checkpoint::LinearShape;
use crate::engine::{Error, Result};
use crate::job::spec::BaseBits;

/// Weights that share one scale.
const BLOCK: usize = 64;
/// Scales that share one scale of their own.
const SCALE_BLOCK: usize = 256;

/// The linear layers of one decoder layer, packed.
pub struct QuantizedLayer {
    linears: Vec<Packed>,
}

impl QuantizedLayer {
    /// Packs the linear layers of layer `index`.
    pub fn pack(checkpoint: &Checkpoint, index: usize, bits: BaseBits) -> Result<Self> {
        let config = checkpoint.config();
        let pack = |linear: &LinearShape| {
            let name = format!("{}.weight", config.in_layer(index, linear.name));
            let weights = checkpoint.linear_values(&name, (linear.outputs, linear.inputs))?;
            match bits {
                BaseBits::Four => Ok(Packed::nf4(&weights)),
                BaseBits::Eight => Ok(Packed::int8(&weights)),
                BaseBits::Sixteen => Err(Error::bug("16 bits need no packing")),
            }
        };
        Ok(Self { linears: config.linears(index).iter().map(pack).collect::<Result<_>>()? })
    }

    /// The layer, ready to use.
    pub fn unpack(&self, checkpoint: &Checkpoint, index: usize, compute: &Compute) -> Result<Layer> {
        Layer::with_weights(checkpoint, index, compute, |i| {
            let linear = checkpoint.config().linears(index)[i];
            let values = self.linears[i].unpack(linear.outputs * linear.inputs);
            Weight::of(values, (linear.outputs, linear.inputs), compute)
        })
    }
}

/// One packed tensor.
pub enum Packed {
    Nf4 {
        /// Two weights a byte, the first in the high nibble.
        codes: Vec<u8>,
        scales: Scales,
    },
    Int8 {
        codes: Vec<i8>,
        /// Absolute maximum of each block.
        scales: Vec<f32>,
    },
}

/// The absolute maxima of all blocks, quantised themselves: 8-bit codes of
/// their distance from the mean, one float32 scale for 256 of them.
pub struct Scales {
    codes: Vec<u8>,
    scales: Vec<f32>,
    mean: f32,
}

impl Packed {
    pub fn nf4(weights: &[f32]) -> Self {
        let maxima: Vec<f32> = weights.par_chunks(BLOCK).map(absolute_maximum).collect();
        let codes = weights
            .par_chunks(BLOCK)
            .zip(&maxima)
            .flat_map_iter(|(block, maximum)| {
                let inverse = if *maximum > 0.0 { 1.0 / maximum } else { 0.0 };
                block.chunks(2).map(move |pair| {
                    let low = pair.get(1).map_or(0, |w| nearest_nf4(w * inverse));
                    nearest_nf4(pair[0] * inverse) << 4 | low
                })
            })
            .collect();
        Self::Nf4 { codes, scales: Scales::pack(&maxima) }
    }

    pub fn int8(weights: &[f32]) -> Self {
        let scales: Vec<f32> = weights.par_chunks(BLOCK).map(absolute_maximum).collect();
        let codes = weights
            .par_chunks(BLOCK)
            .zip(&scales)
            .flat_map_iter(|(block, scale)| {
                let inverse = if *scale > 0.0 { 127.0 / scale } else { 0.0 };
                block.iter().map(move |w| (w * inverse).round() as i8)
            })
            .collect();
        Self::Int8 { codes, scales }
    }

    /// The `count` weights, as float32.
    pub fn unpack(&self, count: usize) -> Vec<f32> {
        let mut out = vec![0f32; count];
        match self {
            Self::Nf4 { codes, scales } => {
                let scales = scales.unpack();
                let blocks = out.par_chunks_mut(BLOCK).zip(codes.par_chunks(BLOCK / 2)).zip(&scales);
                blocks.for_each(|((out, codes), scale)| {
                    let levels = NF4.map(|level| level * scale);
                    for (pair, code) in out.chunks_mut(2).zip(codes) {
                        pair[0] = levels[usize::from(code >> 4)];
                        if let Some(second) = pair.get_mut(1) {
                            *second = levels[usize::from(code & 15)];
                        }
                    }
                });
            }
            Self::Int8 { codes, scales } => {
                let blocks = out.par_chunks_mut(BLOCK).zip(codes.par_chunks(BLOCK)).zip(scales);
                blocks.for_each(|((out, codes), scale)| {
                    let scale = scale / 127.0;
                    for (weight, code) in out.iter_mut().zip(codes) {
                        *weight = f32::from(*code) * scale;
                    }
                });
            }
        }
        out
    }
}

impl Scales {
    fn pack(maxima: &[f32]) -> Self {
        let mean = (maxima.iter().map(|m| f64::from(*m)).sum::<f64>() / maxima.len().max(1) as f64) as f32;
        let distances: Vec<f32> = maxima.iter().map(|m| m - mean).collect();
        let scales: Vec<f32> = distances.chunks(SCALE_BLOCK).map(absolute_maximum).collect();
        let code = |(i, distance): (usize, &f32)| {
            let scale = scales[i / SCALE_BLOCK];
            nearest_dynamic(if scale > 0.0 { distance / scale } else { 0.0 })
        };
        let codes = distances.iter().enumerate().map(code).collect();
        Self { codes, scales, mean }
    }

    fn unpack(&self) -> Vec<f32> {
        let blocks = self.codes.chunks(SCALE_BLOCK).zip(&self.scales);
        let value = |code: &u8, scale: f32| DYNAMIC[usize::from(*code)] * scale + self.mean;
        blocks.flat_map(|(codes, scale)| codes.iter().map(move |code| value(code, *scale))).collect()
    }
}

fn absolute_maximum(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |m, w| m.max(w.abs()))
}

/// The 16 levels of NF4: quantiles of the normal distribution, scaled to
/// [-1, 1], with an exact zero (arXiv 2305.14314, appendix E).
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

fn nearest_nf4(x: f32) -> u8 {
    // Half-way points between the levels, compared all at once: no branches.
    static MIDDLES: LazyLock<[f32; 15]> =
        LazyLock::new(|| std::array::from_fn(|i| f32::midpoint(NF4[i], NF4[i + 1])));
    MIDDLES.iter().map(|m| u8::from(x > *m)).sum()
}

/// bitsandbytes' signed dynamic 8-bit map: seven decades, each with twice the
/// levels of the one below, and the values 0 and 1.
static DYNAMIC: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut levels = vec![0.0, 1.0];
    for decade in 0..7 {
        let count = 1 << decade;
        let magnitude = 10f64.powi(decade - 6);
        for i in 0..count {
            let edge = |i: i32| 0.1 + 0.9 * f64::from(i) / f64::from(count);
            let middle = f64::midpoint(edge(i), edge(i + 1)) * magnitude;
            levels.extend([middle, -middle]);
        }
    }
    levels.sort_by(f64::total_cmp);
    std::array::from_fn(|i| levels[i] as f32)
});

fn nearest_dynamic(x: f32) -> u8 {
    let above = DYNAMIC.partition_point(|level| *level < x).min(255);
    let below = above.saturating_sub(1);
    let nearest = if x - DYNAMIC[below] <= DYNAMIC[above] - x { below } else { above };
    nearest as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::model::lora::unit;

    /// Sum of twelve uniforms: near enough to normal.
    fn normal(count: usize) -> Vec<f32> {
        let one = |i: usize| (0..12).map(|j| unit(7, (i * 12 + j) as u64)).sum::<f64>() - 6.0;
        (0..count).map(|i| one(i) as f32 * 0.02).collect()
    }

    fn relative_error(packed: &Packed, weights: &[f32]) -> f64 {
        let unpacked = packed.unpack(weights.len());
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = unpacked.iter().zip(weights).map(|(a, b)| square(a - b)).sum();
        (error / weights.iter().map(|w| square(*w)).sum::<f64>()).sqrt()
    }

    #[test]
    fn nf4_keeps_normal_weights_to_the_error_the_format_has() {
        let weights = normal(1 << 16);
        let error = relative_error(&Packed::nf4(&weights), &weights);
        assert!((0.085..0.097).contains(&error), "{error}");
    }

    #[test]
    fn int8_is_an_order_closer() {
        let weights = normal(1 << 16);
        let error = relative_error(&Packed::int8(&weights), &weights);
        assert!(error < 0.01, "{error}");
    }

    #[test]
    fn levels_come_back_as_they_were_and_odd_sizes_work() {
        let weights: Vec<f32> = NF4.iter().cycle().take(64 * 3 + 5).copied().collect();
        let unpacked = Packed::nf4(&weights).unpack(weights.len());
        // The last block's maximum is below 1 and moves the mean of the scales a little.
        for (got, want) in unpacked.iter().zip(&weights).take(64 * 3) {
            assert!((got - want).abs() < 0.01, "{got} {want}");
        }
        let zeros = vec![0.0; 100];
        assert_eq!(Packed::nf4(&zeros).unpack(100), zeros);
        assert_eq!(Packed::int8(&zeros).unpack(100), zeros);
    }

    #[test]
    fn the_dynamic_map_is_ascending_and_whole() {
        assert!(DYNAMIC.windows(2).all(|w| w[0] < w[1]));
        assert!((DYNAMIC[255] - 1.0).abs() < 1e-9);
        for (i, level) in DYNAMIC.iter().enumerate() {
            assert_eq!(usize::from(nearest_dynamic(*level)), i);
        }
    }
}
