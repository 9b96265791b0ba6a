//! How fast a checkpoint reads a prompt and writes, one sequence at a time.

use std::time::{Duration, Instant};

use crate::engine::model::{Batch, Decoder};
use crate::engine::{Cx, Error, Result};
use crate::job::report::Speed;

const PROMPT_TOKENS: usize = 256;
const DECODED_TOKENS: usize = 64;
/// The best of several: what else the machine does can only slow it down.
const REPEATS: usize = 3;

/// Prefill and decode speed with a KV cache, at batch size 1.
pub fn measure(decoder: &Decoder, which: &str, cx: Cx) -> Result<Speed> {
    let most = decoder.config().max_position_embeddings;
    let prompt_len = PROMPT_TOKENS.min(most / 2).max(1);
    let decoded = DECODED_TOKENS.min(most - prompt_len).max(1);
    let vocab = decoder.config().vocab_size;
    // Any ids do: the work is the same. 7919 is prime, so they differ.
    let prompt: Vec<u32> = (0..prompt_len).map(|i| (i * 7919 % vocab) as u32).collect();
    let (mut prefill, mut decode) = (Duration::MAX, Duration::MAX);
    for repeat in 0..REPEATS {
        let mut cache = decoder.cache(1, prompt_len + decoded)?;
        let started = Instant::now();
        let mut next = likeliest(decoder, &prompt, &mut cache)?;
        prefill = prefill.min(started.elapsed());
        let started = Instant::now();
        for _ in 0..decoded {
            next = likeliest(decoder, &[next], &mut cache)?;
        }
        decode = decode.min(started.elapsed());
        cx.advanced(&format!("{which}: speed"), repeat as u64 + 1, REPEATS as u64, "runs")?;
    }
    let per_second = |n: usize, time: Duration| n as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE);
    Ok(Speed {
        prefill_tokens_per_s: per_second(prompt_len, prefill),
        decode_tokens_per_s: per_second(decoded, decode),
        latency_ms: decode.as_secs_f64() * 1e3 / decoded as f64,
    })
}

/// Reads `tokens` and gives the likeliest next one; that brings the result off the device, too.
fn likeliest(
    decoder: &Decoder,
    tokens: &[u32],
    cache: &mut crate::engine::model::cache::KvCache,
) -> Result<u32> {
    let x = decoder.step(&Batch::of(&[tokens]), &[0], cache)?;
    let logits = decoder.logits(&x.narrow(0, tokens.len() - 1, 1)?)?;
    let best: Vec<u32> = logits.argmax(1)?.to_vec1()?;
    best.first().copied().ok_or_else(|| Error::bug("no logits"))
}
