//! A GGUF file's weights as a checkpoint in float32, for our own decoder to measure them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{blocks, file};
use crate::checkpoint::Dtype;
use crate::checkpoint::gguf::{Architecture, Named, Turn};
use crate::engine::export::safetensors::{Content, Draft, Planned, note_dtype};
use crate::engine::model::Checkpoint;
use crate::engine::{Cx, Error, Result, at};
use crate::job::spec::WeightType;

/// Writes the weights of the file `path`, which `like` was written to, into the empty directory `dir`: float32 holds
/// what any type of GGUF comes to. Tokenizer and config are those of `like`.
///
/// # Errors
/// A model error when the file does not hold the tensors of `like`.
pub fn unpack(path: &Path, like: &Checkpoint, dir: &Path, cx: Cx) -> Result<()> {
    let content = file::open(path)?;
    let reader = File::open(path).map_err(at(path))?;
    let config = like.config();
    let architecture = Architecture::of(config).map_err(Error::model)?;
    let mut named = architecture.tensors(config);
    // A head that is the embedding once more is not read as such.
    named.retain(|one| !(config.tied && one.name == "output.weight"));
    let shape = |one: &Named| like.info(&one.ours).map(|info| info.shape.clone()).unwrap_or_default();
    let planned = |one: &Named| Planned { name: one.ours.clone(), dtype: Dtype::F32, shape: shape(one) };
    let mut draft = Draft {
        config: config.raw().clone(),
        companions: like.dir(),
        tensors: named.iter().map(planned).collect(),
    };
    note_dtype(&mut draft.config, Some(WeightType::F32));
    draft.write_to(dir, cx, |tensor| {
        let one = named
            .iter()
            .find(|one| one.ours == tensor.name)
            .ok_or_else(|| Error::bug(format!("tensor {} was not planned", tensor.name)))?;
        let info = content
            .tensor_infos
            .get(&one.name)
            .filter(|info| info.shape.dims() == tensor.shape)
            .ok_or_else(|| Error::model(format!("{}: tensor {} is missing", path.display(), one.name)))?;
        let (dtype, turn) = (info.ggml_dtype, one.turn);
        let start = content.tensor_data_offset + info.offset;
        let (rows, columns) = (tensor.shape[0], tensor.shape.get(1).copied().unwrap_or(1));
        let row_bytes = blocks::size_bytes(dtype, columns);
        let reader = &reader;
        Ok(Content::of(like.index(), &tensor.name)?.changed(move |first, values| {
            let count = values.len() / columns;
            let mut bytes = vec![0; count * row_bytes];
            let read = |bytes: &mut [u8], row: usize| {
                reader.read_exact_at(bytes, start + (row * row_bytes) as u64).map_err(at(path))
            };
            match turn {
                Turn::AsIs | Turn::PlusOne => read(&mut bytes, first)?,
                Turn::Neighbours { .. } => bytes
                    .chunks_mut(row_bytes)
                    .enumerate()
                    .try_for_each(|(i, bytes)| read(bytes, turn.target(first + i, rows)))?,
            }
            values.copy_from_slice(&blocks::unpack(bytes, columns, dtype)?);
            if turn == Turn::PlusOne {
                values.iter_mut().for_each(|value| *value -= 1.0);
            }
            Ok(())
        }))
    })?;
    Ok(())
}
