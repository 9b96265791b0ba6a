//! Loss and adapter gradients, layer by layer through the seams.
//!
//! Forward keeps the stream entering each layer, and what happened inside of as many as there is room for.
//! Backward takes the layers in reverse: it runs one again from its seam where that was not kept, and pulls the
//! gradient through it (activation checkpointing by construction).

use candle_core::{Device, Tensor, Var};

use crate::checkpoint::{LinearShape, Role};
use crate::engine::chance::stream_key;
use crate::engine::eval::loglikelihood::{Request, likelihoods};
use crate::engine::model::kernel::attention::Sequence;
use crate::engine::model::kernel::rows::SoftTarget;
use crate::engine::model::layer::{AdapterGradient, Layer, Trace};
use crate::engine::model::lora::{Adapter, Dropout};
use crate::engine::model::streams::Streams;
use crate::engine::model::{Batch, Config, Decoder, ops};
use crate::engine::{Cx, Error, Result};
use crate::job::preset::QloraSettings;

/// The adapters of all layers, as variables: `A` and `B` in turn, by layer and linear.
pub struct Adapters {
    pub variables: Vec<Var>,
    /// By layer.
    places: Vec<Vec<Place>>,
    scale: f64,
    dropout: f64,
}

/// The linear layer an adapter sits on.
#[derive(Clone, Copy)]
pub struct Place {
    pub linear: LinearShape,
    /// Among the layer's linear layers.
    index: usize,
    /// `A` in the variables; `B` is the next one.
    at: usize,
}

/// What identifies one micro-batch, for the draws of dropout.
#[derive(Clone, Copy)]
pub struct Draw {
    pub seed: u64,
    pub step: u32,
    pub micro_batch: usize,
}

impl Adapters {
    /// Fresh adapters on every layer that has a target.
    ///
    /// # Errors
    /// A spec error when a target is no linear layer of this model.
    pub fn new(config: &Config, settings: &QloraSettings, seed: u64, device: &Device) -> Result<Self> {
        let targeted = targets(config, &settings.targets)?;
        let rank = settings.rank as usize;
        let scale = settings.alpha / f64::from(settings.rank);
        let mut variables = Vec::new();
        let mut places = Vec::new();
        for layer in 0..config.layer_count {
            let mut of_layer = Vec::new();
            for (index, linear) in config.linears(layer).iter().enumerate() {
                if !targeted(linear) {
                    continue;
                }
                let key = stream_key(&[seed, layer as u64, index as u64]);
                let adapter = Adapter::new(rank, (linear.outputs, linear.inputs), scale, key, device)?;
                of_layer.push(Place { linear: *linear, index, at: variables.len() });
                variables.push(Var::from_tensor(&adapter.a)?);
                variables.push(Var::from_tensor(&adapter.b)?);
            }
            places.push(of_layer);
        }
        if variables.is_empty() {
            return Err(Error::spec(format!(
                "heal targets {}: no layer of this model has such a linear layer; experts carry no adapters, \
                 attention does: {}",
                settings.targets.join(", "),
                names(config).join(", ")
            )));
        }
        Ok(Self { variables, places, scale, dropout: settings.dropout })
    }

    /// Trained parameters.
    pub fn parameters(&self) -> u64 {
        self.variables.iter().map(|v| v.elem_count() as u64).sum()
    }

    /// All adapters with their layers, without dropout and gradient.
    pub fn trained(&self) -> impl Iterator<Item = (usize, LinearShape, Adapter)> {
        let of_layer = |(layer, places): (usize, &'_ Vec<Place>)| {
            places.clone().into_iter().map(move |place| (layer, place))
        };
        self.places.iter().enumerate().flat_map(of_layer).map(|(layer, place)| {
            let value = |i: usize| self.variables[i].as_detached_tensor();
            let adapter =
                Adapter { a: value(place.at), b: value(place.at + 1), scale: self.scale, dropout: None };
            (layer, place.linear, adapter)
        })
    }

    /// The first layer with an adapter: below it nothing is trained.
    fn lowest(&self) -> usize {
        self.places.iter().position(|places| !places.is_empty()).unwrap_or(0)
    }

