//! Logits: how likely they make a token, and the gradient of that.

use super::lanes::vectorised;
use super::scores::scaled;

/// How likely tokens are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Likelihood {
    /// Sum over the tokens, in nats.
    pub log_likelihood: f64,
    /// Every token is the first of the likeliest at its place.
    pub greedy: bool,
}

/// Scales and caps a row of logits in place.
pub fn finish_logits(logits: &mut [f32], scale: f32, cap: Option<f32>) {
    if scale != 1.0 || cap.is_some() {
        scaled(logits, scale, cap.unwrap_or(0.0));
    }
}

/// Logits whose exponentials are summed in float32; their sums in float64.
const SHORT: usize = 1024;

vectorised! {
    fn largest[v](logits: &[f32]) -> f32 {
        let mut most = v.splat(f32::NEG_INFINITY);
        for at in (0..logits.len()).step_by(L::WIDTH) {
            most = v.larger(v.load_or(f32::NEG_INFINITY, logits, at), most);
        }
        v.largest(most)
    }
}

vectorised! {
    /// Sum of `exp(logit - most)`.
    fn mass[v](logits: &[f32], most: f32) -> f32 {
        let mut sum = v.splat(0.0);
        for at in (0..logits.len()).step_by(L::WIDTH) {
            let logit = v.load_or(f32::NEG_INFINITY, logits, at);
            sum = v.add(sum, v.exp(v.sub(logit, v.splat(most))));
        }
        v.total(sum)
    }
}

/// The largest logit, and the sum of `exp(logit - largest)`.
fn largest_and_mass(logits: &[f32]) -> (f32, f64) {
    let most = largest(logits);
    (most, logits.chunks(SHORT).map(|part| f64::from(mass(part, most))).sum())
}

/// How likely a token is, found out from one block of the vocabulary after another.
#[derive(Debug, Clone, Copy)]
pub struct Odds {
    token: usize,
    /// The token's own logit.
    own: f32,
    /// The largest logit so far, and where it is first.
    most: f32,
    best: usize,
    /// Sum of `exp(logit - most)`.
    sum: f64,
}

impl Odds {
    pub fn of(token: usize) -> Self {
        Self { token, own: f32::NAN, most: f32::NEG_INFINITY, best: usize::MAX, sum: 0.0 }
    }

    /// Takes in the finished logits of tokens `first..`.
    pub fn add(&mut self, logits: &[f32], first: usize) {
        let (most, sum) = largest_and_mass(logits);
        if most > self.most {
            self.sum = self.sum * f64::from(self.most - most).exp() + sum;
            self.best = first + logits.iter().position(|logit| *logit >= most).unwrap_or(0);
            self.most = most;
        } else {
            self.sum += sum * f64::from(most - self.most).exp();
        }
        if let Some(own) = self.token.checked_sub(first).and_then(|place| logits.get(place)) {
            self.own = *own;
        }
    }

    /// The likeliest token; of equal ones the first.
    pub fn best(&self) -> usize {
        self.best
    }

    pub fn likelihood(&self) -> Likelihood {
        Likelihood {
            log_likelihood: f64::from(self.own) - f64::from(self.most) - self.sum.ln(),
            greedy: self.best == self.token,
        }
    }
}

/// Turns a row of logits into the logarithms of the probabilities.
pub fn log_softmax(logits: &mut [f32]) {
    let (most, sum) = largest_and_mass(logits);
    let log_sum = most + sum.ln() as f32;
    logits.iter_mut().for_each(|logit| *logit -= log_sum);
}

/// What should be predicted: tokens and their shares, which sum to one.
pub type SoftTarget = Vec<(u32, f32)>;

/// The likeliest tokens, in no order, and their log-probabilities.
pub fn likeliest(log_probabilities: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut order: Vec<u32> = (0..log_probabilities.len() as u32).collect();
    let value = |id: &u32| log_probabilities[*id as usize];
    if count < order.len() {
        order.select_nth_unstable_by(count - 1, |a, b| value(b).total_cmp(&value(a)));
        order.truncate(count);
    }
    order.iter().map(|id| (*id, value(id))).collect()
}

