//! Training adapters: exact gradients, exact resume, merged as trained.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Device, Tensor};
use safetensors::Dtype;
use secateur::engine::chance::unit;
use secateur::engine::heal::backward::{Objective, Seam, loss_and_gradients, next_tokens};
use secateur::engine::heal::prefix::Prefix;
use secateur::engine::heal::trainables::{Draw, Trainables};
use secateur::engine::heal::{Course, Teacher, Trained, Windows, train};
use secateur::engine::model::{Checkpoint, Compute, Decoder};
use secateur::engine::{Cx, Error};
use secateur::job::heal::QloraSettings;
use secateur::job::progress::{Event, Observer, Silent, Stage};
use secateur::job::spec::{
    BaseBits, BaseFormat, DistillSpec, FourBits, MomentBits, Preset, QloraSpec, TrainingSpec,
};
use secateur::job::training::Training;

use crate::support::tiny::{Tiny, VOCAB};

const ALL: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

fn compute() -> Compute {
    Compute::cpu(None)
}

fn settings(checkpoint: &Checkpoint) -> QloraSettings {
    let spec = QloraSpec {
        rank: Some(4),
        targets: Some(ALL.map(String::from).to_vec()),
        training: TrainingSpec {
            steps: Some(12),
            batch_size: Some(2),
            seq_len: Some(32),
            learning_rate: Some(1e-2),
            warmup_steps: Some(2),
            checkpoint_every: Some(5),
            ..TrainingSpec::default()
        },
        ..QloraSpec::default()
    };
    spec.settings(Preset::Paper, &checkpoint.config().facts(), 1)
}

/// Text with a pattern to learn: counting, from different starts.
fn windows(count: u64) -> Vec<Vec<u32>> {
    (0..count).map(|n| (0..32).map(|i| (n * 7 + i) as u32 % (VOCAB as u32 - 1)).collect()).collect()
}

