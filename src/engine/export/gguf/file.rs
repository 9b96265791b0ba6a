//! The bytes of a GGUF file: description, list of tensors, tensors.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::quantized::{GgmlDType, gguf_file};
use rayon::prelude::*;

use super::blocks;
use crate::checkpoint::gguf::{Architecture, Named, Part, Turn, Value};
use crate::engine::model::Checkpoint;
use crate::engine::model::checkpoint::widened;
use crate::engine::{Cx, Error, Result, at};
use crate::job::spec::GgufType;

/// Every tensor begins at a multiple of this.
const ALIGNMENT: u64 = 32;
/// Bytes of float32 that are quantised at a time, by each thread.
const CHUNK_BYTES: usize = 4 << 20;

/// A tensor and its place in the file.
pub struct Placed {
    pub named: Named,
    pub dtype: GgmlDType,
    pub rows: usize,
    /// None for a vector, which is one row.
    pub columns: Option<usize>,
    /// From the first tensor on.
    pub offset: u64,
    /// What it holds, where that is not in the checkpoint.
    values: Option<Vec<f32>>,
}

impl Placed {
    pub fn size_bytes(&self) -> u64 {
        blocks::size_bytes(self.dtype, self.rows * self.columns.unwrap_or(1)) as u64
    }

    /// Bytes of a row, or of a value of a vector.
    pub fn row_bytes(&self) -> usize {
        blocks::size_bytes(self.dtype, self.columns.unwrap_or(1))
    }

    /// As candle and we write a shape.
    fn shape(&self) -> Vec<usize> {
        std::iter::once(self.rows).chain(self.columns).collect()
    }
}

/// All tensors of a file of type `kind`, one behind the other.
pub fn plan(checkpoint: &Checkpoint, architecture: Architecture, kind: GgufType) -> Result<Vec<Placed>> {
    let config = checkpoint.config();
    let all = architecture.tensors(config);
    let tied = all.iter().all(|named| named.part != Part::Head);
    let mut out: Vec<Placed> = Vec::with_capacity(all.len() + 1);
    for named in all {
        let info = checkpoint
            .info(&named.ours)
            .ok_or_else(|| Error::bug(format!("tensor {} is not in the checkpoint", named.ours)))?;
        let (rows, columns) = match info.shape[..] {
            [rows] => (rows, None),
            [rows, columns] => (rows, Some(columns)),
            _ => return Err(Error::bug(format!("tensor {} has shape {:?}", named.ours, info.shape))),
        };
        let head = named.part == Part::Head || tied;
        let dtype = blocks::dtype(kind, named.part, head, columns.unwrap_or(1), config.layer_count);
        out.push(Placed { named, dtype, rows, columns, offset: 0, values: None });
    }
    if let Some(factors) = architecture.rope_factors(config) {
        let name = "rope_freqs.weight".to_owned();
        let named = Named { ours: String::new(), name, part: Part::Vector, turn: Turn::AsIs };
        let values: Vec<f32> = factors.iter().map(|factor| *factor as f32).collect();
        let (dtype, rows) = (GgmlDType::F32, values.len());
        out.push(Placed { named, dtype, rows, columns: None, offset: 0, values: Some(values) });
    }
    let mut offset = 0;
    for placed in &mut out {
        placed.offset = offset;
        offset += placed.size_bytes().next_multiple_of(ALIGNMENT);
    }
    Ok(out)
}

/// Writes the file. No more than a few rows of a tensor for each thread are in memory at a time.
pub fn write(
    path: &Path,
    checkpoint: &Checkpoint,
    keys: &[(String, Value)],
    tensors: &[Placed],
    kind: GgufType,
    cx: Cx,
) -> Result<()> {
    let header = header(keys, tensors);
    let start = header.len() as u64;
    let file = File::create(path).map_err(at(path))?;
    file.write_all_at(&header, 0).map_err(at(path))?;
    let total = tensors.iter().map(|t| t.size_bytes().next_multiple_of(ALIGNMENT)).sum();
    file.set_len(start + total).map_err(at(path))?;
    let done = AtomicU64::new(0);
    let task = format!("writing {}", super::file_name(kind));
    for tensor in tensors {
        let place = start + tensor.offset;
        let width = tensor.columns.unwrap_or(1);
        let at_once = (CHUNK_BYTES / 4 / width).max(1);
        let starts: Vec<usize> = (0..tensor.rows).step_by(at_once).collect();
        starts.into_par_iter().try_for_each(|row| {
            let rows = at_once.min(tensor.rows - row);
            let values = values(checkpoint, tensor, row, rows)?;
            let bytes = blocks::pack(&tensor.named.ours, values, width, tensor.dtype)?;
            file.write_all_at(&bytes, place + (row * tensor.row_bytes()) as u64).map_err(at(path))?;
            let before = done.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            cx.advanced(&task, before + bytes.len() as u64, total, "bytes")
        })?;
        checkpoint.release(&tensor.named.ours);
    }
    Ok(())
}

