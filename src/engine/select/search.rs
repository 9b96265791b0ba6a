//! Searches over sets of layers. Each asks for damages by way of a [`Meter`] and, when the budget ends, completes
//! the best it has by the order it was given.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use super::meter::Meter;
use super::{Found, Result, Room, Tell};
use crate::engine::chance::{stream_key, unit};
use crate::job::report::Candidate;
use crate::job::spec::DamageSpec;

/// Drops `per_round` layers at a time, those of least damage on top of what is gone, and ranks the others anew:
/// all at once is one-shot, one at a time is greedy (SLEB, arXiv 2402.09025).
///
/// `order` holds the layers that may go, the most promising first.
pub fn rounds(
    meter: &mut Meter,
    room: &Room,
    mut order: Vec<u32>,
    per_round: u32,
    tell: Tell,
) -> Result<Found> {
    let n = room.n as usize;
    let per_round = per_round.max(1) as usize;
    let sets: usize = (0..n).step_by(per_round).map(|gone| order.len() - gone).sum();
    meter.plan((meter.heats() * sets) as u64);
    let (mut gone, mut candidates) = (Vec::new(), Vec::new());
    while gone.len() < n {
        let sets: Vec<Vec<u32>> = order.iter().map(|layer| with(&gone, *layer)).collect();
        let damages = meter.least(&sets, per_round.min(n - gone.len()), tell)?;
        if gone.is_empty() {
            candidates = singles(&order, &damages);
        }
        order = ranked(order, &damages);
        // Nobody can rank again without a budget.
        let round = if meter.exhausted() { n } else { per_round };
        let next = round.min(n - gone.len());
        gone.extend(order.drain(..next));
    }
    Found::settled(meter, path(&gone), candidates, tell)
}

/// Drops layer by layer, keeping the `width` best partial cuts; one of them is greedy.
pub fn beam(meter: &mut Meter, room: &Room, order: &[u32], width: u32, tell: Tell) -> Result<Found> {
    let (n, width) = (room.n as usize, width.max(1) as usize);
    let of_beams = |gone| if gone == 0 { 1 } else { width };
    let sets: usize = (0..n).map(|gone| (order.len() - gone) * of_beams(gone)).sum();
    meter.plan((meter.heats() * sets) as u64);
    let (mut beams, mut best, mut candidates) = (vec![Vec::new()], Vec::new(), Vec::new());
    for gone in 0..n {
        let children = children(&beams, order);
        let damages = meter.least(&children, width, tell)?;
        if gone == 0 {
            candidates = singles(order, &damages);
        }
        let mut measured = least_first(&children, &damages);
        measured.truncate(width);
        if let Some(first) = measured.first() {
            best.push(first.clone());
            beams = measured;
        }
        if meter.exhausted() {
            break;
        }
    }
    // What the budget did not reach.
    while best.len() < n {
        let last = best.last().cloned().unwrap_or_default();
        let layer =
            order.iter().find(|l| !last.contains(l)).expect("n layers fit in the room. This is a bug.");
        best.push(with(&last, *layer));
    }
    Found::settled(meter, best, candidates, tell)
}

/// Every cut of one layer more, without repetition, by the promise of that layer.
fn children(beams: &[Vec<u32>], order: &[u32]) -> Vec<Vec<u32>> {
    let mut seen = BTreeSet::new();
    let all = order.iter().flat_map(|layer| {
        beams.iter().filter(move |beam| !beam.contains(layer)).map(move |beam| with(beam, *layer))
    });
    all.filter(|child| seen.insert(child.clone())).collect()
}

/// Offspring of the best cut swap some of its layers for others; they compete on a sixteenth of the windows, a
/// quarter of them on a quarter, the rest with their parent on all (`EvoPress`, arXiv 2410.14649).
///
/// `founders`: cuts to begin with, at least one.
pub fn evolve(
    meter: &mut Meter,
    room: &Room,
    founders: &[Vec<u32>],
    spec: &DamageSpec,
    seed: u64,
    tell: Tell,
) -> Result<Found> {
    let windows = meter.windows();
    let mut heats = vec![windows.div_ceil(16), windows.div_ceil(4), windows];
    heats.dedup();
    let per_generation = heats.iter().scan(spec.population as usize, |left, _| {
        let now = *left + 1;
        *left = left.div_ceil(SURVIVORS);
        Some(now)
    });
    let per_generation = per_generation.sum::<usize>() as u64;
    meter.plan(founders.len() as u64 + u64::from(spec.generations) * per_generation);
    let damages = meter.search(founders, windows, tell)?;
    let mut parent = least_first(founders, &damages).first().unwrap_or(&founders[0]).clone();
    let mut dice = Dice { key: stream_key(&[seed, EVOLUTION]), thrown: 0 };
    for _ in 0..spec.generations {
        let mut alive = offspring(&parent, room, spec.population as usize, &mut dice);
        if alive.is_empty() || meter.exhausted() {
            break;
        }
        for (heat, windows) in heats.iter().enumerate() {
            let last = heat + 1 == heats.len();
            if last {
                alive.push(parent.clone());
            }
            let damages = meter.search(&alive, *windows, tell)?;
            alive = least_first(&alive, &damages);
            alive.truncate(if last { 1 } else { alive.len().div_ceil(SURVIVORS) });
        }
        // None when not even the parent could be measured.
        parent = alive.pop().unwrap_or(parent);
    }
    Found::settled(meter, vec![parent], Vec::new(), tell)
}

