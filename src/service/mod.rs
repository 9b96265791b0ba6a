//! The service wing: API, job database, store.

pub mod db;
pub mod http;
pub mod local_pg;
pub mod seal;
pub mod sinks;
pub mod store;
pub mod telemetry;
