//! The kernels one by one, with statistics: products with frozen weights (ours against candle's float32),
//! attention, norms and cross-entropy.
//!
//!     cargo bench --bench kernel [-- FILTER]
//!
//! A product's throughput is in FLOP (criterion calls them elements), the others' in bytes or tokens.

use std::hint::black_box;

use candle_core::{Device, Tensor};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use rayon::prelude::*;
use secateur::engine::model::kernel::attention::{Attention, Heads, Sequence};
use secateur::engine::model::kernel::left::Left;
use secateur::engine::model::kernel::matrix::{Matrix, Side, Stored};
use secateur::engine::model::kernel::product::product;
use secateur::engine::model::kernel::rows::{Norm, Scoring, cross_entropy};
use secateur::engine::model::kernel::{Rounding, path};

/// Rows × inputs × outputs.
const PRODUCTS: [(usize, usize, usize); 10] = [
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
];

/// Tokens, hidden size and vocabulary of a batch of `SmolLM2`-135M.
const TOKENS: usize = 2048;
const HIDDEN: usize = 576;
const VOCAB: usize = 49152;

fn main() {
    println!("path {:?}, {} threads", path(), rayon::current_num_threads());
    // As the product does: on a thread of the pool.
    rayon::scope(|_| {
        let mut criterion = Criterion::default().configure_from_args();
        products(&mut criterion);
        attention(&mut criterion);
        norms(&mut criterion);
        losses(&mut criterion);
        criterion.final_summary();
    });
}

/// Values in [-0.5, 0.5) that do not repeat in step with any shape here.
fn values(count: usize, period: usize) -> Vec<f32> {
    (0..count).map(|i| (i % period) as f32 / period as f32 - 0.5).collect()
}

/// Packing included.
fn products(criterion: &mut Criterion) {
    for (m, k, n) in PRODUCTS {
        let mut group = criterion.benchmark_group(format!("product {m}x{k}x{n}"));
        group.throughput(Throughput::Elements(2 * (m * k * n) as u64));
        let (x, w) = (values(m * k, 97), values(n * k, 89));
        let left = Tensor::from_slice(&x, (m, k), &Device::Cpu).expect("a tensor");
        let right = Tensor::from_slice(&w, (n, k), &Device::Cpu).expect("a tensor").t().expect("a matrix");
        group.bench_function("candle", |b| b.iter(|| left.matmul(&right)));
        let halves: Vec<u8> = w.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect();
        let stored = Matrix::stored(halves.into(), Stored::Bf16, n, k);
        let nf4 = Matrix::floats(&w, n, k).nf4(false);
        for (name, matrix, rounding) in [
            ("bf16", &stored, Some(Rounding::Once)),
            ("high", &stored, Some(Rounding::Twice)),
            ("f32", &stored, None),
            ("NF4", &nf4, Some(Rounding::Once)),
        ] {
            group.bench_function(name, |b| {
                b.iter(|| product(&Left::new(black_box(&x), k, rounding), matrix, Side::Rows));
            });
        }
        group.finish();
    }
}

/// `SmolLM2`'s heads: nine of queries, three of keys and values.
fn attention(criterion: &mut Criterion) {
    let (heads, kv_heads, dim) = (9, 3, 64);
    let width = (heads + 2 * kv_heads) * dim;
    let mut group = criterion.benchmark_group("attention");
    group.throughput(Throughput::Elements(TOKENS as u64));
    for len in [256, 512, 2048] {
        let qkv = values(TOKENS * width, 97);
        let start = |head| Heads { values: &qkv, start: head * dim, row: width, head: dim };
        let sequences: Vec<Sequence> =
            (0..TOKENS / len).map(|i| Sequence::alone(i * len..(i + 1) * len)).collect();
        let attention = Attention {
            q: start(0),
            k: start(heads),
            v: start(heads + kv_heads),
            heads,
            kv_heads,
            dim,
            scoring: Scoring { scale: 0.125, cap: None },
            window: None,
            sequences: &sequences,
        };
        let (mut out, mut log_sums) = (vec![0.0; TOKENS * heads * dim], vec![0.0; TOKENS * heads]);
        let shape = format!("{}x{len}", TOKENS / len);
        group.bench_function(BenchmarkId::new("forward", &shape), |b| {
            b.iter(|| attention.forward(&mut out, &mut log_sums));
        });
        let d_out = values(TOKENS * heads * dim, 89);
        let mut gradients = vec![0.0; TOKENS * width];
        group.bench_function(BenchmarkId::new("backward", &shape), |b| {
            b.iter(|| attention.backward(&out, &log_sums, &d_out, &mut gradients));
        });
    }
    group.finish();
}

fn norms(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("norm");
    group.throughput(Throughput::Elements(TOKENS as u64));
    let (x, dy) = (values(TOKENS * HIDDEN, 97), values(TOKENS * HIDDEN, 89));
    let mut out = vec![0.0; TOKENS * HIDDEN];
    for (name, bias) in [("rms", None), ("layer", Some(vec![0.1; HIDDEN]))] {
        let norm = Norm { weight: vec![1.0; HIDDEN], bias, eps: 1e-5 };
        group.bench_function(BenchmarkId::new("forward", name), |b| {
            b.iter(|| {
                let rows = out.par_chunks_mut(HIDDEN).zip(x.par_chunks(HIDDEN));
                rows.for_each(|(out, x)| norm.row(x, out));
            });
        });
        group.bench_function(BenchmarkId::new("backward", name), |b| {
            b.iter(|| {
                let rows = out.par_chunks_mut(HIDDEN).zip(x.par_chunks(HIDDEN)).zip(dy.par_chunks(HIDDEN));
                rows.for_each(|((dx, x), dy)| norm.back(x, dy, dx));
            });
        });
    }
    group.finish();
}

/// Loss and gradient of as many rows of logits as the head computes at a time.
fn losses(criterion: &mut Criterion) {
    let rows = 256;
    let mut group = criterion.benchmark_group("cross-entropy");
    group.throughput(Throughput::Elements(rows as u64));
    let logits = values(rows * VOCAB, 97);
    group.bench_function(format!("{rows}x{VOCAB}"), |b| {
        // The gradient takes the place of the logits, so each run needs its own.
        let fresh = || logits.clone();
        let work = |logits: &mut Vec<f32>| {
            logits.par_chunks_mut(VOCAB).for_each(|row| {
                black_box(cross_entropy(row, &[(7, 1.0)], None, 1.0));
            });
        };
        b.iter_batched_ref(fresh, work, BatchSize::PerIteration);
    });
    group.finish();
}
