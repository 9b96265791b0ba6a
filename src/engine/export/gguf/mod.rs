//! GGUF, the file format of llama.cpp: a checkpoint as one file, its description and its vocabulary included, with
//! weights in as few bits as asked. Tensors flow from the checkpoint to the file a few rows at a time.

mod blocks;
mod file;
mod unpack;
mod vocabulary;

use std::path::Path;

pub use unpack::unpack;

use crate::checkpoint::gguf::{Architecture, Value};
use crate::engine::model::Checkpoint;
use crate::engine::workspace::Workspace;
use crate::engine::{Cx, Error, Result};
use crate::job::report::GgufFile;
use crate::job::spec::GgufType;

/// Directory of a workspace with the GGUF files.
pub const GGUF: &str = "gguf";

/// Name of the file of a type.
#[must_use]
pub fn file_name(kind: GgufType) -> String {
    format!("model-{}.gguf", kind.name())
}

/// What a file says of where it comes from.
pub struct Origin<'a> {
    /// For people.
    pub name: &'a str,
    /// BLAKE3 of the base model, and the layers cut from it, where they are known.
    pub cut: Option<(&'a str, &'a [u32])>,
}

/// Finds what keeps `checkpoint`, cut or not, from being written as GGUF.
///
/// # Errors
/// A model error that says what llama.cpp does not know.
pub fn check(checkpoint: &Checkpoint) -> Result<()> {
    Architecture::of(checkpoint.config()).map_err(Error::model)?;
    vocabulary::describe(checkpoint)?;
    Ok(())
}

/// Writes `checkpoint` to the new file `path` and opens it again.
///
/// # Errors
/// Those of [`check`], and a model error for a value that is too large for the type.
pub fn write(
    checkpoint: &Checkpoint,
    kind: GgufType,
    origin: &Origin,
    path: &Path,
    cx: Cx,
) -> Result<GgufFile> {
    let architecture = Architecture::of(checkpoint.config()).map_err(Error::model)?;
    let mut keys = general(architecture, kind, origin);
    keys.extend(architecture.shape(checkpoint.config()));
    keys.extend(vocabulary::describe(checkpoint)?);
    let tensors = file::plan(checkpoint, architecture, kind)?;
    file::write(path, checkpoint, &keys, &tensors, kind, cx)?;
    file::check(path, &tensors)?;
    let size_bytes = std::fs::metadata(path).map_err(crate::engine::at(path))?.len();
    let weights: u64 = tensors.iter().map(file::Placed::size_bytes).sum();
    Ok(GgufFile {
        kind,
        path: format!("{GGUF}/{}", file_name(kind)),
        size_bytes,
        bits_per_weight: 8.0 * weights as f64 / checkpoint.parameters() as f64,
    })
}

/// Writes `checkpoint` to the workspace in each of `kinds`, all or none.
///
/// # Errors
/// Those of [`write()`].
pub fn write_all(
    checkpoint: &Checkpoint,
    kinds: &[GgufType],
    origin: &Origin,
    workspace: &Workspace,
    cx: Cx,
) -> Result<Vec<GgufFile>> {
    let part = workspace.part(GGUF)?;
    let one = |kind: &GgufType| write(checkpoint, *kind, origin, &part.join(file_name(*kind)), cx);
    let files = kinds.iter().map(one).collect::<Result<_>>()?;
    workspace.publish(&part, GGUF)?;
    Ok(files)
}

fn general(architecture: Architecture, kind: GgufType, origin: &Origin) -> Vec<(String, Value)> {
    let text = |text: &str| Value::Text(text.to_owned());
    // `enum llama_ftype` of llama.cpp's llama.h.
    let file_type = match kind {
        GgufType::F16 => 1,
        GgufType::Q4 => 2,
        GgufType::Q8 => 7,
        GgufType::Q4K => 15,
        GgufType::Q5K => 17,
        GgufType::Q6K => 18,
        GgufType::Bf16 => 32,
    };
    let mut keys = vec![
        ("general.architecture".to_owned(), text(architecture.name)),
        ("general.type".to_owned(), text("model")),
        ("general.name".to_owned(), text(origin.name)),
        ("general.file_type".to_owned(), Value::U32(file_type)),
        ("general.quantization_version".to_owned(), Value::U32(2)),
        ("secateur.version".to_owned(), text(env!("CARGO_PKG_VERSION"))),
    ];
    if let Some((digest, dropped)) = origin.cut {
        keys.push(("secateur.base.blake3".to_owned(), text(digest)));
        let dropped = dropped.iter().map(|layer| *layer as i32).collect();
        keys.push(("secateur.dropped_layers".to_owned(), Value::I32s(dropped)));
    }
    keys
}
