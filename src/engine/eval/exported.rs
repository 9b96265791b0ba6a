//! What is left in a GGUF file: its own weights, in our decoder, on what the checkpoints were measured on.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Material, likelihoods};
use crate::engine::export::gguf::unpack;
use crate::engine::model::{Checkpoint, Decoder};
use crate::engine::workspace::Workspace;
use crate::engine::{Cx, Result, at};
use crate::job::report::{Exported, GgufFile, Perplexity, TaskScore};

/// A GGUF file of the checkpoint to ship.
pub struct Written {
    pub file: GgufFile,
    pub path: PathBuf,
    pub sha256: String,
}

/// Measures each of `files`, which the checkpoint in `shipped` was written to. The base model's weights take
/// `base_bytes`. What was measured is kept by the digest of the file.
///
/// # Errors
/// Those of reading a file, and those of measuring a checkpoint.
pub fn measure(
    files: &[Written],
    shipped: &Path,
    base_bytes: u64,
    material: &Material,
    workspace: &Workspace,
    cx: Cx,
) -> Result<Vec<Exported>> {
    let one = |written: &Written| {
        let Written { file, path, sha256 } = written;
        let nothing = material.texts.is_empty() && material.tasks.is_empty();
        let (perplexity, tasks) = if nothing {
            (Vec::new(), Vec::new())
        } else {
            let inputs = (sha256, cx.compute.name(), &material.texts, &material.tasks);
            workspace
                .kept("exported", &inputs, || weights(written, path, shipped, material, workspace, cx))?
        };
        let compression = base_bytes as f64 / file.size_bytes.max(1) as f64;
        Ok(Exported { file: file.clone(), sha256: sha256.clone(), compression, perplexity, tasks })
    };
    files.iter().map(one).collect()
}

fn weights(
    written: &Written,
    path: &Path,
    shipped: &Path,
    material: &Material,
    workspace: &Workspace,
    cx: Cx,
) -> Result<(Vec<Perplexity>, Vec<TaskScore>)> {
    let dir = workspace.part("unpacked")?;
    unpack(path, &Checkpoint::open(shipped)?, &dir, cx)?;
    let checkpoint = Checkpoint::open(&dir)?;
    let decoder = Decoder::open(&checkpoint, cx.compute)?;
    let which = format!("gguf {}", written.file.kind.name());
    let (perplexity, tasks, _) = likelihoods(&which, &checkpoint, &decoder, material, cx)?;
    // In float32 it is the largest thing of all.
    fs::remove_dir_all(&dir).map_err(at(&dir))?;
    Ok((perplexity, tasks))
}
