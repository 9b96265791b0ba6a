//! The files a job left: listed, and read in ranges.

use std::ops::Range;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::AppState;
use super::auth::Caller;
use super::extract::{JobId, Pairs};
use super::job::Page;
use super::jobs::job_row;
use super::problem::{Code, Problem, ProblemBody};
use super::range::{Asked, asked};
use crate::service::db::ArtifactRow;
use crate::service::store::Store;

/// What a job wrote may show itself, styled, and do nothing.
const FILE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; \
                           form-action 'none'; frame-ancestors 'none'; sandbox";

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(file))
}

/// A file a job left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Artifact {
    /// Relative, as in the workspace.
    #[schema(example = "healed/model.safetensors")]
    pub path: String,
    pub size_bytes: i64,
    /// Hex. It is the file's `ETag`, too.
    pub sha256: String,
    /// Where to get it.
    pub url: String,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// The files the job left, by path. There are none before it succeeds.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/artifacts", operation_id = "list_artifacts", tag = "results", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The files", body = Page<Artifact>),
        (status = 404, description = "No such job", body = ProblemBody),
    )
)]
async fn list(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
) -> Result<Json<Page<Artifact>>, Problem> {
    job_row(&state.database, tenant, id).await?;
    let rows = state.database.artifacts(tenant, id).await?.into_iter().map(|row| Artifact {
        url: format!("/v1/jobs/{id}/artifacts/{}", encoded(&row.path)),
        path: row.path,
        size_bytes: row.size_bytes,
        sha256: row.sha256,
        created_at: row.created_at,
    });
    Ok(Json(Page::new(rows.collect(), false, |file| file.path.clone())))
}

/// One file, or a part of it.
///
/// One range of bytes may be asked for (`bytes=0-99`, `bytes=100-`,
/// `bytes=-100`); several at once are answered by the whole file. The `ETag` is
/// the file's sha256, so `If-Range` resumes a broken download safely.
///
/// Where files are kept in S3, a request without conditions is sent there (307), to a link that is good for some minutes;
/// with `proxy=1` the bytes come from here.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/artifacts/{*path}", operation_id = "get_artifact", tag = "results",
    params(
        ("id" = Uuid, Path),
        ("path" = String, Path, description = "As listed; its slashes stay as they are", example = "healed/config.json"),
        ("Range" = Option<String>, Header, example = "bytes=0-1023"),
        ("If-Range" = Option<String>, Header, description = "Send the part only if the file still has this ETag"),
        ("If-None-Match" = Option<String>, Header, description = "Send nothing if the file has this ETag"),
        ("proxy" = Option<u8>, Query, description = "`1`: the bytes come from here, wherever they are kept"),
    ),
    responses(
        (status = 200, description = "The file", body = Vec<u8>, content_type = "application/octet-stream",
         headers(("ETag" = String), ("Repr-Digest" = String, description = "RFC 9530: sha-256 of the whole file"))),
        (status = 206, description = "The part", body = Vec<u8>, content_type = "application/octet-stream",
         headers(("Content-Range" = String), ("ETag" = String), ("Repr-Digest" = String))),
        (status = 304, description = "You have it"),
        (status = 307, description = "It is there", headers(("Location" = String))),
        (status = 400, description = "The query is wrong", body = ProblemBody),
        (status = 404, description = "No such job or file", body = ProblemBody),
        (status = 416, description = "It has no such bytes", body = ProblemBody),
    )
)]
async fn file(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
    Path((_, path)): Path<(String, String)>,
    method: Method,
    Pairs(query): Pairs,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let proxied = proxied(&query)?;
    job_row(&state.database, tenant, id).await?;
    // The row says where the file is; what was asked for never becomes a path.
    let row = match path.contains('\0') {
        true => None,
        false => state.database.artifact(tenant, id, &path).await?,
    };
    let row = row.ok_or_else(|| {
        Problem::new(
            Code::ArtifactNotFound,
            format!("The job has no file `{path}`; /v1/jobs/{id}/artifacts lists them."),
        )
    })?;
    // Conditions are about our tag, and a link is good for one method.
    let conditions = [header::IF_RANGE, header::IF_NONE_MATCH];
    let here = proxied || method != Method::GET || conditions.iter().any(|name| headers.contains_key(name));
    if !here && let Some(link) = state.store.link(&row.location).await.map_err(Problem::internal)? {
        return Ok(Redirect::temporary(&link).into_response());
    }
    answer(&state.store, row, &headers).await
}

/// Whether the caller wants the bytes from here.
fn proxied(query: &[(String, String)]) -> Result<bool, Problem> {
    let mut proxied = false;
    for (name, value) in query {
        match (name.as_str(), value.as_str()) {
            ("proxy", "1") => proxied = true,
            ("proxy", "0") => proxied = false,
            ("proxy", _) => return Err(Problem::new(Code::InvalidQuery, "`proxy` must be 0 or 1.")),
            _ => return Err(Pairs::unknown(name, "proxy")),
        }
    }
    Ok(proxied)
}

