//! The one measurement under all scores: how likely the model finds given tokens.

use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

pub use crate::engine::model::kernel::rows::Likelihood;
use crate::engine::model::kernel::rows::likelihood;
use crate::engine::model::{Decoder, pad};
use crate::engine::{Cx, Result};

/// Tokens to score: those from `from` on, given all before them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub tokens: Vec<u32>,
    /// At least 1: the first token has nothing before it.
    pub from: usize,
}

/// Padded tokens per forward pass.
const BATCH_TOKENS: usize = 2048;
/// Rows of logits at a time; `rows × vocab` floats are held at once.
const HEAD_ROWS: usize = 256;

/// The likelihood of each request, in their order; `task` is what progress is called.
pub fn likelihoods(decoder: &Decoder, requests: &[Request], task: &str, cx: Cx) -> Result<Vec<Likelihood>> {
    likelihoods_without(decoder, requests, &[], |done| {
        cx.advanced(task, done as u64, requests.len() as u64, "sequences")
    })
}

/// The same for the model without the layers `dropped` (ascending). `tell` hears how many requests are done;
/// an error of its own ends the work.
pub fn likelihoods_without(
    decoder: &Decoder,
    requests: &[Request],
    dropped: &[u32],
    mut tell: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Likelihood>> {
    // Long ones first: neighbours are of like length, and what does not fit fails at once.
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(requests[*i].tokens.len()));
    let mut out = vec![Likelihood { log_likelihood: 0.0, greedy: true }; requests.len()];
    let mut done = 0;
    while done < order.len() {
        let longest = requests[order[done]].tokens.len().max(1);
        let end = order.len().min(done + (BATCH_TOKENS / longest).max(1));
        let batch = &order[done..end];
        for (i, token) in score(decoder, requests, batch, dropped)? {
            out[i].log_likelihood += token.log_likelihood;
            out[i].greedy &= token.greedy;
        }
        done = end;
        tell(done)?;
    }
    Ok(out)
}

/// One likelihood per scored token of the batch, with the request it belongs to.
fn score(
    decoder: &Decoder,
    requests: &[Request],
    batch: &[usize],
    dropped: &[u32],
) -> Result<Vec<(usize, Likelihood)>> {
    // The last token is scored but never read.
    let inputs: Vec<&[u32]> =
        batch.iter().map(|i| &requests[*i].tokens[..requests[*i].tokens.len() - 1]).collect();
    let width = inputs.iter().map(|s| s.len()).max().unwrap_or(0);
    let (mut rows, mut targets) = (Vec::new(), Vec::new());
    for (row, i) in batch.iter().enumerate() {
        let Request { tokens, from } = &requests[*i];
        for (at, token) in tokens.iter().enumerate().skip(*from) {
            rows.push((row * width + at - 1) as u32);
            targets.push((*i, *token));
        }
    }
    let mut x = decoder.embed(&pad(&inputs, decoder.compute())?)?;
    for kept in kept(decoder.config().layer_count, dropped) {
        x = decoder.layers(x, kept, |_, _| Ok(()))?;
    }
    let x = x.flatten_to(1)?;
    let mut out = Vec::with_capacity(targets.len());
    for (rows, targets) in rows.chunks(HEAD_ROWS).zip(targets.chunks(HEAD_ROWS)) {
        let x = x.index_select(&Tensor::new(rows, x.device())?, 0)?;
        let logits = decoder.logits(&x)?;
        let vocab = logits.dim(1)?;
        let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        let scored =
            logits.par_chunks(vocab).zip(targets).map(|(row, (i, id))| (*i, likelihood(row, *id as usize)));
        out.par_extend(scored);
    }
    Ok(out)
}

/// The runs of layers that stay when the layers `dropped` (ascending) go.
fn kept(layer_count: usize, dropped: &[u32]) -> Vec<Range<usize>> {
    let ends = dropped.iter().map(|l| *l as usize).chain([layer_count]);
    let starts = std::iter::once(0).chain(dropped.iter().map(|l| *l as usize + 1));
    starts.zip(ends).map(|(start, end)| start..end).filter(|run| !run.is_empty()).collect()
}