    fn on(&self, layer: Layer, index: usize, draw: Draw, tracked: bool) -> Layer {
        let value = |i: usize| {
            let variable = &self.variables[i];
            if tracked { variable.as_tensor().clone() } else { variable.as_detached_tensor() }
        };
        layer.with_adapters(self.places[index].iter().map(|place| {
            let Draw { seed, step, micro_batch } = draw;
            let parts = [seed, u64::from(step), micro_batch as u64, index as u64, place.index as u64];
            let dropout = Dropout { rate: self.dropout, key: stream_key(&parts) };
            let dropout = Some(dropout).filter(|dropout| dropout.rate > 0.0);
            (place.index, Adapter { a: value(place.at), b: value(place.at + 1), scale: self.scale, dropout })
        }))
    }
}

/// Which linear layers the words of a spec mean: a name of this model, `attention`, `ffn` or `all`, or the
/// name llama has for a layer of the same role.
///
/// # Errors
/// A spec error for a word that is none of these.
fn targets(config: &Config, words: &[String]) -> Result<impl Fn(&LinearShape) -> bool> {
    let short = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let all = names(config);
    for word in words {
        let known = ["attention", "ffn", "all"].contains(&word.as_str()) || roles(word).is_some();
        if !known && !all.iter().any(|name| name == word || short(name) == *word) {
            return Err(Error::spec(format!(
                "heal target \"{word}\" is no linear layer of this model; there are {}, and the words attention, \
                 ffn and all",
                all.join(", ")
            )));
        }
    }
    let words = words.to_vec();
    let experts = config.experts.is_some();
    Ok(move |linear: &LinearShape| {
        // PEFT takes an MLP's names for those of the experts beside it.
        let carries = linear.role.in_attention() || !experts;
        carries
            && words.iter().any(|word| match word.as_str() {
                "all" => true,
                "attention" => linear.role.in_attention(),
                "ffn" => !linear.role.in_attention(),
                word => {
                    let role = roles(word).is_some_and(|roles| roles.contains(&linear.role));
                    role || linear.name == word || short(linear.name) == word
                }
            })
    })
}

/// What llama's names stand for; several where a family keeps matrices together.
fn roles(word: &str) -> Option<&'static [Role]> {
    match word {
        "q_proj" => Some(&[Role::Query, Role::QueryKeyValue]),
        "k_proj" => Some(&[Role::Key, Role::QueryKeyValue]),
        "v_proj" => Some(&[Role::Value, Role::QueryKeyValue]),
        "o_proj" => Some(&[Role::Output]),
        "gate_proj" => Some(&[Role::Gate, Role::GateUp]),
        "up_proj" => Some(&[Role::Up, Role::GateUp]),
        "down_proj" => Some(&[Role::Down]),
        _ => None,
    }
}

/// The linear layers that adapters can sit on.
fn names(config: &Config) -> Vec<&'static str> {
    let mut all = Vec::new();
    for linear in (0..config.layer_count).flat_map(|layer| config.linears(layer)) {
        if !all.contains(&linear.name) {
            all.push(linear.name);
        }
    }
    all
}

/// For every token of `windows` but the first of each: itself.
pub fn next_tokens(windows: &[&[u32]]) -> Vec<SoftTarget> {
    windows.iter().flat_map(|window| &window[1..]).map(|token| vec![(*token, 1.0)]).collect()
}

