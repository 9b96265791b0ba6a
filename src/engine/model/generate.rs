//! Text from a model: sampled with a KV cache, seeded, several texts at once, of any lengths.

use std::collections::VecDeque;

use candle_core::Tensor;
use candle_transformers::generation::{LogitsProcessor, Sampling};
use rayon::prelude::*;
use serde::Serialize;

use super::batch::Batch;
use super::cache::KvCache;
use super::decoder::Decoder;
use crate::engine::chance::stream_key;
use crate::engine::{Cx, Error, Result};

/// What to write.
#[derive(Debug, Clone)]
pub struct Writing {
    pub sequences: usize,
    /// Tokens of each sequence, the first one included.
    pub tokens: usize,
    /// 0 takes the likeliest token each time; 1 samples from the model as it is.
    pub temperature: f64,
    pub seed: u64,
    /// What progress is called.
    pub task: &'static str,
}

/// A text to go on from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prompt {
    /// At least one.
    pub tokens: Vec<u32>,
    /// Most tokens to write.
    pub most: usize,
    /// 0 takes the likeliest token each time.
    pub temperature: f64,
    pub seed: u64,
}

/// Texts decoded together: enough that reading the weights is not what
/// takes the time, few enough that the caches stay small.
const BATCH: usize = 64;

/// Lets the model write `sequences` texts of `tokens` tokens from nothing but
/// its start token. A text that ends goes on as a new one, as in training data.
///
/// # Errors
/// A model error when the config names neither a start nor an end token.
pub fn write(decoder: &Decoder, writing: &Writing, cx: Cx) -> Result<Vec<Vec<u32>>> {
    let config = decoder.config();
    let start = config.bos_token.or(config.eos_tokens.first().copied()).ok_or_else(|| {
        Error::model("config.json names neither bos_token_id nor eos_token_id, so the model cannot begin a text; give a corpus")
    })?;
    let prompts: Vec<Prompt> = (0..writing.sequences)
        .map(|i| Prompt {
            tokens: vec![start],
            most: writing.tokens - 1,
            temperature: writing.temperature,
            seed: stream_key(&[writing.seed, i as u64]),
        })
        .collect();
    let total = (writing.sequences * (writing.tokens - 1)) as u64;
    let mut tell = |done: usize| cx.advanced(writing.task, done as u64, total, "tokens");
    let written = go_on(decoder, &prompts, &mut |_, _| Ok(false), &mut tell)?;
    Ok(written.into_iter().map(|text| [vec![start], text].concat()).collect())
}

/// Continues `prompt` by at most `tokens` tokens; stops at an end token.
///
/// # Errors
/// A data error when the prompt has no tokens.
pub fn continue_text(
    decoder: &Decoder,
    prompt: &[u32],
    tokens: usize,
    temperature: f64,
    seed: u64,
) -> Result<Vec<u32>> {
    let prompt = Prompt { tokens: prompt.to_vec(), most: tokens, temperature, seed };
    let mut written = go_on(decoder, &[prompt], &mut ends_at_end_token(decoder), &mut |_| Ok(()))?.remove(0);
    written.pop_if(|last| decoder.config().eos_tokens.contains(last));
    Ok(written)
}

/// A text ends with one of the model's end tokens.
pub fn ends_at_end_token(decoder: &Decoder) -> impl Fn(usize, &[u32]) -> Result<bool> {
    |_, written| Ok(written.last().is_some_and(|last| decoder.config().eos_tokens.contains(last)))
}

