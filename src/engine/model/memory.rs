//! How much memory a run may take. What does not fit goes to a file: weights stay in theirs, streams go to one
//! of their own. It changes no result but the last digits of healing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::kernel::buffer;
use crate::engine::{Error, Result};
use crate::job::report::FailureKind;

/// The budget of a run.
#[derive(Debug, Clone)]
pub struct Memory {
    limit_bytes: u64,
    spill: PathBuf,
}

/// Share of the free memory that is taken when nobody says how much.
const FREE_SHARE: f64 = 0.75;
/// What the program itself, a tokenizer and the corpus take, whatever the model is.
const PROGRAM_BYTES: u64 = 96 << 20;

impl Default for Memory {
    fn default() -> Self {
        let limit = available_bytes().map_or(u64::MAX, |free| (free as f64 * FREE_SHARE) as u64);
        Self { limit_bytes: limit, spill: std::env::temp_dir() }
    }
}

impl Memory {
    /// At most so many bytes, a share of what is free when absent; what does not fit goes to files in `spill`.
    pub fn new(limit_bytes: Option<u64>, spill: &Path) -> Self {
        let default = Self::default();
        Self { limit_bytes: limit_bytes.unwrap_or(default.limit_bytes), spill: spill.to_owned() }
    }

    /// The part of the budget that is `part` in `of` parts, beside what the program takes anyway.
    pub fn share(&self, part: u64, of: u64) -> usize {
        (self.limit_bytes.saturating_sub(PROGRAM_BYTES) / of).saturating_mul(part) as usize
    }

    /// Lets buffers that were used stay for the next ones within the budget.
    pub fn keep_freed(&self) {
        buffer::keep_at_most(self.share(1, 8));
    }

    /// Refuses a budget in which a layer of `layer_bytes` and what it computes do not fit.
    ///
    /// # Errors
    /// A spec error that says what is needed.
    pub fn check(&self, layer_bytes: u64) -> Result<()> {
        let least = PROGRAM_BYTES + layer_bytes * 2;
        if self.limit_bytes >= least {
            return Ok(());
        }
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        Err(Error::spec(format!(
            "--memory-limit of {} MiB: the largest layer of this model alone takes {} MiB, and what it computes comes \
             on top; give at least {} MiB",
            mib(self.limit_bytes),
            mib(layer_bytes),
            mib(least)
        )))
    }

    /// A new file that is gone when it is closed, however the program ends.
    pub fn spill_file(&self) -> Result<File> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = self.spill.join(format!(".spill-{}-{number}", std::process::id()));
        let wrong = |e: std::io::Error| Error::new(FailureKind::Storage, format!("{}: {e}", path.display()));
        fs::create_dir_all(&self.spill).map_err(wrong)?;
        let file = File::options().read(true).write(true).create_new(true).open(&path).map_err(wrong)?;
        fs::remove_file(&path).map_err(wrong)?;
        Ok(file)
    }
}

/// Memory that can be had without harm: what the machine has free, or less where a container may take less. None
/// where it is not told.
pub fn available_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let free = line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10;
    Some(container_bytes().map_or(free, |left| left.min(free)))
}

/// What the limits of control groups (version 2) leave, from this process's own up to the root.
fn container_bytes() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?.to_owned();
    let root = Path::new("/sys/fs/cgroup");
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let left = |group: &Path| {
        let most = number(group.join("memory.max"))?;
        Some(most.saturating_sub(number(group.join("memory.current"))?))
    };
    root.join(own).ancestors().take_while(|group| group.starts_with(root)).filter_map(left).min()
}
