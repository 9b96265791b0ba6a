//! The oracle behind a meter: every answer is remembered, every question counted, and a search ends with its
//! budget.

use std::collections::{HashMap, HashSet};

use super::{Error, Measured, Oracle, Result, Tell};
use crate::job::report::{Ablation, Cost};
use crate::job::spec::DamageSpec;

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
        let tokens = self.oracle.tokens(windows);
        let questions: Vec<Question> = sets.iter().map(|set| (set.clone(), windows)).collect();
        for question in &questions {
            if self.asked.contains(question) {
                continue;
            }
            let next = Cost { evaluations: self.cost.evaluations + 1, tokens: self.cost.tokens + tokens };
            if next.evaluations > self.most.evaluations || next.tokens > self.most.tokens {
                self.exhausted = true;
            } else {
                self.asked.insert(question.clone());
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
            .map(|q| if self.asked.contains(q) { self.known.get(q).map(|known| known.damage) } else { None })
            .collect())
    }

    /// The damage of `set` on all windows, for what a search has settled on: it is known whatever it costs.
    pub fn settle(&mut self, set: &[u32], tell: Tell) -> Result<f64> {
        let windows = self.windows();
        let question = (set.to_vec(), windows);
        if self.asked.insert(question.clone()) {
            self.cost.evaluations += 1;
            self.cost.tokens += self.oracle.tokens(windows);
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
