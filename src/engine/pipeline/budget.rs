//! A job that is asked for an outcome: walks the road for some numbers of layers, and then for the right one.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Run, spec_by_content};
use crate::engine::prune::Cut;
use crate::engine::select::budget::{Outcome, Tried, search};
use crate::engine::workspace::Workspace;
use crate::engine::{Error, Result, at};
use crate::job::budget::{Budget, BudgetReport, Probe, ProbeOf};
use crate::job::progress::Stage;
use crate::job::report::{Decision, FailureKind};
use crate::job::spec::{EvalSpec, JobSpec, PruneAmount};
use crate::report::{judge, weigh};

/// Directory of a workspace with what is tried.
const PROBES: &str = "probes";

impl Run<'_> {
    /// The number of layers that keeps the promises, found by measuring. What was measured for it is in `workspace`
    /// then and is not measured again.
    ///
    /// # Errors
    /// When no number does: with the nearest one and what it comes to.
    pub(super) fn within(
        &self,
        budget: Budget,
        workspace: &Workspace,
        model_digest: &str,
    ) -> Result<BudgetReport> {
        let most = self.local.prune.most_layers(self.base.config().layer_count as u32);
        let least = self.least_layers(budget, most)?;
        let mut probes: Vec<Probe> = Vec::new();
        // What is weighed best so far, and with how many layers.
        let mut best = (f64::INFINITY, 0);
        let outcome = search(budget, (least, most), &mut |layers, of| {
            let probe = self.probe(budget, layers, of, workspace, model_digest)?;
            let tried = Tried { kept: probe.kept, weighed: probe.weighed };
            if let Some(weighed) = probe.weighed {
                // Only the best one's files are wanted.
                let worse = if (weighed, layers) < best {
                    std::mem::replace(&mut best, (weighed, layers)).1
                } else {
                    layers
                };
                forget(&probe_dir(workspace, worse, of))?;
            }
            probes.push(probe);
            Ok(tried)
        })?;
        match outcome {
            Outcome::Chosen(layers) => {
                let of = budget.weigh.map_or(ProbeOf::Quality, |_| ProbeOf::Weighed);
                let dir = probe_dir(workspace, layers, of);
                if dir.exists() {
                    workspace.adopt(Workspace::open(&dir)?)?;
                }
                workspace.retract(PROBES)?;
                Ok(BudgetReport { promises: budget, layers, probes })
            }
            Outcome::Nearest(layers) => {
                let said = probes.iter().rev().find(|probe| probe.layers == layers);
                let said = said.map(|probe| probe.said.join(" ")).unwrap_or_default();
                workspace.retract(PROBES)?;
                Err(Error::new(
                    FailureKind::Rejected,
                    format!(
                        "no cut keeps all that prune.amount.budget asks for; the nearest is {layers} of the layers: \
                         {said} Ask for less, heal more, or measure on more text and items"
                    ),
                ))
            }
        }
    }

    /// How many layers must go for the promised size: arithmetic, and known before anything is computed.
    pub(super) fn least_layers(&self, budget: Budget, most: u32) -> Result<u32> {
        let Some(limit) = budget.max_size_bytes else { return Ok(1) };
        let base = self.base.index();
        let mut layers: Vec<u32> = (0..base.config.layer_count as u32).collect();
        // The largest go first in this reckoning, wherever they are: no cut of so many is smaller.
        layers.sort_by_key(|l| std::cmp::Reverse(base.layer_parameters(*l as usize)));
        let size = |n: u32| -> Result<u64> {
            let mut dropped = layers[..n as usize].to_vec();
            dropped.sort_unstable();
            Ok(Cut::plan(base, &dropped, self.local.export.dtype)?.size_bytes())
        };
        if size(0)? <= limit {
            return Err(Error::spec(format!(
                "prune.amount.budget.max_size_bytes: the base model's weights have {} bytes, which is not more than \
                 {limit}: nothing needs to go",
                size(0)?
            )));
        }
        for n in 1..=most {
            if size(n)? <= limit {
                return Ok(n);
            }
        }
        Err(Error::spec(format!(
            "prune.amount.budget.max_size_bytes: {limit} bytes cannot be met: with {most} layers less, which is all that \
             may go, the weights still have {} bytes",
            size(most)?
        )))
    }

    /// Tries `layers`, once for the same inputs.
    fn probe(
        &self,
        budget: Budget,
        layers: u32,
        of: ProbeOf,
        workspace: &Workspace,
        model_digest: &str,
    ) -> Result<Probe> {
        let local = asked_of_probe(self.local, budget, layers, of);
        let inputs = json!({
            "model": model_digest,
            "compute": self.compute.name(),
            "spec": spec_by_content(&local)?,
        });
        let cx = self.cx(Stage::Eval);
        let probe = workspace.kept("probe", &inputs, || {
            let dir = probe_dir(workspace, layers, of);
            let probe = self.tried(&local, &dir, layers, of, workspace, model_digest)?;
            if !probe.kept || of == ProbeOf::Costs {
                forget(&dir)?;
            }
            Ok(probe)
        })?;
        let came_to = match (of, probe.kept) {
            (ProbeOf::Weighed, _) => "was weighed",
            (ProbeOf::Costs | ProbeOf::Quality, true) => "keeps what is promised",
            (ProbeOf::Costs | ProbeOf::Quality, false) => "does not keep what is promised",
        };
        cx.note(format!("a cut of {layers} layers {came_to}: {}", probe.said.join(" ")));
        Ok(probe)
    }

    fn tried(
        &self,
        local: &JobSpec,
        dir: &Path,
        layers: u32,
        of: ProbeOf,
        workspace: &Workspace,
        model_digest: &str,
    ) -> Result<Probe> {
        let own = Workspace::open(dir)?.sharing(workspace.sources());
        let run = Run { local, until: None, ..*self };
        let found = run.measured(&own, model_digest, &mut Vec::new())?;
        let found = found.ok_or_else(|| Error::bug("a probe ended before it was measured"))?;
        let dropped = found.selection.dropped;
        if let (ProbeOf::Weighed, Some(weights)) = (of, self.local.prune.budget().and_then(|b| b.weigh)) {
            let (weighed, said) = weigh(&found.eval, weights);
            return Ok(Probe { layers, dropped, of, kept: weighed.is_some(), weighed, said });
        }
        let verdict = judge(&found.eval, &local.eval);
        let kept = verdict.decision == Decision::Ship;
        Ok(Probe { layers, dropped, of, kept, weighed: None, said: verdict.reasons })
    }
}

