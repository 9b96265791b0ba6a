//! A cut checkpoint beside the base model, on the same windows, items and prompts.

use serde::{Deserialize, Serialize};

use super::tasks::ItemResult;
use super::uncertainty::Resampled;
use crate::engine::chance::stream_key;
use crate::job::report::{
    Comparison, Estimate, Generation, PerplexityChange, Scores, TaskChange, WrittenText,
};

/// What was found for each window and item of one checkpoint, in the order of its scores.
#[derive(Serialize, Deserialize)]
pub struct Found {
    /// Negative log-likelihood and scored tokens of each window, by text.
    pub windows: Vec<Vec<(f64, usize)>>,
    /// By task.
    pub items: Vec<Vec<ItemResult>>,
}

/// How sure to be, and what draws the resamples.
#[derive(Clone, Copy)]
pub struct Asked {
    pub confidence: f64,
    pub seed: u64,
}

/// `cut` beside `base`, each with its scores.
pub fn compare(
    checkpoint: &str,
    (base_scores, base): (&Scores, &Found),
    (cut_scores, cut): (&Scores, &Found),
    asked: Asked,
) -> Comparison {
    let texts = base_scores.perplexity.iter().zip(base.windows.iter().zip(&cut.windows));
    let perplexity = texts.enumerate().filter_map(|(i, (text, (base, cut)))| {
        let rows: Vec<[f64; 3]> =
            base.iter().zip(cut).map(|(base, cut)| [base.0, cut.0, base.1 as f64]).collect();
        let ratio = |s: &[[f64; 3]]| Some(((s[0][1] - s[0][0]) / s[0][2]).exp());
        let ratio = Resampled::of(&[&rows], key(asked, 0, i), ratio)?.estimate(asked.confidence)?;
        Some(PerplexityChange { corpus: text.corpus.clone(), ratio })
    });
    let tasks = base.items.iter().zip(&cut.items);
    let rows: Vec<Vec<[f64; 2]>> = tasks.map(|(base, cut)| pairs(base, cut, |item| item.correct)).collect();
    let chances: Vec<f64> = base_scores.tasks.iter().map(|task| task.chance * task.n as f64).collect();
    let changes = base_scores.tasks.iter().zip(&rows).enumerate().filter_map(|(i, (task, rows))| {
        let count = rows.len() as f64;
        let difference = Resampled::of(&[rows], key(asked, 1, i), |s| Some((s[0][1] - s[0][0]) / count))?;
        Some(TaskChange {
            task: task.task.clone(),
            difference: difference.estimate(asked.confidence)?,
            worse: difference.below(0.0),
            retention: retention(&[rows], &chances[i..=i], key(asked, 2, i), asked.confidence),
        })
    });
    let strata: Vec<&[[f64; 2]]> = rows.iter().map(Vec::as_slice).collect();
    Comparison {
        checkpoint: checkpoint.to_owned(),
        perplexity: perplexity.collect(),
        tasks: changes.collect(),
        retention: retention(&strata, &chances, key(asked, 3, 0), asked.confidence),
        broken: broken(base_scores.generation.as_ref(), cut_scores.generation.as_ref(), asked),
        prefill_speedup: None,
        decode_speedup: None,
    }
}

/// Right answers of the cut checkpoint above those that chance gives, over the base model's; tasks weigh by what there
/// is to lose. Nothing where the base model is not surely above chance.
fn retention(strata: &[&[[f64; 2]]], chances: &[f64], seed: u64, confidence: f64) -> Option<Estimate> {
    let of = |sums: &[[f64; 2]]| {
        // Every task counts alike, whatever its number of items.
        let above = |which: usize| -> f64 {
            let tasks = sums.iter().zip(chances).zip(strata);
            tasks.map(|((sum, chance), rows)| (sum[which] - chance) / rows.len() as f64).sum()
        };
        (above(0) > 1e-9).then(|| above(1) / above(0))
    };
    Resampled::of(strata, seed, of)?.estimate(confidence)
}

/// How many texts more than of the base model are broken, as a share of those that are sound with it; a prompt's greedy
/// and sampled text are one thing. Nothing where most of the base model's are broken: they judge nobody.
fn broken(base: Option<&Generation>, cut: Option<&Generation>, asked: Asked) -> Option<Estimate> {
    let (base, cut) = (base?, &cut?.texts);
    if base.broken > 0.5 {
        return None;
    }
    let prompts = base.texts.len() / 2;
    let flaw = |of: &[WrittenText], i: usize| f64::from(u8::from(of[i].flaw.is_some()));
    let row = |i: usize| {
        let both = [i, i + prompts].map(|i| (flaw(&base.texts, i), flaw(cut, i)));
        [both.iter().map(|(base, cut)| cut - base).sum(), both.iter().map(|(base, _)| 1.0 - base).sum()]
    };
    let rows: Vec<[f64; 2]> = (0..prompts).map(row).collect();
    let share = |sums: &[[f64; 2]]| (sums[0][1] > 0.0).then(|| sums[0][0] / sums[0][1]);
    Resampled::of(&[&rows], key(asked, 4, 0), share)?.estimate(asked.confidence)
}

fn pairs(base: &[ItemResult], cut: &[ItemResult], right: impl Fn(&ItemResult) -> bool) -> Vec<[f64; 2]> {
    let one = |item: &ItemResult| f64::from(u8::from(right(item)));
    base.iter().zip(cut).map(|(base, cut)| [one(base), one(cut)]).collect()
}

fn key(asked: Asked, what: u64, which: usize) -> u64 {
    stream_key(&[asked.seed, what, which as u64])
}
