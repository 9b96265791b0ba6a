//! Rows of benchmarks as they are published, made into the items that lm-evaluation-harness 0.4.13 makes of them.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

use super::items::Item;
use crate::engine::{Error, Result};
use crate::job::benchmark::Benchmark;

/// What answers of MMLU are called.
const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

/// What a row asks.
pub struct Question {
    pub item: Item,
    /// Said once before everything else; empty for most.
    pub description: String,
    /// Shots are of the same subject, where there are several.
    pub subject: Option<String>,
    /// The question with its answer, to be shown before another one.
    pub solved: String,
}

/// A row of a benchmark.
struct Row<'a> {
    benchmark: Benchmark,
    row: &'a Value,
    place: &'a str,
}

impl Question {
    /// The question of a row as `benchmark` publishes it.
    ///
    /// # Errors
    /// A data error that names the place and the field that is not as it should be.
    pub fn of(benchmark: Benchmark, row: &Value, place: &str) -> Result<Self> {
        let row = Row { benchmark, row, place };
        let item = row.item()?;
        let (description, subject) = match benchmark {
            Benchmark::Mmlu => row.about("multiple choice questions")?,
            Benchmark::MmluContinuation => row.about("questions")?,
            _ => (String::new(), None),
        };
        let solved = match benchmark {
            Benchmark::Gsm8k => {
                format!("Question: {}\nAnswer: {}", row.text("question")?, row.text("answer")?)
            }
            _ => item.solved(),
        };
        Ok(Self { item, description, subject, solved })
    }
}

