//! Accuracy on evaluation items, as lm-evaluation-harness scores them.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use super::loglikelihood::{Likelihood, Request, likelihoods};
use super::{exact_match, finite};
use crate::engine::data::items::Item;
use crate::engine::model::{Config, Decoder};
use crate::engine::{Cx, Error, Result};
use crate::job::report::{ExactMatch, FailureKind, TaskScore};

/// What came out for one item: a line of `items/<checkpoint>-<task>.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ItemResult {
    /// Place in the item file, from 0.
    pub item: usize,
    /// One per choice, in nats.
    pub log_likelihoods: Vec<f64>,
    /// The likeliest choice; for `loglikelihood` items absent.
    pub chosen: Option<usize>,
    /// The likeliest choice per character; where choices have a length of their own.
    pub chosen_norm: Option<usize>,
    pub gold: Option<usize>,
    /// Of what was written: the number behind "####" is the answer.
    pub correct: bool,
    pub correct_norm: Option<bool>,
    /// What the model wrote, for `generate_until` items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written: Option<String>,
    /// The last number written is the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correct_flexible: Option<bool>,
    /// The context was longer than the model can take, and was cut from the left.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
}

/// Scores every item with the checkpoint called `which`.
pub fn answer(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    which: &str,
    task: &str,
    items: &[Item],
    cx: Cx,
) -> Result<Vec<ItemResult>> {
    let (mut requests, mut truncated) = (Vec::new(), Vec::with_capacity(items.len()));
    for item in items {
        let asked = asked(tokenizer, decoder.config(), item)?;
        requests.extend(asked.requests);
        truncated.push(asked.truncated);
    }
    let name = format!("{which}: {task}");
    let mut results = judged(items, &likelihoods(decoder, &requests, &name, cx)?);
    for (result, truncated) in results.iter_mut().zip(truncated) {
        result.truncated = truncated;
    }
    exact_match::answer(decoder, tokenizer, &name, items, &mut results, cx)?;
    for result in &results {
        for log_likelihood in &result.log_likelihoods {
            finite(*log_likelihood, which, &format!("item {} of {task}", result.item))?;
        }
    }
    Ok(results)
}

/// What must be scored to answer an item.
pub struct Asked {
    /// One per choice; none where the answer is written.
    pub requests: Vec<Request>,
    /// A context was cut from the left.
    pub truncated: bool,
}

/// What must be scored to answer `item`.
pub fn asked(tokenizer: &Tokenizer, config: &Config, item: &Item) -> Result<Asked> {
    let mut asked = Asked { requests: Vec::new(), truncated: false };
    for (context, continuation) in pairs(item) {
        let (request, truncated) = request(tokenizer, config, context, &continuation)?;
        asked.requests.push(request);
        asked.truncated |= truncated;
    }
    Ok(asked)
}

/// The answers that the likelihoods of what was [`asked`] give; those that are written stay open.
pub fn judged(items: &[Item], scored: &[Likelihood]) -> Vec<ItemResult> {
    let mut scored = scored.iter();
    let mut out = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let scored: Vec<_> = scored.by_ref().take(pairs(item).len()).collect();
        let greedy = scored.iter().all(|s| s.greedy);
        out.push(judge(index, item, scored.iter().map(|s| s.log_likelihood).collect(), greedy));
    }
    out
}

/// Accuracy over all items, and what else items of one kind have.
pub fn score(task: &str, items: &[Item], results: &[ItemResult]) -> TaskScore {
    let n = results.len() as f64;
    let share = |right: &dyn Fn(&ItemResult) -> Option<bool>| {
        let all: Option<Vec<bool>> = results.iter().map(right).collect();
        all.map(|all| all.iter().filter(|right| **right).count() as f64 / n)
    };
    // Of a sample, as lm-evaluation-harness has it.
    let stderr = |share: f64| if n > 1.0 { (share * (1.0 - share) / (n - 1.0)).sqrt() } else { 0.0 };
    let acc = results.iter().filter(|r| r.correct).count() as f64 / n;
    let acc_norm = share(&|r| r.correct_norm);
    let told = |item: &Item| matches!(item, Item::Loglikelihood { .. });
    let mut seen = HashSet::new();
    TaskScore {
        task: task.to_owned(),
        acc,
        acc_norm,
        stderr: stderr(acc),
        n: results.len() as u64,
        acc_norm_stderr: acc_norm.map(stderr),
        exact_match: share(&|r| r.correct_flexible).map(|flexible| ExactMatch {
            strict: acc,
            flexible,
            flexible_stderr: stderr(flexible),
        }),
        perplexity: items
            .iter()
            .all(told)
            .then(|| (-results.iter().flat_map(|r| &r.log_likelihoods).sum::<f64>() / n).exp()),
        chance: items.iter().map(Item::chance).sum::<f64>() / n,
        duplicates: items.iter().filter(|item| !seen.insert(*item)).count() as u64,
        truncated: results.iter().filter(|r| r.truncated).count() as u64,
    }
}

