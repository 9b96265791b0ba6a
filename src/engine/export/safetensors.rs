//! Writing a Hugging Face checkpoint: tensors flow from their source to disk one
//! at a time, and the result is opened again before it counts.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::checkpoint::{Dtype, Index, TensorInfo};
use crate::engine::model::checkpoint::{TensorSum, content_digest, read_chunks, widened};
use crate::engine::model::{Checkpoint, Decoder};
use crate::engine::workspace::{Workspace, write_json};
use crate::engine::{Cx, Error, Result, at};
use crate::job::report::CheckpointRef;
use crate::job::spec::WeightType;

/// Largest weight file, as transformers writes them.
const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor to be written; its bytes come when its turn has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Planned {
    fn size_bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.bits() / 8
    }
}

/// The bytes of a tensor to be written: those that tensor `info` has in the file `path`.
pub struct Content<'a> {
    path: &'a Path,
    info: &'a TensorInfo,
    change: Option<Change<'a>>,
}

/// Changes some whole rows of a tensor, `change(first row, values)`.
pub type Change<'a> = Box<dyn Fn(usize, &mut [f32]) -> Result<()> + 'a>;

impl<'a> Content<'a> {
    /// The stored values of tensor `name`, which keep their bytes when they keep their type.
    pub fn of(index: &'a Index, name: &str) -> Result<Self> {
        let info = index.tensors.get(name).ok_or_else(|| Error::bug(format!("tensor {name} is gone")))?;
        Ok(Self { path: &index.files[info.file], info, change: None })
    }

    /// The same values changed: a few rows at a time as float32, so that they are never in memory as a whole,
    /// each rounded once to the planned type.
    #[must_use]
    pub fn changed(self, change: impl Fn(usize, &mut [f32]) -> Result<()> + 'a) -> Self {
        Self { change: Some(Box::new(change)), ..self }
    }
}

/// A checkpoint to be written.
pub struct Draft<'a> {
    pub config: Map<String, Value>,
    /// Where tokenizer, generation config and licence are taken from.
    pub companions: &'a Path,
    pub tensors: Vec<Planned>,
}

impl Draft<'_> {
    /// Bytes of all its tensors.
    pub fn size_bytes(&self) -> u64 {
        self.tensors.iter().map(Planned::size_bytes).sum()
    }

    /// Writes the checkpoint to `name` in the workspace, whole or not at all: built beside, opened
    /// again with every check, run once, then put in place. `content` gives each planned tensor's bytes.
    pub fn write<'c>(
        self,
        workspace: &Workspace,
        name: &str,
        cx: Cx,
        content: impl Fn(&Planned) -> Result<Content<'c>> + Sync,
    ) -> Result<CheckpointRef> {
        let dir = workspace.part(name)?;
        let written = self.write_to(&dir, cx, content)?;
        let checkpoint =
            Checkpoint::open(&dir).map_err(|e| Error::bug(format!("reading {name} back: {e}")))?;
        Decoder::open(&checkpoint, cx.compute)?.prove(name)?;
        workspace.publish(&dir, name)?;
        Ok(CheckpointRef { path: name.to_owned(), ..written })
    }

    /// Writes the checkpoint into the empty directory `dir`, and opens it again with every check.
    pub fn write_to<'c>(
        mut self,
        dir: &Path,
        cx: Cx,
        content: impl Fn(&Planned) -> Result<Content<'c>> + Sync,
    ) -> Result<CheckpointRef> {
        // The reference writer's order: by width, so that everything is aligned, then by name.
        self.tensors.sort_by(|a, b| b.dtype.bits().cmp(&a.dtype.bits()).then_with(|| a.name.cmp(&b.name)));
        copy_companions(self.companions, dir)?;
        write_json(&dir.join("config.json"), &self.config)?;
        let sums = write_shards(dir, &self.tensors, MAX_SHARD_BYTES, cx, &content)?;
        let written =
            Index::read(dir).map_err(|e| Error::bug(format!("reading back what was written: {e}")))?;
        self.check(&written)?;
        Ok(CheckpointRef {
            path: dir.display().to_string(),
            digest: content_digest(dir, &sums)?,
            layer_count: written.config.layer_count as u32,
            size_bytes: written.size_bytes(),
            parameters: written.parameters(),
        })
    }

    /// Every planned tensor must be there as planned, and no other.
    fn check(&self, written: &Index) -> Result<()> {
        let as_planned = |tensor: &&Planned| {
            written
                .tensors
                .get(&tensor.name)
                .is_none_or(|i| i.dtype != tensor.dtype || i.shape != tensor.shape)
        };
        match self.tensors.iter().find(as_planned) {
            None if written.tensors.len() == self.tensors.len() => Ok(()),
            None => Err(Error::bug("the written checkpoint holds more tensors than were planned")),
            Some(tensor) => {
                Err(Error::bug(format!("tensor {} is not as planned in what was written", tensor.name)))
            }
        }
    }
}

