//! Rolling perplexity: every token of a window after the first is scored, and none twice.

use super::finite;
use super::loglikelihood::{Request, likelihoods};
use super::uncertainty::ratio;
use crate::engine::data::Windows;
use crate::engine::model::Decoder;
use crate::engine::{Cx, Result};
use crate::job::report::Perplexity;

/// The perplexity of the checkpoint called `which` on the windows of `corpus`, and for each window its negative
/// log-likelihood, in nats, and how many tokens were scored.
pub fn measure(
    decoder: &Decoder,
    which: &str,
    corpus: &str,
    windows: &Windows,
    cx: Cx,
) -> Result<(Perplexity, Vec<(f64, usize)>)> {
    let request = |(ids, from): (&Vec<u32>, &usize)| Request { tokens: ids.clone(), from: *from };
    let requests: Vec<Request> = windows.ids.iter().zip(&windows.from).map(request).collect();
    let scored = likelihoods(decoder, &requests, &format!("{which}: {corpus}"), cx)?;
    let parts: Vec<f64> = scored.iter().map(|s| -s.log_likelihood).collect();
    let nll = finite(parts.iter().sum(), which, corpus)?;
    let tokens: u64 = requests.iter().map(|r| (r.tokens.len() - r.from) as u64).sum();
    let sizes: Vec<f64> = requests.iter().map(|r| (r.tokens.len() - r.from) as f64).collect();
    let (nll_per_token, stderr) = ratio(&parts, &sizes);
    let score = Perplexity {
        corpus: corpus.to_owned(),
        value: nll_per_token.exp(),
        nll_per_token,
        nll_over_ln_vocab: nll_per_token / (decoder.config().vocab_size as f64).ln(),
        // A text of no words at all, such as bare digits of padding, still has an end.
        word_perplexity: (nll / windows.words.max(1) as f64).exp(),
        tokens,
        // To first order, as the derivative of exp is exp.
        stderr: nll_per_token.exp() * stderr,
    };
    let windows = parts.into_iter().zip(&requests).map(|(nll, r)| (nll, r.tokens.len() - r.from));
    Ok((score, windows.collect()))
}
