//! The API as the commands speak it: over lines that break and services that restart.

use std::time::Duration;

use anyhow::Context;
use serde_json::Value;
use ureq::http::{HeaderMap, Request, Response, StatusCode};
use ureq::{Agent, Body};

/// Tries of one request, the first among them.
const TRIES: u32 = 6;
/// Largest JSON answer that is read.
const MAX_ANSWER_BYTES: u64 = 256 << 20;

/// The service said no.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Refused {
    pub status: u16,
    /// The kind of problem, as the API names it.
    pub code: String,
    text: String,
}

/// One service.
pub struct Client {
    agent: Agent,
    base: String,
    key: Option<String>,
}

impl Client {
    /// # Errors
    /// When `server` is no URL of HTTP.
    pub fn new(server: &str, key: Option<String>) -> anyhow::Result<Self> {
        let base = server.trim_end_matches('/').to_owned();
        if !(base.starts_with("http://") || base.starts_with("https://")) {
            anyhow::bail!("--server {server}: give a URL such as http://127.0.0.1:8080");
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // The key goes to the service that was named and nowhere else.
            .max_redirects(0)
            .user_agent(concat!("secateur/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(Duration::from_secs(90)))
            // A stream that has nothing to tell still sends a comment every 15 seconds.
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build()
            .new_agent();
        Ok(Self { agent, base, key })
    }

    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.send("GET", path, None, &[], json)
    }

    pub fn post(&self, path: &str, body: Option<&Value>, headers: &[(&str, &str)]) -> anyhow::Result<Value> {
        self.send("POST", path, body, headers, json)
    }

    pub fn delete(&self, path: &str) -> anyhow::Result<()> {
        self.send("DELETE", path, None, &[], |_| Ok(()))
    }

    /// An answer to be read as it comes.
    pub fn open(&self, path: &str, headers: &[(&str, &str)]) -> anyhow::Result<Response<Body>> {
        self.send("GET", path, None, headers, Ok)
    }

    /// Sends a request and reads the answer, and again while the line is broken or the service says that it will be
    /// back: each of ours may come twice.
    ///
    /// # Errors
    /// [`Refused`], or what is wrong with the line.
    fn send<T>(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        headers: &[(&str, &str)],
        read: impl Fn(Response<Body>) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let mut tries = 0;
        loop {
            tries += 1;
            let wait = Duration::from_millis(250 << tries.min(6));
            let answer = self.send_once(method, path, body, headers);
            let read = match answer {
                Ok(answer) if answer.status().is_success() => read(answer),
                Ok(answer) => {
                    let later = matches!(
                        answer.status(),
                        StatusCode::SERVICE_UNAVAILABLE
                            | StatusCode::GATEWAY_TIMEOUT
                            | StatusCode::TOO_MANY_REQUESTS
                    );
                    if !later || tries == TRIES {
                        return Err(refused(answer).into());
                    }
                    std::thread::sleep(retry_after(answer.headers()).unwrap_or(wait));
                    continue;
                }
                Err(error) => Err(error),
            };
            match read {
                Err(error) if tries == TRIES => {
                    return Err(error).with_context(|| format!("cannot get an answer from {}", self.base));
                }
                Err(_) => std::thread::sleep(wait),
                Ok(answer) => return Ok(answer),
            }
        }
    }

    fn send_once(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<Response<Body>> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        Ok(match body {
            // Of length 0, which servers want told.
            None if method == "POST" => self.agent.run(request.body(Vec::new())?)?,
            None => self.agent.run(request.body(())?)?,
            Some(value) => {
                let request = request.header("content-type", "application/json");
                self.agent.run(request.body(value.to_string().into_bytes())?)?
            }
        })
    }
}

fn json(mut answer: Response<Body>) -> anyhow::Result<Value> {
    let text = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string()?;
    serde_json::from_str(&text).context("the answer is not JSON; is this a secateur service?")
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers.get("retry-after")?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds.min(30)))
}

/// The problem of an answer, for a person.
fn refused(mut answer: Response<Body>) -> Refused {
    let status = answer.status();
    let text = answer.body_mut().read_to_string().unwrap_or_default();
    let problem: Value = serde_json::from_str(&text).unwrap_or_default();
    let word = |name: &str| problem[name].as_str().unwrap_or_default().to_owned();
    let mut text =
        if word("detail").is_empty() { format!("the service answered {status}") } else { word("detail") };
    for complaint in problem["errors"].as_array().into_iter().flatten() {
        let part = |name: &str| complaint[name].as_str().unwrap_or_default();
        text += &format!("\n  {}: {}", part("pointer"), part("message"));
    }
    Refused { status: status.as_u16(), code: word("code"), text }
}

/// A value for a query or a path: what is not plain is percent-encoded.
pub fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut url, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            url.push(byte.into());
        } else {
            url.push_str(&format!("%{byte:02X}"));
        }
        url
    })
}
