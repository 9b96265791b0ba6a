//! The logit lens: what the head would say of the stream at every seam (the review, section 5.3).

use std::collections::HashMap;

use candle_core::Tensor;

use crate::engine::Result;
use crate::engine::model::{Batch, Decoder};
use crate::job::report::LensReading;

/// Predicted tokens that are read at every seam, spread evenly over all windows: the head costs as much as
/// several layers.
const TOKENS: usize = 1024;

pub struct Lens {
    /// Every so many tokens of the windows, counted through, is read.
    every: usize,
    /// Tokens before each window.
    before: Vec<usize>,
    /// By seam: sum of losses, tokens read, and the likeliest token of each.
    seams: Vec<Seam>,
}

#[derive(Default, Clone)]
struct Seam {
    loss: f64,
    tokens: usize,
    /// By place among all tokens.
    best: HashMap<usize, usize>,
}

impl Lens {
    pub fn new(windows: &[&[u32]], decoder: &Decoder) -> Self {
        let mut total = 0;
        let before = windows.iter().map(|window| {
            total += window.len();
            total - window.len()
        });
        let before = before.collect();
        let seams = vec![Seam::default(); decoder.config().layer_count + 1];
        Self { every: total.div_ceil(TOKENS).max(1), before, seams }
    }

    /// Reads the stream `x` at a seam, of the batch of windows `first..`.
    pub fn read(
        &mut self,
        decoder: &Decoder,
        seam: usize,
        first: usize,
        batch: &Batch,
        x: &Tensor,
    ) -> Result<()> {
        let (mut places, mut rows, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for (window, text) in batch.sequences.iter().enumerate() {
            for (at, row) in text.queries.clone().enumerate() {
                let place = self.before[first + window] + at;
                // The last token of a window predicts nothing that is known.
                if place.is_multiple_of(self.every) && row + 1 < text.queries.end {
                    places.push(place);
                    rows.push(row as u32);
                    targets.push(batch.tokens[row + 1]);
                }
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let odds = decoder.odds(&x.index_select(&Tensor::new(rows, x.device())?, 0)?, &targets)?;
        let seam = &mut self.seams[seam];
        for (place, odds) in places.into_iter().zip(odds) {
            seam.loss -= odds.likelihood().log_likelihood;
            seam.tokens += 1;
            seam.best.insert(place, odds.best());
        }
        Ok(())
    }

    /// Loss and agreement with the whole model, seam by seam.
    pub fn readings(&self) -> Vec<LensReading> {
        let Some(whole) = self.seams.last() else { return Vec::new() };
        let reading = |seam: &Seam| {
            let alike = seam.best.iter().filter(|(place, best)| whole.best.get(place) == Some(best)).count();
            let tokens = seam.tokens.max(1) as f64;
            LensReading { loss: seam.loss / tokens, agreement: alike as f64 / tokens }
        };
        self.seams.iter().map(reading).collect()
    }
}
