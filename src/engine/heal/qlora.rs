//! QLoRA (Dettmers et al., arXiv 2305.14314): adapters trained over a frozen,
//! quantised base, then merged into the *original* weights.

use super::trainables::Trainables;
use super::training::{Course, Trained};
use super::{Case, Remedy};
use crate::engine::Result;
use crate::engine::chance::stream_key;
use crate::job::heal::QloraSettings;

/// Trains adapters and has them merged.
pub fn heal(case: &Case, settings: &QloraSettings) -> Result<Remedy> {
    let trained = train(Course::of(case, settings.base(), &settings.training)?, settings)?;
    Ok(Remedy { adapters: trained.trainables.trained_adapters(), ..Remedy::trained(case, trained) })
}

/// Trains fresh adapters.
pub fn train(course: Course, settings: &QloraSettings) -> Result<Trained> {
    let (config, key) = (course.source.config(), stream_key(&[course.seed, 1]));
    let adapters = Trainables::adapters(config, settings, key, &course.cx.compute.device)?;
    course.run(adapters)
}
