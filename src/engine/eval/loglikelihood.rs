//! The one measurement under all scores: how likely the model finds given tokens.

use candle_core::Tensor;

use crate::engine::model::batch::{Rows, batches};
use crate::engine::model::cuts::{Cuts, carry_cuts};
pub use crate::engine::model::kernel::rows::Likelihood;
use crate::engine::model::{Batch, Decoder};
use crate::engine::{Cx, Result};

/// Tokens to score: those from `from` on, given all before them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub tokens: Vec<u32>,
    /// At least 1: the first token has nothing before it.
    pub from: usize,
}

impl Request {
    /// What the model reads: the last token is scored only.
    fn read(&self) -> &[u32] {
        &self.tokens[..self.tokens.len() - 1]
    }
}

/// The likelihood of each request, in their order; `task` is what progress is called.
///
/// What requests begin with together is computed once: the context of an item's choices, the examples before
/// all items of a subject.
pub fn likelihoods(decoder: &Decoder, requests: &[Request], task: &str, cx: Cx) -> Result<Vec<Likelihood>> {
    let mut tell = |done: usize| cx.advanced(task, done as u64, requests.len() as u64, "sequences");
    let mut of_cuts = likelihoods_without(decoder, requests, Cuts::plain(&[&[]]), &|| cx.check(), &mut tell)?;
    Ok(of_cuts.remove(0))
}

/// The same for the model without the layers of each cut (see [`carry_cuts`]); `tell` hears how many requests are
/// done with, each counted once for each cut, `check` is called between layers.
pub fn likelihoods_without(
    decoder: &Decoder,
    requests: &[Request],
    cuts: Cuts,
    check: &dyn Fn() -> Result<()>,
    tell: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Vec<Likelihood>>> {
    let certain = Likelihood { log_likelihood: 0.0, greedy: true };
    let mut out = vec![vec![certain; requests.len()]; cuts.left_out.len()];
    let mut score = |which: &[usize], places: &[(usize, usize)], x: &Tensor| {
        let targets: Vec<u32> = places.iter().map(|(i, at)| requests[*i].tokens[*at]).collect();
        for ((request, _), token) in places.iter().zip(decoder.likelihoods(x, &targets)?) {
            for cut in which {
                let sum = &mut out[*cut][*request];
                sum.log_likelihood += token.log_likelihood;
                sum.greedy &= token.greedy;
            }
        }
        Ok(())
    };
    walk(decoder, requests, cuts, check, tell, &mut score)?;
    Ok(out)
}

/// Sees cuts that are alike; scored tokens, the request of each and its place there; and the streams `[tokens, h]`
/// behind which they stand.
pub type Score<'a> = &'a mut dyn FnMut(&[usize], &[(usize, usize)], &Tensor) -> Result<()>;

/// Sends requests through the model without the layers of each cut; `tell` and `check` as above. `score` sees all
/// scored tokens of each cut, some at a time.
pub fn walk(
    decoder: &Decoder,
    requests: &[Request],
    cuts: Cuts,
    check: &dyn Fn() -> Result<()>,
    tell: &mut dyn FnMut(usize) -> Result<()>,
    score: Score,
) -> Result<()> {
    // Neighbours have most in common.
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|i| requests[*i].read());
    let texts: Vec<&[u32]> = order.iter().map(|i| requests[*i].read()).collect();
    let shared = decoder.in_common(&texts);
    let parts = batches(&texts, decoder.rows_at_once(), usize::MAX, shared);
    // Where weights do not stay in memory, all go through a layer together.
    let together = if decoder.streamed() { parts.len().max(1) } else { 1 };
    let mut done = 0;
    for parts in parts.chunks(together) {
        let packed: Vec<(Batch, Vec<Rows>)> =
            parts.iter().map(|part| Batch::sharing(&texts[part.clone()], shared)).collect();
        let (batches, rows): (Vec<Batch>, Vec<Vec<Rows>>) = packed.into_iter().unzip();
        let passes: Vec<_> = batches.iter().map(|batch| decoder.pass(batch)).collect();
        carry_cuts(decoder, decoder.streams(&batches)?, &passes, cuts, check, &mut |which, streams| {
            for (i, (part, rows)) in parts.iter().zip(&rows).enumerate() {
                let (mut places, mut at_rows) = (Vec::new(), Vec::new());
                for (request, rows) in order[part.clone()].iter().zip(rows) {
                    for at in requests[*request].from..requests[*request].tokens.len() {
                        places.push((*request, at));
                        at_rows.push(rows.at(at - 1) as u32);
                    }
                }
                let x = streams.get(i)?;
                score(which, &places, &x.index_select(&Tensor::new(at_rows, x.device())?, 0)?)?;
                done += part.len() * which.len();
            }
            tell(done)
        })?;
    }
    Ok(())
}
