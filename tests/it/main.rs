//! One binary that mirrors the surface; tests are named as sentences.
#![allow(clippy::unwrap_used)]

#[cfg(feature = "engine")]
mod heal;
mod support;
#[cfg(feature = "engine")]
mod tiny;
