//! Speed of the engine on a real model: `CANDLE_NUM_THREADS=1 cargo bench --bench engine -- MODEL_DIR
//! [forward|decode|step]`.
//! `benches/engine_torch.py` does the same work in `PyTorch`; compare the ratios of
//! one machine and one hour.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::Instant;

use candle_core::{DType, Tensor};
use secateur::engine::chance::unit;
use secateur::engine::heal::backward::{Adapters, Draw, loss_and_gradients};
use secateur::engine::model::{Checkpoint, Compute, Decoder, Rounding, pad};
use secateur::job::preset::QloraSettings;
use secateur::job::spec::{BaseBits, Preset, QloraSpec};

fn main() {
    // As the product does: on a thread of the pool.
    rayon::scope(|_| measure());
}

fn measure() {
    let mut arguments = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let Some(dir) = arguments.next().map(PathBuf::from) else {
        eprintln!("usage: cargo bench --bench engine -- MODEL_DIR [forward|decode|step]");
        return;
    };
    let only = arguments.next();
    let wanted = |part: &str| only.as_deref().is_none_or(|only| only == part);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let mut known = Vec::new();
    for rounding in [None, Some(Rounding::Once)] {
        let compute = Compute::cpu(rounding);
        // Where the processor does not multiply bfloat16, both are the same.
        if known.contains(&compute.name()) {
            continue;
        }
        known.push(compute.name());
        println!("{}", compute.name());
        if wanted("forward") {
            forward(&checkpoint, &compute);
        }
        if wanted("decode") {
            decode(&checkpoint, &compute);
        }
        if wanted("step") {
            training_step(&checkpoint, &compute);
        }
    }
}

fn windows(checkpoint: &Checkpoint, count: u64, len: u64) -> Vec<Vec<u32>> {
    let vocab = checkpoint.config().vocab_size as f64;
    (0..count).map(|n| (0..len).map(|i| (unit(n, i) * vocab) as u32).collect()).collect()
}

fn forward(checkpoint: &Checkpoint, compute: &Compute) {
    let decoder = Decoder::open(checkpoint, compute).unwrap();
    let windows = windows(checkpoint, 4, 512);
    let batch: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let tokens = pad(&batch, compute).unwrap();
    report("forward 4 x 512, body", 2048, || drop(decoder.forward(&tokens).unwrap()));
}

fn decode(checkpoint: &Checkpoint, compute: &Compute) {
    let decoder = Decoder::open(checkpoint, compute).unwrap();
    for (batch, steps) in [(1, 32), (64, 16)] {
        let tokens = Tensor::zeros((batch, 1), DType::U32, &compute.device).unwrap();
        let mut cache = decoder.cache(batch, 4 * steps).unwrap();
        report(&format!("decode {steps} tokens, batch {batch}"), steps * batch, || {
            for _ in 0..steps {
                let x = decoder.step(&tokens, &mut cache).unwrap();
                drop(decoder.logits(&x.squeeze(1).unwrap()).unwrap());
            }
        });
    }
}

fn training_step(checkpoint: &Checkpoint, compute: &Compute) {
    let all = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let spec = QloraSpec {
        rank: Some(8),
        dropout: Some(0.0),
        targets: Some(all.map(String::from).to_vec()),
        ..QloraSpec::default()
    };
    let settings: QloraSettings = spec.settings(Preset::Paper, &checkpoint.config().facts(), 1);
    let windows = windows(checkpoint, 4, 256);
    let batch: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    for (bits, name) in [(BaseBits::Sixteen, "16-bit"), (BaseBits::Four, "NF4")] {
        let decoder = Decoder::open_frozen(checkpoint, compute, bits).unwrap();
        let adapters = Adapters::new(checkpoint.config(), &settings, 0, &compute.device).unwrap();
        let draw = Draw { seed: 0, step: 0, micro_batch: 0 };
        report(&format!("LoRA step 4 x 256, r 8, all linears, {name} base"), 1024, || {
            drop(loss_and_gradients(&decoder, &adapters, &batch, 1e-3, draw).unwrap());
        });
    }
}

/// Best of three, after one run to warm up.
fn report(what: &str, tokens: usize, mut work: impl FnMut()) {
    work();
    let once = |()| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    let best = [(); 3].map(once).into_iter().fold(f64::INFINITY, f64::min);
    println!("{what}: {best:.3} s, {:.0} tokens/s", tokens as f64 / best);
}
