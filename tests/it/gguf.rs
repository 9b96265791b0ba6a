//! GGUF files: read back by candle's own loader, by our decoder from their own weights, and refused in time.

use std::fs;
use std::io::BufReader;
use std::path::Path;
use std::process::Command;

use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use secateur::checkpoint::family::{FAMILIES, Family};
use secateur::checkpoint::{Index, gguf::Architecture};
use secateur::engine::chance::unit;
use secateur::engine::export::gguf::{self, Origin};
use secateur::engine::model::kernel::matrix::Matrix;
use secateur::engine::model::{Batch, Checkpoint, Compute, Decoder};
use secateur::engine::workspace::file_digest;
use secateur::job::progress::Stage;
use secateur::job::report::Report;
use secateur::job::spec::GgufType;
use serde_json::json;

use crate::parity;
use crate::support::program::{Bench, finished, stderr, tree};
use crate::support::rig::Rig;
use crate::support::tiny::{self, Tiny};

/// Rows that fill the blocks of every type.
fn wide() -> Tiny {
    Tiny { hidden: 256, intermediate: 512, ..Tiny::llama() }
}

/// Writes and reads a file of `kind` next to the checkpoint in `dir`.
fn written(rig: &Rig, dir: &Path, kind: GgufType) -> std::path::PathBuf {
    let path = rig.path(&format!("{}.gguf", kind.name()));
    let checkpoint = Checkpoint::open(dir).unwrap();
    let cut = Some(("0000", &[2, 3][..]));
    gguf::write(&checkpoint, kind, &Origin { name: "tiny", cut }, &path, rig.cx(Stage::Export)).unwrap();
    path
}

#[test]
fn a_base_in_q4_0_has_the_values_that_the_file_would() {
    let (rows, columns) = (37, 96);
    let mut weights: Vec<f32> = (0..rows * columns).map(|i| unit(3, i as u64) as f32 - 0.5).collect();
    // A block of zeros, one with its largest value twice and one of a single value.
    weights[..32].fill(0.0);
    (weights[40], weights[41]) = (0.75, -0.75);
    weights[64..96].fill(0.125);
    let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let straight = Tensor::from_vec(weights.clone(), (rows, columns), &Device::Cpu).unwrap();
    let turned = flat(&straight.t().unwrap().contiguous().unwrap());
    let theirs = QTensor::quantize(&straight, GgmlDType::Q4_0).unwrap();
    let theirs = flat(&theirs.dequantize(&Device::Cpu).unwrap());
    for ours in
        [Matrix::floats(&weights, rows, columns).q4(false), Matrix::floats(&turned, columns, rows).q4(true)]
    {
        for (i, theirs) in theirs.chunks(columns).enumerate() {
            let mut row = vec![0.0; columns];
            ours.row(i, &mut row);
            assert_eq!(row, theirs, "row {i}");
        }
    }
}

