//! One binary that mirrors the surface; tests are named as sentences.
#![allow(clippy::unwrap_used)]

mod support;
#[cfg(feature = "engine")]
mod tiny;
