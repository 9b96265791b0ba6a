//! The oracles of [`select`](super::select): how much worse the model gets without some of its layers.

use std::collections::HashMap;

use super::data::items::Item;
use super::eval::loglikelihood::{Request, likelihoods_without};
use super::eval::tasks;
use super::model::{Checkpoint, Decoder};
use super::select::Oracle;
use super::{Cx, Error, Result};
use crate::job::spec::DamageMeasure;

/// Damage on text: the loss per token above the intact model's, in nats.
pub struct Damage<'a> {
    decoder: Decoder,
    requests: Vec<Request>,
    /// The intact model's loss by number of windows.
    intact: HashMap<usize, f64>,
    cx: Cx<'a>,
}

impl<'a> Damage<'a> {
    /// Measures on `windows`.
    ///
    /// # Errors
    /// A data error when there is no window; a model error when the weights cannot be read.
    pub fn open(
        base: &Checkpoint,
        windows: Vec<Vec<u32>>,
        measure: DamageMeasure,
        cx: Cx<'a>,
    ) -> Result<Self> {
        match measure {
            DamageMeasure::Loss => {}
            DamageMeasure::Kl => {
                return Err(Error::spec(
                    "prune.damage.measure: \"kl\" is not available in this version; use \"loss\"",
                ));
            }
        }
        let windows = windows.into_iter().filter(|window| window.len() > 1);
        let requests: Vec<Request> = windows.map(|tokens| Request { tokens, from: 1 }).collect();
        if requests.is_empty() {
            return Err(Error::data(
                "the damage corpus gives no window of two tokens to measure on; give more text",
            ));
        }
        Ok(Self { decoder: Decoder::open(base, cx.compute)?, requests, intact: HashMap::new(), cx })
    }

    /// Mean negative log-likelihood per token of the first `windows` windows.
    fn loss(&self, dropped: &[u32], windows: usize) -> Result<f64> {
        let requests = &self.requests[..windows];
        let scored = likelihoods_without(&self.decoder, requests, dropped, |_| self.cx.check())?;
        let tokens: usize = requests.iter().map(|r| r.tokens.len() - r.from).sum();
        Ok(-scored.iter().map(|s| s.log_likelihood).sum::<f64>() / tokens as f64)
    }
}

impl Oracle for Damage<'_> {
    fn windows(&self) -> usize {
        self.requests.len()
    }

    fn tokens(&self, windows: usize) -> u64 {
        self.requests[..windows].iter().map(|r| r.tokens.len() as u64).sum()
    }

    fn measure(
        &mut self,
        sets: &[Vec<u32>],
        windows: usize,
        tell: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let intact = match self.intact.get(&windows) {
            Some(loss) => *loss,
            None => self.loss(&[], windows)?,
        };
        self.intact.insert(windows, intact);
        let mut damages = Vec::with_capacity(sets.len());
        for set in sets {
            damages.push(self.loss(set, windows)? - intact);
            tell(damages.len())?;
        }
        Ok(damages)
    }
}

/// Drop of accuracy on task items: the share of right answers the intact model gives, less what is left of it.
pub struct Accuracy<'a> {
    decoder: Decoder,
    items: Vec<Item>,
    /// What must be scored to answer them, one after another.
    requests: Vec<Request>,
    /// Requests of the items up to and with each.
    ends: Vec<usize>,
    intact: HashMap<usize, f64>,
    cx: Cx<'a>,
}

impl<'a> Accuracy<'a> {
    /// Measures on `items`, of all tasks together.
    pub fn open(base: &Checkpoint, items: Vec<Item>, cx: Cx<'a>) -> Result<Self> {
        let (tokenizer, config) = (base.tokenizer()?, base.config());
        let (mut requests, mut ends) = (Vec::new(), Vec::new());
        for item in &items {
            requests.extend(tasks::requests(&tokenizer, config, std::slice::from_ref(item))?);
            ends.push(requests.len());
        }
        let decoder = Decoder::open(base, cx.compute)?;
        Ok(Self { decoder, items, requests, ends, intact: HashMap::new(), cx })
    }

    /// The share of the first `count` items that is answered rightly.
    fn accuracy(&self, dropped: &[u32], count: usize) -> Result<f64> {
        let requests = &self.requests[..self.ends[count - 1]];
        let scored = likelihoods_without(&self.decoder, requests, dropped, |_| self.cx.check())?;
        let results = tasks::judged(&self.items[..count], &scored)?;
        Ok(results.iter().filter(|result| result.correct).count() as f64 / count as f64)
    }
}

impl Oracle for Accuracy<'_> {
    /// Items.
    fn windows(&self) -> usize {
        self.items.len()
    }

    fn tokens(&self, windows: usize) -> u64 {
        self.requests[..self.ends[windows - 1]].iter().map(|r| r.tokens.len() as u64).sum()
    }

    fn measure(
        &mut self,
        sets: &[Vec<u32>],
        windows: usize,
        tell: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let intact = match self.intact.get(&windows) {
            Some(accuracy) => *accuracy,
            None => self.accuracy(&[], windows)?,
        };
        self.intact.insert(windows, intact);
        let mut drops = Vec::with_capacity(sets.len());
        for set in sets {
            drops.push(intact - self.accuracy(set, windows)?);
            tell(drops.len())?;
        }
        Ok(drops)
    }
}
