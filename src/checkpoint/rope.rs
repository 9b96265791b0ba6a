//! Rotary position embedding: frequencies from either form of `config.json`,
//! as transformers computes them (`modeling_rope_utils.py`).

use std::f64::consts::PI;

use super::keys::Keys;
use super::{Result, wrong};

/// The rotation of one kind of layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Inverse frequencies, one for each pair of rotated dimensions.
    frequencies: Vec<f64>,
    /// Others for texts of more tokens than this (`LongRoPE`, arXiv 2402.13753).
    long: Option<(usize, Vec<f64>)>,
    /// Cosine and sine are multiplied by this.
    scale: f64,
    theta: f64,
    scaling: Scaling,
}

/// How the plain rotation is changed, for those who must be told so.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    No,
    Linear {
        factor: f64,
    },
    /// What each wavelength is multiplied by.
    Llama3 {
        factors: Vec<f64>,
    },
    Yarn {
        factor: f64,
        original: f64,
        /// All else is as the paper has it.
        usual: bool,
    },
    Long,
}

/// What the frequencies depend on beside the parameters themselves.
pub struct Shape {
    pub theta: f64,
    /// Dimensions of a head that are rotated.
    pub rotated: usize,
    pub max_positions: usize,
    /// `original_max_position_embeddings` beside the parameters, where phi3 keeps it.
    pub original_positions: Option<f64>,
}

impl Rope {
    /// Reads rope parameters; without any, the plain rotation.
    ///
    /// # Errors
    /// A model error that names a scaling not known here, or a missing value.
    pub fn read(parameters: Option<&Keys>, shape: &Shape) -> Result<Self> {
        let pairs = shape.rotated / 2;
        let plain: Vec<f64> =
            (0..pairs).map(|i| shape.theta.powf(-((2 * i) as f64) / shape.rotated as f64)).collect();
        let unscaled =
            |frequencies, scaling| Self { frequencies, long: None, scale: 1.0, theta: shape.theta, scaling };
        let Some(keys) = parameters else { return Ok(unscaled(plain, Scaling::No)) };
        let kind = if keys.get("rope_type").is_some() {
            keys.text("rope_type")?
        } else {
            keys.text_or("type", "default")?
        };
        let original = match shape.original_positions {
            Some(n) => n,
            None => keys.number_or("original_max_position_embeddings", shape.max_positions as f64)?,
        };
        match kind {
            // Dynamic scaling begins beyond max_position_embeddings, where no text of ours goes.
            "default" | "dynamic" => Ok(unscaled(plain, Scaling::No)),
            "linear" => {
                let factor = keys.number("factor")?;
                Ok(unscaled(plain.iter().map(|f| f / factor).collect(), Scaling::Linear { factor }))
            }
            "llama3" => {
                let llama3 = Llama3 {
                    factor: keys.number("factor")?,
                    low: keys.number("low_freq_factor")?,
                    high: keys.number("high_freq_factor")?,
                    original,
                };
                let scaled: Vec<f64> = plain.iter().map(|f| llama3.scale(*f)).collect();
                let factors = plain.iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect();
                Ok(unscaled(scaled, Scaling::Llama3 { factors }))
            }
            "yarn" => yarn(keys, shape, &plain, original),
            "longrope" | "su" => longrope(keys, shape, &plain, original),
            other => Err(wrong(format!("config.json: rope scaling \"{other}\" is not supported"))),
        }
    }

    /// Whether a text that grows from `from` to `to` tokens is rotated anew from its beginning.
    pub fn changes(&self, from: usize, to: usize) -> bool {
        self.long.as_ref().is_some_and(|(original, _)| from <= *original && *original < to)
    }

    /// The base of the plain rotation.
    pub fn theta(&self) -> f64 {
        self.theta
    }

    pub fn scaling(&self) -> &Scaling {
        &self.scaling
    }

