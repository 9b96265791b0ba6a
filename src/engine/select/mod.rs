//! Which layers go: pure decisions over a profile, no tensor in sight. What must be measured is asked of an
//! [`Oracle`].

pub mod budget;
mod cheap;
mod meter;
mod search;

use std::ops::{Range, RangeInclusive};

use self::meter::Meter;
use super::{Error, Result};
use crate::job::report::{
    Ablation, Candidate, Compared, Considered, Cost, LayerProfile, LayerSelection, Step,
};
use crate::job::spec::{PruneSpec, Strategy};

/// How much worse the model gets without some of its layers, and the standard error of that over windows (paired
/// with the intact model's); 0 where it is not known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    pub damage: f64,
    pub stderr: f64,
}

/// Knows how much worse the model gets without some of its layers.
pub trait Oracle {
    /// Windows there are to measure on: a search may ask for the first few of them.
    fn windows(&self) -> usize;

    /// Tokens of the first `windows` windows.
    fn tokens(&self, windows: usize) -> u64;

    /// The damage of leaving out each of `sets` on the first `windows` windows; 0 is none. A set holds its layers
    /// ascending, and neighbours in `sets` share their first layers where they can.
    ///
    /// `tell` hears how many sets are done; an error of its own ends the work.
    fn measure(
        &mut self,
        sets: &[Vec<u32>],
        windows: usize,
        tell: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Measured>>;
}

/// What is measured for the strategies that a spec names; see [`PruneSpec::measures_damage`].
#[derive(Default)]
pub struct Oracles<'a> {
    /// Damage on text, in nats per token.
    pub damage: Option<&'a mut dyn Oracle>,
    /// What `damage` would say of each single layer, as far as it was asked before; empty where it was not.
    pub known: &'a [Ablation],
    /// Drop of accuracy on task items.
    pub accuracy: Option<&'a mut dyn Oracle>,
}

/// Hears the name of a search, the sets it has looked at, and how many they will be at most.
pub type Tell<'a> = &'a mut dyn FnMut(&str, u64, u64) -> Result<()>;

/// Chooses the layers to drop.
///
/// # Errors
/// A spec error when the model has too few layers for what is asked, and whatever ends the measuring.
pub fn select(
    profile: &LayerProfile,
    spec: &PruneSpec,
    seed: u64,
    oracles: Oracles,
    tell: Tell,
) -> Result<LayerSelection> {
    let mut chooser = Chooser {
        profile,
        spec,
        seed,
        damage: oracles.damage.map(|oracle| Meter::new(oracle, &spec.damage).knowing(oracles.known)),
        accuracy: oracles.accuracy.map(|oracle| Meter::new(oracle, &spec.damage)),
    };
    let decided = chooser.run(spec.strategy, tell)?;
    let mut compared = Vec::new();
    if spec.measures_damage() || spec.measures_accuracy() {
        compared.push(chooser.compared(spec.strategy, &decided, tell)?);
    }
    for strategy in &spec.strategies()[1..] {
        let found = chooser.run(*strategy, tell)?;
        compared.push(chooser.compared(*strategy, &found, tell)?);
    }
    Ok(LayerSelection {
        rounds: Vec::new(),
        dropped: decided.dropped().to_vec(),
        strategy: spec.strategy,
        score: decided.score,
        candidates: decided.candidates,
        considered: decided.considered,
        compared,
        mended: false,
    })
}

/// What a strategy came to.
struct Found {
    score: f64,
    candidates: Vec<Candidate>,
    /// Cuts of ever more layers; the last one is what the strategy would drop.
    path: Vec<Vec<u32>>,
    considered: Vec<Considered>,
}

impl Found {
    /// What a search settled on: the last cut of `path`, scored by its damage.
    fn settled(
        meter: &mut Meter,
        path: Vec<Vec<u32>>,
        candidates: Vec<Candidate>,
        tell: Tell,
    ) -> Result<Self> {
        let mut found = Self { score: 0.0, candidates, path, considered: Vec::new() };
        found.score = meter.settle(found.dropped(), tell)?;
        Ok(found)
    }

    fn dropped(&self) -> &[u32] {
        self.path.last().expect("every strategy drops something. This is a bug.")
    }
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
        let n = spec.layers_to_drop(layer_count);
        let n = n.ok_or_else(|| Error::spec("prune.amount: say how many layers to drop"))?;
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