/// The name of the file of item results.
pub fn file_name(which: &str, task: &str) -> String {
    let safe = |c: char| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    format!("{which}-{}.jsonl", task.chars().map(safe).collect::<String>())
}

/// Writes item results as JSON lines.
pub fn write(path: &Path, results: &[ItemResult]) -> Result<()> {
    let mut lines = Vec::new();
    for result in results {
        serde_json::to_writer(&mut lines, result).map_err(Error::bug)?;
        lines.push(b'\n');
    }
    let parent = path.parent().unwrap_or(Path::new("."));
    let written = fs::create_dir_all(parent)
        .and_then(|()| fs::File::create(path))
        .and_then(|mut file| file.write_all(&lines));
    written.map_err(|e| Error::new(FailureKind::Storage, format!("{}: {e}", path.display())))
}

/// What is scored for an item: contexts and continuations, one space between.
fn pairs(item: &Item) -> Vec<(&str, String)> {
    match item {
        Item::MultipleChoice { context, choices, .. } => {
            choices.iter().map(|c| (context.as_str(), format!(" {c}"))).collect()
        }
        Item::ContextChoice { contexts, continuation, .. } => {
            contexts.iter().map(|c| (c.as_str(), format!(" {continuation}"))).collect()
        }
        Item::Loglikelihood { context, continuation } => vec![(context, format!(" {continuation}"))],
        Item::GenerateUntil { .. } => Vec::new(),
    }
}

/// The token that begins a text where an item gives nothing to go on from, as in the harness.
pub fn beginning(config: &Config) -> Result<u32> {
    config.bos_token.or(config.eos_tokens.first().copied()).ok_or_else(|| {
        Error::data("an item has an empty context, and config.json names no token that begins a text")
    })
}

/// Context and continuation are encoded together and split by the length of the
/// context alone, with the tokenizer's own special tokens. Says, too, whether the model cannot take it all.
fn request(
    tokenizer: &Tokenizer,
    config: &Config,
    context: &str,
    continuation: &str,
) -> Result<(Request, bool)> {
    let encode = |text: String| {
        let encoded =
            tokenizer.encode(text, true).map_err(|e| Error::model(format!("tokenizer.json: {e}")))?;
        Ok::<_, Error>(encoded.get_ids().to_vec())
    };
    let kept = context.trim_end();
    let continuation = format!("{}{continuation}", &context[kept.len()..]);
    let (mut tokens, mut from) = if kept.is_empty() {
        let encoded = tokenizer.encode(continuation, false);
        let encoded = encoded.map_err(|e| Error::model(format!("tokenizer.json: {e}")))?;
        ([&[beginning(config)?], encoded.get_ids()].concat(), 1)
    } else {
        (encode(format!("{kept}{continuation}"))?, encode(kept.to_owned())?.len())
    };
    // What the model cannot take is cut from the left.
    let most = config.max_position_embeddings + 1;
    let truncated = tokens.len() > most;
    if truncated {
        let cut = tokens.len() - most;
        tokens.drain(..cut);
        from = from.saturating_sub(cut);
    }
    // A token that reaches over the border leaves the context empty-handed: score what there is.
    Ok((Request { from: from.clamp(1, tokens.len()), tokens }, truncated))
}

fn judge(index: usize, item: &Item, log_likelihoods: Vec<f64>, greedy: bool) -> ItemResult {
    let result = ItemResult {
        item: index,
        chosen: None,
        chosen_norm: None,
        gold: None,
        correct: greedy,
        correct_norm: None,
        written: None,
        correct_flexible: None,
        truncated: false,
        log_likelihoods,
    };
    match item {
        Item::MultipleChoice { choices, gold, .. } => {
            let per_character = |(l, c): (&f64, &String)| l / c.chars().count() as f64;
            let norm: Vec<f64> = result.log_likelihoods.iter().zip(choices).map(per_character).collect();
            let (chosen, chosen_norm) = (first_best(&result.log_likelihoods), first_best(&norm));
            ItemResult {
                chosen: Some(chosen),
                chosen_norm: Some(chosen_norm),
                gold: Some(*gold),
                correct: chosen == *gold,
                correct_norm: Some(chosen_norm == *gold),
                ..result
            }
        }
        Item::ContextChoice { gold, .. } => {
            let chosen = first_best(&result.log_likelihoods);
            ItemResult { chosen: Some(chosen), gold: Some(*gold), correct: chosen == *gold, ..result }
        }
        Item::Loglikelihood { .. } | Item::GenerateUntil { .. } => result,
    }
}

/// The place of the largest value, the first one on a tie.
fn first_best(values: &[f64]) -> usize {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] {
            best = i;
        }
    }
    best
}