/// Logits after the last of `ids`, by our decoder.
fn ours(dir: &Path, ids: &[u32]) -> Vec<f32> {
    let decoder = Decoder::open(&Checkpoint::open(dir).unwrap(), &Compute::cpu(None)).unwrap();
    let streams = decoder.forward(&Batch::of(&[ids])).unwrap();
    let last = streams.narrow(0, ids.len() - 1, 1).unwrap();
    decoder.logits(&last).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The same by candle's loader of GGUF files.
fn theirs(path: &Path, ids: &[u32]) -> Vec<f32> {
    let mut reader = BufReader::new(fs::File::open(path).unwrap());
    let content = Content::read(&mut reader).unwrap();
    let mut model = ModelWeights::from_gguf(content, &mut reader, &Device::Cpu).unwrap();
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = model.forward(&ids, 0).unwrap();
    logits.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// Root mean square of the difference, relative to the numbers' own.
fn error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
}

#[test]
fn candles_loader_computes_from_the_file_what_we_compute_from_the_checkpoint() {
    let ids: Vec<u32> = (0..24).map(|i| (i * 37 + 11) % 256).collect();
    for tiny in [wide(), Tiny { tied: false, ..wide() }] {
        let rig = Rig::new();
        let dir = tiny.write(rig.path("model"));
        let expected = ours(&dir, &ids);
        for (kind, tolerance) in [
            (GgufType::F16, 0.005),
            (GgufType::Q8, 0.05),
            (GgufType::Q6K, 0.1),
            (GgufType::Q5K, 0.2),
            (GgufType::Q4K, 0.4),
            (GgufType::Q4, 0.5),
        ] {
            let error = error(&theirs(&written(&rig, &dir, kind), &ids), &expected);
            assert!(error < tolerance, "{kind:?}: {error}");
        }
    }
}

#[test]
fn the_weights_of_a_file_come_back_as_they_were_to_within_its_type() {
    let rig = Rig::new();
    let dir = wide().write(rig.path("model"));
    let like = Checkpoint::open(&dir).unwrap();
    for (kind, tolerance) in
        [(GgufType::Bf16, 0.0), (GgufType::F16, 1e-4), (GgufType::Q8, 0.01), (GgufType::Q4K, 0.1)]
    {
        let path = written(&rig, &dir, kind);
        let back = rig.path(&format!("back-{}", kind.name()));
        fs::create_dir_all(&back).unwrap();
        gguf::unpack(&path, &like, &back, rig.cx(Stage::Eval)).unwrap();
        let back = Checkpoint::open(&back).unwrap();
        for name in like.names() {
            let error = error(&back.values(name).unwrap(), &like.values(name).unwrap());
            assert!(error <= tolerance, "{kind:?}, {name}: {error}");
        }
    }
}

/// Families with norms of their own, biases, and rotations that must be told in another way.
#[test]
fn the_weights_of_every_family_that_is_known_come_back_exactly() {
    for name in ["llama3", "llama_bias", "llama_head_dim", "llama_yarn", "mistral_window", "qwen2_bias"]
        .into_iter()
        .chain(["qwen3", "granite", "olmo2", "gemma"])
    {
        let rig = Rig::new();
        let dir = rig.path("model");
        fs::create_dir_all(&dir).unwrap();
        parity::write(name, "newer", &dir);
        tiny::write_tokenizer(&dir, 64);
        let like = Checkpoint::open(&dir).unwrap();
        let architecture = Architecture::of(like.config());
        if name == "qwen2_bias" {
            // Its head, MLP or output has biases here that llama.cpp does not read.
            assert_eq!(
                architecture.is_err(),
                like.config().linears(0).iter().any(|l| l.bias && !l.role.in_attention())
            );
        }
        if architecture.is_err() {
            continue;
        }
        let path = written(&rig, &dir, GgufType::Bf16);
        fs::create_dir_all(rig.path("back")).unwrap();
        gguf::unpack(&path, &like, &rig.path("back"), rig.cx(Stage::Eval)).unwrap();
        let back = Checkpoint::open(&rig.path("back")).unwrap();
        for tensor in like.names().filter(|tensor| back.info(tensor).is_some()) {
            let error = error(&back.values(tensor).unwrap(), &like.values(tensor).unwrap());
            assert!(error <= 0.004, "{name}, {tensor}: {error}");
        }
    }
}

#[test]
fn a_run_exports_what_is_asked_and_measures_each_file() {
    let bench = Bench::new(&Tiny { tied: false, ..wide() });
    let spec = bench.spec_with("/export", json!({"gguf": ["f16", "q8_0", "q4_k", "q4_0"]}));
    bench.succeed(&spec, "out", &[]);
    let report: Report = serde_json::from_slice(&fs::read(bench.path("out/report.json")).unwrap()).unwrap();
    let healed = report.eval.healed.as_ref().unwrap_or(&report.eval.pruned);
    let before = healed.perplexity[0].nll_per_token;
    for (found, tolerance) in report.eval.gguf.iter().zip([0.002, 0.02, 0.3, 0.5]) {
        let path = bench.path("out").join(&found.file.path);
        assert_eq!(fs::metadata(&path).unwrap().len(), found.file.size_bytes);
        assert_eq!(file_digest(&path).unwrap(), found.sha256);
        assert_eq!(report.files[&found.file.path], found.sha256);
        let after = found.perplexity[0].nll_per_token;
        assert!((after - before).abs() < tolerance, "{:?}: {after} {before}", found.file.kind);
    }
    let sizes: Vec<u64> = report.eval.gguf.iter().map(|found| found.file.size_bytes).collect();
    assert_eq!(sizes.len(), 4);
    assert!(sizes.is_sorted_by(|a, b| a > b), "{sizes:?}");
    let mut reader = fs::File::open(bench.path("out/gguf/model-q4_k.gguf")).unwrap();
    let content = Content::read(&mut reader).unwrap();
    assert_eq!(content.metadata["llama.block_count"].to_u32().unwrap(), 4);
    assert_eq!(content.metadata["general.name"].to_string().unwrap(), "tiny");
    let card = fs::read_to_string(
        bench
            .path("out")
            .join(if report.eval.healed.is_some() { "healed" } else { "pruned" })
            .join("README.md"),
    )
    .unwrap();
    assert!(card.contains("## Cut and quantised"), "{card}");
    assert!(fs::read_to_string(bench.path("out/report.html")).unwrap().contains("Cut and quantised"));

    // The same again repeats nothing; without the files they are gone, and nothing else changes.
    let told = bench.succeed(&spec, "out", &[]);
    assert_eq!(finished(&told), Stage::ALL.map(|stage| (stage, true)));
    let told = bench.succeed(&bench.spec(), "out", &[]);
    assert!(tree(&bench.path("out/gguf")).is_empty());
    let again: Vec<Stage> =
        finished(&told).into_iter().filter(|(_, reused)| !reused).map(|(stage, _)| stage).collect();
    assert_eq!(again, [Stage::Export, Stage::Eval, Stage::Report]);
}

#[test]
fn the_same_checkpoint_gives_the_same_bytes_by_the_command_too() {
    let rig = Rig::new();
    let dir = wide().write(rig.path("model"));
    let export = |out: &str, kind: &str| {
        Command::new(env!("CARGO_BIN_EXE_secateur"))
            .args(["export", "--type", kind, "--name", "tiny"])
            .arg(&dir)
            .arg("--out")
            .arg(rig.path(out))
            .output()
            .unwrap()
    };
    for out in ["one", "two"] {
        let output = export(out, "q4_k");
        assert!(output.status.success(), "{}", stderr(&output));
    }
    assert_eq!(fs::read(rig.path("one")).unwrap(), fs::read(rig.path("two")).unwrap());
    let refused = export("one", "q4_k");
    assert!(stderr(&refused).contains("is there already"));
    assert!(stderr(&export("three", "q3")).contains("one of f16, bf16, q8_0"));
}

#[test]
fn what_llama_cpp_would_compute_otherwise_is_refused_before_anything_is_computed() {
    let bench = Bench::new(&Tiny { model_type: "smollm3", ..Tiny::llama() });
    let spec = bench.spec_with("/export", json!({"gguf": ["q8_0"]}));
    let output = bench.run(&spec, "out", &[]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("/export/gguf") && stderr(&output).contains("possible are llama, mistral")
    );
    assert!(!bench.path("out").exists());

    // A tokenizer that llama.cpp has no name for is found before anything is computed as well.
    let bench = Bench::new(&Tiny::llama());
    let path = bench.path("model/tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    tokenizer["normalizer"] = json!({"type": "Lowercase"});
    fs::write(&path, tokenizer.to_string()).unwrap();
    let output = bench.run(&bench.spec_with("/export", json!({"gguf": ["q8_0"]})), "out", &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("leave out export.gguf"), "{}", stderr(&output));
    assert!(!bench.path("out/profile.json").exists());
}

#[test]
fn a_type_is_asked_for_once_and_by_a_name_that_there_is() {
    let bench = Bench::new(&Tiny::llama());
    let twice = bench.run(&bench.spec_with("/export", json!({"gguf": ["q8_0", "q8_0"]})), "out", &[]);
    assert_eq!(twice.status.code(), Some(2));
    assert!(stderr(&twice).contains("/export/gguf/1"), "{}", stderr(&twice));
    let unknown = bench.run(&bench.spec_with("/export", json!({"gguf": ["q9"]})), "out", &[]);
    assert!(stderr(&unknown).contains("/export/gguf/0"), "{}", stderr(&unknown));
}

#[test]
fn the_list_of_families_tells_which_can_be_written() {
    for family in &FAMILIES {
        let card = Family::card(family);
        assert_eq!(card.gguf, secateur::checkpoint::gguf::known(card.model_type));
    }
    let rig = Rig::new();
    let windowed = Index::read(&Tiny::mistral().write(rig.path("mistral"))).unwrap();
    assert_eq!(secateur::checkpoint::gguf::context_length(&windowed.config), 16);
}
