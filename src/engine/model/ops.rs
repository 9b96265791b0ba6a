//! Norm, rope, softmax and products over candle tensors, with and without
//! gradient.
//!
//! candle's fused operations have no backward and cut the graph in silence
//! (`apply_op*_no_bwd`). So each function here takes the fused form only for a
//! tensor that no gradient is asked of, and the differentiable form otherwise.
//! This file is the only user of `candle_nn::ops` and `candle_nn::rotary_emb`.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

use super::kernel::rows::SoftTarget;
use crate::checkpoint::Activation;

/// RMS norm over the last dimension.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if x.track_op() {
        candle_nn::ops::rms_norm_slow(x, weight, eps as f32)
    } else {
        candle_nn::ops::rms_norm(&x.contiguous()?, weight, eps as f32)
    }
}

/// Layer norm over the last dimension: mean and variance.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if x.track_op() {
        candle_nn::ops::layer_norm_slow(x, weight, bias, eps as f32)
    } else {
        candle_nn::ops::layer_norm(&x.contiguous()?, weight, bias, eps as f32)
    }
}

/// `activation(gate) · up`.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    activate(gate, activation)? * up
}

pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Silu => candle_nn::ops::silu(x),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Relu => x.relu(),
    }
}

/// `cap · tanh(x / cap)`.
pub fn soft_cap(x: &Tensor, cap: f64) -> Result<Tensor> {
    (x / cap)?.tanh()? * cap
}

/// Rotates pairs `(i, i + pairs)` of the first dimensions of `x [b, heads, t, d]` by `cos`, `sin` `[t, pairs]`.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (rotated, all) = (2 * cos.dim(1)?, x.dim(3)?);
    if rotated < all {
        let turned = rope(&x.narrow(3, 0, rotated)?.contiguous()?, cos, sin)?;
        return Tensor::cat(&[&turned, &x.narrow(3, rotated, all - rotated)?], 3)?.contiguous();
    }
    if x.track_op() {
        candle_nn::rotary_emb::rope_slow(x, cos, sin)
    } else {
        candle_nn::rotary_emb::rope(&x.contiguous()?, cos, sin)
    }
}

/// Shares of attention from `scores [.., keys]`: scaled, capped, what is not seen left out. Rows repeat the
/// queries of `mask [queries, keys]`, 0 or -inf.
pub fn attention_shares(
    scores: &Tensor,
    scale: f64,
    cap: Option<f64>,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let mut scores = (scores * scale)?;
    if let Some(cap) = cap {
        scores = soft_cap(&scores, cap)?;
    }
    if let Some(mask) = mask {
        let shape = scores.shape().clone();
        let repeated = scores.elem_count() / mask.elem_count();
        let (queries, keys) = mask.dims2()?;
        scores = scores.reshape((repeated, queries, keys))?.broadcast_add(mask)?.reshape(shape)?;
    }
    softmax(&scores)
}

/// Softmax over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if x.track_op() {
        candle_nn::ops::softmax(x, candle_core::D::Minus1)
    } else {
        candle_nn::ops::softmax_last_dim(x)
    }
}

/// Per row of `logits [n, vocab]` (float32): `-Σ share · ln p(token)` in nats, and its
/// gradient `softmax(logits) - shares`.
pub fn cross_entropy(logits: &Tensor, targets: &[SoftTarget]) -> Result<(Vec<f32>, Tensor)> {
    // Shorter ones are filled up with nothing of token 0.
    let most = targets.iter().map(Vec::len).max().unwrap_or(0);
    let filled = |of: &SoftTarget| of.clone().into_iter().chain(std::iter::repeat((0, 0.0))).take(most);
    let (tokens, shares): (Vec<u32>, Vec<f32>) = targets.iter().flat_map(filled).unzip();
    let tokens = Tensor::from_vec(tokens, (targets.len(), most), logits.device())?;
    let shares = Tensor::from_vec(shares, (targets.len(), most), logits.device())?;
    let probabilities = candle_nn::ops::softmax_last_dim(logits)?;
    // The largest logit has probability 1 / Σ exp(x - max), so ln Σ exp(x) = max - ln(that): no second exp.
    let log_sum = (logits.max_keepdim(1)? - probabilities.max_keepdim(1)?.log()?)?;
    let own = (logits.gather(&tokens, 1)? * &shares)?.sum_keepdim(1)?;
    let nll = (log_sum - own)?.squeeze(1)?.to_vec1()?;
    Ok((nll, probabilities.scatter_add(&tokens, &shares.neg()?, 1)?))
}

/// The backward pass from `y` on, given the gradient that arrives at it.
pub fn backward_from(y: &Tensor, upstream: &Tensor) -> Result<GradStore> {
    // candle starts at a scalar only: d/dx Σ(y · u) is the product wanted.
    (y * upstream.detach())?.sum_all()?.backward()
}
