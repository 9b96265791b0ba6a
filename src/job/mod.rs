//! The words everyone speaks: plain data, no tensors, no sockets, no SQL.
//!
//! What is asked ([`spec`]), what is happening ([`progress`]), what came out
//! ([`report`]) and how it stands ([`state`]). Command line, HTTP, database and
//! engine all use these very types; there are no twins to keep in step.

pub mod benchmark;
pub mod budget;
pub mod complaint;
pub mod eval;
pub mod heal;
pub mod placement;
pub mod plan;
pub mod preset;
pub mod progress;
pub mod prune;
pub mod report;
pub mod rules;
pub mod scores;
pub mod shape;
pub mod spec;
pub mod state;
pub mod sweep;
pub mod training;
