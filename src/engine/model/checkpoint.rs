//! A Hugging Face model directory, its weights mapped.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use tokenizers::Tokenizer;

use super::kernel::map::Map;
use crate::checkpoint::{Config, Dtype, Index, TensorInfo};
use crate::engine::{Error, Result, at};

/// An opened model directory: safetensors only, mapped, every shape checked
/// against `config.json`. Cheap to clone.
#[derive(Clone)]
pub struct Checkpoint(Arc<Inner>);

struct Inner {
    index: Index,
    /// In the order of the index's files.
    maps: Vec<Map>,
}

impl Checkpoint {
    /// Opens a model directory and checks that all of it can be used.
    ///
    /// # Errors
    /// A model error that names the file, tensor or key.
    pub fn open(dir: &Path) -> Result<Self> {
        let index = Index::read(dir)?;
        let maps = index.files.iter().map(|file| map_file(file)).collect::<Result<Vec<_>>>()?;
        // The header was checked against the file; the map may be of another one by now.
        for (name, info) in &index.tensors {
            if info.range.end > maps[info.file].len() as u64 {
                return Err(Error::model(format!("{}: tensor {name} was cut off just now", dir.display())));
            }
        }
        Ok(Self(Arc::new(Inner { index, maps })))
    }

    pub fn index(&self) -> &Index {
        &self.0.index
    }

    pub fn dir(&self) -> &Path {
        &self.0.index.dir
    }

    pub fn config(&self) -> &Config {
        &self.0.index.config
    }

    /// Tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.index.tensors.keys().map(String::as_str)
    }

    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.0.index.tensors.get(name)
    }

    /// The bytes of a tensor, straight from the mapped file.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let info = self.required(name)?;
        Ok(&self.0.maps[info.file].as_ref()[place(info)])
    }

    /// The bytes of a tensor, not copied, and their type.
    pub fn mapped(&self, name: &str) -> Result<(Bytes, Dtype)> {
        let info = self.required(name)?;
        Ok((self.0.maps[info.file].bytes(place(info)), info.dtype))
    }

    /// Bytes of the largest layer.
    pub fn layer_bytes(&self) -> u64 {
        let bytes = |index| self.tensors_of(index).map(|info| info.range.end - info.range.start).sum();
        (0..self.config().layer_count).map(bytes).max().unwrap_or(0)
    }

    /// Has layer `index` read from the disk while other things are done.
    pub fn read_ahead(&self, index: usize) {
        for info in self.tensors_of(index) {
            self.0.maps[info.file].read_ahead(place(info));
        }
    }

    /// Lets go of the memory that the mapped tensors of layer `index` take.
    pub fn release_layer(&self, index: usize) {
        self.tensors_of(index).for_each(|info| self.let_go(info));
    }

    /// The same for one tensor.
    pub fn release(&self, name: &str) {
        self.info(name).into_iter().for_each(|info| self.let_go(info));
    }

    fn let_go(&self, info: &TensorInfo) {
        self.0.maps[info.file].release(place(info));
    }

    fn tensors_of(&self, index: usize) -> impl Iterator<Item = &TensorInfo> {
        let prefix = self.config().in_layer(index, "");
        let tensors = self.0.index.tensors.range(prefix.clone()..);
        tensors.take_while(move |(name, _)| name.starts_with(&prefix)).map(|(_, info)| info)
    }

    /// A tensor on `device` as `dtype`.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        Ok(self.stored_tensor(name, device)?.to_dtype(dtype)?)
    }

    /// A tensor on `device` in the type it is stored in.
    pub fn stored_tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let info = self.required(name)?;
        let stored = match info.dtype {
            Dtype::Bf16 => DType::BF16,
            Dtype::F16 => DType::F16,
            Dtype::F32 => DType::F32,
            other => return Err(not_a_weight(name, other)),
        };
        Ok(Tensor::from_raw_buffer(self.bytes(name)?, stored, &info.shape, device)?)
    }

    /// A tensor's values as float32, whatever it is stored in.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.required(name)?;
        widened(name, self.bytes(name)?, info.dtype)
    }

    /// All parameters, a tied head counted once.
    pub fn parameters(&self) -> u64 {
        self.0.index.parameters()
    }

    /// Parameters of embedding and head, which cutting layers cannot shrink.
    pub fn embedding_parameters(&self) -> u64 {
        self.0.index.embedding_parameters()
    }

    /// Bytes of the weight files.
    pub fn size_bytes(&self) -> u64 {
        self.0.maps.iter().map(|m| m.len() as u64).sum()
    }

    /// The name of what the checkpoint holds (see [`content_digest`]). All of it is read, and found sound, on the
    /// way.
    ///
    /// # Errors
    /// A model error that names a tensor with values that are not finite.
    pub fn digest(&self) -> Result<String> {
        let index = self.index();
        let sum = |(name, info): (&String, &TensorInfo)| -> Result<(String, TensorSum)> {
            let mut hash = blake3::Hasher::new();
            let mut sound = true;
            let bytes = info.dtype.bits() as usize / 8;
            read_chunks(&index.files[info.file], info.range.clone(), bytes, |chunk| {
                hash.update(chunk);
                sound &= all_finite(info.dtype, chunk);
                Ok(())
            })?;
            if !sound {
                return Err(Error::model(format!(
                    "{}: tensor {name} holds NaN or infinite values; the checkpoint is damaged, fetch or export it again",
                    self.dir().display()
                )));
            }
            let sum = TensorSum { dtype: info.dtype, shape: info.shape.clone(), hash: hash.finalize() };
            Ok((name.clone(), sum))
        };
        let sums = index.tensors.par_iter().map(sum).collect::<Result<BTreeMap<_, _>>>()?;
        content_digest(self.dir(), &sums)
    }

    /// # Errors
    /// A model error when `tokenizer.json` is missing or damaged.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        read_tokenizer(&self.dir().join("tokenizer.json"))
    }

    fn required(&self, name: &str) -> Result<&TensorInfo> {
        self.info(name)
            .ok_or_else(|| Error::model(format!("{}: tensor {name} is missing", self.dir().display())))
    }
}