/// Files of a model directory that stay true when layers go. Everything else,
/// above all code and pickles, stays behind.
const COMPANIONS: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "spiece.model",
];
const LEGAL: [&str; 4] = ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY"];

fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).map_err(at(from))? {
        let path = entry.map_err(at(from))?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        let legal = LEGAL.iter().any(|l| name.to_ascii_uppercase().starts_with(l)) && is_text(name);
        if path.is_file() && (legal || COMPANIONS.contains(&name)) {
            fs::copy(&path, to.join(name)).map_err(at(&path))?;
        }
    }
    Ok(())
}

fn is_text(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|e| e.to_str());
    extension.is_none_or(|e| matches!(e.to_ascii_lowercase().as_str(), "txt" | "md"))
}

/// One `model.safetensors` when everything fits, else shards and their index. Tensors are written side by
/// side, each hashed on its way; gives their sums.
fn write_shards<'c>(
    dir: &Path,
    tensors: &[Planned],
    max_shard_bytes: u64,
    cx: Cx,
    content: &(impl Fn(&Planned) -> Result<Content<'c>> + Sync),
) -> Result<BTreeMap<String, TensorSum>> {
    let total: u64 = tensors.iter().map(Planned::size_bytes).sum();
    let shards = shards(tensors, max_shard_bytes);
    let mut weight_map = BTreeMap::new();
    let done = AtomicU64::new(0);
    let mut sums = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        weight_map.extend(shard.iter().map(|t| (t.name.clone(), name.clone())));
        sums.extend(write_file(&dir.join(&name), shard, |tensor| {
            let content = content(tensor)?;
            let before = done.fetch_add(tensor.size_bytes(), Ordering::Relaxed);
            cx.advanced("writing weights", before + tensor.size_bytes(), total, "bytes")?;
            Ok(content)
        })?);
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    Ok(sums)
}

/// Cuts the row of tensors where a file would grow too large.
fn shards(tensors: &[Planned], max_bytes: u64) -> Vec<&[Planned]> {
    let mut out = Vec::new();
    let (mut start, mut filled) = (0, 0);
    for (i, tensor) in tensors.iter().enumerate() {
        if i > start && filled + tensor.size_bytes() > max_bytes {
            out.push(&tensors[start..i]);
            (start, filled) = (i, 0);
        }
        filled += tensor.size_bytes();
    }
    out.push(&tensors[start..]);
    out
}

/// The safetensors format: length of the header, header, then the bytes of all tensors in a row.
fn write_file<'c>(
    path: &Path,
    tensors: &[Planned],
    content: impl Fn(&Planned) -> Result<Content<'c>> + Sync,
) -> Result<Vec<(String, TensorSum)>> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut places = Vec::with_capacity(tensors.len());
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.size_bytes();
        let entry =
            json!({"dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), entry);
        places.push(offset);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header).map_err(Error::bug)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let data = 8 + header.len() as u64;
    let file = File::create(path).map_err(at(path))?;
    file.set_len(data + offset).map_err(at(path))?;
    file.write_all_at(&(header.len() as u64).to_le_bytes(), 0).map_err(at(path))?;
    file.write_all_at(&header, 8).map_err(at(path))?;
    let write = |(tensor, place): (&Planned, &u64)| {
        let hash = write_tensor(path, &file, data + place, tensor, &content(tensor)?)?;
        Ok((tensor.name.clone(), TensorSum { dtype: tensor.dtype, shape: tensor.shape.clone(), hash }))
    };
    tensors.par_iter().zip(&places).map(write).collect()
}

