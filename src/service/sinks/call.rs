//! Calls to receivers that the operator has named. They may be anywhere, unlike those that callers of the API name.

use std::time::Duration;

use serde_json::Value;
use ureq::http::Response;
use ureq::{Agent, Body};

use crate::service::db;

/// Of an answer that refuses, for the delivery log.
const MOST_WORDS: usize = 500;

/// Why something did not reach a receiver.
#[derive(Debug)]
pub struct Refusal {
    /// The HTTP status, when there was an answer.
    pub status: Option<u16>,
    /// `error_code` of an answer of `MLflow`; empty elsewhere.
    pub code: String,
    pub message: String,
}

impl From<String> for Refusal {
    fn from(message: String) -> Self {
        Self { status: None, code: String::new(), message }
    }
}

impl From<db::Error> for Refusal {
    fn from(error: db::Error) -> Self {
        error.to_string().into()
    }
}

pub type Result<T> = std::result::Result<T, Refusal>;

/// A client whose calls take at most `timeout`, from looking the name up to the end of the answer.
pub fn agent(timeout: Duration) -> Agent {
    let config = Agent::config_builder()
        .timeout_global(Some(timeout))
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("secateur/", env!("CARGO_PKG_VERSION")))
        .build();
    Agent::new_with_config(config)
}

/// The answer of `who`, unless it refuses.
pub fn accepted(who: &str, got: std::result::Result<Response<Body>, ureq::Error>) -> Result<Response<Body>> {
    let mut got = got.map_err(|e| format!("{who}: {e}"))?;
    let status = got.status();
    if status.is_success() {
        return Ok(got);
    }
    let text = got.body_mut().with_config().limit(64 << 10).read_to_string().unwrap_or_default();
    let value: Value = serde_json::from_str(&text).unwrap_or_default();
    let said = |key: &str| value[key].as_str().map(String::from);
    let words = said("message").or_else(|| said("error")).unwrap_or(text).replace('\0', "");
    let words: String = words.trim().chars().take(MOST_WORDS).collect();
    let code = said("error_code").unwrap_or_default();
    let message = [format!("{who} answered {status}"), code.clone(), words];
    let message = message.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": ");
    Err(Refusal { status: Some(status.as_u16()), code, message })
}

/// Runs what blocks beside the threads of the service.
pub async fn beside<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(error.to_string().into()))
}
