//! Rotary position embedding: frequencies from either form of `config.json`.

use std::f64::consts::PI;

use candle_core::{Device, Tensor};
use serde_json::{Map, Value};

use super::config::Keys;
use crate::engine::{Error, Result};

/// The inverse frequencies of one model, `[head_dim / 2]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    inverse_frequencies: Vec<f64>,
}

impl Rope {
    /// Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before).
    ///
    /// # Errors
    /// A model error that names a scaling not known here.
    pub fn read(raw: &Map<String, Value>, head_dim: usize) -> Result<Self> {
        let object = |key: &str| match raw.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(_) => Err(Error::model(format!("config.json: {key} is not an object"))),
        };
        let parameters = object("rope_parameters")?;
        let scaling = match parameters {
            Some(_) => parameters,
            None => object("rope_scaling")?,
        };
        let theta = match parameters.filter(|p| p.contains_key("rope_theta")) {
            Some(p) => Keys(p).number("rope_theta")?,
            None => Keys(raw).number_or("rope_theta", 10_000.0)?,
        };
        let partial =
            parameters.unwrap_or(raw).get("partial_rotary_factor").or(raw.get("partial_rotary_factor"));
        if partial.and_then(Value::as_f64).is_some_and(|f| (f - 1.0).abs() > f64::EPSILON) {
            return Err(Error::model("config.json: partial_rotary_factor is not supported for this family"));
        }
        let plain = (0..head_dim / 2).map(|i| theta.powf(-((2 * i) as f64) / head_dim as f64));
        let Some(scaling) = scaling else {
            return Ok(Self { inverse_frequencies: plain.collect() });
        };
        let kind =
            scaling.get("rope_type").or(scaling.get("type")).and_then(Value::as_str).unwrap_or("default");
        let inverse_frequencies = match kind {
            "default" => plain.collect(),
            "linear" => {
                let factor = Keys(scaling).number("factor")?;
                plain.map(|f| f / factor).collect()
            }
            "llama3" => {
                let llama3 = Llama3::read(scaling)?;
                plain.map(|f| llama3.scale(f)).collect()
            }
            other => {
                return Err(Error::model(format!("config.json: rope scaling \"{other}\" is not supported")));
            }
        };
        Ok(Self { inverse_frequencies })
    }

    /// cos and sin for positions `start..start + len`, each `[len, head_dim / 2]`, float32.
    pub fn tables(&self, start: usize, len: usize, device: &Device) -> Result<(Tensor, Tensor)> {
        let half = self.inverse_frequencies.len();
        // transformers multiplies position and frequency in float32; its rounding is part of the model.
        let angle = |i: usize| (start + i / half) as f32 * self.inverse_frequencies[i % half] as f32;
        let (sin, cos): (Vec<f32>, Vec<f32>) = (0..len * half).map(|i| angle(i).sin_cos()).unzip();
        Ok((Tensor::from_vec(cos, (len, half), device)?, Tensor::from_vec(sin, (len, half), device)?))
    }
}

/// Llama 3.1's scaling: long wavelengths are stretched, short ones are not, with a ramp between.
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    original_len: f64,
}

impl Llama3 {
    fn read(scaling: &Map<String, Value>) -> Result<Self> {
        let keys = Keys(scaling);
        Ok(Self {
            factor: keys.number("factor")?,
            low: keys.number("low_freq_factor")?,
            high: keys.number("high_freq_factor")?,
            original_len: keys.number("original_max_position_embeddings")?,
        })
    }

    fn scale(&self, frequency: f64) -> f64 {
        let wavelength = 2.0 * PI / frequency;
        if wavelength < self.original_len / self.high {
            frequency
        } else if wavelength > self.original_len / self.low {
            frequency / self.factor
        } else {
            let smooth = (self.original_len / wavelength - self.low) / (self.high - self.low);
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }
}
