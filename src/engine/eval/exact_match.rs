//! Answers that the model writes, matched as the task `gsm8k` of lm-evaluation-harness does.

use std::sync::LazyLock;

use regex::Regex;
use tokenizers::Tokenizer;

use super::tasks::{ItemResult, beginning};
use crate::engine::data::items::Item;
use crate::engine::model::generate::{Prompt, ends_at_end_token, go_on};
use crate::engine::model::{Config, Decoder};
use crate::engine::{Cx, Error, Result};

/// Has the model write the answers to the items of kind `generate_until` among `items`, greedily, and fills in
/// their `results`; `task` is what progress is called.
///
/// # Errors
/// A data error where an item asks for more tokens than the model can take.
pub fn answer(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    task: &str,
    items: &[Item],
    results: &mut [ItemResult],
    cx: Cx,
) -> Result<()> {
    let (mut open, mut prompts) = (Vec::new(), Vec::new());
    for (item, result) in items.iter().zip(results) {
        if let Item::GenerateUntil { context, answer, until, max_gen_toks } = item {
            let (prompt, truncated) = prompt(tokenizer, decoder.config(), context, *max_gen_toks)?;
            result.truncated = truncated;
            prompts.push(prompt);
            open.push((result, answer, Stops::new(until)));
        }
    }
    let at_end = ends_at_end_token(decoder);
    let mut ends =
        |i: usize, written: &[u32]| Ok(at_end(i, written)? || open[i].2.reached(tokenizer, written)?);
    let most = prompts.iter().map(|prompt| prompt.most as u64).sum();
    let mut tell = |done: usize| cx.advanced(task, done as u64, most, "tokens");
    let written = go_on(decoder, &prompts, &mut ends, &mut tell)?;
    for ((result, answer, stops), written) in open.iter_mut().zip(written) {
        let text = stops.before(&decoded(tokenizer, &written, true)?);
        let (strict, flexible) = matches(answer, &text);
        (result.correct, result.correct_flexible, result.written) = (strict, Some(flexible), Some(text));
    }
    Ok(())
}

/// The end of `context` that leaves room to write, and whether that is not all of it.
fn prompt(tokenizer: &Tokenizer, config: &Config, context: &str, most: usize) -> Result<(Prompt, bool)> {
    let encoded =
        tokenizer.encode(context, true).map_err(|e| Error::model(format!("tokenizer.json: {e}")))?;
    let mut tokens = encoded.get_ids().to_vec();
    if tokens.is_empty() {
        tokens.push(beginning(config)?);
    }
    let room = config.max_position_embeddings.checked_sub(most).filter(|room| *room > 0).ok_or_else(|| {
        Error::data(format!(
            "an item asks for `max_gen_toks` {most}, but the model can take {} tokens in all; ask for fewer",
            config.max_position_embeddings
        ))
    })?;
    let cut = tokens.len().saturating_sub(room);
    tokens.drain(..cut);
    Ok((Prompt { tokens, most, temperature: 0.0, seed: 0 }, cut > 0))
}

fn decoded(tokenizer: &Tokenizer, tokens: &[u32], skip_special: bool) -> Result<String> {
    tokenizer.decode(tokens, skip_special).map_err(|e| Error::model(format!("tokenizer.json: {e}")))
}

/// Texts at which writing ends.
struct Stops<'a> {
    texts: Vec<&'a str>,
    /// Tokens at the end of what was written among which a stop that was just completed must lie.
    tail: usize,
}

/// A letter that is split over tokens is whole in so many.
const TOKENS_OF_A_LETTER: usize = 4;

impl<'a> Stops<'a> {
    fn new(texts: &'a [String]) -> Self {
        let texts: Vec<&str> = texts.iter().map(String::as_str).filter(|text| !text.is_empty()).collect();
        // No token of a text is less than a byte.
        let longest = texts.iter().map(|text| text.len()).max().unwrap_or(0);
        Self { texts, tail: longest + TOKENS_OF_A_LETTER }
    }

    fn reached(&self, tokenizer: &Tokenizer, written: &[u32]) -> Result<bool> {
        let tail = &written[written.len().saturating_sub(self.tail)..];
        let text = decoded(tokenizer, tail, false)?;
        Ok(self.texts.iter().any(|stop| text.contains(stop)))
    }

    fn before(&self, text: &str) -> String {
        let ends = self.texts.iter().filter_map(|stop| text.find(stop));
        text[..ends.min().unwrap_or(text.len())].to_owned()
    }
}

/// Whether `written` comes to `answer`: strictly, and flexibly (`strict-match` and `flexible-extract`). An answer
/// that holds no number is compared with the whole of what was written, flexibly without regard to case,
/// punctuation and white space.
pub fn matches(answer: &str, written: &str) -> (bool, bool) {
    static STRICT: LazyLock<Regex> = LazyLock::new(|| pattern(r"#### (\-?[0-9\.\,]+)"));
    static FLEXIBLE: LazyLock<Regex> = LazyLock::new(|| pattern(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"));
    if !FLEXIBLE.is_match(answer) {
        return (answer.trim() == written.trim(), words(answer) == words(written));
    }
    let strict = STRICT.captures(written).and_then(|found| found.get(1));
    let flexible = FLEXIBLE.find_iter(written).last();
    let right = |found: Option<regex::Match>| found.is_some_and(|n| bare(n.as_str().trim()) == bare(answer));
    (right(strict), right(flexible))
}

/// A number without what is to be ignored: all up to "#### ", commas, dollars, a point at the end; in lower case.
fn bare(number: &str) -> String {
    let number = number.rsplit("#### ").next().unwrap_or(number).replace([',', '$'], "");
    number.strip_suffix('.').unwrap_or(&number).to_lowercase()
}

fn words(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a fixed pattern can be read. This is a bug.")
}
