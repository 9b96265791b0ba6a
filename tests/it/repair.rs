//! Healing that trains nothing: what it does to the files is what it says it does to the streams.

use std::path::Path;

use candle_core::{D, Tensor};
use safetensors::Dtype;
use secateur::engine::Error;
use secateur::engine::chance::unit;
use secateur::engine::damage::Damage;
use secateur::engine::heal::backward::mean_loss;
use secateur::engine::heal::{CANDIDATE, Case, Remedy, Windows, Wound, treat};
use secateur::engine::model::{Batch, Checkpoint, Decoder};
use secateur::engine::prune::Cut;
use secateur::engine::select::Oracle;
use secateur::engine::workspace::Workspace;
use secateur::job::heal::{HealSettings, LeastSquaresSettings, ReconstructSettings, RescaleSettings};
use secateur::job::progress::Stage;
use secateur::job::report::{Block, CheckpointRef};
use secateur::job::spec::{
    Corpus, DamageSpec, HealMethod, JobSpec, LeastSquaresSpec, ReconstructSpec, RescaleSpec, WeightType,
};
use serde_json::{Value, json};

use crate::parity::{GOLDENS, write};
use crate::support::rig::Rig;
use crate::support::tiny::{Tiny, Weight};

/// A base model with some of its layers cut, and text.
struct Bed {
    rig: Rig,
    workspace: Workspace,
    base: Checkpoint,
    dropped: Vec<u32>,
    pruned: CheckpointRef,
    spec: JobSpec,
    windows: Windows,
}

impl Bed {
    fn new(dir: &Path, rig: Rig, dropped: &[u32]) -> Self {
        let base = Checkpoint::open(dir).unwrap();
        let workspace = rig.workspace();
        // Weights of 16 bits would round what is done to them.
        let cut = Cut::plan(base.index(), dropped, Some(WeightType::F32)).unwrap();
        let pruned = cut.write(&workspace, rig.cx(Stage::Prune)).unwrap();
        let vocab = base.config().vocab_size as u64;
        let token = |window: u64, i: u64| (unit(window, i) * vocab as f64) as u32;
        let windows = (0..44).map(|w| (0..12 + w % 5).map(|i| token(w, i)).collect()).collect();
        let spec = json!({"model": {"from": "path", "path": "base"}, "prune": {"amount": {"layers": 1}}});
        Self {
            spec: JobSpec::read(spec).unwrap(),
            windows: Windows::split(windows).unwrap(),
            dropped: dropped.to_vec(),
            rig,
            workspace,
            base,
            pruned,
        }
    }

    /// Whether `method` is refused for this model, the golden `name`: just when it is one of `refused`.
    fn refuses(&self, method: &HealMethod, name: &str, refused: &[&str]) -> bool {
        let refuses = method.refused_for(&self.base.config().facts()).is_some();
        assert_eq!(refuses, refused.contains(&name), "{name}");
        refuses
    }

    fn golden(name: &str, dropped: &[u32]) -> Self {
        let rig = Rig::new();
        let dir = rig.path("base");
        std::fs::create_dir_all(&dir).unwrap();
        write(name, "newer", &dir);
        without_epsilon(&dir);
        Self::new(&dir, rig, dropped)
    }

    /// What a method makes of the checkpoint called `name`.
    fn treated(&self, name: &str, sizes: &[f64], settings: &HealSettings) -> Remedy {
        self.try_treated(name, sizes, settings).unwrap()
    }

    fn try_treated(&self, name: &str, sizes: &[f64], settings: &HealSettings) -> Result<Remedy, Error> {
        let wound =
            Wound { spec: &self.spec, base: &self.base, dropped: &self.dropped, pruned: &self.pruned };
        let (source, scratch) = (self.open(name), self.rig.path("scratch"));
        let cx = self.rig.cx(Stage::Heal);
        let case =
            Case { wound: &wound, source: &source, sizes, windows: &self.windows, scratch: &scratch, cx };
        Ok(treat(&case, settings, &self.workspace)?.0)
    }

    fn open(&self, name: &str) -> Checkpoint {
        Checkpoint::open(&self.workspace.dir().join(name)).unwrap()
    }

    fn decoder(&self, name: &str) -> Decoder {
        Decoder::open(&self.open(name), &self.rig.compute).unwrap()
    }

    fn base(&self) -> Decoder {
        Decoder::open(&self.base, &self.rig.compute).unwrap()
    }

    /// Blocks that went, and the layer of the pruned model behind each.
    fn cuts(&self) -> Vec<(Block, usize)> {
        let blocks = Block::runs(&self.dropped);
        let gone = |block: &Block| self.dropped.iter().filter(|layer| **layer < block.start).count();
        blocks.into_iter().map(|block| (block, block.start as usize - gone(&block))).collect()
    }

