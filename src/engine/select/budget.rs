//! How many layers go where promises decide: a search that asks, for a number of layers, whether they are kept.

use std::collections::BTreeMap;

use crate::engine::Result;
use crate::job::budget::{Budget, ProbeOf};

/// What a search came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// So many layers keep all promises.
    Chosen(u32),
    /// No number does; so many come nearest.
    Nearest(u32),
}

/// What trying a number of layers came to.
#[derive(Debug, Clone, Copy)]
pub struct Tried {
    /// All promises of the kind that was looked at are kept.
    pub kept: bool,
    /// The weighed sum, where it was asked for and could be had.
    pub weighed: Option<f64>,
}

/// Searches from `least` to `most` layers: with a promise of costs for the fewest that keep it, which must keep the
/// others as well; without one for the most that keep the rest; and where things are weighed for what comes off best
/// between the fewest and the most. Cutting more never makes a checkpoint larger or slower, nor better, so halves are
/// left unmeasured.
///
/// # Errors
/// Those of `attempt`.
pub fn search(
    budget: Budget,
    (least, most): (u32, u32),
    attempt: &mut dyn FnMut(u32, ProbeOf) -> Result<Tried>,
) -> Result<Outcome> {
    let (costs, quality) = (!budget.costs().is_empty(), !budget.quality().is_empty());
    let mut keeps = |n: u32, of: ProbeOf| attempt(n, of).map(|tried| tried.kept);
    let fewest = if costs { fewest(budget, (least, most), &mut keeps)? } else { Some(least) };
    let Some(fewest) = fewest else { return Ok(Outcome::Nearest(most)) };
    if costs && budget.weigh.is_none() {
        let kept = !quality || keeps(fewest, ProbeOf::Quality)?;
        return Ok(if kept { Outcome::Chosen(fewest) } else { Outcome::Nearest(fewest) });
    }
    let most = if quality { last(fewest, most, &mut |n| keeps(n, ProbeOf::Quality))? } else { Some(most) };
    let chosen = match (most, budget.weigh) {
        (None, _) => None,
        (Some(most), None) => Some(most),
        (Some(most), Some(_)) => {
            best((fewest, most), &mut |n| attempt(n, ProbeOf::Weighed).map(|tried| tried.weighed))?
        }
    };
    Ok(chosen.map_or(Outcome::Nearest(fewest), Outcome::Chosen))
}

/// The fewest layers that keep the promises of costs.
fn fewest(
    budget: Budget,
    (least, most): (u32, u32),
    keeps: &mut dyn FnMut(u32, ProbeOf) -> Result<bool>,
) -> Result<Option<u32>> {
    // Size is known beforehand: most often the first one is it.
    if budget.max_size_bytes.is_some() && keeps(least, ProbeOf::Costs)? {
        return Ok(Some(least));
    }
    let from = least + u32::from(budget.max_size_bytes.is_some());
    let before = last(from, most, &mut |n| Ok(!keeps(n, ProbeOf::Costs)?))?;
    Ok(Some(before.map_or(from, |n| n + 1)).filter(|n| *n <= most))
}

