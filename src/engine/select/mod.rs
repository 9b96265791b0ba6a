//! Which layers go: pure decisions over a profile, no tensor in sight.

use std::ops::{Range, RangeInclusive};

use super::{Error, Result};
use crate::job::report::{Block, Candidate, LayerProfile, LayerSelection};
use crate::job::spec::{PruneSpec, Strategy};

/// Scores nearer than this are a tie: sums of the same distances in another order.
const TIE: f64 = 1e-12;

/// Chooses the layers to drop.
///
/// # Errors
/// A spec error when the model has too few layers for what is asked.
pub fn select(profile: &LayerProfile, spec: &PruneSpec) -> Result<LayerSelection> {
    let strategy = spec.strategy;
    let scored = |start: u32, score: f64| Candidate { start, score };
    Ok(match strategy {
        Strategy::BlockEndpoint => {
            let room = Room::of(profile, spec)?;
            let score = |start| scored(start, profile.distance(Block { start, len: room.n }));
            block(strategy, room.n, room.blocks().map(score).collect())
        }
        Strategy::BlockSum => {
            let room = Room::of(profile, spec)?;
            let adjacent = |l: u32| profile.by_len[0][l as usize];
            let score = |start| scored(start, (start..start + room.n).map(adjacent).sum());
            block(strategy, room.n, room.blocks().map(score).collect())
        }
        Strategy::Deepest => {
            let room = Room::of(profile, spec)?;
            block(strategy, room.n, vec![scored(room.end - room.n, 0.0)])
        }
        Strategy::BlockInfluence => {
            let room = Room::of(profile, spec)?;
            let score = |l| scored(l, profile.influence[l as usize]);
            singles(strategy, room.n, room.layers().map(score).collect())
        }
        Strategy::RelativeMagnitude => {
            let room = Room::of(profile, spec)?;
            let score = |l| scored(l, profile.relative_magnitude[l as usize]);
            singles(strategy, room.n, room.layers().map(score).collect())
        }
        Strategy::Explicit => explicit(profile, spec)?,
    })
}

/// `n` of the layers `first..end` are to go.
struct Room {
    n: u32,
    first: u32,
    end: u32,
}

impl Room {
    fn of(profile: &LayerProfile, spec: &PruneSpec) -> Result<Self> {
        let layer_count = profile.layer_count;
        let amount = spec.amount.ok_or_else(|| Error::spec("prune.amount: say how many layers to drop"))?;
        let n = amount.layers(layer_count);
        let (first, end) = (spec.keep_first, layer_count.saturating_sub(spec.keep_last));
        if n == 0 || n >= layer_count || u64::from(first) + u64::from(n) > u64::from(end) {
            return Err(Error::spec(format!(
                "prune.amount: {n} layers cannot go from a model of {layer_count} with keep_first {first} and \
                 keep_last {}; ask for fewer",
                spec.keep_last
            )));
        }
        Ok(Self { n, first, end })
    }

    /// Where a block of `n` layers may start.
    fn blocks(&self) -> RangeInclusive<u32> {
        self.first..=self.end - self.n
    }

    fn layers(&self) -> Range<u32> {
        self.first..self.end
    }
}

/// The block of least score; of equals, the deeper one.
fn block(strategy: Strategy, n: u32, candidates: Vec<Candidate>) -> LayerSelection {
    let least = candidates.iter().map(|c| c.score).fold(f64::INFINITY, f64::min);
    let best = candidates
        .iter()
        .rfind(|c| c.score <= least + TIE)
        .expect("the range of blocks was checked not to be empty. This is a bug.");
    let dropped = Block { start: best.start, len: n }.layers().collect();
    LayerSelection { dropped, strategy, score: best.score, candidates }
}

/// The `n` layers of least score; of equals, the deeper ones.
fn singles(strategy: Strategy, n: u32, candidates: Vec<Candidate>) -> LayerSelection {
    let mut order = candidates.clone();
    order.sort_by(|a, b| a.score.total_cmp(&b.score).then(b.start.cmp(&a.start)));
    order.truncate(n as usize);
    let mut dropped: Vec<u32> = order.iter().map(|c| c.start).collect();
    dropped.sort_unstable();
    LayerSelection { dropped, strategy, score: order.iter().map(|c| c.score).sum(), candidates }
}

fn explicit(profile: &LayerProfile, spec: &PruneSpec) -> Result<LayerSelection> {
    let mut dropped = spec.layers.clone().unwrap_or_default();
    dropped.sort_unstable();
    dropped.dedup();
    let outside = dropped.last().is_none_or(|l| *l >= profile.layer_count);
    if outside || dropped.len() >= profile.layer_count as usize {
        return Err(Error::spec(format!(
            "prune.layers: {dropped:?} must be some, not all, of the model's layers 0 to {}",
            profile.layer_count - 1
        )));
    }
    Ok(LayerSelection { dropped, strategy: Strategy::Explicit, score: 0.0, candidates: Vec::new() })
}