/// Where a tensor lies in its mapped file.
fn place(info: &TensorInfo) -> Range<usize> {
    info.range.start as usize..info.range.end as usize
}

/// Far above any real one: 32 MB is a large vocabulary.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// Reads a `tokenizer.json`.
///
/// # Errors
/// A model error that names the file.
pub fn read_tokenizer(path: &Path) -> Result<Tokenizer> {
    let wrong = |e: &dyn std::fmt::Display| Error::model(format!("{}: {e}", path.display()));
    let length = std::fs::metadata(path).map_err(|e| wrong(&e))?.len();
    if length > MAX_TOKENIZER_BYTES {
        return Err(wrong(&"is larger than any real one; it is not read"));
    }
    let bytes = std::fs::read(path).map_err(|e| wrong(&e))?;
    serde_json::from_slice::<serde::de::IgnoredAny>(&bytes)
        .map_err(|e| wrong(&format!("is not JSON ({e})")))?;
    // The library panics on some of what it does not expect (found by the fuzzer).
    let read = std::panic::catch_unwind(|| Tokenizer::from_bytes(&bytes));
    let mut tokenizer = match read {
        Ok(Ok(tokenizer)) => tokenizer,
        Ok(Err(e)) => return Err(wrong(&format!("cannot be read as a tokenizer: {e}"))),
        Err(_) => return Err(wrong(&"cannot be read as a tokenizer: it makes the reader fail")),
    };
    // A stored truncation or padding is meant for training scripts; here it would silently shorten texts.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|e| wrong(&format!("cannot switch off truncation: {e}")))?;
    Ok(tokenizer)
}

/// A float is finite unless all bits of its exponent are set.
fn all_finite(dtype: Dtype, bytes: &[u8]) -> bool {
    let halves = |exponent: u16| {
        bytes.chunks_exact(2).all(|b| u16::from_le_bytes([b[0], b[1]]) & exponent != exponent)
    };
    match dtype {
        Dtype::Bf16 => halves(0x7f80),
        Dtype::F16 => halves(0x7c00),
        Dtype::F32 => bytes.chunks_exact(4).all(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite()),
        // Nothing else is computed with; opening the decoder says so.
        _ => true,
    }
}

/// Stored floats as float32; none for a type that holds no weights.
fn widen(bytes: &[u8], stored: Dtype) -> Option<Vec<f32>> {
    let pairs = |f: fn([u8; 2]) -> f32| bytes.par_chunks_exact(2).map(|b| f([b[0], b[1]])).collect();
    match stored {
        Dtype::Bf16 => Some(pairs(|b| bf16::from_le_bytes(b).to_f32())),
        Dtype::F16 => Some(pairs(|b| f16::from_le_bytes(b).to_f32())),
        Dtype::F32 => {
            Some(bytes.par_chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
        _ => None,
    }
}

/// Part of the stored values of tensor `name` as float32.
pub fn widened(name: &str, bytes: &[u8], stored: Dtype) -> Result<Vec<f32>> {
    widen(bytes, stored).ok_or_else(|| not_a_weight(name, stored))
}

/// What a tensor holds.
pub struct TensorSum {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub hash: blake3::Hash,
}

/// BLAKE3 over config, tokenizer and every tensor by its name: the same for the same content, however it
/// is split into files. Sums of tensors can be had side by side, on the way from one file to another.
pub fn content_digest(dir: &Path, tensors: &BTreeMap<String, TensorSum>) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    for name in ["config.json", "tokenizer.json"] {
        let path = dir.join(name);
        if path.exists() {
            hash.update(format!("{name}\n").as_bytes());
            hash.update(blake3::hash(&std::fs::read(&path)?).as_bytes());
        }
    }
    for (name, sum) in tensors {
        hash.update(format!("{name}\n{}{:?}\n", sum.dtype, sum.shape).as_bytes());
        hash.update(sum.hash.as_bytes());
    }
    Ok(hash.finalize().to_hex().to_string())
}

/// Bytes read at a time: few calls, and still in the processor's cache when they are used.
const CHUNK_BYTES: usize = 512 << 10;

/// Reads a range of the file `path` piece by piece, each of whole units of `unit` bytes; none of it stays in memory.
pub fn read_chunks(
    path: &Path,
    range: Range<u64>,
    unit: usize,
    mut each: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let file = File::open(path).map_err(at(path))?;
    let unit = unit.max(1);
    let piece = CHUNK_BYTES.max(unit) / unit * unit;
    let mut buffer = vec![0; piece.min((range.end - range.start) as usize)];
    let mut place = range.start;
    while place < range.end {
        let length = buffer.len().min((range.end - place) as usize);
        file.read_exact_at(&mut buffer[..length], place).map_err(at(path))?;
        each(&buffer[..length])?;
        place += length as u64;
    }
    Ok(())
}

fn not_a_weight(name: &str, dtype: Dtype) -> Error {
    Error::model(format!("tensor {name} is {dtype}; only BF16, F16 and F32 can be used"))
}

fn map_file(path: &Path) -> Result<Map> {
    let wrong = |e: std::io::Error| Error::model(format!("{}: {e}", path.display()));
    Map::open(&File::open(path).map_err(wrong)?).map_err(wrong)
}
