//! What leaves a run: GGUF files, the report, and what proves where all of it comes from.

use super::{Run, healed};
use crate::checkpoint::licence::licence;
use crate::engine::export::gguf;
use crate::engine::model::Checkpoint;
use crate::engine::workspace::{Recorded, Workspace, file_digest, write_atomic, write_json};
use crate::engine::{Error, Result, data};
use crate::job::progress::Stage;
use crate::job::report::{CheckpointRef, Decision, FailureKind, GgufFile, Report, StageSummary};
use crate::job::spec::{Corpus, OnReject};
use crate::report::{Findings, card, page, plots, provenance, sums};

/// Directory of a workspace with the report's plots.
const PLOTS: &str = "plots";
/// What was made of what, and the digests of all that was made.
const PROVENANCE: &str = "provenance.json";
const SUMS: &str = "SHA256SUMS";

impl Run<'_> {
    /// The checkpoint to ship as GGUF, in each type that is asked for.
    pub(super) fn export(
        &self,
        workspace: &Workspace,
        model_digest: &str,
        shipped: &CheckpointRef,
        dropped: &[u32],
    ) -> Result<Recorded<Vec<GgufFile>>> {
        let (cx, kinds) = (self.cx(Stage::Export), &self.local.export.gguf);
        let name = self.asked.title();
        let inputs = (&shipped.digest, kinds, &name, model_digest, dropped);
        let recorded = workspace.once(cx, &inputs, |_| {
            if kinds.is_empty() {
                return Ok((Vec::new(), Vec::new()));
            }
            let checkpoint = Checkpoint::open(&workspace.dir().join(&shipped.path))?;
            let origin = gguf::Origin { name: &name, cut: Some((model_digest, dropped)) };
            Ok((gguf::write_all(&checkpoint, kinds, &origin, workspace, cx)?, vec![gguf::GGUF.to_owned()]))
        })?;
        if kinds.is_empty() {
            workspace.retract(gguf::GGUF)?;
        }
        Ok(recorded)
    }

    /// Name and content of every text of the job.
    fn texts(&self) -> Result<Vec<(String, String)>> {
        let mut spec = self.local.clone();
        let of = |(_, corpus): (String, &mut Corpus)| Ok((data::label(corpus), data::digest(corpus)?));
        spec.corpora_mut().into_iter().map(of).collect()
    }

    /// Fails a job whose result is rejected, where it is to; all its files are written by now.
    pub(super) fn accept(&self, report: &Report) -> Result<()> {
        match (self.local.eval.on_reject, &report.verdict) {
            (OnReject::Fail, Some(verdict)) if verdict.decision == Decision::Reject => Err(Error::new(
                FailureKind::Rejected,
                format!(
                    "the {} checkpoint is rejected, and eval.on_reject is \"fail\": {}",
                    verdict.checkpoint,
                    verdict.reasons.join(" ")
                ),
            )),
            (OnReject::Fail | OnReject::Report, _) => Ok(()),
        }
    }

    pub(super) fn report(
        &self,
        workspace: &Workspace,
        findings: Findings,
        stages: &[StageSummary],
    ) -> Result<Report> {
        let cx = self.cx(Stage::Report);
        let report = findings.report();
        let (licence, texts) = (licence(self.base.dir()), self.texts()?);
        let recorded = workspace.once(cx, &(&report, &licence, &texts), |_| {
            write_atomic(&workspace.dir().join("report.html"), page(&report, stages).as_bytes())?;
            let part = workspace.part(PLOTS)?;
            for (name, svg) in plots(&report) {
                write_atomic(&part.join(name), svg.as_bytes())?;
            }
            workspace.publish(&part, PLOTS)?;
            let shipped = healed_or_pruned(&report);
            let card_path = format!("{}/README.md", shipped.path);
            write_atomic(&workspace.dir().join(&card_path), card(&report, &licence).as_bytes())?;
            let mut files = report.files.clone();
            files.insert(card_path.clone(), file_digest(&workspace.dir().join(&card_path))?);
            write_json(&workspace.dir().join(PROVENANCE), &provenance(&report, &files, &texts))?;
            files.insert(PROVENANCE.to_owned(), file_digest(&workspace.dir().join(PROVENANCE))?);
            write_atomic(&workspace.dir().join(SUMS), sums(&files).as_bytes())?;
            let left = ["report.html", PLOTS, &card_path, PROVENANCE, SUMS];
            Ok((report.clone(), left.map(String::from).to_vec()))
        })?;
        Ok(recorded.value)
    }
}

/// The checkpoint to ship.
fn healed_or_pruned(report: &Report) -> &CheckpointRef {
    healed(&report.heal).unwrap_or(&report.pruned)
}
