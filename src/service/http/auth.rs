//! Who may call: an API key, or nobody but programs on this machine.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use utoipa::ToSchema;

use super::AppState;
use super::problem::{Code, Problem};
use crate::service::db::{self, Database, NewApiKey, Tenant};
use crate::service::seal;

/// A key that opens the API: `sct_<8 characters>_<secret>`. The secret is kept
/// as its sha256 only; it is long and random, so no slow hash is needed.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// The eight characters: they may be shown and logged.
    pub id: String,
    /// Of the secret.
    pub sha256: [u8; 32],
}

/// Characters of a key's id.
const ID_LETTERS: usize = 8;

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKey({})", self.id)
    }
}

impl FromStr for ApiKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            "an API key looks like sct_<8 letters or digits>_<secret of 24 characters or more>".to_string()
        };
        let (id, secret) =
            text.strip_prefix("sct_").and_then(|rest| rest.split_once('_')).ok_or_else(wrong)?;
        let plain = |s: &str| s.bytes().all(|b| b.is_ascii_alphanumeric());
        if id.len() != ID_LETTERS
            || !plain(id)
            || secret.len() < 24
            || !secret.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(wrong());
        }
        Ok(Self { id: id.into(), sha256: Sha256::digest(secret.as_bytes()).into() })
    }
}

impl ApiKey {
    /// A new one, and its text: shown once, kept by nobody here.
    ///
    /// # Panics
    /// When it could not read what it writes, which it can.
    pub fn make() -> (Self, String) {
        let id = hex::encode(seal::random::<{ ID_LETTERS / 2 }>());
        let text = format!("sct_{id}_{}", hex::encode(seal::random::<32>()));
        (text.parse().expect("a key of our own can be read. This is a bug."), text)
    }

    /// The key as the database keeps it, for everything.
    pub fn row(&self, tenant: Tenant, name: &str) -> NewApiKey {
        let scopes = vec![Scope::Admin.name().into()];
        NewApiKey {
            id: self.id.clone(),
            tenant,
            name: name.into(),
            sha256: self.sha256,
            scopes,
            expires_at: None,
        }
    }
}

/// What a key lets its holder do; each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Look at everything of the tenant.
    Read,
    /// Ask for jobs and change them, bring files, name receivers.
    Submit,
    /// Make and revoke keys, and see who did what.
    Admin,
}

impl Scope {
    pub const ALL: [Self; 3] = [Self::Read, Self::Submit, Self::Admin];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Submit => "submit",
            Self::Admin => "admin",
        }
    }

    /// What a key needs for `method` at `path`, a path or its template; none where all may call.
    pub fn needed(method: &Method, path: &str) -> Option<Self> {
        if is_open(path) {
            None
        } else if path.starts_with("/v1/api_keys") || path.starts_with("/v1/audit") {
            Some(Self::Admin)
        } else if is_harmless(method) {
            Some(Self::Read)
        } else {
            Some(Self::Submit)
        }
    }

    fn is_of(self, scopes: &[String]) -> bool {
        Self::ALL.into_iter().any(|scope| scope >= self && scopes.iter().any(|s| s == scope.name()))
    }
}

/// Whether keys open the API, or programs on this machine may call without one. The first key locks it, whoever makes
/// it and where; nothing but a new start opens it again.
#[derive(Debug, Clone)]
pub struct Lock(Arc<LockState>);

#[derive(Debug)]
struct LockState {
    locked: AtomicBool,
    looked: Mutex<Instant>,
}

/// How long a key that another process has made may be overlooked.
const LOOK_EVERY: Duration = Duration::from_secs(1);

impl Lock {
    /// As the database says now.
    pub async fn new(database: &Database) -> Result<Self, db::Error> {
        let locked = AtomicBool::new(database.key_exists().await?);
        Ok(Self(Arc::new(LockState { locked, looked: Mutex::new(Instant::now()) })))
    }

    pub fn is_closed(&self) -> bool {
        self.0.locked.load(Ordering::Acquire)
    }

    /// There is a key now.
    pub fn close(&self) {
        self.0.locked.store(true, Ordering::Release);
    }

    /// Looks whether there is a key by now.
    async fn look(&self, database: &Database) {
        let due = {
            let mut looked = self.0.looked.lock().unwrap_or_else(PoisonError::into_inner);
            let due = looked.elapsed() >= LOOK_EVERY;
            if due {
                *looked = Instant::now();
            }
            due
        };
        // While the database is away nobody makes a key.
        if due && database.key_exists().await.unwrap_or(false) {
            self.close();
        }
    }
}

/// On whose behalf a request is made.
#[derive(Debug, Clone, Copy)]
pub struct Caller(pub Tenant);

/// The key it came with, by its id; none where this machine may call without one.
#[derive(Debug, Clone)]
pub struct CallerKey(pub Option<Arc<str>>);

/// Whether the API may listen at `addr`.
///
/// # Errors
/// Without a key nobody but this machine may reach it.
pub fn may_bind(addr: SocketAddr, has_key: bool) -> Result<(), String> {
    if has_key || addr.ip().is_loopback() {
        return Ok(());
    }
    Err(format!(
        "refusing to listen on {addr} without an API key: everyone who reaches it could run jobs; \
         give --api-key-file FILE, or listen on 127.0.0.1"
    ))
}

