//! Closing the wound: healing methods, run in the order asked, each on what the others left. A method says what is
//! to be done to which tensors; the checkpoint that comes of it is judged on text that nothing was fitted to, and
//! thrown away, with a word in the report, unless its loss is less.

pub mod adamw;
pub mod backward;
mod beside;
mod change;
mod least_squares;
mod peft;
pub mod prefix;
mod qlora;
mod reconstruct;
mod rescale;
mod resume;
mod solve;
mod steps;
mod teacher;
pub mod trainables;
mod training;
mod whole;
mod windows;

use std::path::{Path, PathBuf};

pub use qlora::train;
pub use teacher::Teacher;
pub use training::{Course, Trained};
pub use windows::Windows;

use self::backward::mean_loss;
use self::change::Changes;
use super::model::lora::Adapter;
use super::model::{Checkpoint, Decoder};
use super::workspace::Workspace;
use super::{Cx, Result};
use crate::checkpoint::LinearShape;
use crate::job::heal::HealSettings;
use crate::job::report::{Block, CheckpointRef, HealReport, LossPoint, Repaired};
use crate::job::spec::{Corpus, HealMethod, JobSpec};

/// Name of the healed checkpoint in a workspace.
pub const HEALED: &str = "healed";
/// Name of the adapter, in PEFT's layout, in a workspace.
pub const ADAPTER: &str = "adapter";
/// A healed checkpoint that has not been judged yet.
pub const CANDIDATE: &str = "healing";

/// What healing starts from.
pub struct Wound<'a> {
    pub spec: &'a JobSpec,
    /// The model before the cut.
    pub base: &'a Checkpoint,
    /// Layers cut, ascending, counted in the base.
    pub dropped: &'a [u32],
    pub pruned: &'a CheckpointRef,
}

/// Gives at most so many token windows of a corpus: corpus, `seq_len`, windows wanted.
pub type WindowsOf<'a> = &'a mut dyn FnMut(&Corpus, usize, usize) -> Result<Vec<Vec<u32>>>;

/// What one method works with.
pub struct Case<'a> {
    pub wound: &'a Wound<'a>,
    /// What the cut and earlier methods have left.
    pub source: &'a Checkpoint,
    /// By block: how many times smaller the stream of `source` is behind it than the base's, by what earlier methods
    /// did to the layers there.
    pub sizes: &'a [f64],
    pub windows: &'a Windows,
    /// A directory of the method's own, which may not be there yet and survives a killed run.
    pub scratch: &'a Path,
    pub cx: Cx<'a>,
}

impl Case<'_> {
    /// The blocks that went, from the lowest on, and the layer of `source` that follows each.
    fn cuts(&self) -> Vec<(Block, usize)> {
        let mut gone = 0;
        let seam = |block: Block| {
            let seam = block.start - gone;
            gone += block.len;
            (block, seam as usize)
        };
        Block::runs(self.wound.dropped).into_iter().map(seam).collect()
    }
}

/// What a method would do.
pub struct Remedy {
    changes: Changes,
    /// As [`Case::sizes`], afterwards.
    pub sizes: Vec<f64>,
    /// Tokens worked on.
    pub tokens: u64,
    pub repaired: Vec<Repaired>,
    pub trainable_parameters: u64,
    pub curve: Vec<LossPoint>,
    /// The optimizer step at which the loss was no number, if there was one.
    pub diverged_at: Option<u32>,
    /// Those that `changes` merge, by layer, where that is all they do.
    adapters: Vec<(usize, LinearShape, Adapter)>,
}

impl Remedy {
    /// Nothing but these changes.
    fn new(case: &Case, changes: Changes) -> Self {
        Self {
            changes,
            sizes: case.sizes.to_vec(),
            tokens: case.windows.tokens(),
            repaired: Vec::new(),
            trainable_parameters: 0,
            curve: Vec::new(),
            diverged_at: None,
            adapters: Vec::new(),
        }
    }
}

/// How things stand between two methods.
#[derive(Clone)]
struct Standing {
    checkpoint: CheckpointRef,
    sizes: Vec<f64>,
    /// The adapter that makes `checkpoint` of the pruned one, where one alone does, built and not yet in its place.
    adapter: Option<PathBuf>,
}

/// Runs the methods of the spec, one on what the other left, or, to be compared, each on the cut itself. Gives their
/// reports and the names of what is left in the workspace: `healed`, and `adapter` where `healed` is nothing but
/// `pruned` with an adapter merged; or nothing when no method helped.
pub fn heal(
    wound: &Wound,
    windows: WindowsOf,
    workspace: &Workspace,
    scratch: &Path,
    cx: Cx,
) -> Result<(Vec<HealReport>, Vec<String>)> {
    workspace.retract(HEALED)?;
    workspace.retract(ADAPTER)?;
    let sizes = vec![1.0; Block::runs(wound.dropped).len()];
    let cut = Standing { checkpoint: wound.pruned.clone(), sizes, adapter: None };
    let mut standing = cut.clone();
    let mut reports: Vec<HealReport> = Vec::new();
    let mut least_gain = 0.0;
    for (i, method) in wound.spec.heal.iter().enumerate() {
        let from = if wound.spec.compare_heals { &cut } else { &standing };
        let scratch = scratch.join(format!("{i}"));
        let trial = Trial { wound, from, least_gain, workspace, scratch: &scratch, cx };
        let (report, kept) = trial.run(method, windows)?;
        if let Some(kept) = kept {
            standing = kept;
            if wound.spec.compare_heals {
                least_gain = report.held_out_before - report.held_out_after;
                for earlier in &mut reports {
                    earlier.passed_over |= earlier.checkpoint.take().is_some();
                }
            }
        }
        reports.push(report);
    }
    let mut left = Vec::new();
    if reports.iter().any(|report| report.checkpoint.is_some()) {
        left.push(HEALED.to_owned());
    }
    if let Some(adapter) = standing.adapter {
        workspace.publish(&adapter, ADAPTER)?;
        left.push(ADAPTER.to_owned());
    }
    Ok((reports, left))
}

