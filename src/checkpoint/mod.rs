//! A Hugging Face model directory as it describes itself: `config.json` and the headers of the weight
//! files. No tensor is read here, so both wings of the house use it: the API to refuse a job before it
//! waits in the queue, the engine to open a checkpoint and to write one without some layers.

pub mod config;
pub mod family;
pub mod gguf;
pub mod header;
mod keys;
pub mod licence;
pub mod rope;
mod surgery;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use config::{Activation, Config, ExpertsShape, LayerShape, LinearShape, Role};
pub use family::Family;
pub use header::{Dtype, TensorInfo};
pub use rope::Rope;

use crate::job::plan::Anatomy;
use crate::job::preset::ModelFacts;
use crate::job::report::{Failure, FailureKind};
use family::{Norm, QkNorm};

pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// A model error.
pub(crate) fn wrong(message: impl Into<String>) -> Failure {
    Failure { kind: FailureKind::Model, stage: None, message: message.into() }
}

/// What a model directory holds. Every shape is checked against `config.json`.
#[derive(Debug)]
pub struct Index {
    pub dir: PathBuf,
    pub config: Config,
    /// Weight files, by name.
    pub files: Vec<PathBuf>,
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// Far above any real one; bounds on what a directory can make us read.
const MAX_JSON_BYTES: u64 = 64 << 20;
const MAX_SHARDS: usize = 1000;
const PICKLES: [&str; 5] = ["bin", "pt", "pth", "pkl", "ckpt"];

impl Index {
    /// Reads a model directory and checks that all of it can be used.
    ///
    /// # Errors
    /// A model error that names the file, tensor or key, and what to do.
    pub fn read(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(wrong(format!(
                "{} is not a directory; give the Hugging Face directory of a model",
                dir.display()
            )));
        }
        let in_dir = |e: Failure| wrong(format!("{}: {}", dir.display(), e.message));
        let mut config = Config::read(read_json(&dir.join("config.json"))?).map_err(in_dir)?;
        let files = weight_files(dir).map_err(in_dir)?;
        let mut tensors = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for (name, info) in header::read(file, i).map_err(in_dir)? {
                if tensors.contains_key(&name) {
                    return Err(in_dir(wrong(format!("tensor {name} is in two weight files"))));
                }
                tensors.insert(name, info);
            }
        }
        if !tensors.keys().any(|name| name.starts_with(config.base)) {
            config.base = "";
        }
        let index = Self { dir: dir.to_owned(), config, files, tensors };
        index.check_shapes().map_err(in_dir)?;
        Ok(index)
    }

    /// All parameters, a tied head counted once.
    pub fn parameters(&self) -> u64 {
        self.tensors.values().map(TensorInfo::parameters).sum()
    }

    /// Parameters of embedding, learned positions and head, which cutting layers cannot shrink.
    pub fn embedding_parameters(&self) -> u64 {
        let names = self.config.family.names;
        let positions = names.positions.map(|name| self.config.tensor(name));
        let all = [Some(self.config.embedding()), positions, Some(format!("{}.weight", names.head))];
        all.iter().flatten().filter_map(|name| self.tensors.get(name)).map(TensorInfo::parameters).sum()
    }

    /// Parameters of layer `layer`.
    pub fn layer_parameters(&self, layer: usize) -> u64 {
        let prefix = format!("{}{layer}.", self.config.layers_prefix());
        let of_layer = self.tensors.iter().filter(|(name, _)| name.starts_with(&prefix));
        of_layer.map(|(_, info)| info.parameters()).sum()
    }

    /// What a plan must know.
    pub fn anatomy(&self) -> Anatomy {
        let layers = 0..self.config.layer_count;
        let bytes_of = |layer: usize| {
            let prefix = format!("{}{layer}.", self.config.layers_prefix());
            let of_layer = self.tensors.iter().filter(|(name, _)| name.starts_with(&prefix));
            of_layer.map(|(_, info)| info.parameters() * info.dtype.bits() / 8).sum()
        };
        Anatomy {
            size_bytes: self.size_bytes(),
            parameters: self.parameters(),
            embedding_parameters: self.embedding_parameters(),
            layer_parameters: layers.clone().map(|layer| self.layer_parameters(layer)).collect(),
            layer_bytes: layers.map(bytes_of).collect(),
        }
    }

    /// Bytes of the weights.
    pub fn size_bytes(&self) -> u64 {
        let ends = self.files.iter().map(|file| fs::metadata(file).map_or(0, |meta| meta.len()));
        ends.sum()
    }

    fn check_shapes(&self) -> Result<()> {
        for (name, shape) in self.config.expected() {
            match self.tensors.get(&name) {
                None => {
                    return Err(wrong(format!("tensor {name} is missing, though config.json asks for it")));
                }
                Some(info) if info.shape != shape => {
                    return Err(wrong(format!(
                        "tensor {name} has shape {:?}, but config.json makes it {shape:?}; one of them is wrong",
                        info.shape
                    )));
                }
                Some(_) => {}
            }
        }
        let prefix = self.config.layers_prefix();
        let number = |name: &String| name.strip_prefix(&prefix)?.split('.').next()?.parse::<usize>().ok();
        let beyond =
            self.tensors.keys().find(|name| number(name).is_some_and(|l| l >= self.config.layer_count));
        match beyond {
            None => Ok(()),
            Some(name) => Err(wrong(format!(
                "tensor {name} belongs to a layer beyond the {} that config.json names",
                self.config.layer_count
            ))),
        }
    }
}

