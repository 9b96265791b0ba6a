//! A Hugging Face model directory, opened with suspicion.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use super::config::Config;
use crate::engine::{Error, Result};

/// An opened model directory: safetensors only, mapped, every shape checked
/// against `config.json`. Cheap to clone.
#[derive(Clone)]
pub struct Checkpoint(Arc<Inner>);

struct Inner {
    dir: PathBuf,
    config: Config,
    maps: Vec<Mmap>,
    /// Weight files, in the order of `maps`.
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// Where a tensor lies and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    file: usize,
    range: std::ops::Range<usize>,
}

const MAX_JSON_BYTES: u64 = 64 << 20;
const MAX_TENSORS: usize = 100_000;
const PICKLES: [&str; 5] = ["bin", "pt", "pth", "pkl", "ckpt"];

impl Checkpoint {
    /// Opens a model directory and checks that all of it can be used.
    ///
    /// # Errors
    /// A model error that names the file, tensor or key.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Error::model(format!(
                "{} is not a directory; give the Hugging Face directory of a model",
                dir.display()
            )));
        }
        let config = Config::read(read_json(&dir.join("config.json"))?)?;
        let files = weight_files(dir)?;
        let mut maps = Vec::with_capacity(files.len());
        let mut tensors = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            let map = map_file(file)?;
            for (name, info) in read_header(file, &map, i)? {
                if tensors.insert(name.clone(), info).is_some() {
                    return Err(Error::model(format!(
                        "tensor {name} is in two weight files of {}",
                        dir.display()
                    )));
                }
            }
            maps.push(map);
        }
        let inner = Inner { dir: dir.to_owned(), config, maps, files, tensors };
        inner.check_shapes()?;
        Ok(Self(Arc::new(inner)))
    }

    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.tensors.keys().map(String::as_str)
    }

    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.0.tensors.get(name)
    }

    /// The bytes of a tensor, straight from the mapped file.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let info = self.required(name)?;
        Ok(&self.0.maps[info.file][info.range.clone()])
    }

    /// A tensor on `device` as `dtype`.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let info = self.required(name)?;
        let stored = match info.dtype {
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            Dtype::F32 => DType::F32,
            other => {
                return Err(Error::model(format!(
                    "tensor {name} is {other:?}; only BF16, F16 and F32 can be used"
                )));
            }
        };
        let tensor = Tensor::from_raw_buffer(self.bytes(name)?, stored, &info.shape, device)?;
        Ok(tensor.to_dtype(dtype)?)
    }

    /// All parameters, a tied head counted once.
    pub fn parameters(&self) -> u64 {
        self.0.tensors.values().map(|t| t.shape.iter().product::<usize>() as u64).sum()
    }

    /// Parameters of embedding and head, which cutting layers cannot shrink.
    pub fn embedding_parameters(&self) -> u64 {
        let size = |name: &str| self.info(name).map_or(0, |t| t.shape.iter().product::<usize>() as u64);
        size(EMBEDDING) + size(HEAD)
    }

    /// Bytes of the weight files.
    pub fn size_bytes(&self) -> u64 {
        self.0.maps.iter().map(|m| m.len() as u64).sum()
    }

    /// sha256 over names and contents of config, tokenizer and weight files.
    pub fn digest(&self) -> Result<String> {
        let mut hash = Sha256::new();
        let named = ["config.json", "tokenizer.json"].map(|name| self.0.dir.join(name));
        for path in named.iter().filter(|p| p.exists()).chain(&self.0.files) {
            hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
            hash.update([0]);
            let mut file = File::open(path)?;
            let mut buffer = vec![0; 1 << 20];
            loop {
                match file.read(&mut buffer)? {
                    0 => break,
                    n => hash.update(&buffer[..n]),
                }
            }
        }
        Ok(hex::encode(hash.finalize()))
    }

    /// # Errors
    /// A model error when `tokenizer.json` is missing or damaged.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let path = self.0.dir.join("tokenizer.json");
        let mut tokenizer = Tokenizer::from_file(&path)
            .map_err(|e| Error::model(format!("{}: cannot be read as a tokenizer: {e}", path.display())))?;
        // A stored truncation or padding is meant for training scripts; here it would silently shorten texts.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|e| Error::model(format!("{}: cannot switch off truncation: {e}", path.display())))?;
        Ok(tokenizer)
    }

    fn required(&self, name: &str) -> Result<&TensorInfo> {
        self.info(name)
            .ok_or_else(|| Error::model(format!("{}: tensor {name} is missing", self.0.dir.display())))
    }
}

pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const FINAL_NORM: &str = "model.norm.weight";
pub const HEAD: &str = "lm_head.weight";

/// The linear layers of a decoder layer, by their short names, with the module they sit in.
pub const LINEARS: [(&str, &str); 7] = [
    ("q_proj", "self_attn"),
    ("k_proj", "self_attn"),
    ("v_proj", "self_attn"),
    ("o_proj", "self_attn"),
    ("gate_proj", "mlp"),
    ("up_proj", "mlp"),
    ("down_proj", "mlp"),
];

/// `model.layers.{l}.{module}.{name}`, without `.weight`.
pub fn linear_name(layer: usize, index: usize) -> String {
    let (name, module) = LINEARS[index];
    format!("model.layers.{layer}.{module}.{name}")
}

