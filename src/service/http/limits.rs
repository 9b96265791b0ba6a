//! How much one caller may ask for at once. What counts is the key, never the address: many callers may share one.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::{HeaderValue, header};
use governor::clock::{Clock, DefaultClock};
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};

use super::auth::CallerKey;
use super::problem::{Code, Problem};

/// What each key may ask for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests a second, and as many at once; without a bound when absent. Callers without a key have none.
    pub requests_per_s: Option<NonZeroU32>,
    /// Event streams that are open at once.
    pub streams: usize,
}

type Requests = RateLimiter<Arc<str>, HashMapStateStore<Arc<str>>, DefaultClock>;

/// Counts what callers ask for.
#[derive(Clone)]
pub struct Turnstile(Arc<Counts>);

struct Counts {
    requests: Option<Requests>,
    most_streams: usize,
    streams: Mutex<HashMap<Option<Arc<str>>, usize>>,
}

impl Turnstile {
    pub fn new(limits: Limits) -> Self {
        Self(Arc::new(Counts {
            requests: limits.requests_per_s.map(|rate| RateLimiter::hashmap(Quota::per_second(rate))),
            most_streams: limits.streams,
            streams: Mutex::default(),
        }))
    }

    /// Lets a request of `key` pass.
    ///
    /// # Errors
    /// It must wait.
    pub fn pass(&self, key: &Arc<str>) -> Result<(), Problem> {
        let Some(requests) = &self.0.requests else { return Ok(()) };
        requests.check_key(key).map_err(|early| {
            let wait = early.wait_time_from(DefaultClock::default().now());
            let seconds = wait.as_secs() + 1;
            let detail = format!("The key {key} has asked too often; it may ask again in {seconds} s.");
            Problem::new(Code::TooManyRequests, detail)
                .with_header(header::RETRY_AFTER, HeaderValue::from(seconds))
        })
    }

    /// A place for one more event stream, kept until it is dropped.
    ///
    /// # Errors
    /// The caller has as many as one may have.
    pub fn stream(&self, CallerKey(key): &CallerKey) -> Result<StreamPlace, Problem> {
        let mut streams = self.0.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let open = streams.entry(key.clone()).or_default();
        if *open >= self.0.most_streams {
            let most = self.0.most_streams;
            let detail = format!("There may be {most} event streams at once for a key; end one, or poll.");
            return Err(Problem::new(Code::TooManyStreams, detail));
        }
        *open += 1;
        Ok(StreamPlace { counts: self.0.clone(), key: key.clone() })
    }
}

/// The place of an open stream.
pub struct StreamPlace {
    counts: Arc<Counts>,
    key: Option<Arc<str>>,
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        let mut streams = self.counts.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = streams.get_mut(&self.key) {
            *open -= 1;
            if *open == 0 {
                streams.remove(&self.key);
            }
        }
    }
}