/// Names of tensors.
impl Config {
    /// A tensor outside the layers.
    pub fn tensor(&self, name: &str) -> String {
        format!("{}{name}.weight", self.base)
    }

    pub fn embedding(&self) -> String {
        self.tensor(self.family.names.embedding)
    }

    /// In front of the number of a layer.
    pub fn layers_prefix(&self) -> String {
        format!("{}{}", self.base, self.family.names.layers)
    }

    /// Something in layer `layer`, without `.weight`.
    pub fn in_layer(&self, layer: usize, name: &str) -> String {
        format!("{}{layer}.{name}", self.layers_prefix())
    }

    /// The norms of a layer's own stream, those that the family has.
    pub fn norms(&self) -> [Option<&'static str>; 4] {
        let names = self.family.names;
        [names.attention_in, names.attention_out, self.mlp_in, names.mlp_out]
    }

    /// What healing needs to know.
    pub fn facts(&self) -> ModelFacts {
        let names = self.family.names;
        ModelFacts {
            model_type: self.family.model_type.to_owned(),
            hidden_size: self.hidden_size as u32,
            layer_count: self.layer_count as u32,
            vocab_size: self.vocab_size as u32,
            max_position_embeddings: self.max_position_embeddings as u32,
            experts: self.experts.is_some(),
            // Without a norm of its own a parallel MLP reads what attention's norm gives.
            scale_free: names.attention_in.is_some() && (self.mlp_in.is_some() || self.parallel),
            tied: self.tied,
            plain_mlp: names.mlp_out.is_none(),
            no_gguf: gguf::Architecture::of(self).err(),
        }
    }

    /// Every tensor the decoder reads, with its shape.
    fn expected(&self) -> Vec<(String, Vec<usize>)> {
        let (names, h, v) = (self.family.names, self.hidden_size, self.vocab_size);
        let mut out = vec![(self.embedding(), vec![v, h])];
        if let Some(positions) = names.positions {
            out.push((self.tensor(positions), vec![self.max_position_embeddings, h]));
        }
        self.expect_norm(&mut out, &format!("{}{}", self.base, names.final_norm));
        if !self.tied {
            out.push((format!("{}.weight", names.head), vec![v, h]));
        }
        if self.family.head_bias {
            out.push((format!("{}.bias", names.head), vec![v]));
        }
        for layer in 0..self.layer_count {
            for norm in self.norms().into_iter().flatten() {
                self.expect_norm(&mut out, &self.in_layer(layer, norm));
            }
            for linear in self.linears(layer) {
                let name = self.in_layer(layer, linear.name);
                let shape = if self.family.transposed {
                    vec![linear.inputs, linear.outputs]
                } else {
                    vec![linear.outputs, linear.inputs]
                };
                out.push((format!("{name}.weight"), shape));
                if linear.bias {
                    out.push((format!("{name}.bias"), vec![linear.outputs]));
                }
            }
            out.extend(self.expected_of_heads(layer));
            out.extend(self.expected_of_experts(layer));
        }
        out
    }