/// Removes what was tried, if there is any.
fn forget(dir: &Path) -> Result<()> {
    if dir.exists() { fs::remove_dir_all(dir).map_err(at(dir)) } else { Ok(()) }
}

fn probe_dir(workspace: &Workspace, layers: u32, of: ProbeOf) -> PathBuf {
    let of = match of {
        ProbeOf::Costs => "costs",
        ProbeOf::Quality => "quality",
        ProbeOf::Weighed => "weighed",
    };
    workspace.dir().join(PROBES).join(format!("{layers}-{of}"))
}

/// The job with so many layers. For its quality it is measured as the result will be, so that the right one need not
/// be measured again; for its costs only what they need.
fn asked_of_probe(spec: &JobSpec, budget: Budget, layers: u32, of: ProbeOf) -> JobSpec {
    let mut spec = spec.clone();
    spec.prune.amount = Some(PruneAmount::Layers(layers));
    // Promises are kept by the checkpoint, not by its files of fewer bits.
    spec.export.gguf.clear();
    let confidence = spec.eval.gates.confidence;
    match of {
        ProbeOf::Quality | ProbeOf::Weighed => {
            spec.eval.gates = budget.quality().gates(confidence);
        }
        ProbeOf::Costs => {
            spec.heal.clear();
            spec.eval.gates = budget.costs().gates(confidence);
            spec.eval.speed &= budget.min_speedup.is_some() || budget.max_latency_ms.is_some();
            // The peak is that of measuring.
            if budget.max_memory_bytes.is_none() {
                spec.eval =
                    EvalSpec { perplexity: Vec::new(), tasks: Vec::new(), generation: None, ..spec.eval };
            }
        }
    }
    spec
}
