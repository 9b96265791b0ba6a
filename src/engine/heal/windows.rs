//! The text of healing: windows to work on and windows to judge by.

use crate::engine::{Error, Result};

/// Windows that are kept apart to judge the healing.
pub const HELD_OUT: usize = 16;

/// Windows to work on and windows to judge by; none is in both.
pub struct Windows {
    pub train: Vec<Vec<u32>>,
    pub held_out: Vec<Vec<u32>>,
}

impl Windows {
    /// Keeps a tenth of the windows apart, at most 16, at least one.
    ///
    /// # Errors
    /// A data error when fewer than two windows are at hand.
    pub fn split(mut windows: Vec<Vec<u32>>) -> Result<Self> {
        if windows.len() < 2 {
            return Err(Error::data(
                "the healing corpus gives fewer than two windows: one is worked on, one judges; \
                 give more text or a smaller heal seq_len",
            ));
        }
        let held_out = (windows.len() / 10).clamp(1, HELD_OUT);
        let held_out = windows.split_off(windows.len() - held_out);
        Ok(Self { train: windows, held_out })
    }

    /// Tokens to work on.
    pub fn tokens(&self) -> u64 {
        self.train.iter().map(|window| window.len() as u64).sum()
    }
}
