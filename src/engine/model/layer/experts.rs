//! A mixture of experts in place of the MLP: each token goes through the few experts its router likes
//! best (Shazeer et al., arXiv 1701.06538; as in Mixtral, arXiv 2401.04088).

use candle_core::{DType, Tensor};

use crate::checkpoint::{Activation, ExpertsShape};
use crate::engine::model::checkpoint::Checkpoint;
use crate::engine::model::{Compute, Weight, ops};
use crate::engine::{Error, Result};

#[derive(Clone)]
pub struct Experts {
    /// `[experts, h]`, in float32: who is chosen must not hang on rounding.
    router: Weight,
    /// gate, up and down of each expert.
    experts: Vec<[Weight; 3]>,
    shape: ExpertsShape,
}

impl Experts {
    pub fn load(checkpoint: &Checkpoint, index: usize, compute: &Compute) -> Result<Self> {
        let config = checkpoint.config();
        let (Some(names), Some(shape)) = (config.family.experts, config.experts) else {
            return Err(Error::bug("a sparse layer in a model without experts"));
        };
        let name = |name: &str| format!("{}.weight", config.in_layer(index, name));
        let (h, f) = (config.hidden_size, shape.width);
        let expert = |expert: usize| {
            let read = |i: usize, shape| {
                let linear = format!("{}{expert}.{}", names.experts, names.linears[i]);
                Weight::load(checkpoint, &name(&linear), shape, compute)
            };
            Ok([read(0, (f, h))?, read(1, (f, h))?, read(2, (h, f))?])
        };
        let router = checkpoint.tensor(&name(names.router), compute.dtype, &compute.device)?;
        Ok(Self {
            router: Weight::Dense(router),
            experts: (0..shape.count).map(expert).collect::<Result<_>>()?,
            shape,
        })
    }

    /// What the chosen experts make of `x [n, h]`, each by its share.
    pub fn forward(&self, x: &Tensor, activation: Activation) -> candle_core::Result<Tensor> {
        let (n, k) = (x.dim(0)?, self.shape.per_token);
        let shares = ops::softmax(&self.router.product(x)?.to_dtype(DType::F32)?)?;
        let chosen = chosen(&shares, k)?;
        let places: Vec<u32> = chosen.iter().flatten().copied().collect();
        let mut shares = shares.gather(&Tensor::from_vec(places, (n, k), x.device())?, 1)?;
        if self.shape.normalised {
            shares = shares.broadcast_div(&shares.sum_keepdim(1)?)?;
        }
        let shares = shares.reshape(n * k)?.to_dtype(x.dtype())?;
        let mut out = x.zeros_like()?;
        for (expert, [gate, up, down]) in self.experts.iter().enumerate() {
            // The tokens that go here, and where their share stands.
            let (mut tokens, mut at) = (Vec::new(), Vec::new());
            for (token, experts) in chosen.iter().enumerate() {
                if let Some(place) = experts.iter().position(|e| *e as usize == expert) {
                    tokens.push(token as u32);
                    at.push((token * k + place) as u32);
                }
            }
            if tokens.is_empty() {
                continue;
            }
            let (tokens, at) = (Tensor::new(tokens, x.device())?, Tensor::new(at, x.device())?);
            let entering = x.index_select(&tokens, 0)?;
            let gate = ops::activate(&gate.product(&entering)?, activation)?;
            let hidden = (gate * up.product(&entering)?)?;
            let leaving = down.product(&hidden)?;
            let leaving = leaving.broadcast_mul(&shares.index_select(&at, 0)?.unsqueeze(1)?)?;
            out = out.index_add(&tokens, &leaving, 0)?;
        }
        Ok(out)
    }
}

/// The `k` largest of each row, largest first; of equals the first.
fn chosen(shares: &Tensor, k: usize) -> candle_core::Result<Vec<Vec<u32>>> {
    let rows: Vec<Vec<f32>> = shares.detach().to_vec2()?;
    let best = |row: &Vec<f32>| {
        let mut order: Vec<u32> = (0..row.len() as u32).collect();
        order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
        order.truncate(k);
        order
    };
    Ok(rows.iter().map(best).collect())
}