/// Adapters as they are in the middle of training: nothing is zero.
fn disturbed(checkpoint: &Checkpoint, settings: &QloraSettings) -> Trainables {
    let adapters = Trainables::adapters(checkpoint.config(), settings, 3, &Device::Cpu).unwrap();
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

fn opened(tiny: Tiny, dir: &std::path::Path) -> Checkpoint {
    Checkpoint::open(&Tiny { dtype: Dtype::F32, layers: 3, ..tiny }.write(dir)).unwrap()
}

fn every_adapter_has_the_slope_of_the_loss(tiny: Tiny, dropout: f64) {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = opened(tiny, dir.path());
    let settings = QloraSettings { dropout, ..settings(&checkpoint) };
    every_gradient_is_the_slope_of_the_loss(&checkpoint, &disturbed(&checkpoint, &settings), &[]);
}

fn every_weight_has_the_slope_of_the_loss(tiny: Tiny) {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = opened(tiny, dir.path());
    let head = !checkpoint.config().tied;
    for layers in [0..3, 2..3] {
        let weights = Trainables::weights(&checkpoint, layers, head, &Device::Cpu).unwrap();
        every_gradient_is_the_slope_of_the_loss(&checkpoint, &weights, &[]);
    }
}

fn every_gradient_is_the_slope_of_the_loss(checkpoint: &Checkpoint, trained: &Trainables, seams: &[Seam]) {
    let decoder = Decoder::open_frozen(checkpoint, &compute(), BaseFormat::Sixteen).unwrap();
    let windows = windows(2);
    // One window shorter than the other: padding must not leak into the gradient.
    let batch: Vec<&[u32]> = vec![&windows[0], &windows[1][..20]];
    let draw = Draw { seed: 1, step: 2, micro_batch: 0 };
    let targets = next_tokens(&batch);
    let objective = Objective { targets: &targets, seams, scale: 1.0 };
    let loss = || loss_and_gradients(&decoder, trained, &batch, None, &objective, draw).unwrap();
    let (_, gradients) = loss();
    for (i, variable) in trained.variables.iter().enumerate() {
        let length = gradients[i].sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        // Below that the noise of a loss of some 1,500 nats in float32 would say more than the slope.
        assert!(length > 0.4, "variable {i}: a gradient of {length} proves little");
        // Along the gradient itself: what is wrong with it, in length or direction, makes the slope another.
        let direction = (&gradients[i] / f64::from(length)).unwrap();
        let (value, h) = (variable.as_detached_tensor().copy().unwrap(), 2e-2);
        let at = |h: f64| {
            variable.set(&(&value + (&direction * h).unwrap()).unwrap()).unwrap();
            loss().0
        };
        let slope = (at(h) - at(-h)) / (2.0 * h);
        variable.set(&value).unwrap();
        let error = (f64::from(length) - slope).abs();
        assert!(error < 0.02 * slope.abs() + 0.04, "variable {i}: gradient {length}, slope {slope}");
    }
}

#[test]
fn every_adapter_gets_the_gradient_that_finite_differences_say() {
    every_adapter_has_the_slope_of_the_loss(Tiny::llama(), 0.0);
}

#[test]
fn gradients_pass_windows_biases_and_an_untied_head() {
    every_adapter_has_the_slope_of_the_loss(Tiny::mistral(), 0.0);
    every_adapter_has_the_slope_of_the_loss(Tiny::qwen2(), 0.0);
}

#[test]
fn dropout_zeroes_the_same_inputs_forward_and_backward() {
    every_adapter_has_the_slope_of_the_loss(Tiny::llama(), 0.3);
}

#[test]
fn every_weight_and_the_head_get_the_gradient_that_finite_differences_say() {
    every_weight_has_the_slope_of_the_loss(Tiny::llama());
    every_weight_has_the_slope_of_the_loss(Tiny::mistral());
    every_weight_has_the_slope_of_the_loss(Tiny::qwen2());
}

#[test]
fn what_the_stream_lacks_behind_a_cut_has_a_gradient_too() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = opened(Tiny::llama(), dir.path());
    let width = checkpoint.config().hidden_size;
    let seam = |layer: usize| Seam { layer, wanted: noise(layer as u64, &[52, width], 4.0), weight: 40.0 };
    let adapters = disturbed(&checkpoint, &settings(&checkpoint));
    every_gradient_is_the_slope_of_the_loss(&checkpoint, &adapters, &[seam(1), seam(3)]);
}

#[test]
fn training_learns_a_pattern_over_a_base_in_4_8_and_16_bits() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&Tiny::llama().write(dir.path())).unwrap();
    let mut curves = Vec::new();
    for (bits, format) in [
        (BaseBits::Four, FourBits::Nf4),
        (BaseBits::Four, FourBits::Q4),
        (BaseBits::Eight, FourBits::Nf4),
        (BaseBits::Sixteen, FourBits::Nf4),
    ] {
        let settings =
            QloraSettings { bits, format, ..with_training(settings(&checkpoint), |t| t.steps = 25) };
        let scratch = tempfile::tempdir().unwrap();
        let windows = Windows::split(windows(12)).unwrap();
        let trained = trained(&checkpoint, &settings, &windows, None, scratch.path(), &Silent).unwrap();
        let (first, last) = (trained.taken.curve[0].loss, trained.taken.curve[24].loss);
        assert!(last < 0.7 * first, "{bits:?} {format:?}: {first} to {last}");
        assert!(!curves.contains(&losses(&trained)), "{bits:?} {format:?}: as another base");
        curves.push(losses(&trained));
    }
}

/// Trains adapters as the settings say.
fn trained(
    checkpoint: &Checkpoint,
    settings: &QloraSettings,
    windows: &Windows,
    teacher: Option<Teacher>,
    scratch: &std::path::Path,
    observer: &dyn Observer,
) -> Result<Trained, Error> {
    let compute = compute();
    let cx = Cx { stage: Stage::Heal, compute: &compute, observer };
    let (source, base, training) = (checkpoint, settings.base(), &settings.training);
    train(Course { source, base, training, windows, teacher, seed: 5, scratch, cx }, settings)
}

