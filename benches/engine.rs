//! Speed of one part of the engine on a real model, as one line of JSON:
//!
//!     cargo bench --bench engine -- MODEL_DIR PART [bf16|f32] [REPEATS]
//!
//! `PART` is `forward`, `decode-1`, `decode-64`, `step-16` or `step-4` (bits of the frozen base). One part a
//! process, so that the peak of its memory is that part's. `benches/peers/run.py` runs it in turn with the same
//! work in `PyTorch` (`benches/peers/work.py`); `check` must come out alike in both.
//!
//! Two more have no peer but one of ours: `profile-last` and `profile-mean` send the same tokens through the model as
//! `forward`; `greedy` measures the sets of a search together, `greedy-apart` each from the first layer on.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::Instant;

use candle_core::Tensor;
use secateur::engine::damage::Damage;
use secateur::engine::heal::backward::{Objective, loss_and_gradients, next_tokens};
use secateur::engine::heal::trainables::{Draw, Trainables};
use secateur::engine::model::{Batch, Checkpoint, Compute, Decoder, Rounding};
use secateur::engine::profile::profile;
use secateur::engine::select::{Measured, Oracle, Oracles, select};
use secateur::engine::{Cx, Result};
use secateur::job::heal::QloraSettings;
use secateur::job::progress::{Event, Observer, Stage};
use secateur::job::spec::{
    BaseFormat, CalibrationSpec, FourBits, Preset, PruneSpec, QloraSpec, TokenPosition,
};
use serde_json::json;

/// Tokens that a sequence has grown by when its decoding is timed to the end.
const DECODED: usize = 32;

fn main() {
    // As the product does: on a thread of the pool.
    rayon::scope(|_| measure());
}

fn measure() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let mut arguments = arguments.iter().map(String::as_str);
    let (Some(dir), Some(part)) = (arguments.next().map(PathBuf::from), arguments.next()) else {
        eprintln!("usage: cargo bench --bench engine -- MODEL_DIR PART [bf16|f32] [REPEATS]");
        return;
    };
    let rounding = Some(Rounding::Once).filter(|_| arguments.next() != Some("f32"));
    let repeats = arguments.next().map_or(3, |n| n.parse().unwrap());
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let compute = Compute::cpu(rounding);
    let work = match part {
        "forward" => forward(&checkpoint, &compute),
        "decode-1" => decode(&checkpoint, &compute, 1),
        "decode-64" => decode(&checkpoint, &compute, 64),
        "step-16" => step(&checkpoint, &compute, BaseFormat::Sixteen),
        "step-4" => step(&checkpoint, &compute, BaseFormat::Four(FourBits::Nf4)),
        "profile-last" => profiled(&checkpoint, &compute, TokenPosition::Last),
        "profile-mean" => profiled(&checkpoint, &compute, TokenPosition::Mean),
        "greedy" => greedy(&checkpoint, &compute, false),
        "greedy-apart" => greedy(&checkpoint, &compute, true),
        _ => panic!("no part {part}"),
    };
    report(&compute, repeats, work);
}

/// Work, told how many tokens it is of, that gives a number to compare with the peers'.
struct Work<'a> {
    tokens: usize,
    run: Box<dyn FnMut() -> f64 + 'a>,
}

/// Any tokens, the same as the peers'.
fn windows(checkpoint: &Checkpoint, count: usize, len: usize) -> Vec<Vec<u32>> {
    let vocab = checkpoint.config().vocab_size;
    (0..count).map(|n| (0..len).map(|i| ((n * 31 + i * 7919) % vocab) as u32).collect()).collect()
}

/// The greatest logit of the last of the streams `x [n, h]`.
fn greatest(decoder: &Decoder, x: &Tensor) -> f64 {
    let last = x.narrow(0, x.dim(0).unwrap() - 1, 1).unwrap();
    f64::from(decoder.logits(&last).unwrap().max_all().unwrap().to_scalar::<f32>().unwrap())
}

/// The body alone: what a profile is made of.
fn forward(checkpoint: &Checkpoint, compute: &Compute) -> Work<'static> {
    let decoder = Decoder::open(checkpoint, compute).unwrap();
    let windows = windows(checkpoint, 4, 512);
    let batch: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let tokens = Batch::of(&batch);
    let run = move || greatest(&decoder, &decoder.forward(&tokens).unwrap());
    Work { tokens: 4 * 512, run: Box::new(run) }
}

struct Deaf;

impl Observer for Deaf {
    fn event(&self, _: Event) {}

    fn stop(&self) -> bool {
        false
    }
}

