//! Where training stands, on disk: a killed run goes on from here and ends with
//! the same bytes.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::Path;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::adamw::AdamW;
use super::backward::Adapters;
use crate::engine::{Error, Result};
use crate::job::report::LossPoint;

/// Training so far. Adapters and optimizer moments lie beside it in one file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u32,
    pub tokens: u64,
    pub curve: Vec<LossPoint>,
}

const KEY: &str = "progress";

impl Progress {
    /// Writes the file whole or not at all.
    pub fn save(&self, file: &Path, adapters: &Adapters, optimizer: &AdamW) -> Result<()> {
        let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
        for (i, variable) in adapters.variables.iter().enumerate() {
            tensors.insert(format!("value.{i}"), variable.as_detached_tensor());
            tensors.insert(format!("first.{i}"), optimizer.first[i].clone());
            tensors.insert(format!("second.{i}"), optimizer.second[i].clone());
        }
        let text = serde_json::to_string(self).map_err(Error::bug)?;
        let part = file.with_extension("part");
        if let Some(dir) = file.parent() {
            fs::create_dir_all(dir)?;
        }
        safetensors::serialize_to_file(tensors.iter(), Some(HashMap::from([(KEY.to_owned(), text)])), &part)
            .map_err(|e| Error::from(std::io::Error::other(e)))?;
        File::open(&part)?.sync_all()?;
        fs::rename(&part, file)?;
        Ok(())
    }

    /// Puts adapters and optimizer back to where a file left them; none when
    /// there is no file, or a damaged one.
    pub fn load(
        file: &Path,
        adapters: &Adapters,
        optimizer: &mut AdamW,
        device: &Device,
    ) -> Result<Option<Self>> {
        let Ok(bytes) = fs::read(file) else { return Ok(None) };
        let Ok((_, metadata)) = safetensors::SafeTensors::read_metadata(&bytes) else { return Ok(None) };
        let text = metadata.metadata().as_ref().and_then(|m| m.get(KEY));
        let Some(progress) = text.and_then(|t| serde_json::from_str::<Self>(t).ok()) else { return Ok(None) };
        let Ok(mut tensors) = candle_core::safetensors::load_buffer(&bytes, device) else { return Ok(None) };
        let mut saved = Vec::new();
        for (i, variable) in adapters.variables.iter().enumerate() {
            let mut take = |kind: &str| tensors.remove(&format!("{kind}.{i}"));
            match (take("value"), take("first"), take("second")) {
                (Some(value), Some(first), Some(second)) if value.shape() == variable.shape() => {
                    saved.push((value, first, second));
                }
                _ => return Ok(None),
            }
        }
        for (i, (value, first, second)) in saved.into_iter().enumerate() {
            adapters.variables[i].set(&value)?;
            (optimizer.first[i], optimizer.second[i]) = (first, second);
        }
        Ok(Some(progress))
    }
}
