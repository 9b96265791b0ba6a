//! Where training stands, on disk: a killed run goes on from here and ends with
//! the same bytes.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::adamw::AdamW;
use crate::engine::{Error, Result};
use crate::job::report::LossPoint;

/// Training so far. Variables and optimizer moments lie beside it in one file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u32,
    pub tokens: u64,
    pub curve: Vec<LossPoint>,
}

const KEY: &str = "progress";
/// Time after which progress is kept whatever the step.
const KEPT_AFTER: Duration = Duration::from_secs(300);

/// The resume points of one training.
pub struct Points {
    /// Kept every so many steps: the same ones in every run, to which a training that diverges goes back.
    steady: PathBuf,
    /// Kept because time has passed, or because the run is to end.
    latest: PathBuf,
    kept: Instant,
}

impl Points {
    /// Those called `name` in `dir`, which need not be there.
    pub fn new(dir: &Path, name: &str) -> Self {
        let file = |kind: &str| dir.join(format!("{name}-{kind}.safetensors"));
        Self { steady: file("steady"), latest: file("latest"), kept: Instant::now() }
    }

    /// Keeps progress where a steady point is `due`, or much time has passed.
    pub fn keep(
        &mut self,
        due: bool,
        progress: &Progress,
        variables: &[Var],
        optimizer: &AdamW,
    ) -> Result<()> {
        if due {
            save(&self.steady, progress, variables, optimizer)?;
        } else if self.kept.elapsed() > KEPT_AFTER {
            save(&self.latest, progress, variables, optimizer)?;
        } else {
            return Ok(());
        }
        self.kept = Instant::now();
        Ok(())
    }

    /// Keeps progress because the run ends here.
    pub fn keep_now(&self, progress: &Progress, variables: &[Var], optimizer: &AdamW) -> Result<()> {
        save(&self.latest, progress, variables, optimizer)
    }

    /// Puts variables and optimizer back to where the run has come to; none where it has not begun.
    pub fn newest(
        &self,
        variables: &[Var],
        optimizer: &mut AdamW,
        device: &Device,
    ) -> Result<Option<Progress>> {
        let mut files = [&self.steady, &self.latest].map(|file| (progress_in(file).map(|p| p.step), file));
        files.sort();
        for (_, file) in files.into_iter().rev() {
            if let Some(progress) = load(file, variables, optimizer, device)? {
                return Ok(Some(progress));
            }
        }
        Ok(None)
    }

    /// The same for the last steady point.
    pub fn steady(
        &self,
        variables: &[Var],
        optimizer: &mut AdamW,
        device: &Device,
    ) -> Result<Option<Progress>> {
        load(&self.steady, variables, optimizer, device)
    }
}

/// Writes the file whole or not at all.
fn save(file: &Path, progress: &Progress, variables: &[Var], optimizer: &AdamW) -> Result<()> {
    let mut tensors: BTreeMap<String, Tensor> = optimizer.tensors()?.into_iter().collect();
    for (i, variable) in variables.iter().enumerate() {
        tensors.insert(format!("value.{i}"), variable.as_detached_tensor());
    }
    let text = serde_json::to_string(progress).map_err(Error::bug)?;
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

/// What the header of a file says; the tensors are not read.
fn progress_in(path: &Path) -> Option<Progress> {
    let mut file = File::open(path).ok()?;
    let mut len = [0; 8];
    file.read_exact(&mut len).ok()?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(len)).read_to_end(&mut header).ok()?;
    let header: serde_json::Value = serde_json::from_slice(&header).ok()?;
    serde_json::from_str(header["__metadata__"][KEY].as_str()?).ok()
}

/// None when there is no file, or a damaged one.
fn load(file: &Path, variables: &[Var], optimizer: &mut AdamW, device: &Device) -> Result<Option<Progress>> {
    let Some(progress) = progress_in(file) else { return Ok(None) };
    let Ok(mut tensors) = candle_core::safetensors::load(file, &Device::Cpu) else { return Ok(None) };
    let mut saved = Vec::new();
    for (i, variable) in variables.iter().enumerate() {
        match tensors.remove(&format!("value.{i}")) {
            Some(value) if value.shape() == variable.shape() => saved.push(value),
            _ => return Ok(None),
        }
    }
    if !optimizer.restore(&mut tensors)? {
        return Ok(None);
    }
    for (variable, value) in variables.iter().zip(saved) {
        variable.set(&value.to_device(device)?)?;
    }
    Ok(Some(progress))
}
