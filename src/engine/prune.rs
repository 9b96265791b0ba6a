//! Dropping layers from a checkpoint: files only, no device, no forward pass.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::export::safetensors::{Draft, Planned, convert, note_dtype, written_dtype};
use super::model::Checkpoint;
use super::workspace::Workspace;
use super::{Cx, Error, Result};
use crate::job::report::CheckpointRef;
use crate::job::spec::WeightType;

/// Name of the pruned checkpoint in a workspace.
pub const PRUNED: &str = "pruned";

/// Writes `base` without the layers `dropped` to `pruned/`. What stays keeps its bytes, unless
/// another type is asked for.
///
/// # Errors
/// A model error, before any byte is written, when a tensor or config key speaks of
/// layers in a way that is not known.
pub fn prune(
    base: &Checkpoint,
    dropped: &[u32],
    dtype: Option<WeightType>,
    workspace: &Workspace,
    cx: Cx,
) -> Result<CheckpointRef> {
    let mut config = base.config().without_layers(dropped)?;
    note_dtype(&mut config, dtype);
    // New name to old name.
    let mut sources = BTreeMap::new();
    for name in base.names() {
        if let Some(new) = renamed(name, dropped)? {
            sources.insert(new, name);
        }
    }
    let tensors = sources.iter().map(|(new, old)| {
        let info = base.info(old).ok_or_else(|| Error::bug(format!("tensor {old} is gone")))?;
        Ok(Planned { name: new.clone(), dtype: written_dtype(info.dtype, dtype), shape: info.shape.clone() })
    });
    let draft = Draft { config, companions: base.dir(), tensors: tensors.collect::<Result<_>>()? };
    draft.write(workspace, PRUNED, cx, |tensor| -> Result<Cow<[u8]>> {
        let old = sources[&tensor.name];
        let stored = base.info(old).map_or(tensor.dtype, |info| info.dtype);
        convert(old, base.bytes(old)?, stored, tensor.dtype)
    })
}

/// The name of a tensor when the layers `dropped` are gone; none when it goes with them.
fn renamed(name: &str, dropped: &[u32]) -> Result<Option<String>> {
    const LAYERS: &str = "model.layers.";
    if let Some((layer, rest)) = name.strip_prefix(LAYERS).and_then(|rest| rest.split_once('.'))
        && let Ok(layer) = layer.parse::<u32>()
    {
        let before = dropped.iter().filter(|d| **d < layer).count() as u32;
        return Ok((!dropped.contains(&layer)).then(|| format!("{LAYERS}{}.{rest}", layer - before)));
    }
    if name.split('.').any(|part| part.parse::<u32>().is_ok()) {
        return Err(Error::model(format!(
            "tensor {name} seems to belong to a layer, but not to one of {LAYERS}N; \
             dropping layers around it could break the checkpoint"
        )));
    }
    Ok(Some(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_behind_the_cut_move_up_and_the_rest_stays() {
        let new = |name| renamed(name, &[1, 2, 5]).unwrap();
        assert_eq!(new("model.layers.0.mlp.up_proj.weight").unwrap(), "model.layers.0.mlp.up_proj.weight");
        assert_eq!(new("model.layers.1.mlp.up_proj.weight"), None);
        assert_eq!(new("model.layers.3.mlp.up_proj.weight").unwrap(), "model.layers.1.mlp.up_proj.weight");
        assert_eq!(new("model.layers.10.x").unwrap(), "model.layers.7.x");
        assert_eq!(new("model.norm.weight").unwrap(), "model.norm.weight");
    }

    #[test]
    fn a_layer_by_another_name_is_refused_by_its_name() {
        let error = renamed("model.vision.blocks.3.weight", &[1]).unwrap_err();
        assert!(error.to_string().contains("model.vision.blocks.3.weight"));
    }
}