/// One in so many goes on to the next heat.
const SURVIVORS: usize = 4;
/// Names the stream of chance among those of the seed.
const EVOLUTION: u64 = 0x65_76_6f;

/// Different cuts near `parent`, `count` of them where there are so many.
fn offspring(parent: &[u32], room: &Room, count: usize, dice: &mut Dice) -> Vec<Vec<u32>> {
    let mut found = Vec::new();
    // Near a small room's edge the same child is drawn again and again.
    for _ in 0..count * 4 {
        let mut out = parent.to_vec();
        let mut kept: Vec<u32> = room.layers().filter(|l| !parent.contains(l)).collect();
        if kept.is_empty() || found.len() == count {
            break;
        }
        // Few swaps more often than many.
        for _ in 0..=dice.below(3).min(dice.below(3)) {
            let (a, b) = (dice.below(out.len()), dice.below(kept.len()));
            std::mem::swap(&mut out[a], &mut kept[b]);
        }
        out.sort_unstable();
        if out != parent && !found.contains(&out) {
            found.push(out);
        }
    }
    found
}

struct Dice {
    key: u64,
    thrown: u64,
}

impl Dice {
    /// Uniform in `0..n`.
    fn below(&mut self, n: usize) -> usize {
        self.thrown += 1;
        (unit(self.key, self.thrown) * n as f64) as usize
    }
}

/// `gone` and one layer more, ascending.
fn with(gone: &[u32], layer: u32) -> Vec<u32> {
    let mut set = [gone, &[layer]].concat();
    set.sort_unstable();
    set
}

/// The cuts of one, two, … layers when they go in this order.
pub fn path(gone: &[u32]) -> Vec<Vec<u32>> {
    (1..=gone.len())
        .map(|count| {
            let mut cut = gone[..count].to_vec();
            cut.sort_unstable();
            cut
        })
        .collect()
}

/// Less damage first; of equals, the deeper.
pub fn better<T: Ord>(a: (f64, &T), b: (f64, &T)) -> Ordering {
    a.0.total_cmp(&b.0).then_with(|| b.1.cmp(a.1))
}

/// The sets that were measured, the best first.
fn least_first(sets: &[Vec<u32>], damages: &[Option<f64>]) -> Vec<Vec<u32>> {
    let measured = sets.iter().zip(damages).filter_map(|(set, damage)| Some(((*damage)?, set)));
    let mut measured: Vec<(f64, &Vec<u32>)> = measured.collect();
    measured.sort_by(|a, b| better(*a, *b));
    measured.into_iter().map(|(_, set)| set.clone()).collect()
}

/// The layers by damage; those that were not measured behind, as they were.
fn ranked(order: Vec<u32>, damages: &[Option<f64>]) -> Vec<u32> {
    let mut measured: Vec<(f64, u32)> =
        order.iter().zip(damages).filter_map(|(layer, damage)| Some(((*damage)?, *layer))).collect();
    measured.sort_by(|a, b| better((a.0, &a.1), (b.0, &b.1)));
    let rest = order.iter().zip(damages).filter(|(_, damage)| damage.is_none()).map(|(layer, _)| *layer);
    measured.iter().map(|(_, layer)| *layer).chain(rest).collect()
}

/// The single layers that were measured, from the first one on.
fn singles(order: &[u32], damages: &[Option<f64>]) -> Vec<Candidate> {
    let measured = order.iter().zip(damages).filter_map(|(l, d)| Some(Candidate { start: *l, score: (*d)? }));
    let mut all: Vec<Candidate> = measured.collect();
    all.sort_by_key(|c| c.start);
    all
}
