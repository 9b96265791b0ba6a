//! Loss and gradients of what is trained, layer by layer through the seams.
//!
//! Forward keeps the stream entering each layer, and what happened inside of as many as there is room for.
//! Backward takes the layers in reverse: it runs one again from its seam where that was not kept, and pulls the
//! gradient through it (activation checkpointing by construction).

use candle_core::{DType, Tensor, Var};

use super::trainables::{Draw, Trainables};
use crate::engine::eval::loglikelihood::{Request, likelihoods};
use crate::engine::model::decoder::HeadLoss;
use crate::engine::model::kernel::attention::Sequence;
use crate::engine::model::kernel::rows::SoftTarget;
use crate::engine::model::layer::{Gradients, Layer, Pass, Trace};
use crate::engine::model::streams::Streams;
use crate::engine::model::{Batch, Decoder, ops};
use crate::engine::{Cx, Error, Result};

/// What is to be predicted, and what the stream is to be on the way.
pub struct Objective<'a> {
    /// One for every token of the windows but the first of each.
    pub targets: &'a [SoftTarget],
    pub seams: &'a [Seam],
    /// What all sums are multiplied with before gradients are taken.
    pub scale: f64,
}

/// The stream of all windows, one behind the other, where it enters a layer below which nothing is trained.
pub struct Entering {
    pub layer: usize,
    /// `[rows, h]`.
    pub stream: Tensor,
}

/// What the stream should be at a seam.
pub struct Seam {
    /// The layer that it enters.
    pub layer: usize,
    /// `[rows, h]`, float32, for all rows of the batch.
    pub wanted: Tensor,
    /// What the square of what the stream lacks of it, relative to its own, is multiplied with, row by row.
    pub weight: f64,
}

/// For every token of `windows` but the first of each: itself.
pub fn next_tokens(windows: &[&[u32]]) -> Vec<SoftTarget> {
    windows.iter().flat_map(|window| &window[1..]).map(|token| vec![(*token, 1.0)]).collect()
}

/// Sum of the cross-entropies of the targets, in nats, and of what the seams add to them, and the gradient of `scale`
/// times that sum for every variable. What is known of the stream of the windows is not computed again.
pub fn loss_and_gradients(
    decoder: &Decoder,
    trainables: &Trainables,
    windows: &[&[u32]],
    known: Option<Entering>,
    objective: &Objective,
    draw: Draw,
) -> Result<(f64, Vec<Tensor>)> {
    let batch = Batch::of(windows);
    let pass = decoder.pass(&batch);
    let layer_count = decoder.config().layer_count;
    let lowest = trainables.lowest();
    let Entering { layer: first, stream } = match known {
        Some(known) => known,
        None => Entering { layer: 0, stream: decoder.embed(&batch)? },
    };
    // The streams entering each layer from the first on, and the one that leaves the last.
    let rows = (first..=layer_count).map(|_| batch.tokens.len());
    let mut seams = Streams::new(rows, decoder.config().hidden_size, decoder.compute())?;
    seams.set(0, &stream)?;
    let mut traces: Vec<Option<Trace>> = Vec::new();
    let mut room = decoder.room_bytes();
    for index in first..layer_count {
        decoder.read_ahead(index + 1);
        let layer = trainables.on(decoder.layer(index)?, index, draw, false, decoder.compute())?;
        let entering = seams.get(index - first)?;
        if index >= lowest && room > 0 && layer.is_native() {
            let (leaving, trace) = layer.forward_traced(&entering, &pass)?;
            room = room.saturating_sub(trace.bytes());
            traces.push(Some(trace));
            seams.set(index + 1 - first, &leaving)?;
        } else {
            traces.push(None);
            seams.set(index + 1 - first, &layer.forward(&entering, &pass, None)?)?;
        }
        decoder.release(index);
    }
    let mut gradients: Vec<Option<Tensor>> = vec![None; trainables.variables.len()];
    let head = trainables.head();
    let weight = head.map(|head| trainables.variables[head].as_detached_tensor());
    let HeadLoss { nll, stream, weight } =
        at_head(decoder, &seams.get(layer_count - first)?, &batch, objective, weight.as_ref())?;
    if let Some(head) = head {
        gradients[head] = weight;
    }
    let mut loss: f64 = nll.iter().map(|n| f64::from(*n)).sum();
    let mut upstream = stream;
    for index in (first..layer_count).rev() {
        for seam in objective.seams.iter().filter(|seam| seam.layer == index + 1) {
            let (lacking, gradient) = seam.lacking(&seams.get(index + 1 - first)?)?;
            loss += lacking;
            upstream = (upstream + (gradient * objective.scale)?.to_dtype(decoder.compute().dtype)?)?;
        }
        if index < lowest {
            continue;
        }
        let layer = trainables.on(decoder.layer(index)?, index, draw, true, decoder.compute())?;
        if index > lowest {
            decoder.read_ahead(index - 1);
        }
        let way =
            Way { entering: &seams.get(index - first)?, pass: &pass, trace: traces[index - first].take() };
        // Nothing is trained below the lowest of it: what enters there needs no gradient.
        let dx = way.back(&layer, index, &upstream, index > lowest, trainables, &mut gradients)?;
        upstream = dx.unwrap_or(upstream);
        decoder.release(index);
    }
    Ok((loss, complete(gradients)?))
}

