//! The decoder agrees with transformers in float32, on goldens made by `tests/golden/make_golden.py`:
//! tiny random models of every family, and the config.json that transformers 5 and 4 write for them.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::serialize_to_file;
use secateur::checkpoint::family::FAMILIES;
use secateur::engine::chance::unit;
use secateur::engine::heal::backward::{Objective, loss_and_gradients, next_tokens};
use secateur::engine::heal::trainables::{Draw, Trainables};
use secateur::engine::model::generate::continue_text;
use secateur::engine::model::{Batch, Checkpoint, Compute, Decoder, Rounding};
use secateur::engine::prune::Cut;
use secateur::job::progress::Stage;
use secateur::job::spec::{BaseFormat, Preset, QloraSpec};
use serde_json::{Value, json};

use crate::support::rig::Rig;

/// Largest difference to transformers; the numbers are of the order of 1.
const F32_TOLERANCE: f32 = 1e-4;

struct Golden {
    decoder: Decoder,
    tensors: HashMap<String, Tensor>,
    name: String,
    dir: tempfile::TempDir,
}

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn compute() -> Compute {
    Compute::cpu(None)
}

/// Writes a model directory of the golden's weights with the config in one of its forms.
pub fn write(name: &str, form: &str, dir: &Path) {
    let bytes = fs::read(path(&format!("{name}.safetensors"))).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let weights: Vec<_> = all.tensors().into_iter().filter(|(n, _)| !n.starts_with("golden.")).collect();
    serialize_to_file(weights, None, &dir.join("model.safetensors")).unwrap();
    let configs: Value = serde_json::from_slice(&fs::read(path(&format!("{name}.json"))).unwrap()).unwrap();
    fs::write(dir.join("config.json"), configs[form].to_string()).unwrap();
}

impl Golden {
    fn open(name: &str, form: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write(name, form, dir.path());
        let decoder = Decoder::open(&Checkpoint::open(dir.path()).unwrap(), &compute()).unwrap();
        let tensors =
            candle_core::safetensors::load(path(&format!("{name}.safetensors")), &Device::Cpu).unwrap();
        Self { decoder, tensors, name: format!("{name}, {form}"), dir }
    }

    fn of(&self, key: &str) -> Tensor {
        self.tensors[&format!("golden.{key}")].clone()
    }

    fn ids(&self) -> Vec<Vec<u32>> {
        self.of("ids").to_dtype(DType::U32).unwrap().to_vec2().unwrap()
    }

