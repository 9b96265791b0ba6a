//! What healing trains, as variables, and where in the model they act: adapters on linear layers, or weights of linear
//! layers and of the head themselves.

use std::ops::Range;

use candle_core::{Device, Tensor, Var};

use super::change::{Change, Changes};
use crate::checkpoint::{LinearShape, Role};
use crate::engine::chance::stream_key;
use crate::engine::model::layer::Layer;
use crate::engine::model::lora::{Adapter, Dropout};
use crate::engine::model::{Checkpoint, Compute, Config};
use crate::engine::{Error, Result};
use crate::job::heal::QloraSettings;

pub struct Trainables {
    /// Float32, by layer and linear layer, the head at last.
    pub variables: Vec<Var>,
    /// By layer.
    places: Vec<Vec<Place>>,
    kind: Kind,
    /// The last variable is the head.
    head: bool,
}

/// The linear layer that something trained is of.
#[derive(Clone, Copy)]
struct Place {
    linear: LinearShape,
    /// Among the layer's linear layers.
    index: usize,
    /// Its first variable.
    at: usize,
}

#[derive(Clone, Copy)]
enum Kind {
    /// `A` and `B` in turn.
    Adapters { scale: f64, dropout: f64 },
    /// `[outputs, inputs]`.
    Weights,
}

/// What identifies one micro-batch, for the draws of dropout.
#[derive(Clone, Copy)]
pub struct Draw {
    pub seed: u64,
    pub step: u32,
    pub micro_batch: usize,
}

impl Trainables {
    /// Fresh adapters on every layer that has a target.
    ///
    /// # Errors
    /// A spec error when a target is no linear layer of this model.
    pub fn adapters(config: &Config, settings: &QloraSettings, seed: u64, device: &Device) -> Result<Self> {
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
        let kind = Kind::Adapters { scale, dropout: settings.dropout };
        Ok(Self { variables, places, kind, head: false })
    }

    /// The weights of all linear layers of `layers`, and of a `head` that is not the embedding as well, as they are.
    pub fn weights(source: &Checkpoint, layers: Range<usize>, head: bool, device: &Device) -> Result<Self> {
        let config = source.config();
        let mut variables = Vec::new();
        let mut places = Vec::new();
        let variable = |name: &str, (rows, columns): (usize, usize), turned: bool| {
            let shape = if turned { (columns, rows) } else { (rows, columns) };
            let weight = Tensor::from_vec(source.values(name)?, shape, device)?;
            source.release(name);
            Ok::<_, Error>(Var::from_tensor(&if turned { weight.t()?.contiguous()? } else { weight })?)
        };
        for layer in 0..config.layer_count {
            let mut of_layer = Vec::new();
            for (index, linear) in config.linears(layer).iter().enumerate() {
                if layers.contains(&layer) {
                    let name = weight_name(config, layer, linear);
                    let shape = (linear.outputs, linear.inputs);
                    of_layer.push(Place { linear: *linear, index, at: variables.len() });
                    variables.push(variable(&name, shape, config.family.transposed)?);
                }
            }
            places.push(of_layer);
        }
        if head {
            variables.push(variable(&head_name(config), (config.vocab_size, config.hidden_size), false)?);
        }
        Ok(Self { variables, places, kind: Kind::Weights, head })
    }

    /// Trained parameters.
    pub fn parameters(&self) -> u64 {
        self.variables.iter().map(|v| v.elem_count() as u64).sum()
    }

    /// All adapters with their layers, without dropout and gradient; none where weights are trained.
    pub fn trained_adapters(&self) -> Vec<(usize, LinearShape, Adapter)> {
        let places = self.places.iter().enumerate();
        let places = places.flat_map(|(layer, places)| places.iter().map(move |place| (layer, *place)));
        let Kind::Adapters { scale, .. } = self.kind else { return Vec::new() };
        let adapter = |(layer, place): (usize, Place)| {
            let value = |i: usize| self.variables[i].as_detached_tensor();
            (
                layer,
                place.linear,
                Adapter { a: value(place.at), b: value(place.at + 1), scale, dropout: None },
            )
        };
        places.map(adapter).collect()
    }

    /// What is to be done to the checkpoint it was trained for.
    pub fn changes(&self, config: &Config) -> Changes {
        let mut out: Changes = self
            .trained_adapters()
            .into_iter()
            .map(|(layer, linear, adapter)| (weight_name(config, layer, &linear), Change::Merge(adapter)))
            .collect();
        if matches!(self.kind, Kind::Weights) {
            let value = |at: usize| Change::Replace(self.variables[at].as_detached_tensor());
            for (layer, places) in self.places.iter().enumerate() {
                let weight = |place: &Place| (weight_name(config, layer, &place.linear), value(place.at));
                out.extend(places.iter().map(weight));
            }
            if self.head {
                out.insert(head_name(config), value(self.variables.len() - 1));
            }
        }
        out
    }

    /// The first layer with something trained: below it nothing is. The number of layers where only the head is.
    pub(super) fn lowest(&self) -> usize {
        self.places.iter().position(|places| !places.is_empty()).unwrap_or(self.places.len())
    }

    /// The head's variable.
    pub(super) fn head(&self) -> Option<usize> {
        self.head.then(|| self.variables.len() - 1)
    }

    /// The variables of layer `layer`.
    pub(super) fn of_layer(&self, layer: usize) -> Range<usize> {
        let per_place = match self.kind {
            Kind::Adapters { .. } => 2,
            Kind::Weights => 1,
        };
        let places = &self.places[layer];
        places.first().map_or(0..0, |first| first.at..first.at + per_place * places.len())
    }

    /// The first variable of linear layer `linear` of layer `layer`.
    pub(super) fn place(&self, layer: usize, linear: usize) -> Result<usize> {
        let place = self.places[layer].iter().find(|place| place.index == linear);
        Ok(place.ok_or_else(|| Error::bug("a gradient of what is not trained"))?.at)
    }

    /// Layer `index` with what is trained of it; `tracked` where candle is to find the gradients.
    pub(super) fn on(
        &self,
        layer: Layer,
        index: usize,
        draw: Draw,
        tracked: bool,
        compute: &Compute,
    ) -> Result<Layer> {
        let value = |i: usize| {
            let variable = &self.variables[i];
            if tracked { variable.as_tensor().clone() } else { variable.as_detached_tensor() }
        };
        let places = self.places[index].iter();
        Ok(match self.kind {
            Kind::Weights => {
                layer.with_weights(places.map(|place| (place.index, value(place.at))), compute)?
            }
            Kind::Adapters { scale, dropout } => layer.with_adapters(places.map(|place| {
                let Draw { seed, step, micro_batch } = draw;
                let parts = [seed, u64::from(step), micro_batch as u64, index as u64, place.index as u64];
                let dropout = Dropout { rate: dropout, key: stream_key(&parts) };
                let dropout = Some(dropout).filter(|dropout| dropout.rate > 0.0);
                (place.index, Adapter { a: value(place.at), b: value(place.at + 1), scale, dropout })
            })),
        })
    }
}

fn weight_name(config: &Config, layer: usize, linear: &LinearShape) -> String {
    format!("{}.weight", config.in_layer(layer, linear.name))
}

fn head_name(config: &Config) -> String {
    format!("{}.weight", config.family.names.head)
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
