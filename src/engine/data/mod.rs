//! Text and items in, token windows out.