    /// The mean over tokens of what the files called `name` lack behind a cut, relative to the base's stream there
    /// divided by `size`.
    fn lacking(&self, name: &str, (block, seam): (Block, usize), size: f64) -> f64 {
        let (base, healed) = (self.base(), self.decoder(name));
        let (mut sum, mut rows) = (0.0, 0);
        for window in &self.windows.train {
            let batch = Batch::of(&[window]);
            let until = |decoder: &Decoder, layer: usize| {
                decoder
                    .layers(decoder.embed(&batch).unwrap(), &decoder.pass(&batch), 0..layer, |_, _| Ok(()))
                    .unwrap()
            };
            let wanted = (until(&base, block.layers().end as usize) / size).unwrap();
            let found = until(&healed, seam);
            let square = |x: &Tensor| x.sqr().unwrap().sum(D::Minus1).unwrap();
            let each = (square(&(&wanted - found).unwrap()) / square(&wanted)).unwrap();
            sum += each.to_vec1::<f32>().unwrap().iter().map(|v| f64::from(*v)).sum::<f64>();
            rows += window.len();
        }
        sum / rows as f64
    }
}

/// The size of the stream is nothing to a norm but for its epsilon: that goes.
fn without_epsilon(dir: &Path) {
    let file = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let keys: Vec<String> =
        config.as_object().unwrap().keys().filter(|k| k.contains("eps")).cloned().collect();
    for key in keys {
        config[key] = json!(1e-12);
    }
    std::fs::write(file, config.to_string()).unwrap();
}

fn rescale() -> HealSettings {
    HealSettings::Rescale(RescaleSettings { samples: 40, seq_len: 16 })
}

fn least_squares(ridge: f64) -> HealSettings {
    HealSettings::LeastSquares(LeastSquaresSettings { samples: 40, seq_len: 16, ridge })
}

