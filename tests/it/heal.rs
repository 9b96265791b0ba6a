//! Training adapters: exact gradients, exact resume, merged as trained.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Device, Tensor};
use safetensors::Dtype;
use secateur::engine::chance::unit;
use secateur::engine::heal::backward::{Adapters, Draw, loss_and_gradients, next_tokens};
use secateur::engine::heal::{Teacher, Trained, Windows, train};
use secateur::engine::model::{Checkpoint, Compute, Decoder};
use secateur::engine::{Cx, Error};
use secateur::job::heal::DistillSpec;
use secateur::job::preset::QloraSettings;
use secateur::job::progress::{Event, Observer, Silent, Stage};
use secateur::job::spec::{BaseBits, Preset, QloraSpec};

use crate::support::tiny::{Tiny, VOCAB};

const ALL: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

fn compute() -> Compute {
    Compute::cpu(None)
}

fn settings(checkpoint: &Checkpoint) -> QloraSettings {
    let spec = QloraSpec {
        rank: Some(4),
        steps: Some(12),
        batch_size: Some(2),
        seq_len: Some(32),
        learning_rate: Some(1e-2),
        warmup_steps: Some(2),
        checkpoint_every: Some(5),
        targets: Some(ALL.map(String::from).to_vec()),
        ..QloraSpec::default()
    };
    spec.settings(Preset::Paper, &checkpoint.config().facts(), 1)
}

/// Text with a pattern to learn: counting, from different starts.
fn windows(count: u64) -> Vec<Vec<u32>> {
    (0..count).map(|n| (0..32).map(|i| (n * 7 + i) as u32 % (VOCAB as u32 - 1)).collect()).collect()
}

/// Adapters as they are in the middle of training: nothing is zero.
fn disturbed(checkpoint: &Checkpoint, settings: &QloraSettings) -> Adapters {
    let adapters = Adapters::new(checkpoint.config(), settings, 3, &Device::Cpu).unwrap();
    for (i, variable) in adapters.variables.iter().enumerate() {
        variable.set(&noise(i as u64, variable.dims(), 0.1)).unwrap();
    }
    adapters
}

