//! Products with frozen weights: ours against candle's float32, in the same minute.
//!
//!     cargo bench --bench kernel [-- THREADS]

use std::time::Instant;

use candle_core::{Device, Tensor};
use secateur::engine::model::kernel::{Packed, Path, Rounding, halves, path};

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
    println!("path {:?}, {} threads; GFLOP/s", path(), rayon::current_num_threads());
    println!("{:>20}  {:>8}  {:>8}  {:>8}  {:>8}", "m x k x n", "f32", "bf16", "high", "pack ms");
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
        let started = Instant::now();
        let packed = Packed::new(&halves(&w), n, k);
        let pack_ms = started.elapsed().as_secs_f64() * 1e3;
        let left = Tensor::from_slice(&x, (m, k), &Device::Cpu).expect("a tensor");
        let right = Tensor::from_slice(&w, (n, k), &Device::Cpu).expect("a tensor").t().expect("a matrix");
        let f32 = speed(flops, || drop(left.matmul(&right)));
        let (bf16, high) = if path() == Path::F32 {
            (0.0, 0.0)
        } else {
            let run = |rounding| speed(flops, || drop(packed.product(&x, rounding, path())));
            (run(Rounding::Once), run(Rounding::Twice))
        };
        println!("{:>20}  {f32:>8.0}  {bf16:>8.0}  {high:>8.0}  {pack_ms:>8.2}", format!("{m} x {k} x {n}"));
    }
}
