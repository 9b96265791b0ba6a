//! What a checkpoint is worth, measured on its written files. Two primitives
//! carry every score: the log-likelihood of a continuation and of a whole window.

pub mod exact_match;
pub mod loglikelihood;
pub mod memory;
pub mod perplexity;
pub mod speed;
pub mod tasks;

use std::path::{Path, PathBuf};

use super::data::items::{self, Item};
use super::data::{Purpose, Wanted, Windows, label, windows};
use super::model::{Checkpoint, Decoder};
use super::{Cx, Error, Result};
use crate::job::report::{EvalReport, Scores};
use crate::job::spec::EvalSpec;

/// The checkpoints of a run, as directories.
pub struct Checkpoints {
    pub base: PathBuf,
    pub pruned: PathBuf,
    pub healed: Option<PathBuf>,
}

/// What every checkpoint is measured on: the same tokens and items for all.
pub struct Material {
    texts: Vec<Text>,
    tasks: Vec<Task>,
    speed: bool,
}

struct Text {
    corpus: String,
    windows: Windows,
}

struct Task {
    name: String,
    items: Vec<Item>,
}

impl Material {
    /// Reads, or lets the base model write, what `spec` names. Its corpora must be local files by now.
    pub fn gather(base: &Checkpoint, spec: &EvalSpec, seed: u64, cx: Cx) -> Result<Self> {
        let tasks = spec
            .tasks
            .iter()
            .map(|task| Ok(Task { name: task.task.clone(), items: items::read(&task.items, task.limit)? }));
        let tasks = tasks.collect::<Result<_>>()?;
        let wanted = Wanted {
            seq_len: (spec.seq_len as usize).min(base.config().max_position_embeddings),
            stride: spec.stride.map(|stride| stride as usize),
            at_most: None,
            insisted_by: None,
            purpose: Purpose::Eval,
            seed,
        };
        let texts = spec
            .perplexity
            .iter()
            .map(|corpus| Ok(Text { corpus: label(corpus), windows: windows(corpus, &wanted, base, cx)? }));
        Ok(Self { tasks, texts: texts.collect::<Result<_>>()?, speed: spec.speed })
    }
}

/// Measures base, pruned and healed checkpoint, one after another. The result of
/// every item goes to `items_dir`, one file a checkpoint and task.
///
/// # Errors
/// Data and model errors that name the file; a loss that is not finite names the checkpoint.
pub fn evaluate(
    checkpoints: &Checkpoints,
    spec: &EvalSpec,
    seed: u64,
    items_dir: &Path,
    cx: Cx,
) -> Result<EvalReport> {
    let material = Material::gather(&Checkpoint::open(&checkpoints.base)?, spec, seed, cx)?;
    Ok(EvalReport {
        base: measure("base", &checkpoints.base, &material, items_dir, cx)?,
        pruned: measure("pruned", &checkpoints.pruned, &material, items_dir, cx)?,
        healed: match &checkpoints.healed {
            Some(dir) => Some(measure("healed", dir, &material, items_dir, cx)?),
            None => None,
        },
        overlap: Vec::new(),
    })
}

/// All scores of one checkpoint, `which` by name.
pub fn measure(which: &str, dir: &Path, material: &Material, items_dir: &Path, cx: Cx) -> Result<Scores> {
    let memory = memory::Watch::start();
    let checkpoint = Checkpoint::open(dir)?;
    let decoder = Decoder::open(&checkpoint, cx.compute)?;
    let mut perplexity = Vec::with_capacity(material.texts.len());
    for text in &material.texts {
        perplexity.push(perplexity::measure(&decoder, which, &text.corpus, &text.windows, cx)?);
    }
    let mut tasks = Vec::with_capacity(material.tasks.len());
    for task in &material.tasks {
        let results = tasks::answer(&decoder, &checkpoint.tokenizer()?, which, &task.name, &task.items, cx)?;
        tasks::write(&items_dir.join(tasks::file_name(which, &task.name)), &results)?;
        tasks.push(tasks::score(&task.name, &task.items, &results));
    }
    let speed = if material.speed { Some(speed::measure(&decoder, which, cx)?) } else { None };
    Ok(Scores {
        layer_count: checkpoint.config().layer_count as u32,
        parameters: checkpoint.parameters(),
        size_bytes: checkpoint.size_bytes(),
        embedding_parameters: checkpoint.embedding_parameters(),
        perplexity,
        tasks,
        speed,
        peak_memory_bytes: memory.peak_bytes(cx),
    })
}

/// A number that is not finite means the checkpoint is broken, not that it is bad.
fn finite(value: f64, which: &str, what: &str) -> Result<f64> {
    if value.is_finite() {
        return Ok(value);
    }
    Err(Error::model(format!(
        "the loss of the {which} checkpoint on {what} is not finite; its weights hold NaN or infinity, or overflow \
         in this precision: try --precision f32"
    )))
}
