//! The oracles of [`select`](super::select): how much worse the model gets without some of its layers. All sets
//! of one question are measured in one walk, so that what they have in common is computed once.

use std::collections::HashMap;

use candle_core::{DType, Tensor};

use super::data::items::Item;
use super::eval::loglikelihood::{Likelihood, Request, likelihoods_without, walk};
use super::eval::tasks;
use super::eval::uncertainty::ratio;
use super::model::cuts::Cuts;
use super::model::kernel::rows::likeliest;
use super::model::{Checkpoint, Decoder};
use super::select::{Measured, Oracle};
use super::{Cx, Error, Result};
use crate::job::spec::{DamageMeasure, DamageSpec};

/// Damage on text, in nats per token.
pub struct Damage<'a> {
    decoder: Decoder,
    requests: Vec<Request>,
    measure: DamageMeasure,
    top_k: usize,
    /// `loss`: the intact model's log-likelihood of each window, by how many went through it together.
    intact: HashMap<usize, Vec<f64>>,
    /// `kl`: the intact model's predictions, by window.
    predicted: Vec<Vec<Predicted>>,
    /// By layer: how many times larger the stream leaves it than it enters, where cuts are measured with that made up
    /// for.
    growth: Option<Vec<f64>>,
    cx: Cx<'a>,
}

/// What the intact model predicts at one place.
struct Predicted {
    /// Its likeliest tokens, with the logarithms of their probabilities.
    likeliest: Vec<(u32, f32)>,
    /// The probability of all others together.
    rest: f64,
}

impl<'a> Damage<'a> {
    /// Measures on `windows`; with `mended`, after what a cut takes from the size of the stream has been made up for
    /// (see [`super::heal`], `rescale`).
    ///
    /// # Errors
    /// A data error when there is no window; a model error when the weights cannot be read.
    pub fn open(
        base: &Checkpoint,
        windows: Vec<Vec<u32>>,
        spec: &DamageSpec,
        mended: bool,
        cx: Cx<'a>,
    ) -> Result<Self> {
        let windows = windows.into_iter().filter(|window| window.len() > 1);
        let requests: Vec<Request> = windows.map(|tokens| Request { tokens, from: 1 }).collect();
        if requests.is_empty() {
            return Err(Error::data(
                "the damage corpus gives no window of two tokens to measure on; give more text",
            ));
        }
        let decoder = Decoder::open(base, cx.compute)?;
        Ok(Self {
            growth: if mended { Some(growth(&decoder, &requests, cx)?) } else { None },
            decoder,
            predicted: requests.iter().map(|_| Vec::new()).collect(),
            requests,
            measure: spec.measure,
            top_k: (spec.top_k as usize).clamp(1, base.config().vocab_size),
            intact: HashMap::new(),
            cx,
        })
    }

