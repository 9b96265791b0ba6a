//! What a checkpoint is worth, measured on its written files. Two primitives
//! carry every score: the log-likelihood of a continuation and of a whole window.

pub mod compared;
pub mod exact_match;
pub mod exported;
pub mod generation;
pub mod likeness;
pub mod loglikelihood;
pub mod memory;
pub mod perplexity;
pub mod speed;
pub mod tasks;
pub mod uncertainty;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::data::items::{self, Item};
use super::data::{Purpose, Wanted, Windows, label, windows};
use super::model::generate::Prompt;
use super::model::{Checkpoint, Decoder};
use super::workspace::Workspace;
use super::{Cx, Error, Result};
use crate::job::report::{Comparison, EvalReport, Perplexity, Scores, TaskScore};
use crate::job::spec::EvalSpec;
use compared::Found;

/// The checkpoints of a run.
pub struct Checkpoints {
    pub base: Place,
    pub pruned: Place,
    pub healed: Option<Place>,
    pub gguf: Vec<exported::Written>,
}

/// Where a checkpoint is.
pub struct Place {
    pub dir: PathBuf,
    /// Of what it holds: scores are kept by it.
    pub digest: String,
}

/// What every checkpoint is measured on: the same tokens and items for all.
#[derive(Serialize)]
pub struct Material {
    texts: Vec<Text>,
    tasks: Vec<Task>,
    prompts: Vec<Prompt>,
}

#[derive(Serialize)]
struct Text {
    corpus: String,
    windows: Windows,
}

#[derive(Serialize)]
struct Task {
    name: String,
    items: Vec<Item>,
}

impl Material {
    /// Reads, or lets the base model write, what `spec` names. Its corpora must be local files by now.
    pub fn gather(base: &Checkpoint, spec: &EvalSpec, seed: u64, cx: Cx) -> Result<Self> {
        let tasks =
            spec.tasks.iter().map(|task| Ok(Task { name: task.task.clone(), items: items::read(task)? }));
        let tasks = tasks.collect::<Result<Vec<Task>>>()?;
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
        let texts = texts.collect::<Result<Vec<Text>>>()?;
        let prompts = match &spec.generation {
            None => Vec::new(),
            Some(asked) => {
                let windows: Vec<&[Vec<u32>]> = texts.iter().map(|text| &text.windows.ids[..]).collect();
                let items: Vec<&Item> = tasks.iter().flat_map(|task| &task.items).collect();
                generation::prompts(asked, &windows, &items, base, seed, cx)?
            }
        };
        Ok(Self { texts, tasks, prompts })
    }
}

/// Measures base, pruned and healed checkpoint on the same things, and the latter two beside the first. The result of
/// every item goes to `items_dir`, one file a checkpoint and task; scores are kept in the workspace by what they are of.
///
/// # Errors
/// Data and model errors that name the file; a loss that is not finite names the checkpoint.
pub fn evaluate(
    checkpoints: &Checkpoints,
    spec: &EvalSpec,
    seed: u64,
    items_dir: &Path,
    workspace: &Workspace,
    cx: Cx,
) -> Result<EvalReport> {
    let base = Checkpoint::open(&checkpoints.base.dir)?;
    let material = Material::gather(&base, spec, seed, cx)?;
    let mut names = vec![("base", &checkpoints.base), ("pruned", &checkpoints.pruned)];
    names.extend(checkpoints.healed.iter().map(|place| ("healed", place)));
    let mut all = Vec::with_capacity(names.len());
    for (which, place) in &names {
        // A checkpoint is measured once on the same things, whatever else a run or the next one measures.
        let inputs = (&place.digest, cx.compute.name(), &material);
        let one = workspace.kept("scores", &inputs, || measure(which, &place.dir, &material, cx))?;
        for (task, results) in material.tasks.iter().zip(&one.found.items) {
            tasks::write(&items_dir.join(tasks::file_name(which, &task.name)), results)?;
        }
        all.push(one);
    }
    if !material.prompts.is_empty() {
        let written: Vec<Vec<Vec<u32>>> =
            all.iter_mut().map(|one| std::mem::take(&mut one.written)).collect();
        let judged = generation::judge(&base, &material.prompts, &written, cx)?;
        for (one, generation) in all.iter_mut().zip(judged) {
            one.scores.generation = Some(generation);
        }
    }
    let asked = compared::Asked { confidence: spec.gates.confidence, seed };
    let beside = |(one, (which, _)): (&Measured, &(&str, &Place))| {
        compared::compare(which, (&all[0].scores, &all[0].found), (&one.scores, &one.found), asked)
    };
    let mut compared: Vec<Comparison> = all.iter().zip(&names).skip(1).map(beside).collect();
    if spec.speed {
        let opened =
            names.iter().map(|(_, place)| Checkpoint::open(&place.dir)).collect::<Result<Vec<_>>>()?;
        let turns = speed::Turns::take(&opened.iter().collect::<Vec<_>>(), cx)?;
        for (i, one) in all.iter_mut().enumerate() {
            one.scores.speed = Some(turns.speed(i));
        }
        for (i, compared) in compared.iter_mut().enumerate() {
            let (prefill, decode) = turns.speedups(i + 1);
            (compared.prefill_speedup, compared.decode_speedup) = (Some(prefill), Some(decode));
        }
    }
    let shipped = checkpoints.healed.as_ref().unwrap_or(&checkpoints.pruned);
    let base_bytes = all[0].scores.size_bytes;
    let gguf = exported::measure(&checkpoints.gguf, &shipped.dir, base_bytes, &material, workspace, cx)?;
    let mut scores = all.into_iter().map(|one| one.scores);
    let mut next = || scores.next().ok_or_else(|| Error::bug("a checkpoint was not measured"));
    let (base, pruned) = (next()?, next()?);
    Ok(EvalReport { base, pruned, healed: scores.next(), compared, gguf, overlap: Vec::new() })
}

