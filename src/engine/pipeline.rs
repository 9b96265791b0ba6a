//! The road of one job, straight on: profile, select, prune, heal, eval, report.
//! Each stage is done once for the same inputs, however often the road is walked.

mod budget;
mod results;
mod rounds;
mod wanted;

use std::path::{Path, PathBuf};

use serde_json::json;

use super::damage::{Accuracy, Damage};
use super::data::{self, Purpose, Wanted, Windows, items, overlap};
use super::eval::exported::Written;
use super::export::gguf;
use super::heal::{self, ADAPTER, HEALED, Wound};
use super::model::{Checkpoint, Compute};
use super::prune::{Cut, PRUNED};
use super::select::{Measured, Oracle, Oracles};
use super::workspace::{Recorded, Workspace};
use super::{Cx, Error, Result, eval, profile, select};
use crate::job::budget::BudgetReport;
use crate::job::progress::{Observer, Stage};
use crate::job::report::{
    Ablation, CheckpointRef, EvalReport, GgufFile, HealReport, LayerProfile, LayerSelection, Report,
    StageSummary, Zone,
};
use crate::job::spec::{
    Corpus, DamageSpec, Gates, HealMethod, JobSpec, ModelSource, OverlapPolicy, PruneAmount, Share, TaskSpec,
};
use crate::report::Findings;

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
    /// Directory of records that other runs use as well.
    pub records: Option<&'a Path>,
}

