//! What tests share: tiny models, a private database, a running service.

#[cfg(all(feature = "engine", feature = "service"))]
pub mod app;
#[cfg(feature = "engine")]
pub mod made_up;
#[cfg(feature = "service")]
pub mod postgres;
#[cfg(feature = "engine")]
pub mod program;
#[cfg(feature = "engine")]
pub mod rig;
#[cfg(feature = "engine")]
pub mod tiny;
