//! One binary that mirrors the surface; tests are named as sentences.
#![allow(clippy::unwrap_used)]

mod examples;
#[cfg(feature = "engine")]
mod heal;
mod support;
mod tidy;
#[cfg(feature = "engine")]
mod tiny;