fn with_training(settings: QloraSettings, change: impl FnOnce(&mut Training)) -> QloraSettings {
    let mut settings = settings;
    change(&mut settings.training);
    settings
}

fn losses(trained: &Trained) -> Vec<f64> {
    trained.taken.curve.iter().map(|point| point.loss).collect()
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
    let run = |scratch: &std::path::Path, observer: &dyn Observer| {
        let teacher = Teacher::open(&checkpoint, &DistillSpec::default(), &compute()).unwrap();
        trained(&checkpoint, &settings, &windows, Some(teacher), scratch, observer)
    };
    let bytes = |adapters: &Trainables| -> Vec<Vec<f32>> {
        adapters.variables.iter().map(|v| v.flatten_all().unwrap().to_vec1().unwrap()).collect()
    };
    let scratch = tempfile::tempdir().unwrap();
    let whole = run(scratch.path(), &Silent).unwrap();
    for stop in [1, 5, 7] {
        let scratch = tempfile::tempdir().unwrap();
        let stopped = run(scratch.path(), &StopAfter(AtomicU64::new(stop)));
        assert!(matches!(stopped, Err(Error::Stopped)));
        let resumed = run(scratch.path(), &Silent).unwrap();
        assert_eq!(bytes(&resumed.trainables), bytes(&whole.trainables), "stopped after {stop} steps");
        assert_eq!(losses(&resumed), losses(&whole));
        assert_eq!(resumed.taken.tokens, whole.taken.tokens);
    }
}

#[test]
fn a_teacher_has_nothing_to_teach_a_model_like_itself() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint =
        Checkpoint::open(&Tiny { dtype: Dtype::F32, ..Tiny::llama() }.write(dir.path())).unwrap();
    let adapters =
        Trainables::adapters(checkpoint.config(), &settings(&checkpoint), 3, &Device::Cpu).unwrap();
    let decoder = Decoder::open_frozen(&checkpoint, &compute(), BaseFormat::Sixteen).unwrap();
    let windows = windows(2);
    let batch: Vec<&[u32]> = vec![&windows[0], &windows[1][..20]];
    let largest = |weight: f64| {
        let spec = DistillSpec { weight, top_k: VOCAB as u32, seam: 0.0 };
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
        let objective = Objective { targets: &targets, seams: &[], scale: 1.0 };
        let (_, gradients) = loss_and_gradients(&decoder, &adapters, &batch, None, &objective, draw).unwrap();
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
    let settings = with_training(settings(&checkpoint), |t| t.steps = 3);
    let (scratch, series) = (tempfile::tempdir().unwrap(), Series::default());
    let windows = Windows::split(windows(8)).unwrap();
    trained(&checkpoint, &settings, &windows, None, scratch.path(), &series).unwrap();
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
    let settings = with_training(settings(&checkpoint), |t| (t.steps, t.checkpoint_every) = (3, 1));
    let windows = Windows::split(windows(8)).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let run = || trained(&checkpoint, &settings, &windows, None, scratch.path(), &Silent).unwrap();
    let whole = run();
    let file = scratch.path().join("training-steady.safetensors");
    let saved = std::fs::read(&file).unwrap();
    std::fs::write(&file, &saved[..saved.len() / 2]).unwrap();
    assert_eq!(losses(&run()), losses(&whole));
}

#[test]
fn an_unknown_target_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&Tiny::llama().write(dir.path())).unwrap();
    let settings = QloraSettings { targets: vec!["c_fc".into()], ..settings(&checkpoint) };
    let Err(error) = Trainables::adapters(checkpoint.config(), &settings, 0, &Device::Cpu) else {
        panic!("accepted")
    };
    assert!(error.to_string().contains("c_fc") && error.to_string().contains("down_proj"), "{error}");
}

