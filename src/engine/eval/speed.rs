//! How fast checkpoints read a prompt and write, one text at a time, in turn: what else the machine does meets all of
//! them alike.

use std::time::Instant;

use crate::engine::model::cache::KvCache;
use crate::engine::model::{Batch, Checkpoint, Decoder};
use crate::engine::{Cx, Error, Result};
use crate::job::report::{Estimate, Speed};

const PROMPT_TOKENS: usize = 256;
const DECODED_TOKENS: usize = 40;
/// In each of which every checkpoint has a turn.
const ROUNDS: usize = 5;

/// The times of one turn, in seconds.
struct Turn {
    first_token: f64,
    tokens: Vec<f64>,
}

/// The turns of each checkpoint, and what they were made of.
pub struct Turns {
    turns: Vec<Vec<Turn>>,
    prompt_tokens: usize,
    decoded_tokens: usize,
}

impl Turns {
    /// Prefill and decode speed with a KV cache of all `checkpoints`. One at a time is open.
    pub fn take(checkpoints: &[&Checkpoint], cx: Cx) -> Result<Self> {
        let most = checkpoints.iter().map(|c| c.config().max_position_embeddings).min().unwrap_or(0);
        let prompt_tokens = PROMPT_TOKENS.min(most / 2).max(1);
        let decoded_tokens = DECODED_TOKENS.min(most - prompt_tokens).max(1);
        let mut out =
            Self { turns: checkpoints.iter().map(|_| Vec::new()).collect(), prompt_tokens, decoded_tokens };
        for round in 0..ROUNDS {
            for (checkpoint, turns) in checkpoints.iter().zip(&mut out.turns) {
                let decoder = Decoder::open(checkpoint, cx.compute)?;
                turns.push(turn(&decoder, prompt_tokens, decoded_tokens)?);
                cx.check()?;
            }
            cx.advanced("speed", round as u64 + 1, ROUNDS as u64, "rounds")?;
        }
        Ok(out)
    }

    /// That of checkpoint `which`.
    pub fn speed(&self, which: usize) -> Speed {
        let turns = &self.turns[which];
        let first: Vec<f64> = turns.iter().map(|turn| turn.first_token).collect();
        let tokens: Vec<f64> = turns.iter().flat_map(|turn| &turn.tokens).copied().collect();
        Speed {
            prefill_tokens_per_s: per_second(self.prompt_tokens, quantile(&first, 0.5)),
            decode_tokens_per_s: per_second(self.decoded_tokens, quantile(&self.decoding(which), 0.5)),
            latency_ms: 1e3 * quantile(&tokens, 0.5),
            latency_p95_ms: 1e3 * quantile(&tokens, 0.95),
            first_token_ms: 1e3 * quantile(&first, 0.5),
            first_token_p95_ms: 1e3 * quantile(&first, 0.95),
            prompt_tokens: self.prompt_tokens as u32,
            decoded_tokens: self.decoded_tokens as u32,
            rounds: ROUNDS as u32,
        }
    }

    /// How many times faster than the first checkpoint `which` reads and writes, round by round.
    pub fn speedups(&self, which: usize) -> (Estimate, Estimate) {
        let first = |which: usize| self.turns[which].iter().map(|turn| turn.first_token).collect::<Vec<_>>();
        (over(&first(0), &first(which)), over(&self.decoding(0), &self.decoding(which)))
    }

    /// Seconds of decoding, by round.
    fn decoding(&self, which: usize) -> Vec<f64> {
        self.turns[which].iter().map(|turn| turn.tokens.iter().sum()).collect()
    }
}

/// Median of the ratios, the least and the largest.
fn over(base: &[f64], own: &[f64]) -> Estimate {
    let ratios: Vec<f64> =
        base.iter().zip(own).map(|(base, own)| base / own.max(f64::MIN_POSITIVE)).collect();
    Estimate { value: quantile(&ratios, 0.5), low: quantile(&ratios, 0.0), high: quantile(&ratios, 1.0) }
}

fn turn(decoder: &Decoder, prompt_tokens: usize, decoded_tokens: usize) -> Result<Turn> {
    let vocab = decoder.config().vocab_size;
    // Any ids do: the work is the same. 7919 is prime, so they differ.
    let prompt: Vec<u32> = (0..prompt_tokens).map(|i| (i * 7919 % vocab) as u32).collect();
    // The weights were not read since another checkpoint had its turn.
    likeliest(decoder, &prompt[..1], &mut decoder.cache(1, 1)?)?;
    let mut cache = decoder.cache(1, prompt_tokens + decoded_tokens)?;
    let started = Instant::now();
    let mut next = likeliest(decoder, &prompt, &mut cache)?;
    let first_token = started.elapsed().as_secs_f64();
    let mut tokens = Vec::with_capacity(decoded_tokens);
    for _ in 0..decoded_tokens {
        let started = Instant::now();
        next = likeliest(decoder, &[next], &mut cache)?;
        tokens.push(started.elapsed().as_secs_f64());
    }
    Ok(Turn { first_token, tokens })
}

/// Reads `tokens` and gives the likeliest next one; that brings the result off the device, too.
fn likeliest(decoder: &Decoder, tokens: &[u32], cache: &mut KvCache) -> Result<u32> {
    let x = decoder.step(&Batch::of(&[tokens]), &[0], cache)?;
    let logits = decoder.logits(&x.narrow(0, tokens.len() - 1, 1)?)?;
    let best: Vec<u32> = logits.argmax(1)?.to_vec1()?;
    best.first().copied().ok_or_else(|| Error::bug("no logits"))
}

fn per_second(n: usize, seconds: f64) -> f64 {
    n as f64 / seconds.max(f64::MIN_POSITIVE)
}

/// The value that this share of them does not exceed.
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let at = (share * values.len() as f64).ceil() as usize;
    values.get(at.saturating_sub(1)).copied().unwrap_or(0.0)
}