fn reconstruct() -> HealSettings {
    HealSettings::Reconstruct(ReconstructSettings {
        samples: 40,
        seq_len: 16,
        epochs: 8,
        learning_rate: 5e-3,
    })
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// Of the order of the logits, which are of the order of 1.
fn logits(decoder: &Decoder, window: &[u32]) -> Tensor {
    decoder.logits(&decoder.forward(&Batch::of(&[window])).unwrap()).unwrap()
}

/// The model without its cut layers, its stream multiplied by each factor behind each cut, by hand.
fn upscaled_logits(bed: &Bed, factors: &[f64], window: &[u32]) -> Tensor {
    let base = bed.base();
    let batch = Batch::of(&[window]);
    let pass = base.pass(&batch);
    let mut x = base.embed(&batch).unwrap();
    for layer in 0..base.config().layer_count {
        for ((block, _), factor) in bed.cuts().iter().zip(factors) {
            if block.layers().end as usize == layer {
                x = (x * *factor).unwrap();
            }
        }
        if !bed.dropped.contains(&(layer as u32)) {
            x = base.layers(x, &pass, layer..layer + 1, |_, _| Ok(())).unwrap();
        }
    }
    base.logits(&x).unwrap()
}

/// Of rounding, for logits of the order of 1 to 10.
const SCALE_TOLERANCE: f32 = 1e-3;

#[test]
fn rescaled_files_compute_what_a_stream_scaled_behind_each_cut_does_in_every_family() {
    for name in GOLDENS {
        let bed = Bed::golden(name, &[0, 2]);
        // Its MLP reads the stream as it is.
        if bed.refuses(&HealMethod::Rescale(RescaleSpec::default()), name, &["olmo2"]) {
            continue;
        }
        let remedy = bed.treated("pruned", &[1.0, 1.0], &rescale());
        let factors: Vec<f64> = remedy.repaired.iter().map(|r| r.factor).collect();
        assert!(factors.iter().all(|f| (f - 1.0).abs() > 1e-3), "{name}: {factors:?} would change nothing");
        assert_eq!(remedy.sizes, [factors[0], factors[0] * factors[1]], "{name}");
        let window = &bed.windows.held_out[0];
        let (healed, by_hand) =
            (logits(&bed.decoder(CANDIDATE), window), upscaled_logits(&bed, &factors, window));
        let off = difference(&healed, &by_hand);
        let done = difference(&by_hand, &logits(&bed.decoder("pruned"), window));
        assert!(
            off < SCALE_TOLERANCE && done > 10.0 * off,
            "{name}: off by {off}, of {done} that it changed"
        );
        for (cut, (repaired, size)) in bed.cuts().into_iter().zip(remedy.repaired.iter().zip(&remedy.sizes)) {
            // What the files have at the seam is not multiplied yet: the layers behind it are divided.
            let before = size / repaired.factor;
            let found = bed.lacking(CANDIDATE, cut, before);
            assert!((found - repaired.error_before).abs() < 1e-3 * found, "{name}: {found} {repaired:?}");
        }
    }
}

#[test]
fn the_factor_is_the_mean_over_windows_of_sums_of_absolute_values() {
    let bed = Bed::golden("llama3", &[1, 2]);
    let base = bed.base();
    let ratio = |window: &Vec<u32>| {
        let batch = Batch::of(&[window]);
        let mut sums = Vec::new();
        let x = base.embed(&batch).unwrap();
        base.layers(x, &base.pass(&batch), 0..3, |_, x| {
            sums.push(x.abs()?.sum_all()?.to_scalar::<f32>()?);
            Ok(())
        })
        .unwrap();
        f64::from(sums[2] / sums[0])
    };
    let ratios: Vec<f64> = bed.windows.train.iter().map(ratio).collect();
    let want = ratios.iter().sum::<f64>() / ratios.len() as f64;
    let found = bed.treated("pruned", &[1.0], &rescale()).repaired[0];
    assert!((found.factor - want).abs() < 1e-5 * want, "{} {want}", found.factor);
    assert_eq!(found.block, Block { start: 1, len: 2 });
}

#[test]
fn scaling_a_second_time_finds_nothing_to_do() {
    let bed = Bed::golden("qwen2_bias", &[0, 2]);
    let first = bed.treated("pruned", &[1.0, 1.0], &rescale());
    bed.workspace.publish(&bed.workspace.dir().join(CANDIDATE), "once").unwrap();
    let again = bed.treated("once", &first.sizes, &rescale());
    for repaired in &again.repaired {
        assert!((repaired.factor - 1.0).abs() < 1e-4, "{repaired:?}");
    }
}

#[test]
fn a_fitted_map_is_in_the_files_as_it_was_found_in_every_family() {
    for name in GOLDENS {
        let bed = Bed::golden(name, &[1, 3]);
        // A norm stands between the MLP and the stream.
        let method = HealMethod::LeastSquares(LeastSquaresSpec::default());
        if bed.refuses(&method, name, &["olmo2", "gemma2", "gemma3"]) {
            continue;
        }
        let remedy = bed.treated("pruned", &[1.0, 1.0], &least_squares(1e-3));
        for (cut, repaired) in bed.cuts().into_iter().zip(&remedy.repaired) {
            assert!(repaired.error_after < 0.95 * repaired.error_before, "{name}: {repaired:?}");
            let found = bed.lacking(CANDIDATE, cut, 1.0);
            // Another expert may be chosen where a stream is another by rounding.
            let near = if bed.base.config().experts.is_some() { 2e-2 } else { 2e-3 };
            assert!((found - repaired.error_after).abs() < near * found, "{name}: {found} {repaired:?}");
        }
    }
}

#[test]
fn a_layer_trained_for_those_that_went_is_in_the_files_as_it_was_left_in_every_family() {
    for name in GOLDENS {
        let bed = Bed::golden(name, &[1, 3]);
        // Most of such layers are experts.
        let method = HealMethod::Reconstruct(ReconstructSpec::default());
        if bed.refuses(&method, name, &["mixtral", "qwen3_moe", "qwen3_moe_step"]) {
            continue;
        }
        let remedy = bed.treated("pruned", &[1.0, 1.0], &reconstruct());
        assert!(remedy.trainable_parameters > 0);
        for (cut, repaired) in bed.cuts().into_iter().zip(&remedy.repaired) {
            assert!(repaired.error_after < 0.9 * repaired.error_before, "{name}: {repaired:?}");
            let found = bed.lacking(CANDIDATE, cut, 1.0);
            assert!((found - repaired.error_after).abs() < 2e-3 * found, "{name}: {found} {repaired:?}");
        }
        // What was not trained has its bytes still; a run that is told to do it again has nothing left to do.
        let again = bed.treated("pruned", &[1.0, 1.0], &reconstruct());
        assert_eq!(again.repaired, remedy.repaired, "{name}");
    }
}

#[test]
fn a_layer_whose_training_diverges_at_once_is_not_written_and_the_rate_is_blamed() {
    let bed = Bed::golden("llama3", &[2]);
    let HealSettings::Reconstruct(settings) = reconstruct() else { unreachable!() };
    let settings = HealSettings::Reconstruct(ReconstructSettings { learning_rate: 1e30, ..settings });
    let Err(error) = bed.try_treated("pruned", &[1.0], &settings) else { panic!("it held") };
    assert!(error.to_string().contains("lower learning_rate"), "{error}");
    assert!(!bed.workspace.dir().join(CANDIDATE).exists());
}

#[test]
fn a_token_with_a_huge_stream_does_not_have_the_map_to_itself() {
    const TOKEN: usize = 7;
    const CHANNEL: usize = 5;
    let rig = Rig::new();
    let dir = Tiny { dtype: Dtype::F32, ..Tiny::llama() }.write_with(rig.path("base"), |weight| {
        let columns = weight.shape.last().copied().unwrap();
        match weight.name.as_str() {
            "model.embed_tokens.weight" => weight.values[TOKEN * columns + CHANNEL] = 3000.0,
            // One of the layers that go takes much of it away.
            "model.layers.3.mlp.gate_proj.weight" | "model.layers.3.mlp.up_proj.weight" => {
                weight.values[..columns].fill(0.0);
                weight.values[CHANNEL] = 1.0;
            }
            "model.layers.3.mlp.down_proj.weight" => weight.values[CHANNEL * columns] = -20.0,
            _ => {}
        }
    });
    let mut bed = Bed::new(&dir, rig, &[3, 4]);
    bed.windows.train.iter_mut().for_each(|window| window[0] = TOKEN as u32);
    let repaired = bed.treated("pruned", &[1.0], &least_squares(1e-6)).repaired[0];
    assert!(repaired.error_after < 0.9 * repaired.error_before, "{repaired:?}");
}

#[test]
fn a_fit_after_a_scaling_fits_the_scaled_stream() {
    let bed = Bed::golden("llama_bias", &[1, 3]);
    let scaled = bed.treated("pruned", &[1.0, 1.0], &rescale());
    bed.workspace.publish(&bed.workspace.dir().join(CANDIDATE), "scaled").unwrap();
    let fitted = bed.treated("scaled", &scaled.sizes, &least_squares(1e-3));
    assert_eq!(fitted.sizes, scaled.sizes);
    for ((cut, repaired), size) in bed.cuts().into_iter().zip(&fitted.repaired).zip(&scaled.sizes) {
        assert!(repaired.error_after < repaired.error_before, "{repaired:?}");
        let found = bed.lacking(CANDIDATE, cut, *size);
        assert!((found - repaired.error_after).abs() < 2e-3 * found, "{found} {repaired:?}");
    }
}

#[test]
fn mended_damage_is_the_loss_of_the_rescaled_files() {
    for measure in ["loss", "kl"] {
        let mut bed = Bed::golden("llama_bias", &[1, 2]);
        // Of one window the factor is the same whichever way it is averaged.
        bed.windows.train.truncate(1);
        let window = bed.windows.train[0].clone();
        bed.treated("pruned", &[1.0], &rescale());
        let spec: DamageSpec =
            serde_json::from_value(json!({"measure": measure, "top_k": 1_000_000})).unwrap();
        let measured = |mended: bool| {
            let cx = bed.rig.cx(Stage::Select);
            let mut oracle = Damage::open(&bed.base, vec![window.clone()], &spec, mended, cx).unwrap();
            oracle.measure(&[vec![1, 2], vec![3]], 1, &mut |_| Ok(())).unwrap()[0].damage
        };
        let (plain, mended) = (measured(false), measured(true));
        let log = |decoder: &Decoder| {
            let logits = logits(decoder, &window[..window.len() - 1]);
            let log_sum = logits.exp().unwrap().sum_keepdim(1).unwrap().log().unwrap();
            logits.broadcast_sub(&log_sum).unwrap()
        };
        let (base, healed) = (log(&bed.base()), log(&bed.decoder(CANDIDATE)));
        let gap = (&base - healed).unwrap();
        let each = if measure == "kl" {
            (base.exp().unwrap() * gap).unwrap().sum(1).unwrap()
        } else {
            let targets = Tensor::new(&window[1..], gap.device()).unwrap().unsqueeze(1).unwrap();
            gap.gather(&targets, 1).unwrap().squeeze(1).unwrap()
        };
        let want = f64::from(each.mean_all().unwrap().to_scalar::<f32>().unwrap());
        assert!((mended - want).abs() < 1e-4, "{measure}: {mended} {want}");
        assert!((plain - want).abs() > 1e-3, "{measure}: mending changes nothing");
    }
}

/// Width of the part of the stream that only the MLP below the cut writes to.
const OWN: usize = 16;
/// A part of the stream that is the same for all tokens, and so large that norms divide by it alone.
const CONSTANT: usize = 63;
const LARGE: f32 = 1000.0;

/// A model whose layers 3 and 4 add a linear map of what the MLP of layer 2 gives, and nothing else.
fn planted(weight: &mut Weight) {
    let columns = weight.shape.last().copied().unwrap();
    let mut each = |change: &dyn Fn(usize, usize, f32) -> f32| {
        for (i, value) in weight.values.iter_mut().enumerate() {
            *value = change(i / columns, i % columns, *value);
        }
    };
    let mut parts = weight.name.split('.').skip(2);
    let layer = parts.next().and_then(|number| number.parse::<usize>().ok());
    let gone = matches!(layer, Some(3 | 4));
    match weight.name.as_str() {
        "model.embed_tokens.weight" => each(&|_, column, value| match column {
            CONSTANT => LARGE,
            0..OWN => 0.0,
            _ => value,
        }),
        // Back to where it was before the large part.
        name if name.ends_with("norm.weight") => each(&|_, column, value| {
            if column == CONSTANT { 0.125 } else { value * LARGE / 8.0 }
        }),
        name if name.ends_with("o_proj.weight") => each(&|row, _, value| match row {
            CONSTANT | 0..OWN => 0.0,
            _ if gone => 0.0,
            _ => value,
        }),
        name if name.ends_with("down_proj.weight") => each(&|row, _, value| match (row, layer) {
            (CONSTANT, _) | (0..OWN, Some(0 | 1)) | (OWN.., Some(2)) => 0.0,
            _ => value,
        }),
        // A gate that stands open as far for every token.
        name if gone && name.ends_with("gate_proj.weight") => {
            each(&|_, column, _| if column == CONSTANT { 2.0 } else { 0.0 });
        }
        name if gone && name.ends_with("up_proj.weight") => {
            each(&|_, column, value| if column < OWN { value } else { 0.0 });
        }
        _ => {}
    }
}

#[test]
fn layers_that_were_a_linear_map_are_made_up_for_completely() {
    let rig = Rig::new();
    let dir = Tiny { dtype: Dtype::F32, ..Tiny::llama() }.write_with(rig.path("base"), planted);
    let bed = Bed::new(&dir, rig, &[3, 4]);
    let remedy = bed.treated("pruned", &[1.0], &least_squares(1e-9));
    let loss =
        |decoder: &Decoder| mean_loss(decoder, &bed.windows.held_out, bed.rig.cx(Stage::Heal)).unwrap();
    let (base, pruned, healed) =
        (loss(&bed.base()), loss(&bed.decoder("pruned")), loss(&bed.decoder(CANDIDATE)));
    assert!((pruned - base).abs() > 0.05, "{base} {pruned}: nothing was planted");
    assert!((healed - base).abs() < 1e-3 * (pruned - base).abs(), "{base} {pruned} {healed}");
    assert!(remedy.repaired[0].error_after < 1e-6 * remedy.repaired[0].error_before, "{:?}", remedy.repaired);
}

#[test]
fn tokens_too_few_for_a_map_are_told_where_nothing_holds_it() {
    let bed = Bed {
        windows: Windows { train: vec![vec![1, 2, 3]], held_out: vec![vec![4, 5]] },
        ..Bed::golden("llama3", &[2])
    };
    let Err(error) = bed.try_treated("pruned", &[1.0], &least_squares(0.0)) else { panic!("solved") };
    assert!(error.to_string().contains("3 tokens") && error.to_string().contains("ridge"), "{error}");
}

#[test]
fn a_family_that_a_method_is_not_exact_for_is_refused_before_anything_is_computed() {
    let heal = json!([{"method": "rescale"}, {"method": "least_squares"}]);
    let spec = json!({"model": {"from": "path", "path": "m"}, "prune": {"amount": {"layers": 1}, "keep_first": 1}, "heal": heal});
    let spec = JobSpec::read(spec).unwrap();
    let refused = |name: &str| {
        let bed = Bed::golden(name, &[2]);
        let complaints = spec.validate_for(&bed.base.config().facts());
        complaints.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert!(refused("llama3").is_empty());
    let olmo2 = refused("olmo2");
    assert!(olmo2[0].contains("/heal/0/method") && olmo2[0].contains("olmo2"), "{olmo2:?}");
    assert!(olmo2[1].contains("/heal/1/method") && olmo2[1].contains("norm"), "{olmo2:?}");
    let gemma2 = refused("gemma2");
    assert!(gemma2.len() == 1 && gemma2[0].contains("/heal/1/method"), "{gemma2:?}");
    assert!(!matches!(spec.heal[0].corpus(), Corpus::Path { .. }));
}
