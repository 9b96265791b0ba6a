//! Training weights as they are: of the last layers and the head (arXiv 2411.15558), or of all layers.

use super::trainables::Trainables;
use super::training::Course;
use super::{Case, Remedy};
use crate::engine::Result;
use crate::job::heal::WholeSettings;
use crate::job::training::BaseFormat;

/// Trains the linear layers of the last layers; norms, biases and the embedding stay.
pub fn heal(case: &Case, settings: &WholeSettings) -> Result<Remedy> {
    let layer_count = case.source.config().layer_count;
    let layers = layer_count.saturating_sub(settings.last_layers as usize)..layer_count;
    let weights = Trainables::weights(case.source, layers, settings.head, &case.cx.compute.device)?;
    let trained = Course::of(case, BaseFormat::Sixteen, &settings.training)?.run(weights)?;
    Ok(Remedy::trained(case, trained))
}
