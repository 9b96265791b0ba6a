//! What comes in beside the model: text as token windows, evaluation items.

pub mod corpus;
pub mod items;
pub mod overlap;
pub mod windows;

pub use corpus::{digest, label};
pub use windows::{Purpose, Wanted, Windows, windows};
