//! Evaluation items: JSON lines in the kinds of lm-evaluation-harness.

use serde::{Deserialize, Deserializer, Serialize};

use serde_json::Value;

use super::benchmark::Question;
use super::corpus::{label, records};
use crate::engine::{Error, Result};
use crate::job::benchmark::Benchmark;
use crate::job::spec::TaskSpec;

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

    /// One whose answer is written, until where the harness stops.
    pub fn written(context: String, answer: String) -> Self {
        Self::GenerateUntil { context, answer, until: gsm8k_stops(), max_gen_toks: harness_tokens() }
    }

    /// The question with its answer.
    pub fn solved(&self) -> String {
        let (question, answer) = match self {
            Self::MultipleChoice { context, choices, gold } => (context, choices.get(*gold)),
            Self::ContextChoice { contexts, continuation, gold } => {
                (contexts.get(*gold).unwrap_or(continuation), Some(continuation))
            }
            Self::Loglikelihood { context, continuation } => (context, Some(continuation)),
            Self::GenerateUntil { context, answer, .. } => (context, Some(answer)),
        };
        format!("{question} {}", answer.map_or("", String::as_str))
    }

    /// The same with `before` in front of what it asks.
    fn behind(mut self, before: &str) -> Self {
        match &mut self {
            Self::MultipleChoice { context, .. }
            | Self::Loglikelihood { context, .. }
            | Self::GenerateUntil { context, .. } => context.insert_str(0, before),
            Self::ContextChoice { contexts, .. } => {
                contexts.iter_mut().for_each(|context| context.insert_str(0, before));
            }
        }
        self
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

/// The items of a task, the first `limit` of them, each behind its shots.
///
/// # Errors
/// Data errors that name file and line.
pub fn read(task: &TaskSpec) -> Result<Vec<Item>> {
    let shots = match &task.shots_from {
        Some(corpus) if task.shots > 0 => {
            records(corpus)?.map(|record| question(task.benchmark(), record?)).collect::<Result<Vec<_>>>()?
        }
        _ => Vec::new(),
    };
    let mut items = Vec::new();
    for record in records(&task.items)?.take(task.limit.map_or(usize::MAX, |n| n as usize)) {
        let asked = question(task.benchmark(), record?)?;
        let before = shots_before(&asked, &shots, task.shots as usize)?;
        items.push(asked.item.behind(&before));
    }
    if items.is_empty() {
        return Err(Error::data(format!("{}: has no evaluation items", label(&task.items))));
    }
    Ok(items)
}

/// What stands before a question: what it is about, and the first `count` solved questions of its subject that are
/// others.
fn shots_before(asked: &Question, shots: &[Question], count: usize) -> Result<String> {
    let fit = |shot: &&Question| shot.subject == asked.subject && shot.solved != asked.solved;
    let fitting: Vec<&str> = shots.iter().filter(fit).take(count).map(|shot| &*shot.solved).collect();
    if fitting.len() < count {
        let of = asked.subject.as_ref().map_or(String::new(), |subject| format!(" about {subject}"));
        return Err(Error::data(format!(
            "`shots_from` has {} questions{of}, not the {count} of `shots`; ask for fewer",
            fitting.len()
        )));
    }
    Ok(fitting.iter().fold(asked.description.clone(), |before, shot| before + shot + "\n\n"))
}

/// The question of a record, which is an item already or a row of a benchmark.
fn question(benchmark: Option<Benchmark>, (place, record): (String, Value)) -> Result<Question> {
    let asked = match benchmark {
        Some(benchmark) if record.get("kind").is_none() => Question::of(benchmark, &record, &place)?,
        None if record.get("kind").is_none() && record.is_object() => {
            let names = Benchmark::ALL.map(Benchmark::name).join(", ");
            return Err(Error::data(format!(
                "{place}: has no `kind`, so it is no item; where it is a row of a benchmark as published, call the task \
                 so or name it as `format`: {names}"
            )));
        }
        _ => {
            let item: Item =
                serde_json::from_value(record).map_err(|e| Error::data(format!("{place}: {e}")))?;
            Question { description: String::new(), subject: None, solved: item.solved(), item }
        }
    };
    check(&asked.item, &place)?;
    Ok(asked)
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