/// What is there when the cut is made and healed.
struct Cutting {
    profile: Recorded<LayerProfile>,
    selection: Recorded<LayerSelection>,
    pruned: Recorded<CheckpointRef>,
    heal: Recorded<Vec<HealReport>>,
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
        let shared: Vec<PathBuf> = self.records.iter().map(|dir| dir.to_path_buf()).collect();
        let workspace = &Workspace::open(workspace)?.sharing(shared);
        let model_digest = &self.base.digest()?;
        let Some(budget) = self.local.prune.budget().filter(|_| self.until != Some(Stage::Profile)) else {
            return self.road(workspace, model_digest, None);
        };
        let found = self.within(budget, workspace, model_digest)?;
        let mut local = self.local.clone();
        local.prune.amount = Some(PruneAmount::Layers(found.layers));
        local.eval.gates = budget.over(&local.eval.gates);
        Run { local: &local, ..*self }.road(workspace, model_digest, Some(found))
    }

    /// The road for a number of layers that is known.
    fn road(
        &self,
        workspace: &Workspace,
        model_digest: &str,
        budget: Option<BudgetReport>,
    ) -> Result<Option<Report>> {
        let mut stages = Vec::new();
        let Some(found) = self.measured(workspace, model_digest, &mut stages)? else { return Ok(None) };
        let report = self.report(workspace, Findings { budget, ..found }, &stages)?;
        self.accept(&report).map_err(|e| e.at(Stage::Report))?;
        Ok(Some(report))
    }

    /// All stages but the report.
    fn measured(
        &self,
        workspace: &Workspace,
        model_digest: &str,
        stages: &mut Vec<StageSummary>,
    ) -> Result<Option<Findings>> {
        let Some(cut) = self.cut(workspace, model_digest, stages)? else { return Ok(None) };
        let Cutting { profile, selection, pruned, heal } = cut;
        let healed = healed(&heal.value);
        let dropped = &selection.value.dropped;
        let gguf = self.export(workspace, model_digest, healed.unwrap_or(&pruned.value), dropped)?;
        if self.ends(Stage::Export, &gguf, stages) {
            return Ok(None);
        }
        let eval = self.eval(workspace, model_digest, &pruned.value, healed, &gguf)?;
        if self.ends(Stage::Eval, &eval, stages) {
            return Ok(None);
        }
        Ok(Some(Findings {
            spec: self.asked.clone(),
            judged_by: self.local.eval.clone(),
            model_digest: model_digest.to_owned(),
            budget: None,
            profile: profile.value,
            selection: selection.value,
            pruned: pruned.value,
            heal: heal.value,
            eval: eval.value,
            files: pruned.files.into_iter().chain(heal.files).chain(gguf.files).collect(),
        }))
    }

    /// The stages up to the healed checkpoint.
    fn cut(
        &self,
        workspace: &Workspace,
        model_digest: &str,
        stages: &mut Vec<StageSummary>,
    ) -> Result<Option<Cutting>> {
        let profile = self.profile(workspace, model_digest)?;
        if self.ends(Stage::Profile, &profile, stages) {
            return Ok(None);
        }
        if self.local.prune.rounds > 1 {
            return self.in_rounds(profile, workspace, model_digest, stages);
        }
        let selection = self.select(workspace, model_digest, &profile.value)?;
        if self.ends(Stage::Select, &selection, stages) {
            return Ok(None);
        }
        let pruned = self.prune(workspace, model_digest, &selection.value)?;
        if self.ends(Stage::Prune, &pruned, stages) {
            return Ok(None);
        }
        let heal = self.heal(workspace, model_digest, &selection.value, &pruned.value)?;
        if self.ends(Stage::Heal, &heal, stages) {
            return Ok(None);
        }
        Ok(Some(Cutting { profile, selection, pruned, heal }))
    }

    /// All that can be known to be wrong before anything is computed.
    fn check(&self) -> Result<()> {
        let complaints = self.local.validate_for(&self.base.config().facts());
        if !complaints.is_empty() {
            let all: Vec<String> = complaints.iter().map(ToString::to_string).collect();
            return Err(Error::spec(all.join("; ")));
        }
        if let Some(budget) = self.local.prune.budget() {
            let most = self.local.prune.most_layers(self.base.config().layer_count as u32);
            self.least_layers(budget, most)?;
        }
        // Finds what cannot be cut before hours are spent on the way to the cut.
        Cut::plan(self.base.index(), &[], None)?;
        if !self.local.export.gguf.is_empty() {
            gguf::check(self.base)?;
        }
        if self.base.config().remote_code() {
            let cx = self.cx(Stage::Profile);
            cx.note("config.json names code of the model's authors (auto_map); it is neither run nor copied");
        }
        if self.compute.native() && self.base.config().experts.is_some() {
            let cx = self.cx(Stage::Profile);
            cx.note("layers with experts are computed by candle, not by our own kernels, and several times slower");
        }
        let spec = self.local;
        let some = |seq_len, purpose| Wanted {
            seq_len,
            stride: None,
            at_most: None,
            insisted_by: None,
            purpose,
            seed: spec.seed,
        };
        let heal = spec.heal.iter();
        let heal = heal.map(|method| (method.corpus(), some(self.heal_seq_len(method), Purpose::Heal)));
        let eval = spec.eval.perplexity.iter().map(|c| (c, some(self.eval_seq_len(), Purpose::Eval)));
        let generation = spec.eval.generation.iter();
        let prompts = generation.filter_map(|g| {
            let len = (g.prompt_tokens as usize).min(self.base.config().max_position_embeddings);
            Some((g.prompts.as_ref()?, some(len, Purpose::Eval)))
        });
        let measured = spec.prune.measures_damage() || spec.calibration.ablation;
        let damage = measured.then(|| (self.damage_corpus(), self.damage_wanted()));
        let calibration = (&spec.calibration.corpus, self.calibration_wanted());
        for (corpus, wanted) in
            std::iter::once(calibration).chain(damage).chain(heal).chain(eval).chain(prompts)
        {
            let mixed = matches!(corpus, Corpus::Mix { .. });
            let wanted = if mixed { Wanted { insisted_by: None, ..wanted } } else { wanted };
            for text in corpus.texts() {
                if !matches!(text, Corpus::Model { .. }) {
                    data::windows(text, &wanted.to_check(), self.base, self.cx(Stage::Profile))?;
                }
            }
        }
        for task in spec.eval.tasks.iter().chain(&spec.prune.damage.tasks) {
            items::read(task)?;
        }
        match spec.eval.overlap {
            OverlapPolicy::Warn => Ok(()),
            OverlapPolicy::Refuse => overlap::refuse(&overlap::find(spec, self.base, self.cx(Stage::Eval))?),
        }
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
            "confidence": spec.confidence.map(|asked| (asked, self.profiled_for())),
            "logit_lens": spec.logit_lens,
            "ablation": if spec.ablation { Some((spec.zones, self.damage_inputs(model_digest)?)) } else { None },
        });
        workspace.once(cx, &inputs, |_| {
            if seq_len < spec.seq_len as usize {
                cx.note(format!("windows have {seq_len} tokens, which is all the model can take"));
            }
            let wanted = self.calibration_wanted();
            let windows = self.windows(workspace, model_digest, &spec.corpus, &wanted, cx)?;
            let mut profile =
                profile::profile(self.base, &windows.ids, spec, self.profiled_for() as usize, cx)?;
            if spec.ablation {
                profile.ablation = self.ablation(workspace, model_digest, cx)?;
            }
            Ok((profile, Vec::new()))
        })
    }

    fn select(
        &self,
        workspace: &Workspace,
        model_digest: &str,
        profile: &LayerProfile,
    ) -> Result<Recorded<LayerSelection>> {
        let (cx, spec) = (self.cx(Stage::Select), &self.local.prune);
        let (damage, accuracy) = (spec.measures_damage(), spec.measures_accuracy());
        // Where the stream is read without a norm, its size cannot be made up for.
        let mended = damage && self.local.mends_streams() && self.base.config().facts().scale_free;
        // What is not measured is no part of this, however it would have been measured.
        let mut asked = spec.clone();
        asked.damage = DamageSpec::default();
        let inputs = json!({
            "profile": profile,
            "spec": asked,
            "measured": if damage || accuracy { Some(self.damage_inputs(model_digest)?) } else { None },
            "mended": mended,
        });
        workspace.once(cx, &inputs, |_| {
            let mut damage =
                if damage { Some(self.damage(workspace, model_digest, mended, cx)?) } else { None };
            let mut accuracy = if accuracy { Some(self.accuracy(cx)?) } else { None };
            let oracles = Oracles {
                damage: damage.as_mut().map(|oracle| oracle as &mut dyn Oracle),
                // The ablation mends nothing.
                known: if mended { &[] } else { &profile.ablation },
                accuracy: accuracy.as_mut().map(|oracle| oracle as &mut dyn Oracle),
            };
            let mut tell = |search: &str, done: u64, total: u64| {
                cx.advanced(&format!("measuring damage: {search}"), done, total, "sets of layers")
            };
            let selection = select::select(profile, spec, self.local.seed, oracles, &mut tell)?;
            Ok((LayerSelection { mended, ..selection }, Vec::new()))
        })
    }

    /// Windows of `corpus`. What the model writes itself, in minutes where it is large, is kept in the workspace.
    fn windows(
        &self,
        workspace: &Workspace,
        model_digest: &str,
        corpus: &Corpus,
        wanted: &Wanted,
        cx: Cx,
    ) -> Result<Windows> {
        if let Corpus::Mix { of } = corpus {
            let of_text = |text: &Corpus, count: usize| {
                let wanted = Wanted { at_most: Some(count), insisted_by: None, ..*wanted };
                self.windows(workspace, model_digest, text, &wanted, cx)
            };
            return data::mixed(of, wanted.at_most.unwrap_or(1), of_text, cx);
        }
        let find = || data::windows(corpus, wanted, self.base, cx);
        let Corpus::Model { tokens } = corpus else { return find() };
        let inputs = json!({
            "model": model_digest,
            "compute": self.compute.name(),
            "seed": wanted.seed,
            "purpose": wanted.purpose,
            "seq_len": wanted.seq_len,
            "at_most": wanted.at_most,
            "tokens": tokens,
        });
        workspace.kept("text", &inputs, find)
    }

    /// The damage of leaving out each layer by itself.
    fn ablation(&self, workspace: &Workspace, model_digest: &str, cx: Cx) -> Result<Vec<Ablation>> {
        let mut oracle = self.damage(workspace, model_digest, false, cx)?;
        let singles: Vec<Vec<u32>> = (0..self.base.config().layer_count as u32).map(|l| vec![l]).collect();
        let total = singles.len() as u64;
        let mut tell = |done: usize| cx.advanced("leaving out each layer", done as u64, total, "layers");
        let measured = oracle.measure(&singles, oracle.windows(), &mut tell)?;
        let zones = &self.local.calibration.zones;
        let layer = |Measured { damage, stderr }| Ablation { damage, stderr, zone: Zone::of(damage, zones) };
        Ok(measured.into_iter().map(layer).collect())
    }

    /// What measured damage depends on.
    fn damage_inputs(&self, model_digest: &str) -> Result<serde_json::Value> {
        let mut spec = self.local.prune.damage.clone();
        spec.corpus = Some(by_content(self.damage_corpus())?);
        spec.seq_len = Some(self.damage_seq_len() as u32);
        for corpus in spec.tasks.iter_mut().flat_map(TaskSpec::corpora_mut) {
            *corpus = by_content(corpus)?;
        }
        Ok(json!({
            "model": model_digest,
            "compute": self.compute.name(),
            "seed": self.local.seed,
            "spec": spec,
        }))
    }

    fn damage<'a>(
        &self,
        workspace: &Workspace,
        model_digest: &str,
        mended: bool,
        cx: Cx<'a>,
    ) -> Result<Damage<'a>> {
        let (corpus, wanted) = (self.damage_corpus(), self.damage_wanted());
        let windows = self.windows(workspace, model_digest, corpus, &wanted, cx)?;
        Damage::open(self.base, windows.ids, &self.local.prune.damage, mended, cx)
    }

    fn accuracy<'a>(&self, cx: Cx<'a>) -> Result<Accuracy<'a>> {
        let mut all = Vec::new();
        for task in &self.local.prune.damage.tasks {
            all.extend(items::read(task)?);
        }
        Accuracy::open(self.base, all, cx)
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
        let wound = Wound { spec: self.local, base: self.base, dropped: &selection.dropped, pruned };
        let mut methods = self.local.heal.clone();
        for method in &mut methods {
            *method.corpus_mut() = by_content(method.corpus())?;
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
            "compare": self.local.compare_heals,
        });
        let recorded = workspace.once(cx, &inputs, |scratch| {
            let mut windows = |corpus: &Corpus, seq_len: usize, count: usize| {
                let wanted = Wanted {
                    seq_len,
                    stride: None,
                    at_most: Some(count),
                    insisted_by: None,
                    purpose: Purpose::Heal,
                    seed: self.local.seed,
                };
                Ok(self.windows(workspace, model_digest, corpus, &wanted, cx)?.ids)
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
        gguf: &Recorded<Vec<GgufFile>>,
    ) -> Result<Recorded<EvalReport>> {
        let cx = self.cx(Stage::Eval);
        let mut spec = self.local.eval.clone();
        // Scores are told under the names of files, so the names belong to the result.
        let mut names = Vec::new();
        let of_tasks = spec.tasks.iter_mut().flat_map(TaskSpec::corpora_mut);
        for corpus in spec.perplexity.iter_mut().chain(of_tasks) {
            names.push(data::label(corpus));
            *corpus = by_content(corpus)?;
        }
        if let Some(prompts) = spec.generation.as_mut().and_then(|generation| generation.prompts.as_mut()) {
            *prompts = by_content(prompts)?;
        }
        // Gates judge what was measured and change nothing of it, but for how sure intervals are to be.
        spec.gates = Gates { confidence: spec.gates.confidence, ..Gates::default() };
        spec.tasks.iter_mut().for_each(|task| task.min_retention = None);
        (spec.on_reject, spec.overlap) = Default::default();
        let mut inputs = json!({
            "model": model_digest,
            "pruned": pruned.digest,
            "healed": healed.map(|h| &h.digest),
            "compute": self.compute.name(),
            "seed": self.local.seed,
            "spec": spec,
            "names": names,
            "healed_on": self.healing_texts()?,
        });
        if !gguf.value.is_empty() {
            inputs["gguf"] = json!(gguf.files);
        }
        workspace.once(cx, &inputs, |_| {
            let place = |c: &CheckpointRef| eval::Place {
                dir: workspace.dir().join(&c.path),
                digest: c.digest.clone(),
            };
            let written = |file: &GgufFile| Written {
                file: file.clone(),
                path: workspace.dir().join(&file.path),
                sha256: gguf.files.get(&file.path).cloned().unwrap_or_default(),
            };
            let checkpoints = eval::Checkpoints {
                base: eval::Place { dir: self.base.dir().to_owned(), digest: model_digest.to_owned() },
                pruned: place(pruned),
                healed: healed.map(place),
                gguf: gguf.value.iter().map(written).collect(),
            };
            let part = workspace.part(ITEMS)?;
            let mut report =
                eval::evaluate(&checkpoints, &self.local.eval, self.local.seed, &part, workspace, cx)?;
            report.overlap = overlap::find(self.local, self.base, cx)?;
            workspace.publish(&part, ITEMS)?;
            Ok((report, vec![ITEMS.to_owned()]))
        })
    }

    /// Name and content of every text that is healed on.
    fn healing_texts(&self) -> Result<Vec<(String, String)>> {
        let corpora = self.local.heal.iter().map(HealMethod::corpus);
        corpora.map(|corpus| Ok((data::label(corpus), data::digest(corpus)?))).collect()
    }

    /// Notes the stage, and says whether the road ends here.
    fn ends<T>(&self, stage: Stage, done: &Recorded<T>, stages: &mut Vec<StageSummary>) -> bool {
        stages.push(StageSummary { stage, reused: done.reused, duration_ms: done.duration_ms });
        self.until == Some(stage)
    }

    fn cx(&self, stage: Stage) -> Cx<'_> {
        Cx { stage, compute: self.compute, observer: self.observer }
    }
}

