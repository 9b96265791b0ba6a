//! Writing a Hugging Face checkpoint: tensors flow from their source to disk one
//! at a time, and the result is opened again before it counts.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::engine::model::Checkpoint;
use crate::engine::workspace::{Workspace, at, write_json};
use crate::engine::{Cx, Error, Result};
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
        self.shape.iter().product::<usize>() as u64 * self.dtype.bitsize() as u64 / 8
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
    /// Writes the checkpoint to `name` in the workspace, whole or not at all: built beside, opened
    /// again with every check, then put in place. `bytes` gives each planned tensor's content.
    pub fn write<'b>(
        mut self,
        workspace: &Workspace,
        name: &str,
        cx: Cx,
        bytes: impl FnMut(&Planned) -> Result<Cow<'b, [u8]>>,
    ) -> Result<CheckpointRef> {
        let dir = workspace.part(name)?;
        // The reference writer's order: by width, so that everything is aligned, then by name.
        self.tensors
            .sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
        copy_companions(self.companions, &dir)?;
        write_json(&dir.join("config.json"), &self.config)?;
        write_shards(&dir, &self.tensors, MAX_SHARD_BYTES, cx, bytes)?;
        let reference = {
            let written =
                Checkpoint::open(&dir).map_err(|e| Error::bug(format!("reading {name} back: {e}")))?;
            CheckpointRef {
                path: name.to_owned(),
                digest: written.digest()?,
                layer_count: written.config().layer_count as u32,
                size_bytes: written.size_bytes(),
                parameters: written.parameters(),
            }
        };
        workspace.publish(&dir, name)?;
        Ok(reference)
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

/// One `model.safetensors` when everything fits, else shards and their index.
fn write_shards<'b>(
    dir: &Path,
    tensors: &[Planned],
    max_shard_bytes: u64,
    cx: Cx,
    mut bytes: impl FnMut(&Planned) -> Result<Cow<'b, [u8]>>,
) -> Result<()> {
    let total: u64 = tensors.iter().map(Planned::size_bytes).sum();
    let shards = shards(tensors, max_shard_bytes);
    let mut weight_map = Map::new();
    let mut done = 0;
    for (i, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        weight_map.extend(shard.iter().map(|t| (t.name.clone(), json!(name))));
        write_file(&dir.join(&name), shard, |tensor| {
            let content = bytes(tensor)?;
            if content.len() as u64 != tensor.size_bytes() {
                return Err(Error::bug(format!("{} bytes for tensor {}", content.len(), tensor.name)));
            }
            done += content.len() as u64;
            cx.advanced("writing weights", done, total, "bytes")?;
            Ok(content)
        })?;
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    Ok(())
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
fn write_file<'b>(
    path: &Path,
    tensors: &[Planned],
    mut bytes: impl FnMut(&Planned) -> Result<Cow<'b, [u8]>>,
) -> Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.size_bytes();
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header).map_err(Error::bug)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(at(path))?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(at(path))?;
    file.write_all(&header).map_err(at(path))?;
    for tensor in tensors {
        file.write_all(&bytes(tensor)?).map_err(at(path))?;
    }
    let file = file.into_inner().map_err(|e| at(path)(e.into_error()))?;
    file.sync_all().map_err(at(path))
}

impl WeightType {
    pub const fn dtype(self) -> Dtype {
        match self {
            Self::Bf16 => Dtype::BF16,
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
        (Dtype::BF16 | Dtype::F16 | Dtype::F32, Some(asked)) => asked.dtype(),
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

/// A tensor's bytes in another float type, rounded to nearest even.
///
/// # Errors
/// A spec error when a value does not fit the type.
pub fn convert<'a>(name: &str, bytes: &'a [u8], from: Dtype, to: Dtype) -> Result<Cow<'a, [u8]>> {
    if from == to {
        return Ok(Cow::Borrowed(bytes));
    }
    let values: Vec<f32> = match from {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        other => return Err(Error::bug(format!("converting {name} from {other:?}"))),
    };
    encode(name, &values, to).map(Cow::Owned)
}

/// float32 values as bytes of type `to`, rounded to nearest even.
///
/// # Errors
/// A spec error when a value does not fit the type.
pub fn encode(name: &str, values: &[f32], to: Dtype) -> Result<Vec<u8>> {
    let overflow = |rounded: f32, value: f32| rounded.is_infinite() && value.is_finite();
    let too_large = || {
        Error::spec(format!("export.dtype: tensor {name} has values too large for {to:?}; use bf16 or f32"))
    };
    match to {
        Dtype::F32 => Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Dtype::BF16 => {
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
        other => Err(Error::bug(format!("converting {name} to {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(sizes: &[usize]) -> Vec<Planned> {
        let tensor =
            |(i, n): (usize, &usize)| Planned { name: format!("t{i}"), dtype: Dtype::BF16, shape: vec![*n] };
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
        let error = convert("big.weight", &1e30f32.to_le_bytes(), Dtype::F32, Dtype::F16).unwrap_err();
        assert!(error.to_string().contains("big.weight"));
        assert!(convert("big.weight", &1e30f32.to_le_bytes(), Dtype::F32, Dtype::BF16).is_ok());
    }
}
