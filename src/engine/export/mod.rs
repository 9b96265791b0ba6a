//! What leaves the house.

pub mod safetensors;