#[test]
fn a_training_that_diverges_ends_with_its_last_good_state() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&Tiny::llama().write(dir.path())).unwrap();
    let windows = Windows::split(windows(8)).unwrap();
    let run = |every: u32| {
        // Warm-up reaches a rate at which nothing holds.
        let settings = with_training(settings(&checkpoint), |t| {
            (t.steps, t.warmup_steps, t.checkpoint_every) = (40, 30, every);
            (t.learning_rate, t.max_gradient_norm) = (1e30, 1e9);
        });
        let scratch = tempfile::tempdir().unwrap();
        trained(&checkpoint, &settings, &windows, None, scratch.path(), &Silent)
    };
    let kept = run(1).unwrap();
    let at = kept.taken.diverged_at.unwrap();
    assert!(at > 0 && kept.taken.curve.len() == at as usize, "{at} {}", kept.taken.curve.len());
    assert!(losses(&kept).iter().all(|loss| loss.is_finite()));
    let Err(error) = run(1000) else { panic!("nothing good was kept") };
    assert!(error.to_string().contains("lower learning_rate"), "{error}");
}

#[test]
fn what_is_kept_of_frozen_layers_gives_the_same_loss_and_gradients() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = opened(Tiny::qwen2(), dir.path());
    let decoder = Decoder::open_frozen(&checkpoint, &compute(), BaseFormat::Sixteen).unwrap();
    let weights = Trainables::weights(&checkpoint, 2..3, false, &Device::Cpu).unwrap();
    let windows = Windows::split(windows(6)).unwrap();
    let batch: Vec<&[u32]> = vec![&windows.train[3], &windows.train[1]];
    let targets = next_tokens(&batch);
    let objective = Objective { targets: &targets, seams: &[], scale: 1.0 };
    let gradients = |known| {
        let draw = Draw { seed: 1, step: 0, micro_batch: 0 };
        let (loss, gradients) =
            loss_and_gradients(&decoder, &weights, &batch, known, &objective, draw).unwrap();
        let values = |g: &Tensor| g.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        (loss, gradients.iter().map(values).collect::<Vec<_>>())
    };
    let expected = gradients(None);
    let mut prefix = Prefix::new(&decoder, 2, &windows).unwrap();
    // The first time they are computed, then taken.
    for _ in 0..2 {
        let numbered = [3, 1].into_iter().zip(batch.iter().copied());
        let known = prefix.entering(&decoder, numbered).unwrap();
        assert_eq!(known.layer, 2);
        assert_eq!(gradients(Some(known)), expected);
    }
    // Other windows are others.
    let other = prefix.entering(&decoder, [1, 3].into_iter().zip(batch.iter().rev().copied())).unwrap();
    assert_ne!(gradients(Some(other)), expected);
}

#[test]
fn whole_weights_learn_the_pattern_with_moments_in_8_bits_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&Tiny::mistral().write(dir.path())).unwrap();
    let windows = Windows::split(windows(12)).unwrap();
    let mut curves = Vec::new();
    for moment_bits in [MomentBits::ThirtyTwo, MomentBits::Eight] {
        let settings = with_training(settings(&checkpoint), |t| (t.steps, t.moment_bits) = (25, moment_bits));
        let (scratch, compute) = (tempfile::tempdir().unwrap(), compute());
        let cx = Cx { stage: Stage::Heal, compute: &compute, observer: &Silent };
        let course = Course {
            source: &checkpoint,
            base: BaseFormat::Sixteen,
            training: &settings.training,
            windows: &windows,
            teacher: None,
            seed: 5,
            scratch: scratch.path(),
            cx,
        };
        let layers = checkpoint.config().layer_count;
        let weights = Trainables::weights(&checkpoint, layers - 1..layers, true, &compute.device).unwrap();
        let trained = course.run(weights).unwrap();
        let (first, last) = (trained.taken.curve[0].loss, trained.taken.curve[24].loss);
        assert!(last < 0.7 * first, "{moment_bits:?}: {first} to {last}");
        curves.push(losses(&trained));
    }
    assert_ne!(curves[0], curves[1]);
}
