//! How far apart residual streams are: cosines and norms from one Gram matrix.

use std::f64::consts::PI;

use super::model::kernel::rows::exact_product;
use crate::job::spec::Distance;

/// Inner products of the streams of one token at all seams: everything the
/// profile asks for follows from them.
pub struct Gram {
    seams: usize,
    /// `[seams, seams]`, upper triangle filled.
    products: Vec<f64>,
}

impl Gram {
    /// `streams`: one vector per seam, all of one length. Summed in float64.
    pub fn new(streams: &[&[f32]]) -> Self {
        let seams = streams.len();
        let mut products = vec![0.0; seams * seams];
        for a in 0..seams {
            for b in a..seams {
                products[a * seams + b] = exact_product(streams[a], streams[b]);
            }
        }
        Self { seams, products }
    }

    pub fn norm(&self, seam: usize) -> f64 {
        self.at(seam, seam).sqrt()
    }

    /// Cosine between the streams at two seams, `a <= b`. A stream without length
    /// is like itself and at right angles to all others.
    pub fn cosine(&self, a: usize, b: usize) -> f64 {
        let (aa, bb) = (self.at(a, a), self.at(b, b));
        match (aa > 0.0, bb > 0.0) {
            (true, true) => {}
            (false, false) => return 1.0,
            (true, false) | (false, true) => return 0.0,
        }
        (self.at(a, b) / (aa * bb).sqrt()).clamp(-1.0, 1.0)
    }

    /// `|h_b - h_a| / |h_a|`, `a <= b`.
    pub fn relative_change(&self, a: usize, b: usize) -> f64 {
        let change = self.at(a, a) + self.at(b, b) - 2.0 * self.at(a, b);
        change.max(0.0).sqrt() / self.norm(a).max(1e-12)
    }

    fn at(&self, a: usize, b: usize) -> f64 {
        self.products[a * self.seams + b]
    }
}

impl Distance {
    /// Name of the unit in `profile.json`.
    pub const fn unit(self) -> &'static str {
        match self {
            Self::Angular => "pi",
            Self::Cosine => "cosine",
        }
    }

    /// The distance that belongs to a cosine in `[-1, 1]`.
    pub fn from_cosine(self, cosine: f64) -> f64 {
        match self {
            // arXiv 2403.17887, eq. 7.
            Self::Angular => cosine.acos() / PI,
            Self::Cosine => 1.0 - cosine,
        }
    }
}

/// Running mean and spread (Welford): no catastrophe when the mean is large.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mean {
    count: u64,
    value: f64,
    squares: f64,
}

impl Mean {
    pub fn add(&mut self, value: f64) {
        self.count += 1;
        let before = value - self.value;
        self.value += before / self.count as f64;
        self.squares += before * (value - self.value);
    }

    pub const fn value(&self) -> f64 {
        self.value
    }

    /// Standard error of the mean; 0 with fewer than two values.
    pub fn stderr(&self) -> f64 {
        if self.count < 2 {
            return 0.0;
        }
        (self.squares / (self.count - 1) as f64 / self.count as f64).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn right_angles_are_half_a_pi_and_opposites_a_whole_one() {
        let gram = Gram::new(&[&[1.0, 0.0], &[0.0, 2.0], &[-3.0, 0.0], &[5.0, 0.0]]);
        assert!((Distance::Angular.from_cosine(gram.cosine(0, 1)) - 0.5).abs() < 1e-12);
        assert!((Distance::Angular.from_cosine(gram.cosine(0, 2)) - 1.0).abs() < 1e-12);
        assert!(Distance::Angular.from_cosine(gram.cosine(0, 3)).abs() < 1e-12);
        assert!((Distance::Cosine.from_cosine(gram.cosine(0, 2)) - 2.0).abs() < 1e-12);
        assert!((gram.relative_change(0, 3) - 4.0).abs() < 1e-12);
    }

    #[test]
    fn rounding_never_leaves_the_domain_of_arccos() {
        let long: Vec<f32> = (0..999).map(|i| 1e-3 + i as f32 * 0.1).collect();
        let scaled: Vec<f32> = long.iter().map(|v| v * 3.0).collect();
        let distance = Distance::Angular.from_cosine(Gram::new(&[&long, &scaled]).cosine(0, 1));
        assert!(distance.is_finite() && distance < 1e-4);
    }

    #[test]
    fn a_stream_without_length_gives_no_nan() {
        let gram = Gram::new(&[&[0.0, 0.0], &[1.0, 0.0], &[0.0, 0.0]]);
        assert!(gram.cosine(0, 1).abs() < 1e-12 && (gram.cosine(0, 2) - 1.0).abs() < 1e-12);
        assert!(gram.relative_change(0, 2) < 1e-12);
        assert!(gram.relative_change(0, 1).is_finite());
    }

    #[test]
    fn mean_and_standard_error_are_those_of_the_textbook() {
        let mut mean = Mean::default();
        for value in [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0] {
            mean.add(value);
        }
        assert!((mean.value() - 5.0).abs() < 1e-12);
        assert!((mean.stderr() - (32.0f64 / 7.0 / 8.0).sqrt()).abs() < 1e-12);
    }
}