/// A method tried.
struct Trial<'a> {
    wound: &'a Wound<'a>,
    from: &'a Standing,
    /// What it must lower the held-out loss by, and more, to be kept.
    least_gain: f64,
    workspace: &'a Workspace,
    scratch: &'a Path,
    cx: Cx<'a>,
}

impl Trial<'_> {
    /// Runs the method, judges what it wrote, and keeps it if it is better.
    fn run(&self, method: &HealMethod, windows: WindowsOf) -> Result<(HealReport, Option<Standing>)> {
        let &Self { wound, from, workspace, cx, .. } = self;
        let facts = wound.base.config().facts();
        let settings = method.settings(wound.spec.preset, &facts, wound.dropped.len() as u32);
        let asked = settings.windows() + windows::HELD_OUT;
        let windows = Windows::split(windows(method.corpus(), settings.seq_len() as usize, asked)?)?;
        let source = Checkpoint::open(&workspace.dir().join(&from.checkpoint.path))?;
        let judge = |checkpoint: &Checkpoint| {
            mean_loss(&Decoder::open(checkpoint, cx.compute)?, &windows.held_out, cx)
        };
        let judged = (&from.checkpoint.digest, cx.compute.name(), &windows.held_out);
        let held_out_before = workspace.kept("held-out", &judged, || judge(&source))?;
        let case =
            Case { wound, source: &source, sizes: &from.sizes, windows: &windows, scratch: self.scratch, cx };
        let (remedy, candidate) = treat(&case, &settings, workspace)?;
        let held_out_after = judge(&Checkpoint::open(&workspace.dir().join(CANDIDATE))?)?;
        // What is no number is not less either.
        let gain = held_out_before - held_out_after;
        let (lowered, keep) = (gain > 0.0, gain > self.least_gain);
        if !lowered {
            cx.note(format!(
                "{} did not lower the held-out loss ({held_out_before:.4} to {held_out_after:.4} nats a token) and \
                 was thrown away",
                method.name()
            ));
        }
        let kept = if keep { Some(self.keep(&settings, &remedy, candidate, &source)?) } else { None };
        if kept.is_none() {
            workspace.retract(CANDIDATE)?;
        }
        let report = HealReport {
            method: method.name().to_owned(),
            settings,
            trainable_parameters: remedy.trainable_parameters,
            tokens: remedy.tokens,
            curve: remedy.curve,
            repaired: remedy.repaired,
            diverged_at: remedy.diverged_at,
            held_out_before,
            held_out_after,
            reverted: !lowered,
            passed_over: lowered && !keep,
            checkpoint: kept.as_ref().map(|kept| kept.checkpoint.clone()),
        };
        Ok((report, kept))
    }

    /// Puts what was written in its place.
    fn keep(
        &self,
        settings: &HealSettings,
        remedy: &Remedy,
        candidate: CheckpointRef,
        source: &Checkpoint,
    ) -> Result<Standing> {
        let Self { wound, from, workspace, .. } = self;
        let adapter = match settings {
            HealSettings::Qlora(settings) if from.checkpoint == *wound.pruned => {
                let part = workspace.part(ADAPTER)?;
                peft::save(&part, &wound.pruned.path, source.config(), &remedy.adapters, settings)?;
                Some(part)
            }
            HealSettings::Qlora(_)
            | HealSettings::Whole(_)
            | HealSettings::Rescale(_)
            | HealSettings::LeastSquares(_)
            | HealSettings::Reconstruct(_) => None,
        };
        workspace.publish(&workspace.dir().join(CANDIDATE), HEALED)?;
        let checkpoint = CheckpointRef { path: HEALED.to_owned(), ..candidate };
        Ok(Standing { checkpoint, sizes: remedy.sizes.clone(), adapter })
    }
}

/// Runs one method and writes what comes of it to `healing` in the workspace, which nobody has judged.
pub fn treat(case: &Case, settings: &HealSettings, workspace: &Workspace) -> Result<(Remedy, CheckpointRef)> {
    let remedy = match settings {
        HealSettings::Qlora(settings) => qlora::heal(case, settings),
        HealSettings::Rescale(_) => rescale::heal(case),
        HealSettings::LeastSquares(settings) => least_squares::heal(case, settings),
        HealSettings::Reconstruct(settings) => reconstruct::heal(case, settings),
        HealSettings::Whole(settings) => whole::heal(case, settings),
    }?;
    let candidate = change::write(case.source, &remedy.changes, CANDIDATE, workspace, case.cx)?;
    Ok((remedy, candidate))
}