    /// Where a block of `len` layers may start, `len` at most `n`.
    fn starts(&self, len: u32) -> RangeInclusive<u32> {
        self.first..=self.end - len
    }

    fn layers(&self) -> Range<u32> {
        self.first..self.end
    }
}

/// The strategies whose cuts `auto` weighs and evolution begins with.
const CHEAP: [Strategy; 6] = [
    Strategy::BlockEndpoint,
    Strategy::BlockSum,
    Strategy::BlockInfluence,
    Strategy::RelativeMagnitude,
    Strategy::CrossAxis,
    Strategy::Deepest,
];

/// Runs strategies on one profile.
struct Chooser<'a> {
    profile: &'a LayerProfile,
    spec: &'a PruneSpec,
    seed: u64,
    damage: Option<Meter<'a>>,
    accuracy: Option<Meter<'a>>,
}

impl Chooser<'_> {
    /// Runs `strategy` with a budget of its own.
    fn run(&mut self, strategy: Strategy, tell: Tell) -> Result<Found> {
        for meter in self.damage.iter_mut().chain(&mut self.accuracy) {
            meter.begin(strategy.name().to_owned());
        }
        self.find(strategy, tell)
    }

    fn find(&mut self, strategy: Strategy, tell: Tell) -> Result<Found> {
        let (profile, settings) = (self.profile, &self.spec.damage);
        match strategy {
            Strategy::Auto => self.auto(tell),
            Strategy::BlockEndpoint => Ok(cheap::block(&self.room()?, |block| profile.distance(block))),
            Strategy::BlockSum => {
                let adjacent = |l: u32| profile.by_len[0][l as usize];
                Ok(cheap::block(&self.room()?, |block| block.layers().map(adjacent).sum()))
            }
            Strategy::BlockInfluence => Ok(cheap::singles(&self.room()?, &profile.influence)),
            Strategy::RelativeMagnitude => Ok(cheap::singles(&self.room()?, &profile.relative_magnitude)),
            Strategy::CrossAxis => Ok(cheap::singles(&self.room()?, &profile.cross_axis)),
            Strategy::Deepest => Ok(cheap::deepest(&self.room()?)),
            Strategy::OneShotDamage => self.rounds(u32::MAX, tell),
            Strategy::GreedyDamage => self.rounds(1, tell),
            Strategy::IterativeDamage => self.rounds(settings.layers_per_round, tell),
            Strategy::BeamDamage => {
                let (room, order) = self.order()?;
                search::beam(measured(&mut self.damage)?, &room, &order, settings.beam, tell)
            }
            Strategy::EvolutionaryDamage => {
                let (room, _) = self.order()?;
                let founders: Vec<Vec<u32>> =
                    self.cheap_cuts(tell)?.into_iter().map(|(_, dropped)| dropped).collect();
                search::evolve(measured(&mut self.damage)?, &room, &founders, settings, self.seed, tell)
            }
            Strategy::TaskAccuracy => {
                let (room, order) = self.order()?;
                search::rounds(measured(&mut self.accuracy)?, &room, order, 1, tell)
            }
            Strategy::Explicit => self.explicit(),
        }
    }

    fn room(&self) -> Result<Room> {
        Room::of(self.profile, self.spec)
    }

    /// The room, and its layers in the order in which a search looks at them: those of least influence first.
    fn order(&self) -> Result<(Room, Vec<u32>)> {
        let room = self.room()?;
        let order = cheap::order(&room, &self.profile.influence);
        Ok((room, order))
    }

    fn rounds(&mut self, per_round: u32, tell: Tell) -> Result<Found> {
        let (room, order) = self.order()?;
        search::rounds(measured(&mut self.damage)?, &room, order, per_round, tell)
    }

    /// The cuts of the cheap strategies, none twice, each with those whose cut it is.
    fn cheap_cuts(&mut self, tell: Tell) -> Result<Vec<(Vec<Strategy>, Vec<u32>)>> {
        let mut cuts: Vec<(Vec<Strategy>, Vec<u32>)> = Vec::new();
        for strategy in CHEAP {
            let dropped = self.find(strategy, tell)?.dropped().to_vec();
            match cuts.iter_mut().find(|(_, there)| *there == dropped) {
                Some((strategies, _)) => strategies.push(strategy),
                None => cuts.push((vec![strategy], dropped)),
            }
        }
        Ok(cuts)
    }

    /// The cut of least damage among those of the cheap strategies.
    fn auto(&mut self, tell: Tell) -> Result<Found> {
        let (mut cuts, meter) = (self.cheap_cuts(tell)?, measured(&mut self.damage)?);
        meter.plan(cuts.len() as u64);
        let sets: Vec<Vec<u32>> = cuts.iter().map(|(_, dropped)| dropped.clone()).collect();
        let damages = meter.search(&sets, meter.windows(), tell)?;
        let price = meter.price();
        let mut considered: Vec<Considered> = cuts
            .drain(..)
            .zip(damages)
            .map(|((strategies, dropped), damage)| Considered {
                strategies,
                dropped,
                damage,
                stderr: 0.0,
                cost: damage.map_or(Cost::default(), |_| price),
                why: String::new(),
            })
            .collect();
        let known = |c: &Considered| c.damage.unwrap_or(f64::INFINITY);
        considered.sort_by(|a, b| search::better((known(a), &a.dropped), (known(b), &b.dropped)));
        let mut found = Found::settled(meter, vec![considered[0].dropped.clone()], Vec::new(), tell)?;
        explain(&mut considered, found.score);
        for cut in considered.iter_mut().filter(|cut| cut.damage.is_some()) {
            cut.stderr = meter.known(&cut.dropped).map_or(0.0, |measured| measured.stderr);
        }
        found.considered = considered;
        Ok(found)
    }

    fn explicit(&self) -> Result<Found> {
        let layer_count = self.profile.layer_count;
        let mut dropped = self.spec.layers.clone().unwrap_or_default();
        dropped.sort_unstable();
        dropped.dedup();
        let outside = dropped.last().is_none_or(|l| *l >= layer_count);
        if outside || dropped.len() >= layer_count as usize {
            return Err(Error::spec(format!(
                "prune.layers: {dropped:?} must be some, not all, of the model's layers 0 to {}",
                layer_count - 1
            )));
        }
        Ok(Found { score: 0.0, candidates: Vec::new(), path: vec![dropped], considered: Vec::new() })
    }

    /// What `found`, which was run last, dropped and cost, with the damage of its path where that is measured.
    fn compared(&mut self, strategy: Strategy, found: &Found, tell: Tell) -> Result<Compared> {
        let (mut cost, mut budget_exhausted) = (Cost::default(), false);
        for meter in self.damage.iter().chain(&self.accuracy) {
            cost.evaluations += meter.cost().evaluations;
            cost.tokens += meter.cost().tokens;
            budget_exhausted |= meter.exhausted();
        }
        let whole = !self.spec.compare.is_empty();
        let mut path = Vec::new();
        if let Some(meter) = &mut self.damage {
            for dropped in &found.path {
                if whole || dropped == found.dropped() || meter.known(dropped).is_some() {
                    let Measured { damage, stderr } = meter.damage(dropped, tell)?;
                    path.push(Step { dropped: dropped.clone(), damage, stderr });
                }
            }
        }
        Ok(Compared {
            strategy,
            dropped: found.dropped().to_vec(),
            damage: path.last().map(|step| step.damage),
            stderr: path.last().map_or(0.0, |step| step.stderr),
            path,
            cost,
            budget_exhausted,
        })
    }
}

/// The meter of what a strategy must measure.
fn measured<'a, 'b>(meter: &'a mut Option<Meter<'b>>) -> Result<&'a mut Meter<'b>> {
    meter.as_mut().ok_or_else(|| Error::bug("a strategy that measures was given no oracle"))
}

/// Says of each cut why it was taken or not; the first one was, at the damage `chosen`.
fn explain(considered: &mut [Considered], chosen: f64) {
    let count = considered.len();
    for (i, cut) in considered.iter_mut().enumerate() {
        cut.why = match (i, cut.damage) {
            (0, Some(_)) => match count {
                1 => "all cheap strategies agree on it".into(),
                _ => format!("does the least damage of {count} cuts"),
            },
            (0, None) => "the budget ended before any cut was measured; the first one was taken".into(),
            (_, Some(damage)) if damage > chosen => {
                format!("does {:.4} nats per token more damage", damage - chosen)
            }
            (_, Some(_)) => "does as much damage, but starts before the one that was taken".into(),
            (_, None) => "the budget ended before it was measured".into(),
        };
    }
    considered[0].damage = Some(chosen);
}
