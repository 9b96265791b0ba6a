//! Evaluation items: JSON lines in the kinds of lm-evaluation-harness.

use serde::{Deserialize, Deserializer, Serialize};

use super::corpus::{label, lines, without_line};
use crate::engine::{Error, Result};
use crate::job::spec::Corpus;

/// One item; fields beside these (`id`, `task`, …) are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Item {
    /// Which of `choices` goes on best after `context`.
    MultipleChoice { context: String, choices: Vec<String>, gold: usize },
    /// After which of `contexts` does `continuation` go on best (`WinoGrande`).
    ContextChoice { contexts: Vec<String>, continuation: String, gold: usize },
    /// Is `continuation` what the model would write (LAMBADA).
    Loglikelihood { context: String, continuation: String },
    /// Is `answer` what the model comes to in what it writes (GSM8K), up to one of `until` or so many tokens.
    GenerateUntil {
        context: String,
        answer: String,
        #[serde(default = "gsm8k_stops", deserialize_with = "one_or_many")]
        until: Vec<String>,
        #[serde(default = "harness_tokens")]
        max_gen_toks: usize,
    },
}

/// Where the task `gsm8k` of lm-evaluation-harness stops.
fn gsm8k_stops() -> Vec<String> {
    ["Question:", "</s>", "<|im_end|>"].map(str::to_owned).to_vec()
}

/// `max_gen_toks` of lm-evaluation-harness where a task does not say.
const fn harness_tokens() -> usize {
    256
}

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "`until` must be a text or a list of texts")]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(text) => vec![text],
        OneOrMany::Many(texts) => texts,
    })
}

impl Item {
    /// Share of right answers that guessing gives.
    pub fn chance(&self) -> f64 {
        match self {
            Self::MultipleChoice { choices: all, .. } | Self::ContextChoice { contexts: all, .. } => {
                1.0 / all.len() as f64
            }
            Self::Loglikelihood { .. } | Self::GenerateUntil { .. } => 0.0,
        }
    }

    /// All that a model could have learned by heart.
    pub fn text(&self) -> String {
        match self {
            Self::MultipleChoice { context, choices, .. } => format!("{context} {}", choices.join(" ")),
            Self::ContextChoice { contexts, continuation, .. } => {
                let with = contexts.iter().map(|context| format!("{context} {continuation}"));
                with.collect::<Vec<_>>().join("\n")
            }
            Self::Loglikelihood { context, continuation } => format!("{context} {continuation}"),
            Self::GenerateUntil { context, answer, .. } => format!("{context} {answer}"),
        }
    }
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
        Item::GenerateUntil { answer, max_gen_toks, .. } => {
            filled("answer", answer.trim())?;
            if *max_gen_toks == 0 {
                return Err(Error::data(format!("{place}: `max_gen_toks` must be at least 1")));
            }
            Ok(())
        }
    }
}