    fn expect_norm(&self, out: &mut Vec<(String, Vec<usize>)>, name: &str) {
        out.push((format!("{name}.weight"), vec![self.hidden_size]));
        if self.family.norm == Norm::Layer {
            out.push((format!("{name}.bias"), vec![self.hidden_size]));
        }
    }

    /// Norms of queries and keys.
    fn expected_of_heads(&self, layer: usize) -> Vec<(String, Vec<usize>)> {
        let mut out = Vec::new();
        for (name, heads) in [("q", self.head_count), ("k", self.kv_head_count)] {
            let mut expect = |rest: &str, size| {
                out.push((self.in_layer(layer, &format!("self_attn.{name}_{rest}")), vec![size]));
            };
            match self.qk_norm {
                QkNorm::No => {}
                QkNorm::Head => expect("norm.weight", self.head_dim),
                QkNorm::Whole => expect("norm.weight", heads * self.head_dim),
                QkNorm::KeyShared => {
                    expect("layernorm.weight", self.head_dim);
                    expect("layernorm.bias", self.head_dim);
                }
                QkNorm::KeyEach => {
                    (0..heads)
                        .for_each(|head| expect(&format!("layernorm.norms.{head}.weight"), self.head_dim));
                }
            }
        }
        out
    }

    fn expected_of_experts(&self, layer: usize) -> Vec<(String, Vec<usize>)> {
        let (Some(names), Some(shape), true) = (self.family.experts, self.experts, self.layers[layer].sparse)
        else {
            return Vec::new();
        };
        let (h, f) = (self.hidden_size, shape.width);
        let mut out = vec![(format!("{}.weight", self.in_layer(layer, names.router)), vec![shape.count, h])];
        for expert in 0..shape.count {
            for (linear, size) in names.linears.iter().zip([[f, h], [f, h], [h, f]]) {
                let name = format!("{}{expert}.{linear}.weight", names.experts);
                out.push((self.in_layer(layer, &name), size.to_vec()));
            }
        }
        out
    }
}

/// Reads a JSON object of bounded size.
///
/// # Errors
/// A model error that names the file.
pub fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let bad = |e: &dyn std::fmt::Display| wrong(format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => bad(&"is not there; a Hugging Face checkpoint has one"),
        _ => bad(&e),
    })?;
    let mut bytes = Vec::new();
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(|e| bad(&e))?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        return Err(bad(&"is larger than any real one; it is not read"));
    }
    serde_json::from_slice(&bytes).map_err(|e| bad(&format!("is not a JSON object ({e})")))
}

/// The weight files: the one there is, or those the index names.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    if single.is_file() {
        return Ok(vec![single]);
    }
    if !index.is_file() {
        return Err(no_safetensors(dir));
    }
    let map = read_json(&index)?;
    let Some(Value::Object(weights)) = map.get("weight_map") else {
        return Err(wrong("model.safetensors.index.json has no weight_map"));
    };
    let mut names = Vec::new();
    for value in weights.values() {
        match value.as_str() {
            Some(name) if name.ends_with(".safetensors") && !name.contains(['/', '\\', '\0']) => {
                names.push(name);
            }
            _ => {
                return Err(wrong(format!(
                    "model.safetensors.index.json: {value} is no name of a safetensors file in the same directory"
                )));
            }
        }
    }
    names.sort_unstable();
    names.dedup();
    if names.is_empty() || names.len() > MAX_SHARDS {
        return Err(wrong(format!("model.safetensors.index.json must name 1 to {MAX_SHARDS} files")));
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

fn no_safetensors(dir: &Path) -> Failure {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let pickle = entries
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| PICKLES.iter().any(|p| e.eq_ignore_ascii_case(p))));
    match pickle {
        None => wrong("holds neither model.safetensors nor model.safetensors.index.json"),
        Some(path) => wrong(format!(
            "holds its weights as a pickle ({}), which can run code when it is loaded; convert it: load it with \
             transformers and save_pretrained(…, safe_serialization=True)",
            path.file_name().unwrap_or_default().to_string_lossy()
        )),
    }
}
