//! Closing the wound: healing methods, run in the order asked. One that makes
//! the held-out loss worse is thrown away, with a word in the report.

pub mod adamw;
pub mod backward;
mod peft;
mod qlora;
mod resume;

use std::collections::HashMap;
use std::path::Path;

pub use qlora::{Trained, Windows, train};

use super::export::safetensors::{Content, Draft, Planned};
use super::model::lora::Adapter;
use super::model::{Checkpoint, Decoder};
use super::workspace::{Workspace, write_json};
use super::{Cx, Error, Result};
use crate::job::preset::ModelFacts;
use crate::job::report::{CheckpointRef, HealReport};
use crate::job::spec::{Corpus, HealMethod, JobSpec, QloraSpec};

/// Name of the healed checkpoint in a workspace.
pub const HEALED: &str = "healed";
/// Name of the adapter, in PEFT's layout, in a workspace.
pub const ADAPTER: &str = "adapter";
/// A healed checkpoint that has not been judged yet.
const CANDIDATE: &str = "healing";

/// What healing starts from.
pub struct Wound<'a> {
    pub spec: &'a JobSpec,
    /// The model before the cut.
    pub base: ModelFacts,
    /// Layers cut.
    pub dropped: u32,
    pub pruned: &'a CheckpointRef,
}

/// Gives at most so many token windows of a corpus: corpus, `seq_len`, windows wanted.
pub type WindowsOf<'a> = &'a mut dyn FnMut(&Corpus, usize, usize) -> Result<Vec<Vec<u32>>>;

/// Runs the methods of the spec, one on what the other left. Gives their reports and
/// the names of what is left in the workspace: `healed` and `adapter`, or nothing when
/// no method helped.
pub fn heal(
    wound: &Wound,
    windows: WindowsOf,
    workspace: &Workspace,
    scratch: &Path,
    cx: Cx,
) -> Result<(Vec<HealReport>, Vec<String>)> {
    workspace.retract(HEALED)?;
    workspace.retract(ADAPTER)?;
    let mut current = wound.pruned.clone();
    let mut reports = Vec::new();
    let mut left: Vec<String> = Vec::new();
    for (i, HealMethod::Qlora(spec)) in wound.spec.heal.iter().enumerate() {
        let scratch = scratch.join(format!("{i}"));
        let report = qlora(wound, spec, &current, windows, workspace, &scratch, cx)?;
        if let Some(healed) = &report.checkpoint {
            current = healed.clone();
            left = vec![HEALED.to_owned(), ADAPTER.to_owned()];
        }
        reports.push(report);
    }
    Ok((reports, left))
}

fn qlora(
    wound: &Wound,
    spec: &QloraSpec,
    current: &CheckpointRef,
    windows: WindowsOf,
    workspace: &Workspace,
    scratch: &Path,
    cx: Cx,
) -> Result<HealReport> {
    let settings = spec.settings(wound.spec.preset, &wound.base, wound.dropped);
    let windows = Windows::split(kept_windows(scratch, || {
        windows(&spec.corpus, settings.seq_len as usize, Windows::wanted(&settings))
    })?)?;
    let source = Checkpoint::open(&workspace.dir().join(&current.path))?;
    let trained = train(&source, &settings, &windows, wound.spec.seed, scratch, cx)?;
    let candidate = write_merged(&source, &trained, workspace, cx)?;
    let after = {
        let healed = Checkpoint::open(&workspace.dir().join(CANDIDATE))?;
        backward::mean_loss(&Decoder::open(&healed, cx.compute)?, &windows.held_out, cx)?
    };
    let reverted = after >= trained.held_out_before;
    let checkpoint = if reverted {
        cx.note(format!(
            "healing made the held-out loss worse ({:.4} to {after:.4} nats a token) and was thrown away",
            trained.held_out_before
        ));
        workspace.retract(CANDIDATE)?;
        None
    } else {
        let adapter = workspace.part(ADAPTER)?;
        peft::save(&adapter, &current.path, source.config(), &trained.adapters, &settings)?;
        workspace.publish(&adapter, ADAPTER)?;
        workspace.publish(&workspace.dir().join(CANDIDATE), HEALED)?;
        Some(CheckpointRef { path: HEALED.to_owned(), ..candidate })
    };
    Ok(HealReport {
        method: "qlora".to_owned(),
        settings,
        trainable_parameters: trained.adapters.parameters(),
        tokens: trained.tokens,
        curve: trained.curve,
        held_out_before: trained.held_out_before,
        held_out_after: after,
        reverted,
        checkpoint,
    })
}

/// The healing windows, kept for the next attempt: a model may have taken minutes to write them.
fn kept_windows(scratch: &Path, find: impl FnOnce() -> Result<Vec<Vec<u32>>>) -> Result<Vec<Vec<u32>>> {
    let file = scratch.join("windows.json");
    if let Some(windows) = std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
        return Ok(windows);
    }
    let windows = find()?;
    std::fs::create_dir_all(scratch)?;
    write_json(&file, &windows)?;
    Ok(windows)
}

/// Writes `source` with the adapters merged into its own weights – not into the
/// quantised ones they were trained over – rounded once to the type they have.
fn write_merged(
    source: &Checkpoint,
    trained: &Trained,
    workspace: &Workspace,
    cx: Cx,
) -> Result<CheckpointRef> {
    let config = source.config();
    let adapters: HashMap<String, Adapter> = trained
        .adapters
        .trained()
        .map(|(layer, linear, adapter)| (format!("{}.weight", config.in_layer(layer, linear.name)), adapter))
        .collect();
    let planned = source.index().tensors.iter().map(|(name, info)| Planned {
        name: name.clone(),
        dtype: info.dtype,
        shape: info.shape.clone(),
    });
    let draft = Draft { config: config.raw().clone(), companions: source.dir(), tensors: planned.collect() };
    draft.write(workspace, CANDIDATE, cx, |tensor| {
        let content = Content::of(source.index(), &tensor.name)?;
        let Some(adapter) = adapters.get(&tensor.name) else { return Ok(content) };
        let delta = adapter.delta(config.family.transposed)?;
        let name = tensor.name.clone();
        Ok(content.changed(move |row, weights| {
            delta.add(row, weights);
            if weights.iter().all(|w| w.is_finite()) {
                return Ok(());
            }
            Err(Error::spec(format!("healing left {name} not finite; lower learning_rate")))
        }))
    })
}