/// Rows `row..row + rows` of a tensor, as they are in the file.
fn values(checkpoint: &Checkpoint, tensor: &Placed, row: usize, rows: usize) -> Result<Vec<f32>> {
    if let Some(values) = &tensor.values {
        return Ok(values[row..row + rows].to_vec());
    }
    let Named { ours, turn, .. } = &tensor.named;
    let (bytes, dtype) = checkpoint.mapped(ours)?;
    let length = tensor.columns.unwrap_or(1) * dtype.bits() as usize / 8;
    match turn {
        Turn::AsIs => widened(ours, &bytes[row * length..(row + rows) * length], dtype),
        Turn::PlusOne => {
            let values = widened(ours, &bytes[row * length..(row + rows) * length], dtype)?;
            Ok(values.into_iter().map(|value| value + 1.0).collect())
        }
        Turn::Neighbours { .. } => {
            let source = |row| turn.source(row, tensor.rows) * length;
            let gathered: Vec<u8> = (row..row + rows)
                .flat_map(|row| &bytes[source(row)..source(row) + length])
                .copied()
                .collect();
            widened(ours, &gathered, dtype)
        }
    }
}

/// Everything before the first tensor (the specification of GGUF, version 3).
fn header(keys: &[(String, Value)], tensors: &[Placed]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        put_text(&mut out, key);
        put_value(&mut out, value);
    }
    for tensor in tensors {
        put_text(&mut out, &tensor.named.name);
        let shape = tensor.shape();
        out.extend((shape.len() as u32).to_le_bytes());
        // The innermost dimension first.
        shape.iter().rev().for_each(|size| out.extend((*size as u64).to_le_bytes()));
        out.extend(blocks::code(tensor.dtype).to_le_bytes());
        out.extend(tensor.offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    const U32: u32 = 4;
    const I32: u32 = 5;
    const F32: u32 = 6;
    const BOOL: u32 = 7;
    const TEXT: u32 = 8;
    const LIST: u32 = 9;
    let put = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
    let list = |out: &mut Vec<u8>, kind: u32, count: usize| {
        put(out, LIST);
        put(out, kind);
        out.extend((count as u64).to_le_bytes());
    };
    match value {
        Value::U32(n) => {
            put(out, U32);
            out.extend(n.to_le_bytes());
        }
        Value::F32(n) => {
            put(out, F32);
            out.extend(n.to_le_bytes());
        }
        Value::Bool(flag) => {
            put(out, BOOL);
            out.push(u8::from(*flag));
        }
        Value::Text(text) => {
            put(out, TEXT);
            put_text(out, text);
        }
        Value::I32s(all) => {
            list(out, I32, all.len());
            all.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
        Value::F32s(all) => {
            list(out, F32, all.len());
            all.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
        Value::Texts(all) => {
            list(out, TEXT, all.len());
            all.iter().for_each(|text| put_text(out, text));
        }
    }
}

/// Opens a file with another reader's eyes: every planned tensor must be there as planned, and no other.
pub fn check(path: &Path, tensors: &[Placed]) -> Result<()> {
    let wrong = |what: String| Error::bug(format!("reading {} back: {what}", path.display()));
    let content = open(path)?;
    let found = |tensor: &Placed| {
        content.tensor_infos.get(&tensor.named.name).is_some_and(|info| {
            info.ggml_dtype == tensor.dtype
                && info.shape.dims() == tensor.shape()
                && info.offset == tensor.offset
        })
    };
    if let Some(tensor) = tensors.iter().find(|tensor| !found(tensor)) {
        return Err(wrong(format!("tensor {} is not as planned", tensor.named.name)));
    }
    if content.tensor_infos.len() != tensors.len() {
        return Err(wrong("it holds more tensors than were planned".into()));
    }
    Ok(())
}

/// What a file says of itself.
pub fn open(path: &Path) -> Result<gguf_file::Content> {
    let file = File::open(path).map_err(at(path))?;
    let mut reader = std::io::BufReader::new(file);
    gguf_file::Content::read(&mut reader).map_err(|e| Error::model(format!("{}: {e}", path.display())))
}