/// All blocks of all lengths, from the tokens of [`forward`].
fn profiled<'a>(checkpoint: &'a Checkpoint, compute: &'a Compute, position: TokenPosition) -> Work<'a> {
    let windows = windows(checkpoint, 4, 512);
    let spec = CalibrationSpec { position, ..CalibrationSpec::default() };
    let cx = Cx { stage: Stage::Profile, compute, observer: &Deaf };
    let run = move || profile(checkpoint, &windows, &spec, 1, cx).unwrap().by_len[0][0];
    Work { tokens: 4 * 512, run: Box::new(run) }
}

/// Measures each set by itself.
struct Apart<'a>(Damage<'a>);

impl Oracle for Apart<'_> {
    fn windows(&self) -> usize {
        self.0.windows()
    }

    fn tokens(&self, windows: usize) -> u64 {
        self.0.tokens(windows)
    }

    fn measure(
        &mut self,
        sets: &[Vec<u32>],
        windows: usize,
        tell: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Measured>> {
        let each = sets.iter().map(|set| self.0.measure(std::slice::from_ref(set), windows, tell));
        Ok(each.collect::<Result<Vec<_>>>()?.concat())
    }
}

/// A greedy search for two layers.
fn greedy<'a>(checkpoint: &'a Checkpoint, compute: &'a Compute, apart: bool) -> Work<'a> {
    let windows = windows(checkpoint, 2, 128);
    let spec: PruneSpec =
        serde_json::from_value(json!({"amount": {"layers": 2}, "strategy": "greedy_damage"})).unwrap();
    let cx = Cx { stage: Stage::Select, compute, observer: &Deaf };
    let profile = profile(checkpoint, &windows[..1], &CalibrationSpec::default(), 1, cx).unwrap();
    let run = move || {
        let damage = Damage::open(checkpoint, windows.clone(), &spec.damage, false, cx).unwrap();
        let mut oracle: Box<dyn Oracle> = if apart { Box::new(Apart(damage)) } else { Box::new(damage) };
        let oracles = Oracles { damage: Some(&mut *oracle), ..Oracles::default() };
        select(&profile, &spec, 0, oracles, &mut |_, _, _| Ok(())).unwrap().score
    };
    Work { tokens: 2 * 128, run: Box::new(run) }
}

/// Token by token from nothing, with logits.
fn decode(checkpoint: &Checkpoint, compute: &Compute, batch: usize) -> Work<'static> {
    let decoder = Decoder::open(checkpoint, compute).unwrap();
    let tokens = Batch::of(&vec![&[0][..]; batch]);
    let slots: Vec<usize> = (0..batch).collect();
    let run = move || {
        let mut cache = decoder.cache(batch, DECODED).unwrap();
        let mut logits = None;
        for _ in 0..DECODED {
            let x = decoder.step(&tokens, &slots, &mut cache).unwrap();
            logits = Some(decoder.logits(&x).unwrap());
        }
        f64::from(logits.unwrap().max_all().unwrap().to_scalar::<f32>().unwrap())
    };
    Work { tokens: DECODED * batch, run: Box::new(run) }
}

/// Loss and gradients of adapters on all linear layers.
fn step(checkpoint: &Checkpoint, compute: &Compute, base: BaseFormat) -> Work<'static> {
    let spec = QloraSpec {
        rank: Some(8),
        dropout: Some(0.0),
        targets: Some(vec!["all".to_owned()]),
        ..QloraSpec::default()
    };
    let settings: QloraSettings = spec.settings(Preset::Paper, &checkpoint.config().facts(), 1);
    let windows = windows(checkpoint, 4, 256);
    let predicted = 4 * 255;
    let decoder = Decoder::open_frozen(checkpoint, compute, base).unwrap();
    let adapters = Trainables::adapters(checkpoint.config(), &settings, 0, &compute.device).unwrap();
    let run = move || {
        let batch: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
        let targets = next_tokens(&batch);
        let draw = Draw { seed: 0, step: 0, micro_batch: 0 };
        let scale = 1.0 / f64::from(predicted);
        let objective = Objective { targets: &targets, seams: &[], scale };
        let (nll, _) = loss_and_gradients(&decoder, &adapters, &batch, None, &objective, draw).unwrap();
        nll * scale
    };
    Work { tokens: 4 * 256, run: Box::new(run) }
}

/// The first run, which warms up, apart from the others.
fn report(compute: &Compute, repeats: usize, mut work: Work) {
    let mut check = 0.0;
    let mut timed = || {
        let start = Instant::now();
        check = (work.run)();
        assert!(check.is_finite(), "numbers that are not finite may be fast for that reason");
        start.elapsed().as_secs_f64()
    };
    let first = timed();
    let seconds: Vec<f64> = (0..repeats).map(|_| timed()).collect();
    let line = json!({
        "compute": compute.name(), "tokens": work.tokens, "first_s": first, "seconds": seconds, "check": check,
    });
    println!("{line}");
}
