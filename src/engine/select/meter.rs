//! The oracle behind a meter: every answer is remembered, every question counted, and a search ends with its
//! budget.

use std::collections::{HashMap, HashSet};

use super::{Error, Measured, Oracle, Result, Tell};
use crate::job::report::{Ablation, Cost};
use crate::job::spec::DamageSpec;

/// One in so many windows is a first heat.
const HEAT: usize = 4;
/// Fewer windows say too little of how sure they are.
const LEAST_WINDOWS: usize = 4;
/// Standard errors, of each of two damages, that must lie between them for it to be sure which is less: more than it
/// takes, as both are of the same windows.
const SURE: f64 = 2.0;

/// A set of layers left out (ascending), and how many windows it is measured on.
type Question = (Vec<u32>, usize);

/// What strategies ask instead of the oracle. Answers are shared between strategies; cost and budget are each
/// strategy's own, so that neither hangs on what it is compared with.
pub struct Meter<'a> {
    oracle: &'a mut dyn Oracle,
    most: Cost,
    known: HashMap<Question, Measured>,
    /// What the present strategy has asked for.
    asked: HashSet<Question>,
    /// Of which sets that was: a set is one evaluation, however often it is looked at.
    sets: HashSet<Vec<u32>>,
    cost: Cost,
    exhausted: bool,
    task: String,
    planned: u64,
    looked_up: u64,
}

impl<'a> Meter<'a> {
    pub fn new(oracle: &'a mut dyn Oracle, spec: &DamageSpec) -> Self {
        let most = Cost {
            evaluations: spec.max_evaluations.map_or(u64::MAX, u64::from),
            tokens: spec.max_tokens.unwrap_or(u64::MAX),
        };
        Self {
            oracle,
            most,
            known: HashMap::new(),
            asked: HashSet::new(),
            sets: HashSet::new(),
            cost: Cost::default(),
            exhausted: false,
            task: String::new(),
            planned: 0,
            looked_up: 0,
        }
    }

    /// Takes the damage of leaving out each single layer, in order, as measured on all windows; none where it was not.
    pub fn knowing(mut self, ablation: &[Ablation]) -> Self {
        let windows = self.windows();
        let single = |(layer, a): (usize, &Ablation)| {
            ((vec![layer as u32], windows), Measured { damage: a.damage, stderr: a.stderr })
        };
        self.known.extend(ablation.iter().enumerate().map(single));
        self
    }

    /// The next strategy: nothing asked, nothing spent. `task` is what its progress is called.
    pub fn begin(&mut self, task: String) {
        self.asked.clear();
        self.sets.clear();
        (self.cost, self.exhausted) = (Cost::default(), false);
        (self.task, self.planned, self.looked_up) = (task, 0, 0);
    }

    /// How many sets the search will ask for at most.
    pub fn plan(&mut self, sets: u64) {
        self.planned = sets.min(self.most.evaluations);
    }

    pub const fn cost(&self) -> Cost {
        self.cost
    }

    pub const fn exhausted(&self) -> bool {
        self.exhausted
    }

    /// All windows there are.
    pub fn windows(&self) -> usize {
        self.oracle.windows()
    }

    /// What measuring one set on all windows costs.
    pub fn price(&self) -> Cost {
        Cost { evaluations: 1, tokens: self.oracle.tokens(self.windows()) }
    }

    /// The damage of each of `sets` on the first `windows` windows; none where the budget does not reach. Those
    /// worth knowing most come first.
    pub fn search(&mut self, sets: &[Vec<u32>], windows: usize, tell: Tell) -> Result<Vec<Option<f64>>> {
        let found = self.ask(sets, windows, tell)?;
        Ok(found.into_iter().map(|found| found.map(|measured| measured.damage)).collect())
    }

