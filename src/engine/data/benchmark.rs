//! Rows of benchmarks as they are published, made into the items that lm-evaluation-harness 0.4.13 makes of them.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

use super::items::Item;
use crate::engine::{Error, Result};
use crate::job::benchmark::Benchmark;

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
        let asked = |context: String, choices: Vec<String>, gold: usize| Item::MultipleChoice {
            context,
            choices,
            gold,
        };
        Ok(match self.benchmark {
            Benchmark::ArcChallenge | Benchmark::ArcEasy => {
                let (choices, gold) = self.labelled()?;
                asked(format!("Question: {}\nAnswer:", self.text("question")?), choices, gold)
            }
            Benchmark::Openbookqa => {
                let (choices, gold) = self.labelled()?;
                asked(self.text("question_stem")?.to_owned(), choices, gold)
            }
            Benchmark::Boolq => {
                let (passage, question) = (self.text("passage")?, self.text("question")?);
                let choices = ["no", "yes"].map(str::to_owned).to_vec();
                asked(format!("{passage}\nQuestion: {question}?\nAnswer:"), choices, self.number("label")?)
            }
            Benchmark::Piqa => {
                let choices = vec![self.text("sol1")?.to_owned(), self.text("sol2")?.to_owned()];
                asked(format!("Question: {}\nAnswer:", self.text("goal")?), choices, self.number("label")?)
            }
            Benchmark::Sciq => {
                let (support, question) = (self.text("support")?.trim_start(), self.text("question")?);
                let choices = ["distractor1", "distractor2", "distractor3", "correct_answer"];
                let choices = choices.map(|name| self.text(name).map(str::to_owned));
                let choices = choices.into_iter().collect::<Result<_>>()?;
                asked(format!("{support}\nQuestion: {question}\nAnswer:"), choices, 3)
            }
            Benchmark::Hellaswag => {
                let (label, ctx_a) = (self.text("activity_label")?, self.text("ctx_a")?);
                let query = format!("{label}: {ctx_a} {}", capitalised(self.text("ctx_b")?));
                let endings = self.texts("endings")?.into_iter().map(|ending| without_brackets(&ending));
                asked(without_brackets(&query), endings.collect(), self.number("label")?)
            }
            Benchmark::Mmlu => {
                let choices = self.texts("choices")?;
                let lettered = ["A", "B", "C", "D"].iter().zip(&choices);
                let lettered: String =
                    lettered.map(|(letter, choice)| format!("{letter}. {choice}\n")).collect();
                let context = format!("{}\n{lettered}Answer:", self.text("question")?.trim());
                let letters = ["A", "B", "C", "D"].map(str::to_owned).to_vec();
                asked(context, letters, self.number("answer")?)
            }
            Benchmark::MmluContinuation => {
                let context = format!("Question: {}\nAnswer:", self.text("question")?.trim());
                asked(context, self.texts("choices")?, self.number("answer")?)
            }
            Benchmark::Winogrande => {
                let sentence = self.text("sentence")?;
                let (before, behind) = sentence
                    .split_once('_')
                    .ok_or_else(|| self.wrong("`sentence` has no \"_\" where the options go"))?;
                let options = [self.text("option1")?, self.text("option2")?];
                let contexts = options.iter().map(|option| format!("{before}{option}")).collect();
                let gold = self.number("answer")?;
                let gold = gold.checked_sub(1).ok_or_else(|| self.wrong("`answer` must be 1 or 2"))?;
                Item::ContextChoice { contexts, continuation: behind.trim().to_owned(), gold }
            }
            Benchmark::LambadaOpenai => {
                let (context, last) = self
                    .text("text")?
                    .rsplit_once(' ')
                    .ok_or_else(|| self.wrong("`text` is one word, so there is nothing to go on from"))?;
                Item::Loglikelihood { context: context.to_owned(), continuation: last.to_owned() }
            }
            Benchmark::Gsm8k => {
                let answer = self.text("answer")?.rsplit("####").next().unwrap_or_default();
                Item::written(
                    format!("Question: {}\nAnswer:", self.text("question")?),
                    answer.trim().to_owned(),
                )
            }
        })
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

/// What WikiHow left in HellaSwag: "[title]" stands for a full stop, other brackets for nothing.
fn without_brackets(text: &str) -> String {
    static BRACKETS: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\[.*?\]").expect("a regular expression. This is a bug."));
    let text = text.trim().replace(" [title]", ". ");
    BRACKETS.replace_all(&text, "").replace("  ", " ")
}