/// `-Σ share · ln p(token)`, in nats; finished logits become `factor` times its gradient for the logits before they
/// were capped and scaled, the latter of which `factor` has to hold.
pub fn cross_entropy(logits: &mut [f32], target: &[(u32, f32)], cap: Option<f32>, factor: f32) -> f32 {
    vectorised! {
        fn go[v](logits: &mut [f32], cap: f32, most: f32, factor: f32) {
            for at in (0..logits.len()).step_by(L::WIDTH) {
                let logit = v.load(logits, at);
                let mut gradient = v.mul(v.exp(v.sub(logit, v.splat(most))), v.splat(factor));
                if cap > 0.0 {
                    // d/dx cap·tanh(x/cap) = 1 - tanh², and the capped logit is cap·tanh.
                    let t = v.mul(logit, v.splat(1.0 / cap));
                    gradient = v.mul(gradient, v.sub(v.splat(1.0), v.mul(t, t)));
                }
                v.store(logits, at, gradient);
            }
        }
    }
    let (most, sum) = largest_and_mass(logits);
    let own = |(token, share): &(u32, f32)| f64::from(*share) * f64::from(logits[*token as usize]);
    let nll = f64::from(most) - target.iter().map(own).sum::<f64>() + sum.ln();
    let pull = |(token, share): &(u32, f32)| {
        let slope = cap.map_or(1.0, |cap| 1.0 - (logits[*token as usize] / cap).powi(2));
        (*token as usize, factor * share * slope)
    };
    let pulls: Vec<(usize, f32)> = target.iter().map(pull).collect();
    go(logits, cap.unwrap_or(0.0), most, (f64::from(factor) / sum) as f32);
    pulls.into_iter().for_each(|(token, pull)| logits[token] -= pull);
    nll as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odds_do_not_depend_on_the_blocks_they_come_in() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 37 % 1001) as f32 - 500.0) / 40.0).collect();
        let sum: f64 = logits.iter().map(|v| f64::from(*v).exp()).sum();
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        for block in [1000, 333, 16, 1] {
            for token in [0, 17, best, 999] {
                let mut odds = Odds::of(token);
                for (i, part) in logits.chunks(block).enumerate() {
                    odds.add(part, i * block);
                }
                let found = odds.likelihood();
                assert!((found.log_likelihood - (f64::from(logits[token]) - sum.ln())).abs() < 1e-6);
                assert_eq!(found.greedy, token == best);
            }
        }
        // Of equal ones the first is meant.
        let mut odds = Odds::of(2);
        odds.add(&[1.0, 3.0], 0);
        odds.add(&[3.0, 0.0], 2);
        assert!(!odds.likelihood().greedy);
    }

    /// The slope of `f` at `x`, from the values around it.
    fn slope(f: impl Fn(f32) -> f64, x: f32) -> f64 {
        (f(x + 1e-2) - f(x - 1e-2)) / f64::from((x + 1e-2) - (x - 1e-2))
    }

    #[test]
    fn cross_entropy_agrees_with_float64_and_its_own_slope() {
        let logits: Vec<f32> = (0..100).map(|i| ((i * 37 % 101) as f32 - 50.0) / 10.0).collect();
        let hard = vec![(7, 1.0)];
        let soft = vec![(7, 0.25), (50, 0.5), (99, 0.25)];
        for (cap, target) in [(None, &hard), (Some(3.0), &hard), (None, &soft), (Some(3.0), &soft)] {
            let nll = |raw: &[f32]| {
                let mut row = raw.to_vec();
                finish_logits(&mut row, 0.5, cap);
                let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
                let own: f64 =
                    target.iter().map(|(t, share)| f64::from(*share) * f64::from(row[*t as usize])).sum();
                (row.clone(), sum.ln() - own)
            };
            let (mut row, want) = nll(&logits);
            let got = cross_entropy(&mut row, target, cap, 0.5 * 2.0);
            assert!((f64::from(got) - want).abs() < 1e-5, "{got} {want}");
            for i in [0, 7, 50, 99] {
                let moved = |v: f32| {
                    let mut raw = logits.clone();
                    raw[i] = v;
                    nll(&raw).1
                };
                let want = 2.0 * slope(moved, logits[i]);
                assert!((f64::from(row[i]) - want).abs() < 1e-3, "{i}: {} {want}", row[i]);
            }
        }
    }
}