    /// The damage on all windows of the `count` sets that do least, and of those that might: what a quarter of the
    /// windows says surely is not among them is not measured on the others, and none is known of it.
    pub fn least(&mut self, sets: &[Vec<u32>], count: usize, tell: Tell) -> Result<Vec<Option<f64>>> {
        let (all, few) = (self.windows(), self.windows() / HEAT);
        if self.heats() == 1 || sets.len() <= count {
            return self.search(sets, all, tell);
        }
        let heat = self.ask(sets, few, tell)?;
        let at_most = |measured: &Measured| measured.damage + SURE * measured.stderr;
        let mut bounds: Vec<f64> = heat.iter().flatten().map(at_most).collect();
        bounds.sort_by(f64::total_cmp);
        // With fewer measured than wanted the budget has ended.
        let bound = bounds.get(count - 1).copied().unwrap_or(f64::INFINITY);
        let may = |m: &Option<Measured>| m.is_some_and(|m| m.damage - SURE * m.stderr <= bound);
        let left: Vec<bool> = heat.iter().map(may).collect();
        let of_left = |(set, left): (&Vec<u32>, &bool)| left.then(|| set.clone());
        let measured =
            self.search(&sets.iter().zip(&left).filter_map(of_left).collect::<Vec<_>>(), all, tell)?;
        let mut measured = measured.into_iter();
        Ok(left.into_iter().map(|left| if left { measured.next().flatten() } else { None }).collect())
    }

    /// How often [`Self::least`] may look at a set.
    pub fn heats(&self) -> usize {
        if self.windows() / HEAT < LEAST_WINDOWS { 1 } else { 2 }
    }

    fn ask(&mut self, sets: &[Vec<u32>], windows: usize, tell: Tell) -> Result<Vec<Option<Measured>>> {
        let tokens = self.oracle.tokens(windows);
        let questions: Vec<Question> = sets.iter().map(|set| (set.clone(), windows)).collect();
        for question in &questions {
            if self.asked.contains(question) {
                continue;
            }
            let next = self.with(&question.0, tokens);
            if next.evaluations > self.most.evaluations || next.tokens > self.most.tokens {
                self.exhausted = true;
            } else {
                self.asked.insert(question.clone());
                self.sets.insert(question.0.clone());
                self.cost = next;
            }
        }
        let paid: Vec<Question> = questions.iter().filter(|q| self.asked.contains(q)).cloned().collect();
        let before = self.looked_up;
        self.answer(&paid, windows, tell)?;
        // What was known already is a part of the plan, too.
        self.looked_up = before + sets.len() as u64;
        tell(&self.task, self.looked_up, self.planned.max(self.looked_up))?;
        Ok(questions
            .iter()
            .map(|q| if self.asked.contains(q) { self.known.get(q).copied() } else { None })
            .collect())
    }

    /// The cost with `set` sent through on so many tokens.
    fn with(&self, set: &[u32], tokens: u64) -> Cost {
        let new = u64::from(!self.sets.contains(set));
        Cost { evaluations: self.cost.evaluations + new, tokens: self.cost.tokens + tokens }
    }

    /// The damage of `set` on all windows, for what a search has settled on: it is known whatever it costs.
    pub fn settle(&mut self, set: &[u32], tell: Tell) -> Result<f64> {
        let windows = self.windows();
        let question = (set.to_vec(), windows);
        if self.asked.insert(question.clone()) {
            self.cost = self.with(set, self.oracle.tokens(windows));
            self.sets.insert(set.to_vec());
        }
        Ok(self.damage(set, tell)?.damage)
    }

    /// The same beside the search and its cost.
    pub fn damage(&mut self, set: &[u32], tell: Tell) -> Result<Measured> {
        let windows = self.windows();
        let question = (set.to_vec(), windows);
        self.answer(std::slice::from_ref(&question), windows, tell)?;
        Ok(self.known[&question])
    }

    /// The same where it is known already.
    pub fn known(&self, set: &[u32]) -> Option<Measured> {
        self.known.get(&(set.to_vec(), self.windows())).copied()
    }

    /// Asks the oracle for what is not known yet, in an order in which neighbours share their first layers.
    fn answer(&mut self, questions: &[Question], windows: usize, tell: Tell) -> Result<()> {
        let mut unknown: Vec<Vec<u32>> =
            questions.iter().filter(|q| !self.known.contains_key(q)).map(|(set, _)| set.clone()).collect();
        unknown.sort_unstable();
        unknown.dedup();
        if unknown.is_empty() {
            return Ok(());
        }
        let (task, before, planned) = (&self.task, self.looked_up, self.planned);
        let mut progress = |done: usize| tell(task, before + done as u64, planned.max(before + done as u64));
        let found = self.oracle.measure(&unknown, windows, &mut progress)?;
        for (set, measured) in unknown.into_iter().zip(found) {
            if !measured.damage.is_finite() {
                return Err(Error::model(format!(
                    "without the layers {set:?} the model's loss is not finite; its values overflow in this \
                     precision: try --precision f32"
                )));
            }
            self.known.insert((set, windows), measured);
            self.looked_up += 1;
        }
        Ok(())
    }
}
