//! What comes in beside the model: text as token windows, evaluation items.

mod benchmark;
pub mod corpus;
pub mod items;
mod mix;
pub mod overlap;
mod parquet;
pub mod windows;

pub use corpus::{digest, label};
pub use mix::mixed;
pub use windows::{Purpose, Wanted, Windows, windows};
