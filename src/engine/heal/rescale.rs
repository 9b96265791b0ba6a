//! Making up for the size of the stream (Prune&Comp, arXiv 2507.18212).
//!
//! Layers add to the stream, so it grows from one to the next; behind a cut it is too small for what the layers there
//! add to it. It should be multiplied by `α = Σ|wanted| / Σ|found|` there. All that reads the stream norms it first, so
//! the same comes of dividing what the layers behind the cut *add* by α: then no embedding is touched, which may be the
//! head, too.

use super::beside::Beside;
use super::change::{Changes, scaled_branches};
use super::{Case, Remedy};
use crate::engine::Result;

/// Measures the factor of each cut, from the lowest on, and scales the layers behind.
pub fn heal(case: &Case) -> Result<Remedy> {
    let mut beside = Beside::open(case)?;
    let mut repaired = Vec::new();
    for (index, (block, seam)) in case.cuts().into_iter().enumerate() {
        beside.go_to(block, seam, 0)?;
        repaired.push(beside.repaired(index, block, |beside| {
            let factor = factor(beside, index)?;
            for batch in 0..beside.batches() {
                let x = (beside.found(batch)? * factor)?;
                beside.repair(batch, &x)?;
            }
            Ok(factor)
        })?);
    }
    let config = case.source.config();
    let mut changes = Changes::new();
    let mut sizes = case.sizes.to_vec();
    for layer in 0..config.layer_count {
        let behind = case.cuts().into_iter().zip(&repaired).filter(|((_, seam), _)| *seam <= layer);
        let factor: f64 = behind.map(|(_, repaired)| repaired.factor).product();
        if factor != 1.0 {
            changes.extend(scaled_branches(config, layer, 1.0 / factor));
        }
    }
    let mut product = 1.0;
    for (size, repaired) in sizes.iter_mut().zip(&repaired) {
        product *= repaired.factor;
        *size *= product;
    }
    Ok(Remedy { sizes, repaired, ..Remedy::new(case, changes) })
}

/// How many times larger the stream behind block `index` should be: by sums of absolute values, over each window, and
/// then the mean.
fn factor(beside: &Beside, index: usize) -> Result<f64> {
    let mut ratios = Vec::new();
    for batch in 0..beside.batches() {
        let sizes = |x: &candle_core::Tensor| x.abs()?.sum(1)?.to_vec1::<f32>();
        let (wanted, found) = (sizes(&beside.wanted(index, batch)?)?, sizes(&beside.found(batch)?)?);
        let mut first = 0;
        for rows in beside.windows(batch) {
            let sum = |x: &[f32]| x[first..first + rows].iter().map(|v| f64::from(*v)).sum::<f64>();
            ratios.push(sum(&wanted) / sum(&found).max(f64::MIN_POSITIVE));
            first += rows;
        }
    }
    Ok(ratios.iter().sum::<f64>() / ratios.len() as f64)
}
