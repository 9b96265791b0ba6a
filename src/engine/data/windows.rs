//! Text as token windows: documents joined by a blank line, cut without overlap.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use super::corpus::{Piece, label, pieces};
use crate::engine::chance::stream_key;
use crate::engine::model::generate::{Writing, write};
use crate::engine::model::{Checkpoint, Config, Decoder};
use crate::engine::{Cx, Error, Result};
use crate::job::spec::Corpus;

/// What text is for. A model writes another text for each purpose, so that no
/// checkpoint is judged by the words it was healed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Purpose {
    Calibration,
    Heal,
    Eval,
}

impl Purpose {
    const fn key(self) -> u64 {
        match self {
            Self::Calibration => 1,
            Self::Heal => 2,
            Self::Eval => 3,
        }
    }

    const fn task(self) -> &'static str {
        match self {
            Self::Calibration => "writing calibration text",
            Self::Heal => "writing healing text",
            Self::Eval => "writing evaluation text",
        }
    }
}

/// Which windows are wanted of a corpus.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Tokens per window. Rows of `input_ids` keep their own length.
    pub seq_len: usize,
    /// Tokens from the start of a window of a text to that of the next, if that is less than `seq_len`; then the
    /// last window ends with the text. Windows do not overlap when absent.
    pub stride: Option<usize>,
    /// The first so many windows; all there are when absent.
    pub at_most: Option<usize>,
    /// The setting that insists on `at_most` windows: text that gives fewer is refused. Where nobody insists they are
    /// noted.
    pub insisted_by: Option<&'static str>,
    pub purpose: Purpose,
    /// The job's seed; used for text the model writes.
    pub seed: u64,
}

impl Wanted {
    /// What is enough to read for knowing that a text will do.
    #[must_use]
    pub fn to_check(self) -> Self {
        if self.insisted_by.is_some() { self } else { Self { at_most: Some(1), ..self } }
    }
}

/// Token windows and the words they cover.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Windows {
    pub ids: Vec<Vec<u32>>,
    /// For each window the first token that no earlier one has predicted, at least 1.
    pub from: Vec<usize>,
    /// Words between white space in the text of the windows.
    pub words: u64,
}

/// Windows a model writes when nobody says how many.
const WRITTEN_WINDOWS: usize = 16;
/// Text taken of one corpus: millions of tokens, days on a CPU.
pub(super) const MAX_TEXT_BYTES: usize = 64 << 20;
/// Text gathered first per token wanted; more is fetched where it does not do.
const BYTES_PER_TOKEN: usize = 6;

/// Windows of `corpus` for `base`, in the order of the text.
///
/// # Errors
/// A spec error when a window is longer than the model can take; data errors
/// that name file, line and remedy, or how many windows there are where more are insisted on.
pub fn windows(corpus: &Corpus, wanted: &Wanted, base: &Checkpoint, cx: Cx) -> Result<Windows> {
    let (config, name) = (base.config(), label(corpus));
    let most = config.max_position_embeddings;
    if wanted.seq_len > most {
        return Err(Error::spec(format!(
            "seq_len {} is more than the {most} tokens the model can take (max_position_embeddings)",
            wanted.seq_len
        )));
    }
    let tokenizer = base.tokenizer()?;
    if let Corpus::Model { tokens } = corpus {
        return written(*tokens, wanted, base, &tokenizer, cx);
    }
    let found = match gather(corpus, wanted, config, &tokenizer, cx)? {
        Gathered::Text(encoded) => cut(&encoded, wanted, &name)?,
        Gathered::Rows(ids) => {
            let words = ids.iter().map(|w| words(&tokenizer, w)).sum::<Result<u64>>()?;
            Windows { from: vec![1; ids.len()], ids, words }
        }
    };
    for id in found.ids.iter().flatten() {
        if *id as usize >= config.vocab_size {
            return Err(Error::model(format!(
                "tokenizer.json gives token {id}, but config.json has a vocab_size of {}; they do not belong together",
                config.vocab_size
            )));
        }
    }
    if let Some(asked) = wanted.at_most.filter(|n| *n > found.ids.len()) {
        let n = found.ids.len();
        if let Some(setting) = wanted.insisted_by {
            return Err(Error::data(format!(
                "{name} gives {n} windows (seq_len = {}), but {setting} asks for {asked}: set it to {n}, or give more text",
                wanted.seq_len
            )));
        }
        cx.note(format!("{name} gives {n} windows, {asked} were asked; going on with {n}"));
    }
    Ok(found)
}

fn written(
    tokens: Option<u64>,
    wanted: &Wanted,
    base: &Checkpoint,
    tokenizer: &Tokenizer,
    cx: Cx,
) -> Result<Windows> {
    let asked = tokens.map(|n| (n as usize).div_ceil(wanted.seq_len));
    let sequences = match (asked, wanted.at_most) {
        (Some(asked), Some(most)) => asked.min(most),
        (Some(n), None) | (None, Some(n)) => n,
        (None, None) => WRITTEN_WINDOWS,
    };
    let writing = Writing {
        sequences,
        tokens: wanted.seq_len,
        temperature: 1.0,
        seed: stream_key(&[wanted.seed, wanted.purpose.key()]),
        task: wanted.purpose.task(),
    };
    let ids = write(&Decoder::open(base, cx.compute)?, &writing, cx)?;
    let words = ids.iter().map(|w| words(tokenizer, w)).sum::<Result<u64>>()?;
    Ok(Windows { from: vec![1; ids.len()], ids, words })
}

