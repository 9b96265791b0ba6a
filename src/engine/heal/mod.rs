//! Closing the wound.
