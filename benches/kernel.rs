//! Products with frozen weights: ours against candle's float32, in the same minute.
//!
//!     cargo bench --bench kernel [-- THREADS]

use std::time::Instant;

use candle_core::{Device, Tensor};
use secateur::engine::model::kernel::left::Left;
use secateur::engine::model::kernel::matrix::{Matrix, Side, Stored};
use secateur::engine::model::kernel::product::product;
use secateur::engine::model::kernel::{Rounding, path};

/// Best of several, in GFLOP/s.
fn speed(flops: f64, mut work: impl FnMut()) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..12 {
        let started = Instant::now();
        work();
        best = best.min(started.elapsed().as_secs_f64());
    }
    flops / best / 1e9
}

fn main() {
    println!("path {:?}, {} threads; GFLOP/s, packing included", path(), rayon::current_num_threads());
    println!(
        "{:>20}  {:>8}  {:>8}  {:>8}  {:>8}  {:>8}",
        "m x k x n", "candle", "bf16", "high", "f32", "NF4"
    );
    for (m, k, n) in [
        (2048, 576, 1536),
        (2048, 1536, 576),
        (2048, 576, 192),
        (512, 576, 1536),
        (1024, 2048, 5632),
        (256, 576, 49152),
        (64, 576, 1536),
        (8, 576, 1536),
        (1, 576, 1536),
        (1, 2048, 5632),
    ] {
        let x: Vec<f32> = (0..m * k).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
        let w: Vec<f32> = (0..n * k).map(|i| (i % 89) as f32 / 89.0 - 0.5).collect();
        let flops = 2.0 * m as f64 * k as f64 * n as f64;
        let halves: Vec<u8> = w.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect();
        let stored = Matrix::stored(halves.into(), Stored::Bf16, n, k);
        let nf4 = Matrix::nf4(&w, n, k);
        let left = Tensor::from_slice(&x, (m, k), &Device::Cpu).expect("a tensor");
        let right = Tensor::from_slice(&w, (n, k), &Device::Cpu).expect("a tensor").t().expect("a matrix");
        let candle = speed(flops, || drop(left.matmul(&right)));
        let run = |matrix: &Matrix, rounding| {
            speed(flops, || drop(product(&Left::new(&x, k, rounding), matrix, Side::Rows)))
        };
        let ours = [
            run(&stored, Some(Rounding::Once)),
            run(&stored, Some(Rounding::Twice)),
            run(&stored, None),
            run(&nf4, Some(Rounding::Once)),
        ];
        let columns: String = ours.iter().map(|v| format!("  {v:>8.0}")).collect();
        println!("{:>20}  {candle:>8.0}{columns}", format!("{m} x {k} x {n}"));
    }
}