fn noise(key: u64, shape: &[usize], size: f64) -> Tensor {
    let count = shape.iter().product::<usize>() as u64;
    let values: Vec<f32> = (0..count).map(|i| ((unit(key, i) - 0.5) * size) as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn every_gradient_is_the_slope_of_the_loss(tiny: Tiny, dropout: f64) {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint =
        Checkpoint::open(&Tiny { dtype: Dtype::F32, layers: 3, ..tiny }.write(dir.path())).unwrap();
    let settings = QloraSettings { dropout, ..settings(&checkpoint) };
    let adapters = disturbed(&checkpoint, &settings);
    let decoder = Decoder::open_frozen(&checkpoint, &compute(), BaseBits::Sixteen).unwrap();
    let windows = windows(2);
    // One window shorter than the other: padding must not leak into the gradient.
    let batch: Vec<&[u32]> = vec![&windows[0], &windows[1][..20]];
    let draw = Draw { seed: 1, step: 2, micro_batch: 0 };
    let loss = || loss_and_gradients(&decoder, &adapters, &batch, &next_tokens(&batch), 1.0, draw).unwrap();
    let (_, gradients) = loss();
    let mut telling = 0;
    for (i, variable) in adapters.variables.iter().enumerate() {
        let direction = noise(1000 + i as u64, variable.dims(), 2.0);
        let (value, h) = (variable.as_detached_tensor().copy().unwrap(), 5e-3);
        let at = |h: f64| {
            variable.set(&(&value + (&direction * h).unwrap()).unwrap()).unwrap();
            loss().0
        };
        let slope = (at(h) - at(-h)) / (2.0 * h);
        variable.set(&value).unwrap();
        let product = (&gradients[i] * &direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        let error = (f64::from(product) - slope).abs();
        // The loss is a sum of some 1,500 nats in float32; a slope below that noise proves little.
        telling += usize::from(slope.abs() > 0.4);
        assert!(error < 0.02 * slope.abs() + 0.04, "variable {i}: gradient {product}, slope {slope}");
        assert!(gradients[i].abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 0.0);
    }
    assert!(telling * 2 > gradients.len(), "only {telling} of {} slopes say anything", gradients.len());
}

#[test]
fn every_adapter_gets_the_gradient_that_finite_differences_say() {
    every_gradient_is_the_slope_of_the_loss(Tiny::llama(), 0.0);
}

#[test]
fn gradients_pass_windows_biases_and_an_untied_head() {
    every_gradient_is_the_slope_of_the_loss(Tiny::mistral(), 0.0);
    every_gradient_is_the_slope_of_the_loss(Tiny::qwen2(), 0.0);
}

#[test]
fn dropout_zeroes_the_same_inputs_forward_and_backward() {
    every_gradient_is_the_slope_of_the_loss(Tiny::llama(), 0.3);
}

#[test]
fn training_learns_a_pattern_over_a_base_in_4_8_and_16_bits() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&Tiny::llama().write(dir.path())).unwrap();
    for bits in [BaseBits::Four, BaseBits::Eight, BaseBits::Sixteen] {
        let settings = QloraSettings { bits, steps: 25, ..settings(&checkpoint) };
        let scratch = tempfile::tempdir().unwrap();
        let compute = compute();
        let cx = Cx { stage: Stage::Heal, compute: &compute, observer: &Silent };
        let windows = Windows::split(windows(12)).unwrap();
        let trained = train(&checkpoint, &settings, &windows, None, 5, scratch.path(), cx).unwrap();
        let (first, last) = (trained.curve[0].loss, trained.curve[24].loss);
        assert!(last < 0.7 * first, "{bits:?}: {first} to {last}");
    }
}

fn losses(trained: &Trained) -> Vec<f64> {
    trained.curve.iter().map(|point| point.loss).collect()
}

/// Asks to stop once so many steps have been measured.
struct StopAfter(AtomicU64);

impl Observer for StopAfter {
    fn event(&self, event: Event) {
        if matches!(event, Event::Measured { name, .. } if name == "loss") {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn stop(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

#[test]
fn a_training_stopped_anywhere_goes_on_and_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&Tiny::llama().write(dir.path())).unwrap();
    let settings = settings(&checkpoint);
    let windows = Windows::split(windows(8)).unwrap();
    let compute = compute();
    let run = |scratch: &std::path::Path, observer: &dyn Observer| {
        train(
            &checkpoint,
            &settings,
            &windows,
            Some(Teacher::open(&checkpoint, &DistillSpec::default(), &compute).unwrap()),
            5,
            scratch,
            Cx { stage: Stage::Heal, compute: &compute, observer },
        )
    };
    let bytes = |adapters: &Adapters| -> Vec<Vec<f32>> {
        adapters.variables.iter().map(|v| v.flatten_all().unwrap().to_vec1().unwrap()).collect()
    };
    let scratch = tempfile::tempdir().unwrap();
    let whole = run(scratch.path(), &Silent).unwrap();
    for stop in [1, 5, 7] {
        let scratch = tempfile::tempdir().unwrap();
        let stopped = run(scratch.path(), &StopAfter(AtomicU64::new(stop)));
        assert!(matches!(stopped, Err(Error::Stopped)));
        let resumed = run(scratch.path(), &Silent).unwrap();
        assert_eq!(bytes(&resumed.adapters), bytes(&whole.adapters), "stopped after {stop} steps");
        assert_eq!(losses(&resumed), losses(&whole));
        assert_eq!(resumed.tokens, whole.tokens);
    }
}

#[test]
fn a_teacher_has_nothing_to_teach_a_model_like_itself() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint =
        Checkpoint::open(&Tiny { dtype: Dtype::F32, ..Tiny::llama() }.write(dir.path())).unwrap();
    let adapters = Adapters::new(checkpoint.config(), &settings(&checkpoint), 3, &Device::Cpu).unwrap();
    let decoder = Decoder::open_frozen(&checkpoint, &compute(), BaseBits::Sixteen).unwrap();
    let windows = windows(2);
    let batch: Vec<&[u32]> = vec![&windows[0], &windows[1][..20]];
    let largest = |weight: f64| {
        let spec = DistillSpec { weight, top_k: VOCAB as u32 };
        let mut teacher = Teacher::open(&checkpoint, &spec, &compute()).unwrap();
        let taught = |teacher: &mut Teacher| -> Vec<_> {
            batch.iter().enumerate().flat_map(|(i, window)| teacher.targets(i, window).unwrap()).collect()
        };
        let targets = taught(&mut teacher);
        // The second time they come from the file.
        assert_eq!(taught(&mut teacher), targets);
        for target in &targets {
            assert!((target.iter().map(|(_, share)| share).sum::<f32>() - 1.0).abs() < 1e-5);
        }
        let draw = Draw { seed: 1, step: 2, micro_batch: 0 };
        let (_, gradients) = loss_and_gradients(&decoder, &adapters, &batch, &targets, 1.0, draw).unwrap();
        let largest = |g: &Tensor| g.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        gradients.iter().map(largest).fold(0.0, f32::max)
    };
    let (all, half) = (largest(1.0), largest(0.5));
    assert!(all < 1e-3 * half, "{all} of {half}");
}

/// Keeps the names and values of all that is measured.
#[derive(Default)]
struct Series(Mutex<Vec<(String, f64)>>);

impl Observer for Series {
    fn event(&self, event: Event) {
        if let Event::Measured { name, value, .. } = event {
            self.0.lock().unwrap().push((name, value));
        }
    }

    fn stop(&self) -> bool {
        false
    }
}

#[test]
fn every_step_tells_its_loss_rate_gradient_and_speed() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&Tiny::llama().write(dir.path())).unwrap();
    let settings = QloraSettings { steps: 3, ..settings(&checkpoint) };
    let (compute, scratch, series) = (compute(), tempfile::tempdir().unwrap(), Series::default());
    let cx = Cx { stage: Stage::Heal, compute: &compute, observer: &series };
    train(&checkpoint, &settings, &Windows::split(windows(8)).unwrap(), None, 5, scratch.path(), cx).unwrap();
    let told = series.0.into_inner().unwrap();
    for name in ["loss", "learning_rate", "gradient_norm", "tokens_per_s"] {
        let values: Vec<f64> = told.iter().filter(|(n, _)| n == name).map(|(_, value)| *value).collect();
        // Warm-up begins at a rate of nothing.
        assert!(values.len() == 3 && values[1..].iter().all(|value| *value > 0.0), "{name}: {values:?}");
    }
}

