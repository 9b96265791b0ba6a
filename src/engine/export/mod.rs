//! What leaves the house.

pub mod gguf;
pub mod safetensors;