/// Answers with a file, as the conditions and the range of the request ask.
pub async fn answer(store: &Store, row: ArtifactRow, headers: &HeaderMap) -> Result<Response, Problem> {
    let etag = format!("\"{}\"", row.sha256);
    let size_bytes = row.size_bytes as u64;
    let described = describe(&row, &etag)?;
    send(Sent { etag, size_bytes, described }, headers, async |bytes| {
        let read = store.read(&row.location, size_bytes, bytes).await;
        Ok(Body::from_stream(read.map_err(|e| Problem::internal(format!("artifact {}: {e}", row.location)))?))
    })
    .await
}

/// What can be sent whole, in part or not at all.
pub struct Sent {
    pub etag: String,
    pub size_bytes: u64,
    /// Its headers but those of its length.
    pub described: HeaderMap,
}

/// Answers with the bytes that the conditions and the range of the request ask for; `read` gives them.
pub async fn send(
    sent: Sent,
    headers: &HeaderMap,
    read: impl AsyncFnOnce(Range<u64>) -> Result<Body, Problem>,
) -> Result<Response, Problem> {
    let Sent { etag, size_bytes, described } = sent;
    let text = |name| headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok());
    if text(header::IF_NONE_MATCH).is_some_and(|tags| matches_any(tags, &etag)) {
        return Ok((StatusCode::NOT_MODIFIED, described).into_response());
    }
    // Weak tags never match for If-Range; a date cannot be compared with a digest.
    let fresh = text(header::IF_RANGE).is_none_or(|tag| tag.trim() == etag);
    let part = match asked(text(header::RANGE).filter(|_| fresh), size_bytes) {
        Asked::Whole => None,
        Asked::Part(part) => Some(part),
        Asked::Nothing => {
            let length =
                HeaderValue::from_str(&format!("bytes */{size_bytes}")).map_err(Problem::internal)?;
            let problem =
                Problem::new(Code::RangeNotSatisfiable, format!("The file has {size_bytes} bytes."));
            return Err(problem.with_header(header::CONTENT_RANGE, length));
        }
    };
    let bytes = part.clone().unwrap_or(0..size_bytes);
    let length = [(header::CONTENT_LENGTH, (bytes.end - bytes.start).to_string())];
    let body = read(bytes).await?;
    Ok(match part {
        None => (StatusCode::OK, described, length, body).into_response(),
        Some(part) => {
            let range = format!("bytes {}-{}/{size_bytes}", part.start, part.end - 1);
            (StatusCode::PARTIAL_CONTENT, described, length, [(header::CONTENT_RANGE, range)], body)
                .into_response()
        }
    })
}

fn describe(row: &ArtifactRow, etag: &str) -> Result<HeaderMap, Problem> {
    let digest = hex::decode(&row.sha256).map_err(Problem::internal)?;
    let mut headers = HeaderMap::new();
    for (name, value) in [
        (header::ETAG, etag),
        (header::HeaderName::from_static("repr-digest"), &format!("sha-256=:{}:", base64(&digest))),
        (header::CONTENT_TYPE, media_type(&row.path)),
        (header::ACCEPT_RANGES, "bytes"),
        (header::CACHE_CONTROL, "private, no-cache"),
        (header::CONTENT_SECURITY_POLICY, FILE_POLICY),
    ] {
        headers.insert(name, HeaderValue::from_str(value).map_err(Problem::internal)?);
    }
    Ok(headers)
}

/// `If-None-Match` compares weakly: `W/` does not matter.
fn matches_any(tags: &str, etag: &str) -> bool {
    tags.trim() == "*" || tags.split(',').any(|tag| tag.trim().trim_start_matches("W/") == etag)
}

fn media_type(path: &str) -> &'static str {
    match path.rsplit_once('.').map_or("", |(_, extension)| extension) {
        "json" => "application/json",
        "html" => "text/html; charset=utf-8",
        "md" | "txt" | "jinja" => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    }
}

/// A path for a URL: slashes stay, what is not plain is percent-encoded.
fn encoded(path: &str) -> String {
    path.bytes().fold(String::new(), |mut url, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte) {
            url.push(byte.into());
        } else {
            url.push_str(&format!("%{byte:02X}"));
        }
        url
    })
}

/// RFC 4648, with padding: digests of 32 bytes need no crate.
pub fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = (0..3).fold(0_u32, |word, i| word << 8 | u32::from(chunk.get(i).copied().unwrap_or(0)));
        for i in 0..4 {
            let sextet = ALPHABET[(word >> (18 - 6 * i) & 63) as usize];
            text.push(if i <= chunk.len() { sextet.into() } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_agrees_with_the_vectors_of_rfc_4648() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn paths_survive_a_url() {
        assert_eq!(encoded("healed/model-00001 of.safetensors"), "healed/model-00001%20of.safetensors");
        assert_eq!(encoded("a?b#c%"), "a%3Fb%23c%25");
    }

    #[test]
    fn if_none_match_compares_weakly_and_takes_lists() {
        for (tags, matches) in
            [("*", true), ("\"a\"", true), ("W/\"a\"", true), ("\"b\", \"a\"", true), ("\"b\"", false)]
        {
            assert_eq!(matches_any(tags, "\"a\""), matches, "{tags}");
        }
    }
}
