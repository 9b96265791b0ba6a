//! The road of one job, straight on: profile, select, prune, heal, eval, report.
//! Each stage is done once for the same inputs, however often the road is walked.

use std::path::Path;

use serde_json::json;

use super::data::{self, Purpose, Wanted, items};
use super::heal::{self, ADAPTER, HEALED, Wound};
use super::model::{Checkpoint, Compute};
use super::prune::{Cut, PRUNED};
use super::report::{Findings, page};
use super::workspace::{Recorded, Workspace, write_atomic};
use super::{Cx, Error, Result, eval, profile, select};
use crate::job::progress::{Observer, Stage};
use crate::job::report::{
    CheckpointRef, EvalReport, HealReport, LayerProfile, LayerSelection, Report, StageSummary,
};
use crate::job::spec::{Corpus, HealMethod, JobSpec};

/// Directory of a workspace with the answer to every evaluation item.
const ITEMS: &str = "items";

/// One run of one job.
pub struct Run<'a> {
    /// The spec as it was asked; it goes into the report.
    pub asked: &'a JobSpec,
    /// The same with local paths for everything that had to be fetched.
    pub local: &'a JobSpec,
    pub base: &'a Checkpoint,
    pub compute: &'a Compute,
    pub observer: &'a dyn Observer,
    /// The last stage to do; all of them when absent.
    pub until: Option<Stage>,
}

