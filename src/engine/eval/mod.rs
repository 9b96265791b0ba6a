//! Measuring checkpoints.
