//! What samples say together: means, standard errors, and how sure the nearest block is.

use crate::engine::distance::{Gram, Mean};
use crate::job::report::{Contribution, LayerProfile, cross_axis, mean_and_spread};
use crate::job::spec::{Distance, TokenPosition};

/// One window's, or one token's, contribution to the profile.
#[derive(Default)]
pub struct Sample {
    /// `by_len[n-1][l]`, flattened.
    distances: Vec<f64>,
    influence: Vec<f64>,
    relative_magnitude: Vec<f64>,
    norm: Vec<f64>,
    /// What attention and MLP of each layer add, relative to the stream.
    pub added: Vec<[f64; 2]>,
}

impl Sample {
    pub fn of(gram: &Gram, seams: usize, distance: Distance) -> Self {
        let layer_count = seams - 1;
        let blocks = (1..=layer_count).flat_map(|n| (0..=layer_count - n).map(move |l| (l, l + n)));
        Self {
            distances: blocks.map(|(a, b)| distance.from_cosine(gram.cosine(a, b))).collect(),
            influence: (0..layer_count).map(|l| 1.0 - gram.cosine(l, l + 1)).collect(),
            relative_magnitude: (0..layer_count).map(|l| gram.relative_change(l, l + 1)).collect(),
            norm: (0..seams).map(|l| gram.norm(l)).collect(),
            added: Vec::new(),
        }
    }

    /// The first seam at which the stream is not finite.
    pub fn not_finite(&self) -> Option<usize> {
        self.norm.iter().position(|norm| !norm.is_finite())
    }

    pub fn add(&mut self, other: &Self, weight: f64) {
        let pairs = [
            (&mut self.distances, &other.distances),
            (&mut self.influence, &other.influence),
            (&mut self.relative_magnitude, &other.relative_magnitude),
            (&mut self.norm, &other.norm),
        ];
        for (mine, theirs) in pairs {
            mine.resize(theirs.len(), 0.0);
            mine.iter_mut().zip(theirs).for_each(|(m, t)| *m += weight * t);
        }
    }
}

/// Running means over windows.
pub struct Sums {
    layer_count: usize,
    unit: &'static str,
    distances: Vec<Mean>,
    influence: Vec<Mean>,
    relative_magnitude: Vec<Mean>,
    norm: Vec<Mean>,
    added: [Vec<Mean>; 2],
    /// The distances of each sample, to compare two blocks on the same ones.
    each: Vec<Vec<f32>>,
}

impl Sums {
    pub fn new(layer_count: usize, distance: Distance) -> Self {
        let empty = |count: usize| vec![Mean::default(); count];
        Self {
            layer_count,
            unit: distance.unit(),
            distances: empty(layer_count * (layer_count + 1) / 2),
            influence: empty(layer_count),
            relative_magnitude: empty(layer_count),
            norm: empty(layer_count + 1),
            added: [empty(layer_count), empty(layer_count)],
            each: Vec::new(),
        }
    }

    pub fn samples(&self) -> usize {
        self.each.len()
    }

    pub fn add(&mut self, sample: &Sample) {
        let pairs = [
            (&mut self.distances, &sample.distances),
            (&mut self.influence, &sample.influence),
            (&mut self.relative_magnitude, &sample.relative_magnitude),
            (&mut self.norm, &sample.norm),
        ];
        for (means, values) in pairs {
            means.iter_mut().zip(values).for_each(|(m, v)| m.add(*v));
        }
        for (half, means) in self.added.iter_mut().enumerate() {
            means.iter_mut().zip(&sample.added).for_each(|(m, v)| m.add(v[half]));
        }
        self.each.push(sample.distances.iter().map(|d| *d as f32).collect());
    }

    /// How sure it is that the nearest block of `len` layers is the nearest: the probability that its distance
    /// to the runner-up is above 0, by the mean and the standard error of that distance over samples.
    pub fn confidence(&self, len: usize) -> f64 {
        let cells = self.row(len);
        let mut order: Vec<usize> = cells.collect();
        order.sort_by(|a, b| self.distances[*a].value().total_cmp(&self.distances[*b].value()));
        let [best, second, ..] = order[..] else { return 1.0 };
        let mut gap = Mean::default();
        self.each.iter().for_each(|sample| gap.add(f64::from(sample[second]) - f64::from(sample[best])));
        match (gap.value(), gap.stderr()) {
            // One sample, or samples that agree to the last digit.
            (value, 0.0) => {
                if value > 0.0 && self.samples() > 1 {
                    1.0
                } else {
                    0.5
                }
            }
            (value, stderr) => normal(value / stderr).max(0.5),
        }
    }