impl Run<'_> {
    /// Walks the road in the directory `workspace`. Gives the report, or nothing when told to end before it.
    ///
    /// # Errors
    /// What cannot be met or used is said before anything is computed or written.
    pub fn go(&self, workspace: &Path) -> Result<Option<Report>> {
        // On a thread of the pool: work handed to it from outside costs two wake-ups each time.
        rayon::scope(|_| self.walk(workspace))
    }

    fn walk(&self, workspace: &Path) -> Result<Option<Report>> {
        self.check()?;
        let workspace = &Workspace::open(workspace)?;
        let model_digest = &self.base.digest()?;
        let mut stages = Vec::new();

        let profile = self.profile(workspace, model_digest)?;
        if self.ends(Stage::Profile, &profile, &mut stages) {
            return Ok(None);
        }
        let selection = self.select(workspace, &profile.value)?;
        if self.ends(Stage::Select, &selection, &mut stages) {
            return Ok(None);
        }
        let pruned = self.prune(workspace, model_digest, &selection.value)?;
        if self.ends(Stage::Prune, &pruned, &mut stages) {
            return Ok(None);
        }
        let heal = self.heal(workspace, model_digest, &selection.value, &pruned.value)?;
        if self.ends(Stage::Heal, &heal, &mut stages) {
            return Ok(None);
        }
        let healed = heal.value.iter().rev().find_map(|h| h.checkpoint.as_ref());
        let eval = self.eval(workspace, model_digest, &pruned.value, healed)?;
        if self.ends(Stage::Eval, &eval, &mut stages) {
            return Ok(None);
        }
        let findings = Findings {
            spec: self.asked.clone(),
            model_digest: model_digest.clone(),
            profile: profile.value,
            selection: selection.value,
            pruned: pruned.value,
            heal: heal.value,
            eval: eval.value,
            files: pruned.files.into_iter().chain(heal.files).collect(),
        };
        self.report(workspace, findings, &stages).map(Some)
    }

    /// All that can be known to be wrong before anything is computed.
    fn check(&self) -> Result<()> {
        let complaints = self.local.validate_for(self.base.config().layer_count as u32);
        if !complaints.is_empty() {
            let all: Vec<String> = complaints.iter().map(ToString::to_string).collect();
            return Err(Error::spec(all.join("; ")));
        }
        // Finds what cannot be cut before hours are spent on the way to the cut.
        Cut::plan(self.base.index(), &[], None)?;
        if self.base.config().remote_code() {
            let cx = self.cx(Stage::Profile);
            cx.note("config.json names code of the model's authors (auto_map); it is neither run nor copied");
        }
        let spec = self.local;
        let heal =
            spec.heal.iter().map(|HealMethod::Qlora(q)| (&q.corpus, self.heal_seq_len(q), Purpose::Heal));
        let eval = spec.eval.perplexity.iter().map(|c| (c, self.eval_seq_len(), Purpose::Eval));
        let calibration = (&spec.calibration.corpus, self.calibration_seq_len(), Purpose::Calibration);
        for (corpus, seq_len, purpose) in std::iter::once(calibration).chain(heal).chain(eval) {
            if !matches!(corpus, Corpus::Model { .. }) {
                let first = Wanted { seq_len, at_most: Some(1), purpose, seed: spec.seed };
                data::windows(corpus, &first, self.base, self.cx(Stage::Profile))?;
            }
        }
        for task in &spec.eval.tasks {
            items::read(&task.items, task.limit)?;
        }
        Ok(())
    }

    fn profile(&self, workspace: &Workspace, model_digest: &str) -> Result<Recorded<LayerProfile>> {
        let cx = self.cx(Stage::Profile);
        let spec = &self.local.calibration;
        let seq_len = self.calibration_seq_len();
        // The size of a batch is no part of this: it changes nothing.
        let inputs = json!({
            "model": model_digest,
            "compute": self.compute.name(),
            "seed": self.local.seed,
            "corpus": data::digest(&spec.corpus)?,
            "samples": spec.samples,
            "seq_len": seq_len,
            "position": spec.position,
            "distance": spec.distance,
        });
        workspace.once(cx, &inputs, |_| {
            if seq_len < spec.seq_len as usize {
                cx.note(format!("windows have {seq_len} tokens, which is all the model can take"));
            }
            let wanted = Wanted {
                seq_len,
                at_most: Some(spec.samples as usize),
                purpose: Purpose::Calibration,
                seed: self.local.seed,
            };
            let windows = data::windows(&spec.corpus, &wanted, self.base, cx)?;
            Ok((profile::profile(self.base, &windows.ids, spec, cx)?, Vec::new()))
        })
    }

    fn select(&self, workspace: &Workspace, profile: &LayerProfile) -> Result<Recorded<LayerSelection>> {
        let spec = &self.local.prune;
        workspace.once(self.cx(Stage::Select), &(profile, spec), |_| {
            Ok((select::select(profile, spec)?, Vec::new()))
        })
    }

    fn prune(
        &self,
        workspace: &Workspace,
        model_digest: &str,
        selection: &LayerSelection,
    ) -> Result<Recorded<CheckpointRef>> {
        let cx = self.cx(Stage::Prune);
        let dtype = self.local.export.dtype;
        workspace.once(cx, &(model_digest, &selection.dropped, dtype), |_| {
            let pruned = Cut::plan(self.base.index(), &selection.dropped, dtype)?.write(workspace, cx)?;
            Ok((pruned, vec![PRUNED.to_owned()]))
        })
    }

    fn heal(
        &self,
        workspace: &Workspace,
        model_digest: &str,
        selection: &LayerSelection,
        pruned: &CheckpointRef,
    ) -> Result<Recorded<Vec<HealReport>>> {
        let cx = self.cx(Stage::Heal);
        let wound = Wound {
            spec: self.local,
            base: self.base.config().facts(),
            dropped: selection.dropped.len() as u32,
            pruned,
        };
        let mut methods = self.local.heal.clone();
        for HealMethod::Qlora(q) in &mut methods {
            q.corpus = by_content(&q.corpus)?;
            // How often progress is kept changes nothing.
            q.checkpoint_every = None;
        }
        let inputs = json!({
            // The base writes the text to heal on, where that is asked.
            "model": model_digest,
            "pruned": pruned.digest,
            "dropped": wound.dropped,
            "compute": self.compute.name(),
            "seed": self.local.seed,
            "preset": self.local.preset,
            "methods": methods,
        });
        let recorded = workspace.once(cx, &inputs, |scratch| {
            let mut windows = |corpus: &Corpus, seq_len: usize, count: usize| {
                let wanted =
                    Wanted { seq_len, at_most: Some(count), purpose: Purpose::Heal, seed: self.local.seed };
                Ok(data::windows(corpus, &wanted, self.base, cx)?.ids)
            };
            heal::heal(&wound, &mut windows, workspace, scratch, cx)
        })?;
        if recorded.value.iter().all(|h| h.checkpoint.is_none()) {
            // Another run's healed checkpoint has no place beside this one's cut.
            workspace.retract(HEALED)?;
            workspace.retract(ADAPTER)?;
        }
        Ok(recorded)
    }

    fn eval(
        &self,
        workspace: &Workspace,
        model_digest: &str,
        pruned: &CheckpointRef,
        healed: Option<&CheckpointRef>,
    ) -> Result<Recorded<EvalReport>> {
        let cx = self.cx(Stage::Eval);
        let mut spec = self.local.eval.clone();
        // Scores are told under the names of files, so the names belong to the result.
        let mut names = Vec::new();
        for corpus in spec.perplexity.iter_mut().chain(spec.tasks.iter_mut().map(|t| &mut t.items)) {
            names.push(data::label(corpus));
            *corpus = by_content(corpus)?;
        }
        let inputs = json!({
            "model": model_digest,
            "pruned": pruned.digest,
            "healed": healed.map(|h| &h.digest),
            "compute": self.compute.name(),
            "seed": self.local.seed,
            "spec": spec,
            "names": names,
        });
        workspace.once(cx, &inputs, |_| {
            let place = |c: &CheckpointRef| workspace.dir().join(&c.path);
            let checkpoints = eval::Checkpoints {
                base: self.base.dir().to_owned(),
                pruned: place(pruned),
                healed: healed.map(place),
            };
            let part = workspace.part(ITEMS)?;
            let report = eval::evaluate(&checkpoints, &self.local.eval, self.local.seed, &part, cx)?;
            workspace.publish(&part, ITEMS)?;
            Ok((report, vec![ITEMS.to_owned()]))
        })
    }

    fn report(&self, workspace: &Workspace, findings: Findings, stages: &[StageSummary]) -> Result<Report> {
        let cx = self.cx(Stage::Report);
        let report = findings.report();
        let recorded = workspace.once(cx, &report, |_| {
            write_atomic(&workspace.dir().join("report.html"), page(&report, stages).as_bytes())?;
            Ok((report.clone(), vec!["report.html".to_owned()]))
        })?;
        Ok(recorded.value)
    }

    /// Notes the stage, and says whether the road ends here.
    fn ends<T>(&self, stage: Stage, done: &Recorded<T>, stages: &mut Vec<StageSummary>) -> bool {
        stages.push(StageSummary { stage, reused: done.reused, duration_ms: done.duration_ms });
        self.until == Some(stage)
    }

    fn cx(&self, stage: Stage) -> Cx<'_> {
        Cx { stage, compute: self.compute, observer: self.observer }
    }

    fn calibration_seq_len(&self) -> usize {
        (self.local.calibration.seq_len as usize).min(self.base.config().max_position_embeddings)
    }

    fn eval_seq_len(&self) -> usize {
        (self.local.eval.seq_len as usize).min(self.base.config().max_position_embeddings)
    }

    fn heal_seq_len(&self, spec: &crate::job::spec::QloraSpec) -> usize {
        let facts = self.base.config().facts();
        spec.settings(self.local.preset, &facts, self.dropped_at_most()).seq_len as usize
    }

    fn dropped_at_most(&self) -> u32 {
        let prune = &self.local.prune;
        let layer_count = self.base.config().layer_count as u32;
        prune
            .layers
            .as_ref()
            .map_or_else(|| prune.amount.map_or(1, |a| a.layers(layer_count)), |layers| layers.len() as u32)
    }
}

/// A corpus by what it holds, not by where it lies.
fn by_content(corpus: &Corpus) -> Result<Corpus> {
    Ok(match corpus {
        Corpus::Model { tokens } => Corpus::Model { tokens: *tokens },
        Corpus::Path { .. } | Corpus::Hub { .. } | Corpus::Upload { .. } | Corpus::Text { .. } => {
            Corpus::Text { text: data::digest(corpus)? }
        }
    })
}
