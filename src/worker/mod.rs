//! Supervises children.