    /// Log-likelihood of each of the first `windows` windows without each of `sets`.
    fn likelihoods(
        &self,
        sets: &[&[u32]],
        windows: usize,
        tell: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Vec<f64>>> {
        let requests = &self.requests[..windows];
        let cuts = Cuts { left_out: sets, growth: self.growth.as_deref() };
        let scored = likelihoods_without(&self.decoder, requests, cuts, &|| self.cx.check(), tell)?;
        let of_set = |of: Vec<Likelihood>| of.iter().map(|s| s.log_likelihood).collect();
        Ok(scored.into_iter().map(of_set).collect())
    }

    /// Divergence KL(intact, without each of `sets`) on each of the first `windows` windows, summed over its tokens.
    fn divergences(
        &mut self,
        sets: &[&[u32]],
        windows: usize,
        tell: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Vec<f64>>> {
        self.predict(windows)?;
        let requests = &self.requests[..windows];
        let mut sums = vec![vec![0.0; windows]; sets.len()];
        let mut score = |which: &[usize], places: &[(usize, usize)], x: &Tensor| {
            let of = |request: usize, at: usize, row: &[f32]| self.predicted[request][at - 1].divergence(row);
            for ((request, _), divergence) in places.iter().zip(self.each_place(places, x, of)?) {
                which.iter().for_each(|set| sums[*set][*request] += divergence);
            }
            Ok(())
        };
        let cuts = Cuts { left_out: sets, growth: self.growth.as_deref() };
        walk(&self.decoder, requests, cuts, &|| self.cx.check(), tell, &mut score)?;
        Ok(sums)
    }

    /// Has the intact model predict the first `windows` windows, as far as it has not.
    fn predict(&mut self, windows: usize) -> Result<()> {
        let missing: Vec<usize> = (0..windows).filter(|i| self.predicted[*i].is_empty()).collect();
        let requests: Vec<Request> = missing.iter().map(|i| self.requests[*i].clone()).collect();
        let mut predicted: Vec<Vec<Predicted>> = missing.iter().map(|_| Vec::new()).collect();
        let mut score = |_: &[usize], places: &[(usize, usize)], x: &Tensor| {
            let all = self.each_place(places, x, |_, _, row| Predicted::of(row, self.top_k))?;
            // The places of a request come in their order.
            places.iter().zip(all).for_each(|((request, _), one)| predicted[*request].push(one));
            Ok(())
        };
        let intact = Cuts::plain(&[&[]]);
        walk(&self.decoder, &requests, intact, &|| self.cx.check(), &mut |_| Ok(()), &mut score)?;
        for (i, predicted) in missing.into_iter().zip(predicted) {
            self.predicted[i] = predicted;
        }
        Ok(())
    }

    /// What `of(request, place, row)` makes of each place, `row` the logarithms of the probabilities of all tokens
    /// behind the stream that stands for it in `x`.
    fn each_place<T: Send>(
        &self,
        places: &[(usize, usize)],
        x: &Tensor,
        of: impl Fn(usize, usize, &[f32]) -> T + Sync,
    ) -> Result<Vec<T>> {
        self.decoder.each_prediction(x, |row, predicted| {
            let (request, at) = places[row];
            of(request, at, predicted)
        })
    }
}

impl Predicted {
    fn of(log_probabilities: &[f32], top_k: usize) -> Self {
        let likeliest = likeliest(log_probabilities, top_k);
        let known: f64 = likeliest.iter().map(|(_, log)| f64::from(*log).exp()).sum();
        Self { likeliest, rest: (1.0 - known).max(0.0) }
    }

    /// KL of this prediction and another model's, the tokens that are not kept one by one taken as one.
    fn divergence(&self, log_probabilities: &[f32]) -> f64 {
        let (mut sum, mut known) = (0.0, 0.0);
        for (id, log) in &self.likeliest {
            let other = f64::from(log_probabilities[*id as usize]);
            sum += f64::from(*log).exp() * (f64::from(*log) - other);
            known += other.exp();
        }
        if self.rest > 0.0 {
            sum += self.rest * (self.rest / (1.0 - known).max(1e-12)).ln();
        }
        sum
    }
}

/// Damage and its standard error from what each window lost, of so many tokens (or items) each.
fn over_windows(lost: &[f64], tokens: &[f64]) -> Measured {
    let (damage, stderr) = ratio(lost, tokens);
    Measured { damage, stderr }
}

/// By layer: the sum of absolute values of the streams that leave it, relative to those that enter.
fn growth(decoder: &Decoder, requests: &[Request], cx: Cx) -> Result<Vec<f64>> {
    let texts: Vec<&[u32]> = requests.iter().map(|request| request.tokens.as_slice()).collect();
    let (passes, mut streams) = decoder.packed(&texts, usize::MAX)?;
    let layers: Vec<usize> = (0..decoder.config().layer_count).collect();
    let mut sizes = vec![0.0; layers.len() + 1];
    let size = |x: &Tensor| -> Result<f64> {
        let rows: Vec<f32> = x.abs()?.to_dtype(DType::F32)?.sum(1)?.to_vec1()?;
        Ok(rows.iter().map(|v| f64::from(*v)).sum())
    };
    for batch in 0..streams.len() {
        sizes[0] += size(&streams.get(batch)?)?;
    }
    decoder.carry(&mut streams, &passes, &layers, |layer, _, x| {
        sizes[layer + 1] += size(x)?;
        cx.check()
    })?;
    Ok(sizes.windows(2).map(|pair| pair[1] / pair[0].max(f64::MIN_POSITIVE)).collect())
}

/// What `measure` gives each window (the more, the better) with the intact model, and what each of `sets` loses of
/// it: in one walk, unless the first is known.
fn beside_intact(
    known: Option<Vec<f64>>,
    sets: &[Vec<u32>],
    measure: impl FnOnce(&[&[u32]]) -> Result<Vec<Vec<f64>>>,
) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
    let mut asked: Vec<&[u32]> = sets.iter().map(Vec::as_slice).collect();
    let (intact, left) = match known {
        Some(intact) => (intact, measure(&asked)?),
        None => {
            asked.insert(0, &[]);
            let mut all = measure(&asked)?;
            (all.remove(0), all)
        }
    };
    let lost = |left: Vec<f64>| intact.iter().zip(left).map(|(intact, left)| intact - left).collect();
    let lost = left.into_iter().map(lost).collect();
    Ok((intact, lost))
}

/// Tells of sets done, of requests done for each set.
fn in_sets(
    sets: usize,
    requests: usize,
    tell: &mut dyn FnMut(usize) -> Result<()>,
) -> impl FnMut(usize) -> Result<()> {
    // The intact model comes beside them the first time.
    move |done| tell((done / requests.max(1)).min(sets))
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
    ) -> Result<Vec<Measured>> {
        let mut tell = in_sets(sets.len(), windows, tell);
        let lost = match self.measure {
            DamageMeasure::Kl => {
                let sets: Vec<&[u32]> = sets.iter().map(Vec::as_slice).collect();
                self.divergences(&sets, windows, &mut tell)?
            }
            DamageMeasure::Loss => {
                let known = self.intact.get(&windows).cloned();
                let (intact, lost) =
                    beside_intact(known, sets, |sets| self.likelihoods(sets, windows, &mut tell))?;
                self.intact.insert(windows, intact);
                lost
            }
        };
        let predicted = self.requests[..windows].iter().map(|r| (r.tokens.len() - r.from) as f64);
        let tokens: Vec<f64> = predicted.collect();
        Ok(lost.iter().map(|lost| over_windows(lost, &tokens)).collect())
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
    /// Right answers (1, else 0) of the intact model, by how many items it was asked together.
    intact: HashMap<usize, Vec<f64>>,
    cx: Cx<'a>,
}

impl<'a> Accuracy<'a> {
    /// Measures on `items`, of all tasks together.
    pub fn open(base: &Checkpoint, items: Vec<Item>, cx: Cx<'a>) -> Result<Self> {
        let (tokenizer, config) = (base.tokenizer()?, base.config());
        let (mut requests, mut ends) = (Vec::new(), Vec::new());
        for item in &items {
            if let Item::GenerateUntil { .. } = item {
                return Err(Error::data(
                    "an item of kind generate_until cannot choose layers: it would be written anew for every cut; \
                     leave such items to eval.tasks",
                ));
            }
            requests.extend(tasks::asked(&tokenizer, config, item)?.requests);
            ends.push(requests.len());
        }
        let decoder = Decoder::open(base, cx.compute)?;
        Ok(Self { decoder, items, requests, ends, intact: HashMap::new(), cx })
    }

    /// 1 for each of the first `count` items that is answered rightly without each of `sets`, else 0.
    fn right_answers(
        &self,
        sets: &[&[u32]],
        count: usize,
        tell: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Vec<f64>>> {
        let requests = &self.requests[..self.ends[count - 1]];
        let cuts = Cuts::plain(sets);
        let scored = likelihoods_without(&self.decoder, requests, cuts, &|| self.cx.check(), tell)?;
        let right = |scored: &Vec<Likelihood>| {
            let results = tasks::judged(&self.items[..count], scored);
            Ok(results.iter().map(|result| f64::from(u8::from(result.correct))).collect())
        };
        scored.iter().map(right).collect()
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
    ) -> Result<Vec<Measured>> {
        let mut tell = in_sets(sets.len(), self.ends[windows - 1], tell);
        let known = self.intact.get(&windows).cloned();
        let (intact, lost) = beside_intact(known, sets, |sets| self.right_answers(sets, windows, &mut tell))?;
        self.intact.insert(windows, intact);
        let items = vec![1.0; windows];
        Ok(lost.iter().map(|lost| over_windows(lost, &items)).collect())
    }
}
