//! Pruning in rounds: a few layers go, what is left is healed, and looked at anew before the next ones go.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Cutting, Run, healed, spec_by_content};
use crate::engine::heal::{ADAPTER, HEALED};
use crate::engine::model::Checkpoint;
use crate::engine::workspace::{Recorded, Workspace};
use crate::engine::{Error, Result, at};
use crate::job::progress::Stage;
use crate::job::report::{CheckpointRef, HealReport, LayerProfile, LayerSelection, StageSummary};
use crate::job::spec::PruneAmount;

/// Directory of a workspace with one workspace for each round.
const ROUNDS: &str = "rounds";

/// What all rounds came to.
#[derive(Serialize, Deserialize)]
struct Walked {
    /// In the base model's numbers.
    selection: LayerSelection,
    /// Of all rounds; the last that helped names the checkpoint of the last round.
    heal: Vec<HealReport>,
    /// Where that is, in the workspace, until it is in its place.
    left: String,
}

impl Run<'_> {
    /// The road up to the healed checkpoint, in rounds. Each has the checkpoint of the one before for its base. What
    /// comes of it is told against the base model: the layers that went in its numbers, and `pruned` is the base
    /// model without them.
    pub(super) fn in_rounds(
        &self,
        profile: Recorded<LayerProfile>,
        workspace: &Workspace,
        model_digest: &str,
        stages: &mut Vec<StageSummary>,
    ) -> Result<Option<Cutting>> {
        let inputs = json!({
            "model": model_digest,
            "compute": self.compute.name(),
            "spec": spec_by_content(self.local)?,
        });
        let walk = || self.walk_rounds(workspace, model_digest);
        let walked = workspace.kept("rounds", &inputs, walk)?;
        let (cx, selected) = (self.cx(Stage::Select), walked.selection.clone());
        let selection = workspace.once(cx, &inputs, |_| Ok((selected, Vec::new())))?;
        if self.ends(Stage::Select, &selection, stages) {
            return Ok(None);
        }
        let pruned = self.prune(workspace, model_digest, &selection.value)?;
        if self.ends(Stage::Prune, &pruned, stages) {
            return Ok(None);
        }
        let heal = workspace.once(self.cx(Stage::Heal), &inputs, |_| {
            if walked.heal.iter().all(|heal| heal.checkpoint.is_none()) {
                workspace.retract(HEALED)?;
                return Ok((walked.heal.clone(), Vec::new()));
            }
            // Its files went with an earlier run that was killed before it said so.
            if !workspace.dir().join(&walked.left).exists() {
                self.walk_rounds(workspace, model_digest)?;
            }
            let part = workspace.part(HEALED)?;
            link_all(&workspace.dir().join(&walked.left), &part)?;
            workspace.publish(&part, HEALED)?;
            Ok((walked.heal.clone(), vec![HEALED.to_owned()]))
        })?;
        // No single adapter leads from the pruned checkpoint to the healed one.
        workspace.retract(ADAPTER)?;
        workspace.retract(ROUNDS)?;
        if self.ends(Stage::Heal, &heal, stages) {
            return Ok(None);
        }
        Ok(Some(Cutting { profile, selection, pruned, heal }))
    }

    fn walk_rounds(&self, workspace: &Workspace, model_digest: &str) -> Result<Walked> {
        let (rounds, all) = (self.local.prune.rounds, self.dropped_at_most());
        let mut left: Vec<u32> = (0..self.base.config().layer_count as u32).collect();
        let mut out: Option<Walked> = None;
        let (mut base, mut digest): (Option<Checkpoint>, String) = (None, model_digest.to_owned());
        for round in 0..rounds {
            let layers = all * (round + 1) / rounds - all * round / rounds;
            let name = format!("{ROUNDS}/{}", round + 1);
            let own = Workspace::open(&workspace.dir().join(&name))?.sharing(workspace.sources());
            let mut local = self.local.clone();
            (local.prune.amount, local.prune.rounds) = (Some(PruneAmount::Layers(layers)), 1);
            self.cx(Stage::Profile).note(format!("round {} of {rounds}: {layers} layers go", round + 1));
            let run = Run {
                local: &local,
                asked: &local,
                base: base.as_ref().unwrap_or(self.base),
                until: None,
                ..*self
            };
            let cut = run.cut(&own, &digest, &mut Vec::new())?;
            let cut = cut.ok_or_else(|| Error::bug("a round ended before its cut"))?;
            let result = healed(&cut.heal.value).unwrap_or(&cut.pruned.value).clone();
            let dir = own.dir().join(&result.path);
            digest.clone_from(&result.digest);
            let place = format!("{name}/{}", result.path);
            drop(own);
            base = Some(Checkpoint::open(&dir)?);
            out = Some(told(out, cut, &mut left, result, place));
        }
        out.ok_or_else(|| Error::bug("no rounds"))
    }
}

/// What is told of a round, after the ones before. `left` are the base model's layers that were left before it.
fn told(
    before: Option<Walked>,
    cut: Cutting,
    left: &mut Vec<u32>,
    result: CheckpointRef,
    place: String,
) -> Walked {
    let selection = cut.selection.value;
    let went: Vec<u32> = selection.dropped.iter().map(|layer| left[*layer as usize]).collect();
    left.retain(|layer| !went.contains(layer));
    let mut walked = before.unwrap_or(Walked {
        // Of the first round are the places that can be told in the base model's numbers.
        selection: LayerSelection {
            dropped: Vec::new(),
            rounds: Vec::new(),
            considered: Vec::new(),
            compared: Vec::new(),
            ..selection
        },
        heal: Vec::new(),
        left: String::new(),
    });
    walked.selection.dropped.extend(&went);
    walked.selection.dropped.sort_unstable();
    walked.selection.rounds.push(went);
    walked.heal.extend(cut.heal.value);
    let mut checkpoint = Some(CheckpointRef { path: HEALED.to_owned(), ..result });
    for heal in walked.heal.iter_mut().rev() {
        let helped = heal.checkpoint.is_some();
        heal.checkpoint = if helped { checkpoint.take() } else { None };
    }
    walked.left = place;
    walked
}

/// The files of a directory in another one, by hard links where the file system has them.
fn link_all(from: &Path, to: &Path) -> Result<()> {
    let mut open: Vec<PathBuf> = vec![PathBuf::new()];
    while let Some(below) = open.pop() {
        let dir = from.join(&below);
        fs::create_dir_all(to.join(&below)).map_err(at(to))?;
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let path = below.join(entry.map_err(at(&dir))?.file_name());
            let (source, target) = (from.join(&path), to.join(&path));
            if source.is_dir() {
                open.push(path);
            } else if fs::hard_link(&source, &target).is_err() {
                fs::copy(&source, &target).map_err(at(&target))?;
            }
        }
    }
    Ok(())
}
