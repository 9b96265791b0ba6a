//! How much text each stage wants, by the spec and by what the model can take.

use super::Run;
use crate::engine::data::{Purpose, Wanted};
use crate::job::spec::{Corpus, HealMethod};

impl Run<'_> {
    pub(super) fn calibration_seq_len(&self) -> usize {
        (self.local.calibration.seq_len as usize).min(self.base.config().max_position_embeddings)
    }

    pub(super) fn calibration_wanted(&self) -> Wanted {
        let spec = &self.local.calibration;
        Wanted {
            seq_len: self.calibration_seq_len(),
            stride: None,
            at_most: Some(spec.samples as usize),
            insisted_by: spec.insists_on_samples().then_some("calibration.samples"),
            purpose: Purpose::Calibration,
            seed: self.local.seed,
        }
    }

    pub(super) fn damage_wanted(&self) -> Wanted {
        let spec = &self.local.prune.damage;
        Wanted {
            seq_len: self.damage_seq_len(),
            stride: None,
            at_most: Some(spec.samples as usize),
            insisted_by: spec.insists_on_samples().then_some("prune.damage.samples"),
            purpose: Purpose::Calibration,
            seed: self.local.seed,
        }
    }

    pub(super) fn damage_corpus(&self) -> &Corpus {
        let spec = &self.local.prune.damage;
        spec.corpus.as_ref().unwrap_or(&self.local.calibration.corpus)
    }

    pub(super) fn damage_seq_len(&self) -> usize {
        let asked = self.local.prune.damage.seq_len.unwrap_or(self.local.calibration.seq_len);
        (asked as usize).min(self.base.config().max_position_embeddings)
    }

    pub(super) fn eval_seq_len(&self) -> usize {
        (self.local.eval.seq_len as usize).min(self.base.config().max_position_embeddings)
    }

    pub(super) fn heal_seq_len(&self, method: &HealMethod) -> usize {
        let facts = self.base.config().facts();
        method.settings(self.local.preset, &facts, self.dropped_at_most()).seq_len() as usize
    }

    /// Blocks up to so many layers must be told apart: the same for all that a budget makes the job try.
    pub(super) fn profiled_for(&self) -> u32 {
        let (prune, layer_count) = (&self.asked.prune, self.base.config().layer_count as u32);
        let promised = prune.budget().map(|_| prune.most_layers(layer_count));
        promised.unwrap_or_else(|| self.dropped_at_most())
    }

    pub(super) fn dropped_at_most(&self) -> u32 {
        self.local.prune.layers_to_drop(self.base.config().layer_count as u32).unwrap_or(1)
    }
}
