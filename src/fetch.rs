//! Names into local, pinned files.