/// Paths that are open to all: health, documentation and the empty dashboard tell nothing.
fn is_open(path: &str) -> bool {
    matches!(path, "/" | "/livez" | "/readyz" | "/openapi.json" | "/docs")
        || path.starts_with("/assets/")
        || path.starts_with("/docs/")
        || path == "/problems"
        || path.starts_with("/problems/")
}

/// Lets through who may call, and notes on whose behalf.
pub async fn check(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let needed = Scope::needed(request.method(), request.uri().path());
    if needed.is_some() && !state.lock.is_closed() {
        state.lock.look(&state.database).await;
    }
    let (caller, key) = match needed {
        Some(scope) if state.lock.is_closed() => {
            let key = presented(request.headers())?;
            let caller = open(&state, &key, scope).await?;
            let id: Arc<str> = key.id.into();
            state.turnstile.pass(&id)?;
            (caller, Some(id))
        }
        None if state.lock.is_closed() => (Caller(Tenant::DEFAULT), None),
        Some(_) | None => {
            check_local(&request)?;
            (Caller(Tenant::DEFAULT), None)
        }
    };
    request.extensions_mut().insert(caller);
    request.extensions_mut().insert(CallerKey(key));
    Ok(next.run(request).await)
}

fn refused(detail: &str, challenge: &'static str) -> Problem {
    Problem::new(Code::Unauthorized, detail)
        .with_header(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge))
}

fn unknown_key() -> Problem {
    let challenge = "Bearer realm=\"secateur\", error=\"invalid_token\"";
    refused("The key in the Authorization header does not open this service.", challenge)
}

/// The key of the Authorization header.
fn presented(headers: &HeaderMap) -> Result<ApiKey, Problem> {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return Err(refused("Send the header `Authorization: Bearer sct_…`.", "Bearer realm=\"secateur\""));
    };
    match value.to_str().ok().and_then(|v| v.split_once(' ')) {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => {
            token.trim().parse().map_err(|_| unknown_key())
        }
        _ => Err(unknown_key()),
    }
}

async fn open(state: &AppState, key: &ApiKey, scope: Scope) -> Result<Caller, Problem> {
    let row = state.database.key(&key.id).await?.ok_or_else(unknown_key)?;
    if !bool::from(row.sha256.as_slice().ct_eq(&key.sha256)) {
        return Err(unknown_key());
    }
    if !scope.is_of(&row.scopes) {
        let (id, scopes, needed) = (&row.id, row.scopes.join(", "), scope.name());
        let detail = format!("This needs the scope `{needed}`; the key {id} has: {scopes}.");
        return Err(Problem::new(Code::Forbidden, detail));
    }
    state.database.key_used(&row.id).await?;
    Ok(Caller(row.tenant))
}

fn is_harmless(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

/// Without a key only this machine may call. A web page open in a browser here
/// must not: not through a name that it points at loopback (DNS rebinding,
/// shows in `Host`), nor by posting across sites (shows in `Origin`).
fn check_local(request: &Request) -> Result<(), Problem> {
    let headers = request.headers();
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).or_else(|| request.uri().host());
    // HTTP/1.0 clients send none; browsers always do.
    if let Some(host) = host.filter(|h| !is_loopback_host(h)) {
        let shown: String = host.chars().take(100).collect();
        return Err(Problem::new(Code::ForeignHost, format!("The request is addressed to `{shown}`.")));
    }
    if let Some(origin) = headers.get(header::ORIGIN).filter(|_| !is_harmless(request.method())) {
        let own = origin.to_str().ok().and_then(|o| o.split_once("://"));
        if own.is_none_or(|(scheme, authority)| scheme != "http" || Some(authority) != host) {
            let detail = "The Origin header names another site than this service.";
            return Err(Problem::new(Code::ForeignOrigin, detail));
        }
    }
    Ok(())
}

fn is_loopback_host(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((v6, _)) => v6,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let name = name.trim_end_matches('.');
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_may_be_bound_without_a_key() {
        for (addr, ok) in
            [("127.0.0.1:1", true), ("[::1]:1", true), ("0.0.0.0:1", false), ("10.0.0.7:1", false)]
        {
            assert_eq!(may_bind(addr.parse().unwrap(), false).is_ok(), ok, "{addr}");
            assert!(may_bind(addr.parse().unwrap(), true).is_ok(), "{addr}");
        }
    }

    #[test]
    fn hosts_that_only_look_like_loopback_are_foreign() {
        for host in
            ["localhost", "LocalHost:80", "127.0.0.1", "127.1.2.3:8080", "[::1]", "[::1]:8080", "localhost."]
        {
            assert!(is_loopback_host(host), "{host}");
        }
        for host in
            ["evil.example", "localhost.evil.example:80", "127.0.0.1.nip.io", "10.0.0.1", "[::2]:1", ""]
        {
            assert!(!is_loopback_host(host), "{host}");
        }
    }

    #[test]
    fn a_key_is_read_only_in_its_own_form_and_never_shown() {
        let key: ApiKey = "sct_abcd1234_0123456789abcdef01234567".parse().unwrap();
        assert_eq!((key.id.as_str(), format!("{key:?}").as_str()), ("abcd1234", "ApiKey(abcd1234)"));
        assert_eq!(key.sha256[..], Sha256::digest("0123456789abcdef01234567")[..]);
        for wrong in [
            "",
            "sct_abc_0123456789abcdef01234567",
            "sct_abcd1234_short",
            "prk_abcd1234_0123456789abcdef01234567",
        ] {
            assert!(wrong.parse::<ApiKey>().is_err(), "{wrong}");
        }
    }
}
