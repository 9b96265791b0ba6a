//! Evaluation items: JSON lines in the kinds of lm-evaluation-harness.

use serde::Deserialize;

use super::corpus::{label, lines, without_line};
use crate::engine::{Error, Result};
use crate::job::spec::Corpus;

/// One item; fields beside these (`id`, `task`, …) are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Item {
    /// Which of `choices` goes on best after `context`.
    MultipleChoice { context: String, choices: Vec<String>, gold: usize },
    /// After which of `contexts` does `continuation` go on best (`WinoGrande`).
    ContextChoice { contexts: Vec<String>, continuation: String, gold: usize },
    /// Is `continuation` what the model would write (LAMBADA).
    Loglikelihood { context: String, continuation: String },
    /// What does the model write (GSM8K). Known, so that it can be refused by name.
    GenerateUntil {},
}

/// The items of a corpus, the first `limit` of them.
///
/// # Errors
/// Data errors that name file and line.
pub fn read(corpus: &Corpus, limit: Option<u32>) -> Result<Vec<Item>> {
    let limit = limit.map_or(usize::MAX, |n| n as usize);
    let mut items = Vec::new();
    for line in lines(corpus)?.take(limit) {
        let (place, line) = line?;
        let item: Item =
            serde_json::from_str(&line).map_err(|e| Error::data(format!("{place}: {}", without_line(&e))))?;
        check(&item, &place)?;
        items.push(item);
    }
    if items.is_empty() {
        return Err(Error::data(format!("{}: has no evaluation items", label(corpus))));
    }
    Ok(items)
}

fn check(item: &Item, place: &str) -> Result<()> {
    let choice = |what: &str, count: usize, gold: usize| {
        if count < 2 {
            return Err(Error::data(format!("{place}: `{what}` needs at least two entries")));
        }
        if gold >= count {
            return Err(Error::data(format!(
                "{place}: `gold` is {gold}, but `{what}` has entries 0 to {}",
                count - 1
            )));
        }
        Ok(())
    };
    let filled = |what: &str, text: &str| {
        if text.is_empty() { Err(Error::data(format!("{place}: `{what}` is empty"))) } else { Ok(()) }
    };
    match item {
        Item::MultipleChoice { choices, gold, .. } => {
            choices.iter().try_for_each(|c| filled("choices", c))?;
            choice("choices", choices.len(), *gold)
        }
        Item::ContextChoice { contexts, continuation, gold } => {
            filled("continuation", continuation)?;
            choice("contexts", contexts.len(), *gold)
        }
        Item::Loglikelihood { continuation, .. } => filled("continuation", continuation),
        Item::GenerateUntil {} => Err(Error::data(format!(
            "{place}: items of kind generate_until cannot be scored in this version; \
             multiple_choice, context_choice and loglikelihood can"
        ))),
    }
}
