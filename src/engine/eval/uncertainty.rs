//! How sure a score is: standard errors, and the paired bootstrap (Efron & Tibshirani 1993, ch. 13; for models on the
//! same items, Koehn 2004).

use crate::engine::chance::{stream_key, unit};
use crate::job::report::Estimate;

/// Enough that the ends of a 95 % interval come from 25 resamples each.
const RESAMPLES: usize = 1000;

/// A ratio of two sums and its standard error. Parts may differ in size, so its error is that of a ratio (Cochran,
/// Sampling Techniques, ch. 6); where they do not, it is that of the mean of their differences.
pub fn ratio(parts: &[f64], sizes: &[f64]) -> (f64, f64) {
    let (count, all) = (parts.len() as f64, sizes.iter().sum::<f64>());
    let value = parts.iter().sum::<f64>() / all;
    let squares: f64 = parts.iter().zip(sizes).map(|(part, size)| (part - value * size).powi(2)).sum();
    let stderr = if count > 1.0 { (squares * count / (count - 1.0)).sqrt() / all } else { 0.0 };
    (value, stderr)
}

/// How a value that follows from sums over items would have come out on other items.
pub struct Resampled {
    value: f64,
    /// Ascending; those that exist.
    resamples: Vec<f64>,
    missing: usize,
}

impl Resampled {
    /// `of(sums)` of what stands in each stratum (a task, a text), and of resamples of its rows, drawn as many as there
    /// are, with replacement. Nothing where the value itself does not exist. The same `seed` draws the same.
    pub fn of<const N: usize>(
        strata: &[&[[f64; N]]],
        seed: u64,
        of: impl Fn(&[[f64; N]]) -> Option<f64>,
    ) -> Option<Self> {
        let sum = |rows: &mut dyn Iterator<Item = &[f64; N]>| {
            rows.fold([0.0; N], |sums, row| std::array::from_fn(|i| sums[i] + row[i]))
        };
        let all: Vec<_> = strata.iter().map(|rows| sum(&mut rows.iter())).collect();
        let value = of(&all)?;
        let mut resamples: Vec<f64> = (0..RESAMPLES as u64)
            .filter_map(|resample| {
                let drawn = strata.iter().enumerate().map(|(stratum, rows)| {
                    let key = stream_key(&[seed, resample, stratum as u64]);
                    let draw = |i: u64| &rows[(unit(key, i) * rows.len() as f64) as usize];
                    sum(&mut (0..rows.len() as u64).map(draw))
                });
                of(&drawn.collect::<Vec<_>>())
            })
            .collect();
        resamples.sort_by(f64::total_cmp);
        let missing = RESAMPLES - resamples.len();
        Some(Self { value, resamples, missing })
    }

    /// The interval that holds the middle `confidence` of the resamples. Nothing where the value does not exist in
    /// more of them than may lie outside.
    pub fn estimate(&self, confidence: f64) -> Option<Estimate> {
        let outside = 1.0 - confidence;
        if self.resamples.is_empty() || self.missing as f64 > outside * RESAMPLES as f64 {
            return None;
        }
        let last = (self.resamples.len() - 1) as f64;
        let at = |share: f64| self.resamples[(share * last).round() as usize];
        Some(Estimate { value: self.value, low: at(outside / 2.0), high: at(1.0 - outside / 2.0) })
    }

    /// Share of the resamples below `bound`; those at it count half.
    pub fn below(&self, bound: f64) -> f64 {
        let less = self.resamples.iter().filter(|v| **v < bound).count() as f64;
        let at = self.resamples.iter().filter(|v| **v == bound).count() as f64;
        (less + at / 2.0) / self.resamples.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_windows_weigh_more_and_what_is_the_same_everywhere_is_certain() {
        let (same, stderr) = ratio(&[0.5, 1.5, 0.25], &[10.0, 30.0, 5.0]);
        assert!((same - 0.05).abs() < 1e-12 && stderr < 1e-12, "{same}, {stderr}");
        // 0.1 and 0.3 per token, the latter on three times as many.
        let (uneven, stderr) = ratio(&[1.0, 9.0], &[10.0, 30.0]);
        assert!((uneven - 0.25).abs() < 1e-12, "{uneven}");
        // Residuals 1 - 2.5 and 9 - 7.5: the root of (1.5² + 1.5²) · 2, over 40 tokens.
        assert!((stderr - 3.0 / 40.0).abs() < 1e-12, "{stderr}");
        assert!(ratio(&[1.0], &[10.0]).1.abs() < 1e-12);
    }

    #[test]
    fn the_interval_of_a_mean_is_that_of_its_standard_error_and_the_same_seed_draws_it_again() {
        let rows: Vec<[f64; 1]> = (0..400).map(|i| [f64::from(u8::from(i % 4 == 0))]).collect();
        let mean = |sums: &[[f64; 1]]| Some(sums[0][0] / 400.0);
        let resampled = Resampled::of(&[&rows], 1, mean).unwrap();
        let estimate = resampled.estimate(0.95).unwrap();
        let reach = 1.96 * (0.25f64 * 0.75 / 400.0).sqrt();
        assert!((estimate.value - 0.25).abs() < 1e-12);
        assert!((estimate.low - (0.25 - reach)).abs() < 0.2 * reach, "{estimate:?}");
        assert!((estimate.high - (0.25 + reach)).abs() < 0.2 * reach, "{estimate:?}");
        assert_eq!(Resampled::of(&[&rows], 1, mean).unwrap().estimate(0.95), Some(estimate));
        assert_ne!(Resampled::of(&[&rows], 2, mean).unwrap().estimate(0.95), Some(estimate));
        let wider = resampled.estimate(0.99).unwrap();
        assert!(wider.low < estimate.low && wider.high > estimate.high);
        assert!((resampled.below(0.25) - 0.5).abs() < 0.1);
    }

    #[test]
    fn what_is_the_same_for_every_item_is_sure_and_what_often_does_not_exist_is_not() {
        let pairs: Vec<[f64; 2]> = (0..50).map(|i| [f64::from(i % 2), f64::from(i % 2)]).collect();
        let difference = Resampled::of(&[&pairs], 0, |s| Some(s[0][0] - s[0][1])).unwrap();
        assert_eq!(difference.estimate(0.95), Some(Estimate::default()), "paired: no item differs");
        let positive = |s: &[[f64; 2]]| (s[0][0] >= 25.0).then_some(1.0);
        assert_eq!(Resampled::of(&[&pairs], 0, positive).unwrap().estimate(0.95), None);
        assert!(Resampled::of(&[&pairs], 0, |_| None).is_none());
    }
}
