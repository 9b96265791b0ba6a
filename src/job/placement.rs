//! When a job may run, and on what. Nothing here changes what comes out; the command `run` reads it and lets it be.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a job allows for its time. A job that is over it fails, and what it has recorded is kept for a day: tried again
/// it goes on from there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Deadlines {
    /// Seconds that it may wait for a worker, each time it waits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_queue_s: Option<u32>,
    /// Seconds that it may run, over all its attempts. It is stopped as if it were cancelled, at its next seam.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_run_s: Option<u32>,
}

/// What a job needs of its worker. It waits for one that has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    /// Labels that the worker was started with (`--label key=value`), all of them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Memory that the worker lets a job work in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_memory_bytes: Option<u64>,
    /// Only a worker that holds all weights in memory, by the job's plan. Elsewhere they are streamed, which takes longer.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub in_memory: bool,
}

impl Resources {
    /// The memory that a worker must have for a job that is planned to take `planned` bytes with all weights in memory.
    #[must_use]
    pub fn memory_bytes(&self, planned: Option<u64>) -> Option<u64> {
        self.min_memory_bytes.max(planned.filter(|_| self.in_memory))
    }
}
