//! Text from a model: sampled with a KV cache, seeded, several sequences at once.

use candle_core::Tensor;
use candle_transformers::generation::{LogitsProcessor, Sampling};
use rayon::prelude::*;

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

/// Sequences decoded together: enough that reading the weights is not what
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
    let total = (writing.sequences * writing.tokens) as u64;
    let mut out = Vec::with_capacity(writing.sequences);
    while out.len() < writing.sequences {
        let batch = BATCH.min(writing.sequences - out.len());
        let mut samplers: Vec<_> = (0..batch)
            .map(|i| sampler(writing.temperature, stream_key(&[writing.seed, (out.len() + i) as u64])))
            .collect();
        let mut texts = vec![vec![start]; batch];
        let mut cache = decoder.cache(batch, writing.tokens)?;
        for done in 1..writing.tokens {
            let fresh = decoder.unread(&mut cache, texts[0].len());
            let unread: Vec<&[u32]> = texts.iter().map(|t| &t[fresh..]).collect();
            let next = next_tokens(decoder, &unread, &mut cache, &mut samplers)?;
            for (text, token) in texts.iter_mut().zip(next) {
                text.push(token);
            }
            cx.advanced(
                writing.task,
                (out.len() * writing.tokens + batch * (done + 1)) as u64,
                total,
                "tokens",
            )?;
        }
        out.append(&mut texts);
    }
    Ok(out)
}

/// Continues `prompt` by at most `tokens` tokens; stops at an end token. `each` sees every new token.
pub fn continue_text(
    decoder: &Decoder,
    prompt: &[u32],
    tokens: usize,
    temperature: f64,
    seed: u64,
    mut each: impl FnMut(u32),
) -> Result<Vec<u32>> {
    if prompt.is_empty() {
        return Err(Error::data("the prompt has no tokens"));
    }
    let mut sampler = sampler(temperature, seed);
    let mut cache = decoder.cache(1, prompt.len() + tokens)?;
    let mut text = prompt.to_vec();
    while text.len() < prompt.len() + tokens {
        let fresh = decoder.unread(&mut cache, text.len());
        let token =
            next_tokens(decoder, &[&text[fresh..]], &mut cache, std::slice::from_mut(&mut sampler))?[0];
        if decoder.config().eos_tokens.contains(&token) {
            break;
        }
        each(token);
        text.push(token);
    }
    Ok(text.split_off(prompt.len()))
}

fn sampler(temperature: f64, seed: u64) -> LogitsProcessor {
    let sampling = if temperature > 0.0 { Sampling::All { temperature } } else { Sampling::ArgMax };
    LogitsProcessor::from_sampling(seed, sampling)
}

/// One token more for each text, whose unread ends, all of one length, are given.
fn next_tokens(
    decoder: &Decoder,
    unread: &[&[u32]],
    cache: &mut KvCache,
    samplers: &mut [LogitsProcessor],
) -> Result<Vec<u32>> {
    let batch = Batch::of(unread);
    let last: Vec<u32> = batch.sequences.iter().map(|text| text.queries.end as u32 - 1).collect();
    let x = decoder.step(&batch, cache)?;
    let logits = decoder.logits(&x.index_select(&Tensor::new(last, x.device())?, 0)?)?;
    let rows: Vec<Tensor> = (0..unread.len()).map(|i| logits.get(i)).collect::<candle_core::Result<_>>()?;
    let sampled: Vec<candle_core::Result<u32>> =
        samplers.par_iter_mut().zip(rows.par_iter()).map(|(sampler, row)| sampler.sample(row)).collect();
    Ok(sampled.into_iter().collect::<candle_core::Result<_>>()?)
}