/// Writes a tensor to its place and hashes it. Where it is nothing but zeros a hole is left: a sparse
/// checkpoint stays one.
fn write_tensor(
    path: &Path,
    file: &File,
    mut place: u64,
    tensor: &Planned,
    content: &Content,
) -> Result<blake3::Hash> {
    let mut hash = blake3::Hasher::new();
    let mut put = |chunk: &[u8]| {
        hash.update(chunk);
        if chunk.iter().any(|b| *b != 0) {
            file.write_all_at(chunk, place).map_err(at(path))?;
        }
        place += chunk.len() as u64;
        Ok(())
    };
    let Content { path: source, info, change } = content;
    if info.shape != tensor.shape {
        return Err(Error::bug(format!(
            "tensor {} of {:?} from {:?}",
            tensor.name, tensor.shape, info.shape
        )));
    }
    let width = info.shape.iter().skip(1).product::<usize>().max(1);
    let mut row = 0;
    read_chunks(source, info.range.clone(), width * info.dtype.bits() as usize / 8, |chunk| {
        if change.is_none() && info.dtype == tensor.dtype {
            return put(chunk);
        }
        let mut values = widened(&tensor.name, chunk, info.dtype)?;
        if let Some(change) = change {
            change(row, &mut values)?;
        }
        row += values.len() / width;
        put(&encode(&tensor.name, &values, tensor.dtype)?)
    })?;
    Ok(hash.finalize())
}

impl WeightType {
    pub const fn dtype(self) -> Dtype {
        match self {
            Self::Bf16 => Dtype::Bf16,
            Self::F16 => Dtype::F16,
            Self::F32 => Dtype::F32,
        }
    }

    /// Its name in `config.json`.
    pub const fn torch_name(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::F32 => "float32",
        }
    }
}

/// The type a tensor is written in: floats as asked, whatever else there is stays.
pub const fn written_dtype(stored: Dtype, asked: Option<WeightType>) -> Dtype {
    match (stored, asked) {
        (Dtype::Bf16 | Dtype::F16 | Dtype::F32, Some(asked)) => asked.dtype(),
        (stored, _) => stored,
    }
}

/// Notes the type of the written weights, under both names transformers has had for it.
pub fn note_dtype(config: &mut Map<String, Value>, asked: Option<WeightType>) {
    let Some(asked) = asked else { return };
    let known: Vec<&str> = ["dtype", "torch_dtype"].into_iter().filter(|k| config.contains_key(*k)).collect();
    for key in if known.is_empty() { vec!["torch_dtype"] } else { known } {
        config.insert(key.into(), asked.torch_name().into());
    }
}

/// float32 values as bytes of type `to`, rounded to nearest even.
///
/// # Errors
/// A spec error when a value does not fit the type.
pub fn encode(name: &str, values: &[f32], to: Dtype) -> Result<Vec<u8>> {
    let overflow = |rounded: f32, value: f32| rounded.is_infinite() && value.is_finite();
    let too_large =
        || Error::spec(format!("export: tensor {name} has values too large for {to}; use bf16 or f32"));
    match to {
        Dtype::F32 => Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Dtype::Bf16 => {
            let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            if rounded.iter().zip(values).any(|(r, v)| overflow(r.to_f32(), *v)) {
                return Err(too_large());
            }
            Ok(rounded.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        Dtype::F16 => {
            let rounded: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
            if rounded.iter().zip(values).any(|(r, v)| overflow(r.to_f32(), *v)) {
                return Err(too_large());
            }
            Ok(rounded.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        other => Err(Error::bug(format!("converting {name} to {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(sizes: &[usize]) -> Vec<Planned> {
        let tensor =
            |(i, n): (usize, &usize)| Planned { name: format!("t{i}"), dtype: Dtype::Bf16, shape: vec![*n] };
        sizes.iter().enumerate().map(tensor).collect()
    }

    #[test]
    fn shards_hold_every_tensor_once_and_stay_below_the_limit() {
        let tensors = planned(&[3, 3, 3, 20, 1, 1, 8]);
        let shards = shards(&tensors, 14);
        let sizes: Vec<usize> = shards.iter().map(|s| s.len()).collect();
        // A tensor larger than the limit gets a file of its own.
        assert_eq!(sizes, [2, 1, 1, 2, 1]);
        assert_eq!(shards.concat(), tensors);
    }

    #[test]
    fn a_value_beyond_the_type_is_refused_by_tensor_name() {
        let error = encode("big.weight", &[1e30], Dtype::F16).unwrap_err();
        assert!(error.to_string().contains("big.weight"));
        assert!(encode("big.weight", &[1e30], Dtype::Bf16).is_ok());
    }
}
