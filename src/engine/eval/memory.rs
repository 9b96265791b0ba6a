//! Peak resident memory while a checkpoint is measured.

use crate::engine::Cx;
use crate::engine::model::kernel::{allocator, buffer};

/// Watches from its start on, where the system can forget an earlier peak.
pub struct Watch {
    fresh: bool,
}

impl Watch {
    /// Gives freed memory back and lets Linux count the peak anew.
    pub fn start() -> Self {
        buffer::clear();
        // What the last checkpoint freed must not count for this one.
        allocator::give_back();
        Self { fresh: std::fs::write("/proc/self/clear_refs", "5").is_ok() }
    }

    /// The peak since the start, in bytes; 0 where the system does not tell.
    pub fn peak_bytes(&self, cx: Cx) -> u64 {
        let peak = high_water_bytes();
        match (self.fresh, peak) {
            (true, Some(_)) => {}
            (false, Some(_)) => {
                cx.note("peak memory is that of the whole run: this system keeps the old peak");
            }
            (_, None) => cx.note("peak memory is not known on this system and shown as 0"),
        }
        peak.unwrap_or(0)
    }
}

/// `VmHWM` of Linux.
fn high_water_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