/// `spec` by what it names: not where that lies, how the job is called, nor when and where it may run.
fn spec_by_content(spec: &JobSpec) -> Result<JobSpec> {
    let mut spec = spec.clone();
    for (_, corpus) in spec.corpora_mut() {
        *corpus = by_content(corpus)?;
    }
    (spec.name, spec.labels) = Default::default();
    (spec.priority, spec.deadlines, spec.resources) = Default::default();
    spec.model = ModelSource::Path { path: String::new() };
    Ok(spec)
}

/// The checkpoint that the last method which helped left.
fn healed(heal: &[HealReport]) -> Option<&CheckpointRef> {
    heal.iter().rev().find_map(|heal| heal.checkpoint.as_ref())
}

/// A corpus by what it holds, not by where it lies.
fn by_content(corpus: &Corpus) -> Result<Corpus> {
    Ok(match corpus {
        Corpus::Model { tokens } => Corpus::Model { tokens: *tokens },
        Corpus::Mix { of } => {
            let share =
                |share: &Share| Ok(Share { corpus: by_content(&share.corpus)?, weight: share.weight });
            Corpus::Mix { of: of.iter().map(share).collect::<Result<_>>()? }
        }
        Corpus::Path { .. } | Corpus::Hub { .. } | Corpus::Upload { .. } | Corpus::Text { .. } => {
            Corpus::Text { text: data::digest(corpus)? }
        }
    })
}