impl Config {
    /// Rows (outputs) and columns (inputs) of the linear layer `LINEARS[index]`.
    pub fn linear_shape(&self, index: usize) -> (usize, usize) {
        let (h, f) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.head_count * self.head_dim, self.kv_head_count * self.head_dim);
        [(q, h), (kv, h), (kv, h), (h, q), (f, h), (f, h), (h, f)][index]
    }

    /// Whether the linear layer `LINEARS[index]` has a bias.
    pub fn linear_bias(&self, index: usize) -> bool {
        match index {
            0..3 => self.qkv_bias,
            3 => self.o_bias,
            _ => self.mlp_bias,
        }
    }

    /// Every tensor the decoder reads, with its shape.
    fn expected(&self) -> Vec<(String, Vec<usize>)> {
        let (h, v) = (self.hidden_size, self.vocab_size);
        let mut out = vec![(EMBEDDING.into(), vec![v, h]), (FINAL_NORM.into(), vec![h])];
        if !self.tied {
            out.push((HEAD.into(), vec![v, h]));
        }
        for layer in 0..self.layer_count {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                out.push((format!("model.layers.{layer}.{norm}.weight"), vec![h]));
            }
            for index in 0..LINEARS.len() {
                let (name, (n, k)) = (linear_name(layer, index), self.linear_shape(index));
                if self.linear_bias(index) {
                    out.push((format!("{name}.bias"), vec![n]));
                }
                out.push((format!("{name}.weight"), vec![n, k]));
            }
        }
        out
    }
}

impl Inner {
    fn check_shapes(&self) -> Result<()> {
        for (name, shape) in self.config.expected() {
            match self.tensors.get(&name) {
                None => {
                    return Err(Error::model(format!(
                        "{}: tensor {name} is missing, though config.json asks for it",
                        self.dir.display()
                    )));
                }
                Some(info) if info.shape != shape => {
                    return Err(Error::model(format!(
                        "{}: tensor {name} has shape {:?}, but config.json makes it {shape:?}; one of them is wrong",
                        self.dir.display(),
                        info.shape
                    )));
                }
                Some(_) => {}
            }
        }
        let beyond = format!("model.layers.{}.", self.config.layer_count);
        if let Some(name) = self.tensors.keys().find(|n| n.starts_with(&beyond)) {
            return Err(Error::model(format!(
                "{}: tensor {name} belongs to a layer beyond the {} that config.json names",
                self.dir.display(),
                self.config.layer_count
            )));
        }
        Ok(())
    }
}

/// Reads a JSON object of bounded size.
pub fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let wrong = |e: &dyn std::fmt::Display| Error::model(format!("{}: {e}", path.display()));
    let length = fs::metadata(path).map_err(|e| wrong(&e))?.len();
    if length > MAX_JSON_BYTES {
        return Err(wrong(&"is larger than any real one; it is not read"));
    }
    serde_json::from_slice(&fs::read(path).map_err(|e| wrong(&e))?).map_err(|e| wrong(&e))
}

fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    if single.is_file() {
        return Ok(vec![single]);
    }
    if !index.is_file() {
        let pickles = fs::read_dir(dir)?.filter_map(std::result::Result::ok).any(|entry| {
            entry.path().extension().is_some_and(|e| PICKLES.iter().any(|p| e.eq_ignore_ascii_case(p)))
        });
        let found = if pickles {
            "holds pickled weights only, which can run code when loaded; convert them to safetensors"
        } else {
            "holds neither model.safetensors nor model.safetensors.index.json"
        };
        return Err(Error::model(format!("{} {found}", dir.display())));
    }
    let map = read_json(&index)?;
    let Some(Value::Object(weights)) = map.get("weight_map") else {
        return Err(Error::model(format!("{}: has no weight_map", index.display())));
    };
    let mut names = Vec::new();
    for value in weights.values() {
        match value.as_str() {
            Some(name) if name.ends_with(".safetensors") && !name.contains(['/', '\\', '\0']) => {
                names.push(name.to_owned());
            }
            _ => {
                return Err(Error::model(format!(
                    "{}: {value} is no name of a safetensors file",
                    index.display()
                )));
            }
        }
    }
    names.sort();
    names.dedup();
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

fn map_file(path: &Path) -> Result<Mmap> {
    let wrong = |e: std::io::Error| Error::model(format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(wrong)?;
    // SAFETY: the map is read only as bytes. A file cut short by someone else while it is mapped would
    // end the process with SIGBUS: one attempt of one job, which the worker supervises.
    #[allow(unsafe_code)]
    unsafe { Mmap::map(&file) }.map_err(wrong)
}

fn read_header(path: &Path, map: &Mmap, file: usize) -> Result<Vec<(String, TensorInfo)>> {
    let wrong =
        |e: String| Error::model(format!("{}: damaged or cut short ({e}); fetch it again", path.display()));
    if is_pickle(map) {
        return Err(Error::model(format!(
            "{}: is a pickle, not safetensors, whatever its name",
            path.display()
        )));
    }
    let parsed = SafeTensors::deserialize(map).map_err(|e| wrong(e.to_string()))?;
    if parsed.len() > MAX_TENSORS {
        return Err(wrong(format!("{} tensors", parsed.len())));
    }
    let start = map.as_ptr() as usize;
    Ok(parsed
        .iter()
        .map(|(name, view)| {
            let begin = view.data().as_ptr() as usize - start;
            let range = begin..begin + view.data().len();
            (name.to_owned(), TensorInfo { dtype: view.dtype(), shape: view.shape().to_vec(), file, range })
        })
        .collect())
}

/// Pickle protocol 2+ begins with 0x80; torch's newer files are zip archives.
fn is_pickle(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04")
        || (bytes.first() == Some(&0x80) && bytes.get(1).is_some_and(|v| *v <= 5) && bytes.get(7) != Some(&0))
}
