//! What a method of healing does to tensors, and the checkpoint that comes of it.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use crate::checkpoint::family::Norm;
use crate::checkpoint::{Config, Role};
use crate::engine::export::safetensors::{Content, Draft, Planned};
use crate::engine::model::Checkpoint;
use crate::engine::model::lora::Adapter;
use crate::engine::model::weight::{floats, with};
use crate::engine::workspace::Workspace;
use crate::engine::{Cx, Error, Result};
use crate::job::report::CheckpointRef;

/// What is done to a tensor; it is rounded once, to the type it has.
pub enum Change {
    /// An adapter is merged into the weight of a linear layer.
    Merge(Adapter),
    /// All values times this.
    Scale(f64),
    /// The same for a norm that multiplies by 1 + weight: 1 + weight is scaled.
    ScaleFromOne(f64),
    /// The outputs `y` of a linear layer become `y + y D`, for `D [outputs, outputs]`, float32: of its weight or bias.
    Mix(Tensor),
    /// The weight `[outputs, inputs]` of a linear layer becomes another, float32.
    Replace(Tensor),
}

/// By name of the tensor; all others stay as they are.
pub type Changes = BTreeMap<String, Change>;

/// Writes `source` with `changes` to `name` in the workspace: proven as every checkpoint is.
///
/// # Errors
/// A spec error when a value is no longer finite, or too large for the tensor's type.
pub fn write(
    source: &Checkpoint,
    changes: &Changes,
    name: &str,
    workspace: &Workspace,
    cx: Cx,
) -> Result<CheckpointRef> {
    if let Some(stranger) = changes.keys().find(|name| source.info(name).is_none()) {
        return Err(Error::bug(format!("healing changes {stranger}, which is no tensor here")));
    }
    let planned = source.index().tensors.iter().map(|(name, info)| Planned {
        name: name.clone(),
        dtype: info.dtype,
        shape: info.shape.clone(),
    });
    let draft =
        Draft { config: source.config().raw().clone(), companions: source.dir(), tensors: planned.collect() };
    draft.write(workspace, name, cx, |tensor| {
        let content = Content::of(source.index(), &tensor.name)?;
        match changes.get(&tensor.name) {
            None => Ok(content),
            Some(change) => change.applied(source, tensor, content),
        }
    })
}

impl Change {
    /// What a tensor of `source` is after the change.
    fn applied<'a>(
        &'a self,
        source: &Checkpoint,
        tensor: &Planned,
        content: Content<'a>,
    ) -> Result<Content<'a>> {
        let turned = source.config().family.transposed;
        let name = tensor.name.clone();
        let finite = move |values: &[f32], advice: &str| {
            if values.iter().all(|value| value.is_finite()) {
                return Ok(());
            }
            Err(Error::spec(format!("healing left {name} not finite; {advice}")))
        };
        Ok(match self {
            Self::Merge(adapter) => {
                let delta = adapter.delta(turned)?;
                content.changed(move |first, values| {
                    delta.add(first, values);
                    finite(values, "lower learning_rate")
                })
            }
            Self::Scale(factor) => content.changed(move |_, values| {
                values.iter_mut().for_each(|value| *value *= *factor as f32);
                finite(values, TOO_LARGE)
            }),
            Self::ScaleFromOne(factor) => content.changed(move |_, values| {
                for value in values.iter_mut() {
                    *value = ((f64::from(*value) + 1.0) * factor - 1.0) as f32;
                }
                finite(values, TOO_LARGE)
            }),
            Self::Replace(weight) => {
                // The head is never turned.
                let turned = turned && tensor.name.starts_with(&source.config().layers_prefix());
                let weight = if turned { weight.t()?.contiguous()? } else { weight.clone() };
                let weight = weight.to_device(&Device::Cpu)?;
                let width = weight.dim(1)?;
                content.changed(move |first, values| {
                    with(&weight, |weight| values.copy_from_slice(&weight[first * width..][..values.len()]))?;
                    finite(values, "lower learning_rate")
                })
            }
            Self::Mix(mix) => {
                let (rows, columns) = match tensor.shape[..] {
                    [outputs] => (1, outputs),
                    [rows, columns] => (rows, columns),
                    _ => return Err(Error::bug(format!("{} is no linear layer's", tensor.name))),
                };
                let values = Tensor::from_vec(source.values(&tensor.name)?, (rows, columns), &Device::Cpu)?;
                let outputs_last = turned || tensor.shape.len() == 1;
                let more = if outputs_last { values.matmul(mix)? } else { mix.t()?.matmul(&values)? };
                source.release(&tensor.name);
                // Of a bias each value is a row.
                let (more, width) = (floats(&more)?, if tensor.shape.len() == 1 { 1 } else { columns });
                content.changed(move |first, values| {
                    values.iter_mut().zip(&more[first * width..]).for_each(|(value, more)| *value += more);
                    finite(values, "give more samples or a larger ridge")
                })
            }
        })
    }
}

const TOO_LARGE: &str = "leave this method out";

/// What scales all that layer `layer` adds to the stream, by `factor`: its last norms where it has such, else its
/// last projections with their biases.
pub fn scaled_branches(config: &Config, layer: usize, factor: f64) -> Changes {
    let [_, attention_out, _, mlp_out] = config.norms();
    let mut out = Changes::new();
    let mut norm = |name: &str| {
        let name = config.in_layer(layer, name);
        match config.family.norm {
            Norm::Rms => drop(out.insert(format!("{name}.weight"), Change::Scale(factor))),
            Norm::RmsPlusOne => drop(out.insert(format!("{name}.weight"), Change::ScaleFromOne(factor))),
            Norm::Layer => {
                out.insert(format!("{name}.weight"), Change::Scale(factor));
                out.insert(format!("{name}.bias"), Change::Scale(factor));
            }
        }
    };
    let mut projections = Vec::new();
    match attention_out {
        Some(name) => norm(name),
        None => projections.extend(last_projection(config, layer, Role::Output)),
    }
    match mlp_out {
        Some(name) => norm(name),
        None => projections.extend(down_projections(config, layer)),
    }
    out.extend(projections.into_iter().map(|name| (name, Change::Scale(factor))));
    out
}

/// The tensors through which the MLP of `layer` leaves: weight, and bias where there is one, of its down-projection,
/// or the down-projections of all its experts.
pub fn down_projections(config: &Config, layer: usize) -> Vec<String> {
    match (config.family.experts, config.experts) {
        (Some(names), Some(shape)) if config.layers[layer].sparse => {
            let [_, _, down] = names.linears;
            let expert = |i| config.in_layer(layer, &format!("{}{i}.{down}.weight", names.experts));
            (0..shape.count).map(expert).collect()
        }
        _ => last_projection(config, layer, Role::Down),
    }
}

fn last_projection(config: &Config, layer: usize, role: Role) -> Vec<String> {
    let linear = config.linears(layer).iter().find(|linear| linear.role == role);
    let tensors = |name: String, bias: bool| {
        let bias = bias.then(|| format!("{name}.bias"));
        std::iter::once(format!("{name}.weight")).chain(bias)
    };
    linear.into_iter().flat_map(|l| tensors(config.in_layer(layer, l.name), l.bias)).collect()
}