impl Row<'_> {
    fn item(&self) -> Result<Item> {
        match self.benchmark {
            Benchmark::Winogrande => self.winogrande(),
            Benchmark::LambadaOpenai => {
                let (context, last) = self
                    .text("text")?
                    .rsplit_once(' ')
                    .ok_or_else(|| self.wrong("`text` is one word, so there is nothing to go on from"))?;
                Ok(Item::Loglikelihood { context: context.to_owned(), continuation: last.to_owned() })
            }
            Benchmark::Gsm8k => {
                let answer = self.text("answer")?.rsplit("####").next().unwrap_or_default();
                let context = format!("Question: {}\nAnswer:", self.text("question")?);
                Ok(Item::written(context, answer.trim().to_owned()))
            }
            Benchmark::Hellaswag
            | Benchmark::ArcChallenge
            | Benchmark::ArcEasy
            | Benchmark::Boolq
            | Benchmark::Mmlu
            | Benchmark::MmluContinuation
            | Benchmark::Openbookqa
            | Benchmark::Piqa
            | Benchmark::Sciq => {
                let context = self.asked()?;
                let (choices, gold) = self.choices()?;
                Ok(Item::MultipleChoice { context, choices, gold })
            }
        }
    }

    /// What is asked where one of several answers is to be chosen.
    fn asked(&self) -> Result<String> {
        let text = |name: &str| self.text(name);
        Ok(match self.benchmark {
            Benchmark::Openbookqa => text("question_stem")?.to_owned(),
            Benchmark::Boolq => format!("{}\nQuestion: {}?\nAnswer:", text("passage")?, text("question")?),
            Benchmark::Piqa => format!("Question: {}\nAnswer:", text("goal")?),
            Benchmark::Sciq => {
                format!("{}\nQuestion: {}\nAnswer:", text("support")?.trim_start(), text("question")?)
            }
            Benchmark::Hellaswag => {
                let (label, ctx_a, ctx_b) = (text("activity_label")?, text("ctx_a")?, text("ctx_b")?);
                without_brackets(&format!("{label}: {ctx_a} {}", capitalised(ctx_b)))
            }
            Benchmark::Mmlu => {
                let choices = self.texts("choices")?;
                let lettered = LETTERS.iter().zip(&choices);
                let lettered: String =
                    lettered.map(|(letter, choice)| format!("{letter}. {choice}\n")).collect();
                format!("{}\n{lettered}Answer:", text("question")?.trim())
            }
            Benchmark::MmluContinuation => format!("Question: {}\nAnswer:", text("question")?.trim()),
            _ => format!("Question: {}\nAnswer:", text("question")?),
        })
    }

    /// The answers, and which of them is right.
    fn choices(&self) -> Result<(Vec<String>, usize)> {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let fields = |names: &[&str]| {
            names.iter().map(|name| self.text(name).map(str::to_owned)).collect::<Result<Vec<_>>>()
        };
        match self.benchmark {
            Benchmark::Boolq => Ok((words(&["no", "yes"]), self.number("label")?)),
            Benchmark::Piqa => Ok((fields(&["sol1", "sol2"])?, self.number("label")?)),
            Benchmark::Sciq => {
                Ok((fields(&["distractor1", "distractor2", "distractor3", "correct_answer"])?, 3))
            }
            Benchmark::Hellaswag => {
                let endings = self.texts("endings")?;
                Ok((endings.iter().map(|ending| without_brackets(ending)).collect(), self.number("label")?))
            }
            Benchmark::Mmlu => Ok((words(&LETTERS), self.number("answer")?)),
            Benchmark::MmluContinuation => Ok((self.texts("choices")?, self.number("answer")?)),
            _ => self.labelled(),
        }
    }

    fn winogrande(&self) -> Result<Item> {
        let (before, behind) = self
            .text("sentence")?
            .split_once('_')
            .ok_or_else(|| self.wrong("`sentence` has no \"_\" where the options go"))?;
        let options = [self.text("option1")?, self.text("option2")?];
        let contexts = options.iter().map(|option| format!("{before}{option}")).collect();
        let gold = self.number("answer")?.checked_sub(1);
        let gold = gold.ok_or_else(|| self.wrong("`answer` must be 1 or 2"))?;
        Ok(Item::ContextChoice { contexts, continuation: behind.trim().to_owned(), gold })
    }

    /// What is said before questions about a subject, and the subject.
    fn about(&self, what: &str) -> Result<(String, Option<String>)> {
        let subject = self.text("subject")?.to_owned();
        let named = subject.replace('_', " ");
        Ok((format!("The following are {what} (with answers) about {named}.\n\n"), Some(subject)))
    }

    /// The texts of `choices`, and the place of the one with the label `answerKey`.
    fn labelled(&self) -> Result<(Vec<String>, usize)> {
        let choices = Row { row: self.field("choices")?, ..*self };
        let (labels, key) = (choices.texts("label")?, self.text("answerKey")?.trim_start());
        let gold = labels.iter().position(|label| label == key);
        let gold = gold.ok_or_else(|| self.wrong(&format!("`answerKey` is {key}, which no choice has")))?;
        Ok((choices.texts("text")?, gold))
    }

    fn field(&self, name: &str) -> Result<&Value> {
        self.row.get(name).ok_or_else(|| self.wrong(&format!("it has no field `{name}`")))
    }

    fn text(&self, name: &str) -> Result<&str> {
        self.field(name)?.as_str().ok_or_else(|| self.wrong(&format!("`{name}` is not a text")))
    }

    fn texts(&self, name: &str) -> Result<Vec<String>> {
        let texts = self.field(name)?.as_array().and_then(|all| {
            all.iter().map(|one| one.as_str().map(str::to_owned)).collect::<Option<Vec<String>>>()
        });
        texts.ok_or_else(|| self.wrong(&format!("`{name}` is not a list of texts")))
    }

    /// A count, which some data sets write as text.
    fn number(&self, name: &str) -> Result<usize> {
        let value = self.field(name)?;
        let number = value.as_u64().or_else(|| value.as_str()?.parse().ok());
        let number = number.and_then(|number| usize::try_from(number).ok());
        number.ok_or_else(|| self.wrong(&format!("`{name}` is not a number from 0 on")))
    }

    fn wrong(&self, why: &str) -> Error {
        Error::data(format!("{}: {why}, as a row of {} should have it", self.place, self.benchmark.name()))
    }
}

/// As `str.capitalize` of Python has it: what follows becomes small.
fn capitalised(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters.next().into_iter().flat_map(char::to_uppercase);
    first.chain(characters.as_str().to_lowercase().chars()).collect()
}

/// What `WikiHow` left in `HellaSwag`: `[title]` stands for a full stop, other brackets for nothing.
fn without_brackets(text: &str) -> String {
    static BRACKETS: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\[.*?\]").expect("a regular expression. This is a bug."));
    let text = text.trim().replace(" [title]", ". ");
    BRACKETS.replace_all(&text, "").replace("  ", " ")
}
