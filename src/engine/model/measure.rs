//! How fast this machine computes, in a fraction of a second: what plans reckon with.

use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};

use super::Compute;
use super::weight::Weight;
use crate::engine::Result;
use crate::job::plan::Machine;

/// Rows that go through a layer at once, as everywhere.
const ROWS: usize = 512;
/// Of the matrix: as wide as a layer of a small model.
const WIDTH: usize = 1024;
const HEIGHT: usize = 4096;
/// More than any cache holds.
const LARGE: usize = 32 * 1024;
const AT_LEAST: Duration = Duration::from_millis(150);

/// Measures products with frozen weights: of many rows, and of one.
///
/// # Errors
/// Those of the device.
pub fn machine(compute: &Compute) -> Result<Machine> {
    let many = product(HEIGHT, ROWS, compute)?;
    let one = product(LARGE, 1, compute)?;
    let width = if compute.native() { DType::F32 } else { compute.dtype }.size_in_bytes();
    Ok(Machine {
        flops_per_s: 2.0 * (HEIGHT * WIDTH * ROWS) as f64 / many,
        bytes_per_s: (width * LARGE * WIDTH) as f64 / one,
    })
}

/// Seconds of one product: the least of several, which nothing else disturbed.
fn product(height: usize, rows: usize, compute: &Compute) -> Result<f64> {
    let weight = Weight::of(&Tensor::full(0.01f32, (height, WIDTH), &compute.device)?, compute)?;
    let x = Tensor::full(0.5f32, (rows, WIDTH), &compute.device)?.to_dtype(compute.dtype)?;
    let (started, mut best) = (Instant::now(), f64::INFINITY);
    while started.elapsed() < AT_LEAST {
        let turn = Instant::now();
        let y = weight.product(&x)?;
        // Brings the result off the device.
        y.narrow(0, 0, 1)?.narrow(1, 0, 1)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        best = best.min(turn.elapsed().as_secs_f64());
    }
    Ok(best)
}