/// Sum of the cross-entropies of `targets`, one for every token of `windows` but the first of each, in nats, and the
/// gradient of `scale` times that sum for every variable.
pub fn loss_and_gradients(
    decoder: &Decoder,
    adapters: &Adapters,
    windows: &[&[u32]],
    targets: &[SoftTarget],
    scale: f64,
    draw: Draw,
) -> Result<(f64, Vec<Tensor>)> {
    let batch = Batch::of(windows);
    let pass = decoder.pass(&batch);
    let layer_count = decoder.config().layer_count;
    let lowest = adapters.lowest();
    let rows = batch.tokens.len();
    // The streams entering each layer, and the one that leaves the last.
    let mut seams =
        Streams::new((0..=layer_count).map(|_| rows), decoder.config().hidden_size, decoder.compute())?;
    seams.set(0, &decoder.embed(&batch)?)?;
    let mut traces: Vec<Option<Trace>> = Vec::new();
    let mut room = decoder.room_bytes();
    for index in 0..layer_count {
        decoder.read_ahead(index + 1);
        let layer = adapters.on(decoder.layer(index)?, index, draw, false);
        let entering = seams.get(index)?;
        if index >= lowest && room > 0 && layer.is_native() {
            let (leaving, trace) = layer.forward_traced(&entering, &pass)?;
            room = room.saturating_sub(trace.bytes());
            traces.push(Some(trace));
            seams.set(index + 1, &leaving)?;
        } else {
            traces.push(None);
            seams.set(index + 1, &layer.forward(&entering, &pass, None)?)?;
        }
        decoder.release(index);
    }
    let (nll, mut upstream) = head_backward(decoder, &seams.get(layer_count)?, &batch, targets, scale)?;
    let mut gradients: Vec<Option<Tensor>> = vec![None; adapters.variables.len()];
    for index in (lowest..layer_count).rev() {
        let entering = seams.get(index)?;
        let layer = adapters.on(decoder.layer(index)?, index, draw, true);
        if index > lowest {
            decoder.read_ahead(index - 1);
        }
        if layer.is_native() {
            let trace = traces[index].take();
            let (dx, of_layer) = layer.backward(&entering, &pass, trace, &upstream, index > lowest)?;
            for AdapterGradient { linear, a, b } in of_layer {
                let place = adapters.places[index].iter().find(|place| place.index == linear);
                let at = place.ok_or_else(|| Error::bug("a gradient without an adapter"))?.at;
                (gradients[at], gradients[at + 1]) = (Some(a), Some(b));
            }
            if let Some(dx) = dx {
                upstream = dx;
            }
            decoder.release(index);
            continue;
        }
        // Nothing is trained below the lowest adapter: its layer's input needs no gradient.
        let leaf = if index == lowest { None } else { Some(Var::from_tensor(&entering)?) };
        let x = leaf.as_ref().map_or(&entering, |v| v.as_tensor());
        let mut store = ops::backward_from(&layer.forward(x, &pass, None)?, &upstream)?;
        for i in adapters.places[index].iter().flat_map(|place| [place.at, place.at + 1]) {
            gradients[i] = store.remove(&adapters.variables[i]);
        }
        if let Some(leaf) = leaf {
            upstream = store.remove(&leaf).ok_or_else(|| Error::bug("the stream lost its gradient"))?;
        }
        decoder.release(index);
    }
    let gradients: Option<Vec<Tensor>> = gradients.into_iter().collect();
    Ok((nll, gradients.ok_or_else(|| Error::bug("an adapter got no gradient"))?))
}

/// Loss at the head, and its gradient for the stream `[rows, h]` leaving the last layer.
fn head_backward(
    decoder: &Decoder,
    x: &Tensor,
    batch: &Batch,
    targets: &[SoftTarget],
    scale: f64,
) -> Result<(f64, Tensor)> {
    // All rows but the last one of each text predict the token behind them.
    let predicting = |text: &Sequence| text.queries.start as u32..text.queries.end as u32 - 1;
    let rows: Vec<u32> = batch.sequences.iter().flat_map(predicting).collect();
    let rows = Tensor::new(rows, x.device())?;
    let (nll, gradient) = decoder.token_nll_backward(&x.index_select(&rows, 0)?, targets, scale)?;
    let all = x.zeros_like()?.index_add(&rows, &gradient, 0)?;
    Ok((nll.iter().map(|n| f64::from(*n)).sum(), all))
}

/// Mean negative log-likelihood per predicted token, in nats, without adapters.
pub fn mean_loss(decoder: &Decoder, windows: &[Vec<u32>], cx: Cx) -> Result<f64> {
    let requests: Vec<Request> = windows.iter().map(|w| Request { tokens: w.clone(), from: 1 }).collect();
    let scored = likelihoods(decoder, &requests, "judging on held-out windows", cx)?;
    let predicted: usize = windows.iter().map(|w| w.len() - 1).sum();
    Ok(-scored.iter().map(|s| s.log_likelihood).sum::<f64>() / predicted.max(1) as f64)
}
