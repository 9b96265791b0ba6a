//! Makes large language models smaller by cutting whole layers.
//!
//! The map of the house (the whole plan is in `ARCHITECTURE.md`):
//!
//! ```text
//!                      main
//!                      cli                     the doors: up · api · worker · run · …
//!                     worker                   supervises children; knows both wings
//!              ╱                 ╲
//!  service: http ─ db            engine/pipeline     the stages, each once
//!  local_pg · store              profile · prune · heal/ · eval/ · export/
//!           ╲        fetch       select · model/ · data/ · distance · workspace
//!            ╲         │         ╱
//!        checkpoint · report                   model directories as they describe themselves · results for people
//!                     job                      the words everyone speaks (pure data)
//! ```
//!
//! The path of one job: `POST /v1/jobs` puts a [`job::spec::JobSpec`] into the
//! database; a worker leases it and starts `secateur run -` as a child; the
//! child's pipeline records every stage in its workspace and tells what happens
//! as JSON lines; the worker commits artifacts and state under the lease's epoch.

pub mod checkpoint;
pub mod cli;
#[cfg(feature = "engine")]
pub mod engine;
#[cfg(feature = "engine")]
pub mod fetch;
pub mod job;
pub mod report;
#[cfg(feature = "service")]
pub mod service;
#[cfg(feature = "service")]
pub mod worker;