/// What was measured of one checkpoint.
#[derive(Serialize, Deserialize)]
pub struct Measured {
    pub scores: Scores,
    pub found: Found,
    /// What it wrote after the prompts.
    pub written: Vec<Vec<u32>>,
}

/// All that one checkpoint, `which` by name, comes to by itself.
pub fn measure(which: &str, dir: &Path, material: &Material, cx: Cx) -> Result<Measured> {
    let memory = memory::Watch::start();
    let checkpoint = Checkpoint::open(dir)?;
    let decoder = Decoder::open(&checkpoint, cx.compute)?;
    let (perplexity, tasks, found) = likelihoods(which, &checkpoint, &decoder, material, cx)?;
    let written = generation::write(&decoder, which, &material.prompts, cx)?;
    let scores = Scores {
        layer_count: checkpoint.config().layer_count as u32,
        parameters: checkpoint.parameters(),
        size_bytes: checkpoint.size_bytes(),
        embedding_parameters: checkpoint.embedding_parameters(),
        perplexity,
        tasks,
        speed: None,
        peak_memory_bytes: memory.peak_bytes(cx),
        flops_per_token: flops_per_token(&checkpoint),
        generation: None,
    };
    Ok(Measured { scores, found, written })
}

/// All that the log-likelihoods of texts and items come to.
fn likelihoods(
    which: &str,
    checkpoint: &Checkpoint,
    decoder: &Decoder,
    material: &Material,
    cx: Cx,
) -> Result<(Vec<Perplexity>, Vec<TaskScore>, Found)> {
    let (mut perplexity, mut windows) = (Vec::new(), Vec::new());
    for text in &material.texts {
        let (score, found) = perplexity::measure(decoder, which, &text.corpus, &text.windows, cx)?;
        perplexity.push(score);
        windows.push(found);
    }
    let (mut tasks, mut items) = (Vec::new(), Vec::new());
    for task in &material.tasks {
        let results = tasks::answer(decoder, &checkpoint.tokenizer()?, which, &task.name, &task.items, cx)?;
        tasks.push(tasks::score(&task.name, &task.items, &results));
        items.push(results);
    }
    Ok((perplexity, tasks, Found { windows, items }))
}

/// A multiplication and an addition for each weight that a token meets: those of the layers, of which only some experts
/// see it, and the head's.
fn flops_per_token(checkpoint: &Checkpoint) -> u64 {
    let config = checkpoint.config();
    let head = (config.vocab_size * config.hidden_size) as u64;
    let idle = config.experts.as_ref().map_or(0, |experts| {
        let sparse = config.layers.iter().filter(|layer| layer.sparse).count();
        (sparse * (experts.count - experts.per_token) * 3 * experts.width * config.hidden_size) as u64
    });
    2 * (checkpoint.parameters().saturating_sub(checkpoint.embedding_parameters() + idle) + head)
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