    fn batch(&self) -> Batch {
        let ids = self.ids();
        Batch::of(&ids.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    fn assert_close(&self, what: &str, ours: &Tensor, theirs: &Tensor) {
        assert_eq!(ours.dims(), theirs.dims(), "{}: {what}", self.name);
        let difference =
            (ours - theirs).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference <= F32_TOLERANCE, "{}: {what} differs by {difference}", self.name);
    }

    fn streams_and_logits_agree(&self) {
        let seen = |seam: usize| self.of(&format!("stream.{seam}")).flatten_to(1).unwrap();
        let x = self.decoder.embed(&self.batch()).unwrap();
        self.assert_close("stream 0", &x, &seen(0));
        let count = self.decoder.config().layer_count;
        let last = self.decoder.layers(x, &self.decoder.pass(&self.batch()), 0..count, |seam, stream| {
            self.assert_close(&format!("stream {seam}"), stream, &seen(seam));
            Ok(())
        });
        let logits = self.decoder.logits(&last.unwrap()).unwrap();
        self.assert_close("logits", &logits, &self.of("logits").flatten_to(1).unwrap());
    }

    /// Greedy text goes through the KV cache; the prompt is the first sequence's beginning.
    fn greedy_text_agrees(&self) {
        let text: Vec<u32> = self.of("greedy").to_dtype(DType::U32).unwrap().to_vec1().unwrap();
        let (prompt, rest) = text.split_at(8);
        let written = continue_text(&self.decoder, prompt, rest.len(), 0.0, 0).unwrap();
        let ends = |id: &u32| self.decoder.config().eos_tokens.contains(id);
        let until_end = rest.iter().position(ends).unwrap_or(rest.len());
        assert!(until_end > 0, "{}: the golden text says nothing", self.name);
        assert_eq!(written, rest[..until_end], "{}: greedy text", self.name);
    }

    /// In one batch with a longer one, a sequence is what it is alone.
    fn lengths_do_not_mix(&self) {
        let rows = self.ids();
        let all = [&rows[0][..], &rows[1][..11]];
        let together = self.decoder.forward(&Batch::of(&all)).unwrap();
        for (ids, first) in [(all[0], 0), (all[1], rows[0].len())] {
            let alone = self.decoder.forward(&Batch::of(&[ids])).unwrap();
            let row = together.narrow(0, first, ids.len()).unwrap();
            self.assert_close("a text of a batch", &row, &alone);
        }
    }

    /// What texts begin with together is computed once, and each is what it is alone.
    fn beginnings_are_shared(&self) {
        let rows = self.ids();
        let end = rows[0].len();
        let texts = [
            &rows[0][..18],
            &[&rows[0][..17], &rows[1][..3]].concat(),
            &rows[0][..],
            &rows[0][..end - 1],
            &rows[1][..5],
        ];
        let (batch, places) = Batch::sharing(&texts, self.decoder.in_common(&texts));
        let all: usize = texts.iter().map(|text| text.len()).sum();
        let turns_anew = self.decoder.config().ropes.iter().any(|rope| rope.changes(5, end));
        assert_eq!(batch.tokens.len() < all, !turns_anew, "{}", self.name);
        let together = self.decoder.forward(&batch).unwrap();
        for (text, places) in texts.iter().zip(&places) {
            let alone = self.decoder.forward(&Batch::of(&[text])).unwrap();
            let rows: Vec<u32> = (0..text.len()).map(|i| places.at(i) as u32).collect();
            let found = together.index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap();
            self.assert_close("a text that shares its beginning", &found, &alone);
        }
    }

    /// A checkpoint without some layers computes what the whole one does when they are skipped.
    fn a_cut_closes(&self) {
        let rig = Rig::new();
        let base = Checkpoint::open(self.dir.path()).unwrap();
        let cut = Cut::plan(base.index(), &[0, 2], None).unwrap();
        let written = cut.write(&rig.workspace(), rig.cx(Stage::Prune)).unwrap();
        let pruned = Checkpoint::open(&rig.path("workspace").join(written.path)).unwrap();
        let (batch, mut skipping) = (self.batch(), self.decoder.embed(&self.batch()).unwrap());
        let pass = self.decoder.pass(&batch);
        for layer in [1, 3] {
            skipping = self.decoder.layers(skipping, &pass, layer..layer + 1, |_, _| Ok(())).unwrap();
        }
        let plain = Decoder::open(&pruned, &compute()).unwrap().forward(&batch).unwrap();
        self.assert_close("the pruned checkpoint", &plain, &skipping);
    }

    /// Loss at the head, and its gradient for the stream.
    fn head(&self, ids: &[u32]) -> (f32, Tensor) {
        let x = self.of(&format!("stream.{}", self.decoder.config().layer_count)).get(0).unwrap();
        let x = x.narrow(0, 0, ids.len() - 1).unwrap();
        let loss = self.decoder.token_nll_backward(&x, &next_tokens(&[ids]), 0.1, None).unwrap();
        (loss.nll.iter().sum(), loss.stream)
    }

    /// Every gradient of adapters, and of weights where they can be trained, against finite differences along itself.
    fn gradients_are_right(&self) {
        let checkpoint = Checkpoint::open(self.dir.path()).unwrap();
        let spec: QloraSpec = serde_json::from_value(json!({
            "corpus": {"from": "model"}, "rank": 2, "dropout": 0.0, "targets": ["all"]
        }))
        .unwrap();
        let config = checkpoint.config();
        let settings = spec.settings(Preset::Paper, &config.facts(), 1);
        let adapters = Trainables::adapters(config, &settings, 3, &Device::Cpu).unwrap();
        for (key, variable) in adapters.variables.iter().enumerate() {
            // B begins as zero, which would hide A.
            let noise: Vec<f32> =
                (0..variable.elem_count()).map(|i| unit(key as u64, i as u64) as f32 * 0.3 - 0.15).collect();
            let noise = Tensor::from_vec(noise, variable.shape(), &Device::Cpu).unwrap();
            variable.set(&(variable.as_detached_tensor() + noise).unwrap()).unwrap();
        }
        self.gradients_of(&checkpoint, &adapters);
        if config.experts.is_none() {
            let (layers, head) = (0..config.layer_count, !config.tied);
            let weights = Trainables::weights(&checkpoint, layers, head, &Device::Cpu).unwrap();
            self.gradients_of(&checkpoint, &weights);
        }
    }

    fn gradients_of(&self, checkpoint: &Checkpoint, trained: &Trainables) {
        let config = checkpoint.config();
        let decoder = Decoder::open_frozen(checkpoint, &compute(), BaseFormat::Sixteen).unwrap();
        let rows = self.ids();
        let windows = [&rows[0][..14], &rows[1][..9]];
        // Partly another token than the one that comes, as a teacher may think.
        let mut targets = next_tokens(&windows);
        for target in &mut targets {
            target[0].1 = 0.75;
            target.push(((target[0].0 + 3) % config.vocab_size as u32, 0.25));
        }
        let draw = Draw { seed: 1, step: 0, micro_batch: 0 };
        // A longer step sends a token to another expert, and there the slope jumps.
        let step = if config.experts.is_some() { 1e-3 } else { 5e-3 };
        let objective = Objective { targets: &targets, seams: &[], scale: 1.0 };
        let loss = || loss_and_gradients(&decoder, trained, &windows, None, &objective, draw).unwrap();
        let (_, gradients) = loss();
        for (i, (variable, gradient)) in trained.variables.iter().zip(&gradients).enumerate() {
            let length = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            assert!(length > 0.0, "{}: matrix {i} has no gradient", self.name);
            let value = variable.as_detached_tensor().copy().unwrap();
            let direction = (gradient / f64::from(length)).unwrap();
            let at = |by: f64| {
                variable.set(&(&value + (&direction * by).unwrap()).unwrap()).unwrap();
                loss().0
            };
            let slope = (at(step) - at(-step)) / (2.0 * step);
            variable.set(&value).unwrap();
            let error = (slope - f64::from(length)).abs() / f64::from(length);
            assert!(error < 0.03, "{}: matrix {i}: slope {slope}, gradient {length}", self.name);
        }
    }
}

fn agrees(name: &str) {
    for form in ["newer", "older"] {
        let golden = Golden::open(name, form);
        golden.streams_and_logits_agree();
        golden.greedy_text_agrees();
        golden.lengths_do_not_mix();
        golden.beginnings_are_shared();
        golden.a_cut_closes();
    }
    Golden::open(name, "newer").gradients_are_right();
}

macro_rules! goldens {
    ($($name:ident)*) => {
        $(#[test] fn $name() { agrees(stringify!($name)); })*

        pub const GOLDENS: &[&str] = &[$(stringify!($name)),*];
    };
}

goldens! {
    llama3 llama_head_dim llama_bias llama_yarn mistral_window mixtral qwen2_bias qwen2_window qwen3 qwen3_moe
    qwen3_moe_step gemma gemma2 gemma3 phi phi_qk_norm phi3_long gpt2 gpt2_inner gpt_neox gpt_neox_serial olmo2
    smollm3 granite starcoder2 stablelm stablelm_parallel
}

/// What rounding the inputs of products costs at most, for numbers of the order of 1; a tenth and a ten-thousandth
/// were seen.
#[test]
fn halves_stay_near_transformers_and_pairs_of_halves_nearer() {
    for name in GOLDENS {
        // Another expert may be chosen, and then nothing is near.
        if name.contains("mo") || *name == "mixtral" {
            continue;
        }
        let mut golden = Golden::open(name, "newer");
        let checkpoint = Checkpoint::open(golden.dir.path()).unwrap();
        for (rounding, tolerance) in [(Rounding::Once, 0.3), (Rounding::Twice, 1e-3)] {
            let compute = Compute { rounding: Some(rounding), ..Compute::cpu(None) };
            golden.decoder = Decoder::open(&checkpoint, &compute).unwrap();
            let logits = golden.decoder.logits(&golden.decoder.forward(&golden.batch()).unwrap()).unwrap();
            let theirs = golden.of("logits").flatten_to(1).unwrap();
            let difference = (&logits - theirs).unwrap().abs().unwrap().max_all().unwrap();
            let difference = difference.to_scalar::<f32>().unwrap();
            assert!(difference < tolerance, "{name}, {rounding:?}: {difference}");
        }
        let rows = golden.ids();
        let (nll, gradient) = golden.head(&rows[0]);
        golden.decoder = Decoder::open(&checkpoint, &Compute::cpu(None)).unwrap();
        let (want_nll, want) = golden.head(&rows[0]);
        assert!((nll - want_nll).abs() < 1e-3, "{name}: {nll} {want_nll}");
        golden.assert_close("gradient of the head", &gradient, &want);
    }
}

#[test]
fn every_family_has_a_golden() {
    let types: BTreeSet<String> = GOLDENS
        .iter()
        .map(|name| {
            let configs: Value =
                serde_json::from_slice(&fs::read(path(&format!("{name}.json"))).unwrap()).unwrap();
            configs["newer"]["model_type"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(types, FAMILIES.iter().map(|f| f.model_type.to_owned()).collect());
}

#[test]
fn a_checkpoint_of_the_bare_decoder_is_read_without_the_prefix() {
    let dir = tempfile::tempdir().unwrap();
    write("gpt2", "newer", dir.path());
    let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let bare = all.tensors().into_iter().map(|(name, view)| (name.replace("transformer.", ""), view));
    let other = tempfile::tempdir().unwrap();
    serialize_to_file(bare.collect::<Vec<_>>(), None, &other.path().join("model.safetensors")).unwrap();
    fs::copy(dir.path().join("config.json"), other.path().join("config.json")).unwrap();
    let golden = Golden {
        decoder: Decoder::open(&Checkpoint::open(other.path()).unwrap(), &compute()).unwrap(),
        ..Golden::open("gpt2", "newer")
    };
    golden.streams_and_logits_agree();
}