/// What a corpus turned out to hold.
enum Gathered {
    Text(Encoded),
    Rows(Vec<Vec<u32>>),
}

struct Encoded {
    text: String,
    ids: Vec<u32>,
    /// Byte in `text` behind each token.
    ends: Vec<usize>,
}

/// Reads as much as is wanted. Text is tokenized as one string, because where
/// one token ends can depend on what follows.
fn gather(
    corpus: &Corpus,
    wanted: &Wanted,
    config: &Config,
    tokenizer: &Tokenizer,
    cx: Cx,
) -> Result<Gathered> {
    let (name, mut text, mut rows) = (label(corpus), String::new(), Vec::new());
    // One token more than is used: the last one may still change.
    let tokens = wanted.at_most.map(|n| n.saturating_mul(wanted.seq_len).saturating_add(1));
    let mut goal = tokens.map_or(usize::MAX, |n| n.saturating_mul(BYTES_PER_TOKEN));
    for piece in pieces(corpus)? {
        cx.check()?;
        match piece? {
            Piece::Ids { ids, place } => {
                check_row(&ids, &place, config)?;
                rows.push(ids);
                if wanted.at_most.is_some_and(|n| rows.len() >= n) {
                    break;
                }
            }
            Piece::Text { text: next, begins } => {
                if begins && !text.is_empty() {
                    text.push_str("\n\n");
                }
                text.push_str(&next);
            }
        }
        if !rows.is_empty() && !text.is_empty() {
            return Err(Error::data(format!(
                "{name}: mixes rows of `text` and of `input_ids`; split the file"
            )));
        }
        if text.len() >= goal {
            let encoded = encode(tokenizer, &text)?;
            if tokens.is_none_or(|n| encoded.ids.len() >= n) {
                return Ok(Gathered::Text(encoded));
            }
            goal = text.len() * 2;
        }
        if text.len() > MAX_TEXT_BYTES {
            cx.note(format!("only the first {} MiB of {name} are used", MAX_TEXT_BYTES >> 20));
            break;
        }
    }
    if rows.is_empty() { Ok(Gathered::Text(encode(tokenizer, &text)?)) } else { Ok(Gathered::Rows(rows)) }
}

fn check_row(ids: &[u32], place: &str, config: &Config) -> Result<()> {
    if ids.len() < 2 {
        return Err(Error::data(format!("{place}: {} token ids; a window needs at least 2", ids.len())));
    }
    if ids.len() > config.max_position_embeddings {
        return Err(Error::data(format!(
            "{place}: {} token ids, but the model can take {} (max_position_embeddings)",
            ids.len(),
            config.max_position_embeddings
        )));
    }
    match ids.iter().find(|id| **id as usize >= config.vocab_size) {
        None => Ok(()),
        Some(id) => Err(Error::data(format!(
            "{place}: token id {id} is outside the model's vocabulary of {}; tokenize with this model's tokenizer",
            config.vocab_size
        ))),
    }
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Encoded> {
    let encoding = tokenizer.encode(text, false).map_err(|e| Error::model(format!("tokenizer.json: {e}")))?;
    Ok(Encoded {
        text: text.to_owned(),
        ids: encoding.get_ids().to_vec(),
        ends: encoding.get_offsets().iter().map(|o| o.1).collect(),
    })
}

fn cut(encoded: &Encoded, wanted: &Wanted, name: &str) -> Result<Windows> {
    let (tokens, seq_len) = (encoded.ids.len(), wanted.seq_len);
    if tokens == 0 {
        return Err(Error::data(format!("{name}: the corpus is empty; give some text")));
    }
    if tokens < seq_len {
        return Err(Error::data(format!(
            "{name}: {tokens} tokens, but one window takes seq_len = {seq_len}; give more text or a smaller seq_len"
        )));
    }
    let spans = spans(tokens, seq_len, wanted.stride, wanted.at_most.unwrap_or(usize::MAX));
    let end = encoded.ends[spans.last().map_or(0, |span| span.end - 1)];
    let covered = encoded.text.get(..end).unwrap_or(&encoded.text);
    let ends = spans.iter().map(|span| span.end);
    let from =
        spans.iter().zip(std::iter::once(1).chain(ends)).map(|(span, seen)| (seen - span.start).max(1));
    Ok(Windows {
        from: from.collect(),
        ids: spans.iter().map(|span| encoded.ids[span.clone()].to_vec()).collect(),
        words: covered.split_whitespace().count() as u64,
    })
}

/// The places of at most `most` windows in a text of so many tokens. With a stride each begins so much behind the
/// one before it and the last one ends with the text, as the perplexity of transformers' documentation has it.
fn spans(tokens: usize, seq_len: usize, stride: Option<usize>, most: usize) -> Vec<Range<usize>> {
    let Some(stride) = stride else {
        return (0..tokens / seq_len).take(most).map(|i| i * seq_len..(i + 1) * seq_len).collect();
    };
    let mut spans: Vec<Range<usize>> = Vec::new();
    while spans.len() < most && spans.last().is_none_or(|last| last.end < tokens) {
        let start = spans.len() * stride;
        spans.push(start..(start + seq_len).min(tokens));
    }
    spans
}

fn words(tokenizer: &Tokenizer, ids: &[u32]) -> Result<u64> {
    let text = tokenizer.decode(ids, true).map_err(|e| Error::model(format!("tokenizer.json: {e}")))?;
    Ok(text.split_whitespace().count() as u64)
}