#[test]
fn a_damaged_resume_point_is_not_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&Tiny::llama().write(dir.path())).unwrap();
    let settings = QloraSettings { steps: 3, checkpoint_every: 1, ..settings(&checkpoint) };
    let windows = Windows::split(windows(8)).unwrap();
    let compute = compute();
    let cx = Cx { stage: Stage::Heal, compute: &compute, observer: &Silent };
    let scratch = tempfile::tempdir().unwrap();
    let whole = train(&checkpoint, &settings, &windows, None, 5, scratch.path(), cx).unwrap();
    let file = scratch.path().join("qlora.safetensors");
    let saved = std::fs::read(&file).unwrap();
    std::fs::write(&file, &saved[..saved.len() / 2]).unwrap();
    let again = train(&checkpoint, &settings, &windows, None, 5, scratch.path(), cx).unwrap();
    assert_eq!(losses(&again), losses(&whole));
}

#[test]
fn an_unknown_target_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&Tiny::llama().write(dir.path())).unwrap();
    let settings = QloraSettings { targets: vec!["c_fc".into()], ..settings(&checkpoint) };
    let Err(error) = Adapters::new(checkpoint.config(), &settings, 0, &Device::Cpu) else {
        panic!("accepted")
    };
    assert!(error.to_string().contains("c_fc") && error.to_string().contains("down_proj"), "{error}");
}
