//! What healing texts have in common with what is measured on: runs of 13 words.

use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::corpus::{Piece, label, pieces};
use super::{items, windows};
use crate::engine::model::Checkpoint;
use crate::engine::{Cx, Error, Result};
use crate::job::report::Overlap;
use crate::job::spec::{Corpus, JobSpec};

/// Words in a row that hardly come together twice by chance.
const WORDS: usize = 13;

/// The overlap of every healing text with every text and task of `spec.eval`, as far as there is some. Its corpora
/// must be local files. Text that the model writes itself is left out.
///
/// # Errors
/// Data errors that name file and line.
pub fn find(spec: &JobSpec, base: &Checkpoint, cx: Cx) -> Result<Vec<Overlap>> {
    let given = |corpus: &&Corpus| !matches!(corpus, Corpus::Model { .. });
    let healing: Vec<&Corpus> =
        spec.heal.iter().flat_map(|method| method.corpus().texts()).filter(given).collect();
    if healing.is_empty() {
        return Ok(Vec::new());
    }
    let mut measured = Vec::new();
    for task in &spec.eval.tasks {
        let items = items::read(task)?;
        let runs = items.iter().map(|item| Runs::of(&item.text()).collect()).collect();
        measured.push(Measured { name: task.task.clone(), runs });
    }
    for corpus in spec.eval.perplexity.iter().filter(given) {
        let mut runs = Vec::new();
        each_text(corpus, base, cx, |text| runs.extend(Runs::of(text).map(|run| vec![run])))?;
        measured.push(Measured { name: label(corpus), runs });
    }
    let mut out = Vec::new();
    for (i, corpus) in healing.iter().enumerate() {
        if healing[..i].contains(corpus) {
            continue;
        }
        let looked_for: HashSet<u64> =
            measured.iter().flat_map(|m| m.runs.iter().flatten().copied()).collect();
        let mut found = HashSet::new();
        each_text(corpus, base, cx, |text| {
            found.extend(Runs::of(text).filter(|run| looked_for.contains(run)));
        })?;
        for Measured { name, runs } in &measured {
            let common = runs.iter().filter(|runs| runs.iter().any(|run| found.contains(run))).count() as u64;
            if common > 0 {
                let (measured, healed_on) = (name.clone(), label(corpus));
                out.push(Overlap { measured, healed_on, common, total: runs.len() as u64 });
            }
        }
    }
    Ok(out)
}

/// # Errors
/// A data error that says all that overlaps.
pub fn refuse(overlaps: &[Overlap]) -> Result<()> {
    let said = |o: &Overlap| {
        let Overlap { measured, healed_on, common, total } = o;
        format!(
            "{healed_on} holds 13 words in a row of {common} of the {total} items or passages of {measured}"
        )
    };
    match overlaps {
        [] => Ok(()),
        some => Err(Error::data(format!(
            "{}; heal on other text, or let eval.overlap be \"warn\"",
            some.iter().map(said).collect::<Vec<_>>().join("; ")
        ))),
    }
}

/// What is measured on under one name: the runs of each item, or each run of a text on its own.
struct Measured {
    name: String,
    runs: Vec<Vec<u64>>,
}

/// Hands on every text of a corpus, as much as healing would use of it.
fn each_text(corpus: &Corpus, base: &Checkpoint, cx: Cx, mut each: impl FnMut(&str)) -> Result<()> {
    let (mut tokenizer, mut bytes) = (None, 0);
    for piece in pieces(corpus)? {
        cx.check()?;
        let text = match piece? {
            Piece::Text { text, .. } => text,
            Piece::Ids { ids, .. } => {
                let tokenizer = match &mut tokenizer {
                    Some(tokenizer) => tokenizer,
                    none => none.insert(base.tokenizer()?),
                };
                tokenizer.decode(&ids, true).map_err(|e| Error::model(format!("tokenizer.json: {e}")))?
            }
        };
        bytes += text.len();
        each(&text);
        if bytes > windows::MAX_TEXT_BYTES {
            break;
        }
    }
    Ok(())
}

/// The runs of 13 words of a text, as digests: words in lower case, whatever stands between them.
struct Runs<'a> {
    words: Box<dyn Iterator<Item = u64> + 'a>,
    last: VecDeque<u64>,
}

impl<'a> Runs<'a> {
    fn of(text: &'a str) -> Self {
        let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
        let words = words.map(|word| {
            let mut hash = DefaultHasher::new();
            word.chars().flat_map(char::to_lowercase).for_each(|c| c.hash(&mut hash));
            hash.finish()
        });
        Self { words: Box::new(words), last: VecDeque::with_capacity(WORDS) }
    }
}

impl Iterator for Runs<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.last.len() == WORDS {
            self.last.pop_front();
        }
        while self.last.len() < WORDS {
            self.last.push_back(self.words.next()?);
        }
        // Each word's place counts: the digest of one run is a polynomial in its words.
        Some(
            self.last
                .iter()
                .fold(0, |run: u64, word| run.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(*word)),
        )
    }
}