    /// Pairs of dimensions that are rotated.
    pub fn pairs(&self) -> usize {
        self.frequencies.len()
    }

    /// Cosines and sines for positions `start..start + len`, each `[len, pairs]`.
    pub fn tables(&self, start: usize, len: usize) -> (Vec<f32>, Vec<f32>) {
        let frequencies = match &self.long {
            Some((original, long)) if start + len > *original => long,
            _ => &self.frequencies,
        };
        let (pairs, scale) = (frequencies.len(), self.scale as f32);
        // transformers multiplies position and frequency in float32; its rounding is part of the model.
        let angle = |i: usize| (start + i / pairs) as f32 * frequencies[i % pairs] as f32;
        let scaled = |i: usize| {
            let (sin, cos) = angle(i).sin_cos();
            (cos * scale, sin * scale)
        };
        (0..len * pairs).map(scaled).unzip()
    }
}

/// Llama 3.1's scaling: long wavelengths are stretched, short ones are not, with a ramp between.
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
}

impl Llama3 {
    fn scale(&self, frequency: f64) -> f64 {
        let wavelength = 2.0 * PI / frequency;
        if wavelength < self.original / self.high {
            frequency
        } else if wavelength > self.original / self.low {
            frequency / self.factor
        } else {
            let smooth = (self.original / wavelength - self.low) / (self.high - self.low);
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }
}

/// `YaRN` (arXiv 2309.00071): fast rotations stay, slow ones are stretched, and attention is sharpened.
fn yarn(keys: &Keys, shape: &Shape, plain: &[f64], original: f64) -> Result<Rope> {
    let factor = keys.number_or("factor", shape.max_positions as f64 / original)?;
    let sharpen = |scale: f64, by: f64| if scale <= 1.0 { 1.0 } else { 0.1 * by * scale.ln() + 1.0 };
    let (given, one, all) =
        (keys.number_if("attention_factor")?, keys.number_if("mscale")?, keys.number_if("mscale_all_dim")?);
    let (fast, slow) = (keys.number_or("beta_fast", 32.0)?, keys.number_or("beta_slow", 1.0)?);
    let truncated = keys.flag_or("truncate", true)?;
    let unasked = given.is_none() && (one.is_none() || all.is_none());
    let usual = unasked && truncated && (fast, slow) == (32.0, 1.0);
    let scale = match (given, one, all) {
        (Some(given), _, _) => given,
        (None, Some(one), Some(all)) => sharpen(factor, one) / sharpen(factor, all),
        (None, _, _) => sharpen(factor, 1.0),
    };
    let dim = shape.rotated as f64;
    // The pair of dimensions that turns so often over the original length.
    let place = |turns: f64| dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * shape.theta.ln());
    let (mut low, mut high) = (place(fast), place(slow));
    if truncated {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if (high - low).abs() < f64::EPSILON {
        high += 0.001;
    }
    let stretched = |(i, f): (usize, &f64)| {
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        f / factor * ramp + f * (1.0 - ramp)
    };
    Ok(Rope {
        frequencies: plain.iter().enumerate().map(stretched).collect(),
        long: None,
        scale,
        theta: shape.theta,
        scaling: Scaling::Yarn { factor, original, usual },
    })
}

fn longrope(keys: &Keys, shape: &Shape, plain: &[f64], original: f64) -> Result<Rope> {
    let divided = |key: &str| -> Result<Vec<f64>> {
        let factors = keys.numbers(key, plain.len())?;
        Ok(plain.iter().zip(factors).map(|(f, factor)| f / factor).collect())
    };
    let factor = keys.number_or("factor", shape.max_positions as f64 / original)?;
    let scale = match keys.number_if("attention_factor")? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / original.ln()).sqrt(),
    };
    Ok(Rope {
        frequencies: divided("short_factor")?,
        long: Some((original as usize, divided("long_factor")?)),
        scale,
        theta: shape.theta,
        scaling: Scaling::Long,
    })
}