/// What the model writes after each prompt, as far as there is room for it. `ends(i, written)` says of prompt `i` after each of its tokens
/// whether that was the last; `tell` hears how many tokens are written, of all texts together. Many texts go
/// through the model together, and where one ends the next begins; no text depends on those beside it.
///
/// # Errors
/// A data error when a prompt has no tokens.
pub fn go_on(
    decoder: &Decoder,
    prompts: &[Prompt],
    ends: &mut dyn FnMut(usize, &[u32]) -> Result<bool>,
    tell: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Vec<u32>>> {
    if prompts.iter().any(|prompt| prompt.tokens.is_empty()) {
        return Err(Error::data("the prompt has no tokens"));
    }
    let capacity = prompts.iter().map(|prompt| prompt.tokens.len() + prompt.most).max().unwrap_or(0);
    let compute = decoder.compute();
    let each = KvCache::slot_bytes(decoder.config(), capacity, compute.dtype).max(1);
    let slots = BATCH.min(prompts.len()).min(compute.memory.share(1, 4) / each).max(1);
    let mut cache = decoder.cache(slots, capacity)?;
    let mut waiting: VecDeque<usize> = (0..prompts.len()).filter(|i| prompts[*i].most > 0).collect();
    let mut texts: Vec<Option<Text>> = (0..slots).map(|_| None).collect();
    let mut out = vec![Vec::new(); prompts.len()];
    let mut done = 0;
    loop {
        let going: usize = texts.iter().flatten().count();
        let mut rows = going;
        for (slot, free) in texts.iter_mut().enumerate().filter(|(_, text)| text.is_none()) {
            let Some(next) = waiting.front().copied() else { break };
            // A prompt is read whole, with what the others go on by, as far as a batch takes that.
            rows += prompts[next].tokens.len();
            if rows > decoder.rows_at_once() && rows > prompts[next].tokens.len() {
                break;
            }
            waiting.pop_front();
            cache.read[slot] = 0;
            *free = Some(Text::begin(next, &prompts[next]));
        }
        let mut going: Vec<(usize, &mut Text)> =
            texts.iter_mut().enumerate().filter_map(|(slot, text)| Some((slot, text.as_mut()?))).collect();
        if going.is_empty() {
            return Ok(out);
        }
        next_tokens(decoder, &mut going, &mut cache)?;
        done += going.len();
        for text in &mut texts {
            let Some(Text { prompt, tokens, .. }) = text else { continue };
            let prompt = *prompt;
            let written = &tokens[prompts[prompt].tokens.len()..];
            if ends(prompt, written)? || written.len() >= prompts[prompt].most {
                out[prompt] = written.to_vec();
                *text = None;
            }
        }
        tell(done)?;
    }
}

/// A text that is being written.
struct Text {
    /// Its place among the prompts.
    prompt: usize,
    tokens: Vec<u32>,
    sampler: LogitsProcessor,
}

impl Text {
    fn begin(index: usize, prompt: &Prompt) -> Self {
        let temperature = prompt.temperature;
        let sampling = if temperature > 0.0 { Sampling::All { temperature } } else { Sampling::ArgMax };
        Self {
            prompt: index,
            tokens: prompt.tokens.clone(),
            sampler: LogitsProcessor::from_sampling(prompt.seed, sampling),
        }
    }
}

/// One token more for each text, given with its slot.
fn next_tokens(decoder: &Decoder, texts: &mut [(usize, &mut Text)], cache: &mut KvCache) -> Result<()> {
    let mut slots = Vec::with_capacity(texts.len());
    let mut unread = Vec::with_capacity(texts.len());
    for (slot, text) in texts.iter() {
        let fresh = decoder.unread(cache, *slot, text.tokens.len());
        slots.push(*slot);
        unread.push(&text.tokens[fresh..]);
    }
    let batch = Batch::of(&unread);
    let last: Vec<u32> = batch.sequences.iter().map(|text| text.queries.end as u32 - 1).collect();
    let x = decoder.step(&batch, &slots, cache)?;
    let logits = decoder.logits(&x.index_select(&Tensor::new(last, x.device())?, 0)?)?;
    let rows: Vec<Tensor> = (0..texts.len()).map(|i| logits.get(i)).collect::<candle_core::Result<_>>()?;
    texts.par_iter_mut().zip(rows.par_iter()).try_for_each(|((_, text), row)| {
        text.tokens.push(text.sampler.sample(row)?);
        Ok(())
    })
}
