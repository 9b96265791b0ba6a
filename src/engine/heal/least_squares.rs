//! A linear map for the layers that went (`ReplaceMe`, arXiv 2505.02819), in the MLP below the cut.
//!
//! Below a cut, the MLP gives `M` to the stream and all else of it is `Y`; the base model's stream behind the cut is
//! `X`. The map `T` that brings `M T + Y` nearest to `X` goes into the projection that makes `M`. It is looked for as
//! `T = I + D`, `D = (MᵀM + λI)⁻¹ Mᵀ(X − Y − M)`: where the tokens say little, the MLP stays as it is.
//!
//! Each token counts relative to the size of its `X`: what reads the stream norms it. Where all counted alike, the few
//! tokens with streams hundreds of times larger would have the map to themselves.

use candle_core::{DType, Tensor};

use super::beside::Beside;
use super::change::{Change, Changes, down_projections};
use super::solve::{add_product, solve};
use super::{Case, Remedy};
use crate::engine::model::streams::Streams;
use crate::engine::{Error, Result};
use crate::job::heal::LeastSquaresSettings;

/// Fits the map of each cut, from the lowest on; what is behind sees the streams as they were mended.
pub fn heal(case: &Case, settings: &LeastSquaresSettings) -> Result<Remedy> {
    let mut beside = Beside::open(case)?;
    let config = case.source.config();
    let (mut changes, mut repaired) = (Changes::new(), Vec::new());
    for (index, (block, seam)) in case.cuts().into_iter().enumerate() {
        let Some(below) = seam.checked_sub(1) else {
            return Err(Error::spec("least_squares changes the layer below the cut; keep layer 0"));
        };
        beside.go_to(block, seam, 1)?;
        let rows = (0..beside.batches()).map(|batch| beside.windows(batch).sum());
        let mut given = Streams::new(rows, config.hidden_size, case.cx.compute)?;
        let mut equations = Equations::new(config.hidden_size);
        beside.through_layer(|beside, batch, gives, leaving| {
            given.set(batch, gives)?;
            let wanted = beside.wanted(index, batch)?;
            let each = (wanted.sqr()?.sum_keepdim(1)? + f64::from(f32::MIN_POSITIVE))?.sqrt()?.recip()?;
            equations.add(&gives.broadcast_mul(&each)?, &(wanted - leaving)?.broadcast_mul(&each)?)
        })?;
        let map = equations.solve(settings.ridge)?;
        repaired.push(beside.repaired(index, block, |beside| {
            for batch in 0..beside.batches() {
                let x = (beside.found(batch)? + given.get(batch)?.to_dtype(DType::F32)?.matmul(&map)?)?;
                beside.repair(batch, &x)?;
            }
            Ok(1.0)
        })?);
        changes
            .extend(down_projections(config, below).into_iter().map(|name| (name, Change::Mix(map.clone()))));
    }
    Ok(Remedy { repaired, ..Remedy::new(case, changes) })
}

/// `MᵀM` and `Mᵀ(X − Y − M)`, summed over weighted rows in float64.
struct Equations {
    h: usize,
    squares: Vec<f64>,
    right: Vec<f64>,
    rows: usize,
}

impl Equations {
    fn new(h: usize) -> Self {
        Self { h, squares: vec![0.0; h * h], right: vec![0.0; h * h], rows: 0 }
    }

    /// Adds the rows of `given` and of what is lacking, both `[rows, h]`.
    fn add(&mut self, given: &Tensor, lacking: &Tensor) -> Result<()> {
        let (given, lacking) = (given.to_dtype(DType::F64)?, lacking.to_dtype(DType::F64)?);
        let turned = given.t()?;
        add_product(&mut self.squares, &turned, &given)?;
        add_product(&mut self.right, &turned, &lacking)?;
        self.rows += given.dim(0)?;
        Ok(())
    }

    /// `D [h, h]`, float32; `ridge` relative to the mean of the diagonal of `MᵀM`.
    fn solve(mut self, ridge: f64) -> Result<Tensor> {
        let h = self.h;
        let mean = (0..h).map(|i| self.squares[i * h + i]).sum::<f64>() / h as f64;
        (0..h).for_each(|i| self.squares[i * h + i] += ridge * mean);
        solve(&mut self.squares, &mut self.right, h).map_err(|_| {
            Error::spec(format!(
                "least_squares: {} tokens do not tell {h} outputs of the MLP apart; give more samples or a larger ridge",
                self.rows
            ))
        })?;
        let map: Vec<f32> = self.right.iter().map(|value| *value as f32).collect();
        Ok(Tensor::from_vec(map, (h, h), &candle_core::Device::Cpu)?)
    }
}