    pub fn profile(&self, position: TokenPosition, tokens: u64) -> LayerProfile {
        let values = |means: &[Mean]| means.iter().map(Mean::value).collect::<Vec<f64>>();
        let stderr = |means: &[Mean]| means.iter().map(Mean::stderr).collect::<Vec<f64>>();
        let (influence, relative_magnitude) = (values(&self.influence), values(&self.relative_magnitude));
        let contribution = |(attention, mlp): (&Mean, &Mean)| Contribution {
            attention: attention.value(),
            mlp: mlp.value(),
            attention_stderr: attention.stderr(),
            mlp_stderr: mlp.stderr(),
        };
        LayerProfile {
            layer_count: self.layer_count as u32,
            samples: self.samples() as u32,
            tokens,
            position,
            unit: self.unit.into(),
            by_len: self.rows(Mean::value),
            stderr: self.rows(Mean::stderr),
            cross_axis: cross_axis(&influence, &relative_magnitude),
            cross_axis_stderr: self.cross_axis_stderr(),
            influence,
            relative_magnitude,
            norm: values(&self.norm),
            influence_stderr: stderr(&self.influence),
            relative_magnitude_stderr: stderr(&self.relative_magnitude),
            norm_stderr: stderr(&self.norm),
            contribution: self.added[0].iter().zip(&self.added[1]).map(contribution).collect(),
            ablation: Vec::new(),
            logit_lens: Vec::new(),
            confidence: (1..=self.layer_count).map(|len| self.confidence(len)).collect(),
            samples_asked: self.samples() as u32,
            stopped_early: false,
        }
    }

    /// That of the larger z-score of each layer; mean and spread over layers are taken as known.
    fn cross_axis_stderr(&self) -> Vec<f64> {
        let scores = |means: &[Mean]| -> Vec<(f64, f64)> {
            let (middle, spread) = mean_and_spread(&means.iter().map(Mean::value).collect::<Vec<f64>>());
            let score = |m: &Mean| {
                if spread > 0.0 { ((m.value() - middle) / spread, m.stderr() / spread) } else { (0.0, 0.0) }
            };
            means.iter().map(score).collect()
        };
        let both = scores(&self.influence).into_iter().zip(scores(&self.relative_magnitude));
        both.map(|(a, b)| if a.0 >= b.0 { a.1 } else { b.1 }).collect()
    }

    /// The flat cells of blocks of `len` layers.
    fn row(&self, len: usize) -> std::ops::Range<usize> {
        let first = (1..len).map(|n| self.layer_count - n + 1).sum();
        first..first + self.layer_count - len + 1
    }

    /// The flat cells as rows: row `n-1` has one entry per block of length `n`.
    fn rows(&self, value: impl Fn(&Mean) -> f64) -> Vec<Vec<f64>> {
        (1..=self.layer_count).map(|len| self.distances[self.row(len)].iter().map(&value).collect()).collect()
    }
}

/// The standard normal distribution function (Abramowitz & Stegun, 26.2.17, to 7.5e-8).
fn normal(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z.abs());
    let series = t
        * (0.319_381_530
            + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    let tail = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt() * series;
    if z >= 0.0 { 1.0 - tail } else { tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_normal_distribution_is_that_of_the_tables() {
        for (z, p) in
            [(0.0, 0.5), (1.0, 0.841_344_746), (1.959_964, 0.975), (-1.0, 0.158_655_254), (6.0, 1.0)]
        {
            assert!((normal(z) - p).abs() < 1e-6, "{z}");
        }
    }

    #[test]
    fn confidence_goes_by_the_difference_on_the_same_samples() {
        // Two layers; their distances move together from sample to sample, and the first is always less.
        let sums = |gap: &dyn Fn(usize) -> f64| {
            let mut sums = Sums::new(2, Distance::Angular);
            for i in 0..20 {
                let noise = (i % 5) as f64 * 0.1;
                let distances = vec![noise, noise + gap(i), 1.0];
                sums.add(&Sample { distances, ..Sample::default() });
            }
            sums
        };
        assert!(sums(&|i| 0.01 + (i % 2) as f64 * 0.001).confidence(1) > 0.999);
        assert!(sums(&|i| if i % 2 == 0 { 0.1 } else { -0.09 }).confidence(1) < 0.8);
        assert!((sums(&|_| 0.0).confidence(1) - 0.5).abs() < 1e-12);
        assert!((sums(&|_| 0.0).confidence(2) - 1.0).abs() < 1e-12);
    }
}