/// The last number from `least` to `most` for which `holds`, if any; it holds for all before.
fn last(least: u32, most: u32, holds: &mut dyn FnMut(u32) -> Result<bool>) -> Result<Option<u32>> {
    let (mut low, mut high) = (least, most + 1);
    // It holds below `low` and does not from `high` on.
    while low < high {
        let middle = low.midpoint(high);
        if holds(middle)? {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    Ok((low > least).then(|| low - 1))
}

/// The number of layers for which `weigh` gives the least, by golden section: exact where it falls and then rises, else a
/// number that is better than those beside it. Of equals the fewest layers. `None` weighs nothing, and more than anything.
///
/// # Errors
/// Those of `weigh`.
fn best(
    (mut low, mut high): (u32, u32),
    weigh: &mut dyn FnMut(u32) -> Result<Option<f64>>,
) -> Result<Option<u32>> {
    let mut known = BTreeMap::new();
    let mut of = |n: u32| -> Result<f64> {
        if let Some(found) = known.get(&n) {
            return Ok(*found);
        }
        let found = weigh(n)?.unwrap_or(f64::INFINITY);
        known.insert(n, found);
        Ok(found)
    };
    while high - low > 3 {
        // Rounded down: of four numbers between, the two looked at are not the same.
        let part = (f64::from(high - low) * GOLDEN) as u32;
        let (a, b) = (low + part, high - part);
        if of(a)? <= of(b)? { high = b } else { low = a }
    }
    for n in low..=high {
        of(n)?;
    }
    let least = known.into_iter().filter(|(_, found)| found.is_finite()).min_by(|a, b| a.1.total_cmp(&b.1));
    Ok(least.map(|(n, _)| n))
}

/// The smaller part of a golden section.
const GOLDEN: f64 = 0.381_966;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::budget::Weights;

    /// Searches 1 to 20 layers where costs are kept from `fits` on and quality up to `bears`; counts what was tried.
    fn found(budget: Budget, fits: u32, bears: u32) -> (Outcome, usize) {
        let mut tried = 0;
        let mut keeps = |n: u32, of: ProbeOf| {
            tried += 1;
            let kept = match of {
                ProbeOf::Costs => n >= fits,
                ProbeOf::Quality => n <= bears,
                ProbeOf::Weighed => true,
            };
            Ok(Tried { kept, weighed: Some((f64::from(n) - 9.0).abs()) })
        };
        let outcome = search(budget, (1, 20), &mut keeps).unwrap();
        (outcome, tried)
    }

    const QUALITY: Budget = Budget { max_perplexity_ratio: Some(1.5), ..NONE };
    const SPEED: Budget = Budget { min_speedup: Some(1.3), ..NONE };
    const NONE: Budget = Budget {
        max_size_bytes: None,
        max_memory_bytes: None,
        min_speedup: None,
        max_latency_ms: None,
        min_retention: None,
        max_perplexity_ratio: None,
        weigh: None,
    };

    #[test]
    fn quality_alone_takes_the_most_layers_that_keep_it() {
        for bears in 1..=20 {
            let (outcome, tried) = found(QUALITY, 0, bears);
            assert_eq!(outcome, Outcome::Chosen(bears));
            assert!(tried <= 5, "{tried} probes for {bears}");
        }
        assert_eq!(found(QUALITY, 0, 0).0, Outcome::Nearest(1));
    }

    #[test]
    fn costs_take_the_fewest_layers_that_keep_them() {
        for fits in 1..=20 {
            let (outcome, tried) = found(SPEED, fits, 0);
            assert_eq!(outcome, Outcome::Chosen(fits));
            assert!(tried <= 5, "{tried} probes for {fits}");
        }
        assert_eq!(found(SPEED, 21, 20).0, Outcome::Nearest(20));
    }

    #[test]
    fn promises_of_both_kinds_must_meet() {
        let both = Budget { max_perplexity_ratio: Some(1.5), ..SPEED };
        assert_eq!(found(both, 7, 7).0, Outcome::Chosen(7));
        assert_eq!(found(both, 7, 6).0, Outcome::Nearest(7));
    }

    #[test]
    fn a_size_that_is_known_beforehand_is_tried_first() {
        let size = Budget { max_size_bytes: Some(1), ..NONE };
        assert_eq!(found(size, 1, 0), (Outcome::Chosen(1), 1));
        // Layers of several sizes: the reckoning was too hopeful.
        assert_eq!(found(size, 3, 0).0, Outcome::Chosen(3));
    }

    #[test]
    fn what_is_weighed_is_weighed_between_the_fewest_and_the_most() {
        let weigh = Some(Weights { perplexity: 1.0, size: 1.0, ..Weights::default() });
        let both = Budget { max_perplexity_ratio: Some(1.5), weigh, ..SPEED };
        assert_eq!(found(Budget { weigh, ..NONE }, 0, 0).0, Outcome::Chosen(9));
        assert_eq!(found(both, 4, 12).0, Outcome::Chosen(9));
        assert_eq!(found(both, 11, 15).0, Outcome::Chosen(11));
        assert_eq!(found(both, 2, 6).0, Outcome::Chosen(6));
        assert_eq!(found(both, 7, 6).0, Outcome::Nearest(7));
    }

    #[test]
    fn the_least_of_what_falls_and_rises_is_found_in_few_looks() {
        let all = (1..=29).flat_map(|most| (1..=most).map(move |wanted| (most, wanted)));
        for (most, wanted) in all {
            let mut looks = 0;
            let mut weigh = |n: u32| {
                looks += 1;
                Ok(Some((f64::from(n) - f64::from(wanted)).powi(2)))
            };
            assert_eq!(best((1, most), &mut weigh).unwrap(), Some(wanted), "of {most}");
            assert!(looks <= 11, "{looks} looks for {wanted} of {most}");
        }
        assert_eq!(best((4, 4), &mut |_| Ok(Some(1.0))).unwrap(), Some(4));
        assert_eq!(best((1, 9), &mut |_| Ok(Some(1.0))).unwrap(), Some(1), "of equals the fewest");
        assert_eq!(best((1, 9), &mut |_| Ok(None)).unwrap(), None);
    }
}
