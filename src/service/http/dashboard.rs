//! The dashboard: a fixed page and its scripts, all inside the binary. They use the public API like any other client.

use std::sync::LazyLock;

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};

use super::AppState;
use super::edge;
use super::problem::Problem;

/// Scripts and styles of our own only, nothing inline, nobody else to talk to. Plots come as blobs.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

struct Asset {
    path: &'static str,
    kind: &'static str,
    bytes: &'static [u8],
    /// sha256 of the bytes: strong, for it is what they are.
    etag: HeaderValue,
}

macro_rules! assets {
    ($($path:literal: $kind:expr),* $(,)?) => {
        vec![$(Asset::new($path, $kind, include_bytes!(concat!("assets/", $path)))),*]
    };
}

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";

static ASSETS: LazyLock<Vec<Asset>> = LazyLock::new(|| {
    assets! {
        "index.html": HTML,
        "icon.svg": "image/svg+xml",
        "page.css": STYLE,
        "api.js": SCRIPT,
        "charts.js": SCRIPT,
        "job.js": SCRIPT,
        "jobs.js": SCRIPT,
        "page.js": SCRIPT,
        "results.js": SCRIPT,
        "submit.js": SCRIPT,
        "sweeps.js": SCRIPT,
        "webhooks.js": SCRIPT,
        "words.js": SCRIPT,
        "workers.js": SCRIPT,
        "vendor/lit-html.js": SCRIPT,
        "vendor/directive.js": SCRIPT,
        "vendor/directive-helpers.js": SCRIPT,
        "vendor/directives/live.js": SCRIPT,
        "vendor/uPlot.iife.min.js": SCRIPT,
        "vendor/uPlot.min.css": STYLE,
    }
});

impl Asset {
    fn new(path: &'static str, kind: &'static str, bytes: &'static [u8]) -> Self {
        let etag = HeaderValue::from_str(&format!("\"{}\"", hex::encode(Sha256::digest(bytes))));
        Self { path, kind, bytes, etag: etag.expect("hex is a header. This is a bug.") }
    }

    /// The file, or that the caller has it. It is asked after each time, so that an upgrade is seen at once.
    fn answer(&self, headers: &HeaderMap) -> Response {
        let known = headers.get(header::IF_NONE_MATCH).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let same = known.split(',').any(|tag| self.etag == tag.trim().trim_start_matches("W/"));
        let mut response = match same {
            true => StatusCode::NOT_MODIFIED.into_response(),
            false => self.bytes.into_response(),
        };
        let told = response.headers_mut();
        told.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.kind));
        told.insert(header::ETAG, self.etag.clone());
        told.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        told.insert(header::CONTENT_SECURITY_POLICY, POLICY);
        response
    }
}

pub fn routes() -> Router<AppState> {
    Router::new().route("/", get(page)).route("/assets/{*path}", get(asset))
}

async fn page(headers: HeaderMap) -> Result<Response, Problem> {
    find("index.html", &headers)
}

async fn asset(Path(path): Path<String>, headers: HeaderMap) -> Result<Response, Problem> {
    find(&path, &headers)
}

fn find(path: &str, headers: &HeaderMap) -> Result<Response, Problem> {
    let found = ASSETS.iter().find(|asset| asset.path == path);
    Ok(found.ok_or_else(edge::no_route)?.answer(headers))
}
