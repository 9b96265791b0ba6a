//! Dropping layers from a checkpoint: files only, no device, no forward pass.

use std::collections::BTreeMap;
use std::path::Path;

use super::export::safetensors::{Content, Draft, Planned, note_dtype, written_dtype};
use super::workspace::Workspace;
use super::{Cx, Result};
use crate::checkpoint::Index;
use crate::job::report::CheckpointRef;
use crate::job::spec::WeightType;

/// Name of the pruned checkpoint in a workspace.
pub const PRUNED: &str = "pruned";

/// A checkpoint without some of its layers. What stays keeps its bytes, unless another type is asked for.
pub struct Cut<'a> {
    base: &'a Index,
    /// New name to old name.
    sources: BTreeMap<String, String>,
    draft: Draft<'a>,
}

impl<'a> Cut<'a> {
    /// Plans to leave the layers `dropped` out of `base`.
    ///
    /// # Errors
    /// A model error, before any byte is written, when a tensor or config key speaks of
    /// layers in a way that is not known.
    pub fn plan(base: &'a Index, dropped: &[u32], dtype: Option<WeightType>) -> Result<Self> {
        let mut config = base.config.without_layers(dropped)?;
        note_dtype(&mut config, dtype);
        let (mut sources, mut tensors) = (BTreeMap::new(), Vec::new());
        for (old, info) in &base.tensors {
            let Some(new) = base.config.renamed(old, dropped)? else { continue };
            let dtype = written_dtype(info.dtype, dtype);
            tensors.push(Planned { name: new.clone(), dtype, shape: info.shape.clone() });
            sources.insert(new, old.clone());
        }
        Ok(Self { base, sources, draft: Draft { config, companions: &base.dir, tensors } })
    }

    /// Writes it to `pruned/` in the workspace, whole or not at all.
    pub fn write(self, workspace: &Workspace, cx: Cx) -> Result<CheckpointRef> {
        let Self { base, sources, draft } = self;
        draft.write(workspace, PRUNED, cx, |tensor| Content::of(base, &sources[&tensor.name]))
    }

    /// Bytes of the tensors it will hold.
    pub fn size_bytes(&self) -> u64 {
        self.draft.size_bytes()
    }

    /// Writes it into the empty directory `dir`.
    pub fn write_to(self, dir: &Path, cx: Cx) -> Result<CheckpointRef> {
        let Self { base, sources, draft } = self;
        draft.write_to(dir, cx, |tensor| Content::of(base, &sources[&tensor.name]))
    }
}
