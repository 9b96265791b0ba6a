//! How many layers go where promises decide: a search that asks, for a number of layers, whether they are kept.

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

/// Searches from `least` to `most` layers: with a promise of costs for the fewest that keep it, which must keep the
/// others as well; without one for the most that keep the rest. `keeps` measures and says whether all promises of one
/// kind are kept; cutting more never makes a checkpoint larger or slower, nor better, so halves are left unmeasured.
///
/// # Errors
/// Those of `keeps`.
pub fn search(
    budget: Budget,
    (least, most): (u32, u32),
    keeps: &mut dyn FnMut(u32, ProbeOf) -> Result<bool>,
) -> Result<Outcome> {
    if budget.costs().is_empty() {
        let kept = last(least, most, &mut |n| keeps(n, ProbeOf::Quality))?;
        return Ok(kept.map_or(Outcome::Nearest(least), Outcome::Chosen));
    }
    // Size is known beforehand: most often the first one is it.
    let at_once = budget.max_size_bytes.is_some() && keeps(least, ProbeOf::Costs)?;
    let fewest = if at_once {
        Some(least)
    } else {
        let from = least + u32::from(budget.max_size_bytes.is_some());
        let before = last(from, most, &mut |n| Ok(!keeps(n, ProbeOf::Costs)?))?;
        Some(before.map_or(from, |n| n + 1)).filter(|n| *n <= most)
    };
    let Some(n) = fewest else { return Ok(Outcome::Nearest(most)) };
    let kept = budget.quality().is_empty() || keeps(n, ProbeOf::Quality)?;
    Ok(if kept { Outcome::Chosen(n) } else { Outcome::Nearest(n) })
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches 1 to 20 layers where costs are kept from `fits` on and quality up to `bears`; counts what was tried.
    fn found(budget: Budget, fits: u32, bears: u32) -> (Outcome, usize) {
        let mut tried = 0;
        let mut keeps = |n: u32, of: ProbeOf| {
            tried += 1;
            Ok(match of {
                ProbeOf::Costs => n >= fits,
                ProbeOf::Quality => n <= bears,
            })
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
}