/// All of the variables' gradients.
pub fn complete(gradients: Vec<Option<Tensor>>) -> Result<Vec<Tensor>> {
    let gradients: Option<Vec<Tensor>> = gradients.into_iter().collect();
    gradients.ok_or_else(|| Error::bug("a variable got no gradient"))
}

/// The way of a stream through one layer, to be gone back.
pub struct Way<'a> {
    /// `[rows, h]`.
    pub entering: &'a Tensor,
    pub pass: &'a Pass,
    /// What was kept of it; it is gone again where nothing was.
    pub trace: Option<Trace>,
}

impl Way<'_> {
    /// Notes the gradients of what is trained of layer `index`, for the gradient `upstream` of the stream leaving it;
    /// gives that of the stream entering it, where it is wanted.
    pub fn back(
        self,
        layer: &Layer,
        index: usize,
        upstream: &Tensor,
        wanted: bool,
        trainables: &Trainables,
        gradients: &mut [Option<Tensor>],
    ) -> Result<Option<Tensor>> {
        if layer.is_native() {
            let (dx, of_layer) = layer.backward(self.entering, self.pass, self.trace, upstream, wanted)?;
            for Gradients { linear, tensors } in of_layer {
                let at = trainables.place(index, linear)?;
                for (gradient, new) in gradients[at..].iter_mut().zip(tensors) {
                    *gradient = Some(new);
                }
            }
            return Ok(dx);
        }
        let leaf = if wanted { Some(Var::from_tensor(self.entering)?) } else { None };
        let x = leaf.as_ref().map_or(self.entering, |leaf| leaf.as_tensor());
        let mut store = ops::backward_from(&layer.forward(x, self.pass, None)?, upstream)?;
        for i in trainables.of_layer(index) {
            gradients[i] = store.remove(&trainables.variables[i]);
        }
        let dx =
            leaf.map(|leaf| store.remove(&leaf).ok_or_else(|| Error::bug("the stream lost its gradient")));
        dx.transpose()
    }
}

impl Seam {
    /// The sum over rows of what the stream `x [rows, h]` lacks, and its gradient for `x`, float32.
    pub fn lacking(&self, x: &Tensor) -> Result<(f64, Tensor)> {
        let gap = (x.to_dtype(DType::F32)? - &self.wanted)?;
        let each =
            ((self.wanted.sqr()?.sum_keepdim(1)? + f64::from(f32::MIN_POSITIVE))?.recip()? * self.weight)?;
        let lacking = (gap.sqr()?.sum_keepdim(1)? * &each)?.sum_all()?.to_scalar::<f32>()?;
        Ok((f64::from(lacking), (gap.broadcast_mul(&each)? * 2.0)?))
    }
}

/// Loss at the head, and its gradients: for the stream `[rows, h]` leaving the last layer, and for a trained weight.
fn at_head(
    decoder: &Decoder,
    x: &Tensor,
    batch: &Batch,
    objective: &Objective,
    trained: Option<&Tensor>,
) -> Result<HeadLoss> {
    // All rows but the last one of each text predict the token behind them.
    let predicting = |text: &Sequence| text.queries.start as u32..text.queries.end as u32 - 1;
    let rows: Vec<u32> = batch.sequences.iter().flat_map(predicting).collect();
    let rows = Tensor::new(rows, x.device())?;
    let of_rows = x.index_select(&rows, 0)?;
    let loss = decoder.token_nll_backward(&of_rows, objective.targets, objective.scale, trained)?;
    let stream = x.zeros_like()?.index_add(&rows, &loss.stream, 0)?;
    Ok(HeadLoss { stream, ..loss })
}

/// Mean negative log-likelihood per predicted token, in nats, without adapters.
pub fn mean_loss(decoder: &Decoder, windows: &[Vec<u32>], cx: Cx) -> Result<f64> {
    let requests: Vec<Request> = windows.iter().map(|w| Request { tokens: w.clone(), from: 1 }).collect();
    let scored = likelihoods(decoder, &requests, "judging on held-out windows", cx)?;
    let predicted: usize = windows.iter().map(|w| w.len() - 1).sum();
    Ok(-scored.iter().map(|s| s.log_likelihood).sum::<f64>() / predicted.max(1) as f64)
}
