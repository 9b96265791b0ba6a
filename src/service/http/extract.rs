//! Reading requests, each refusal a problem.

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use serde::de::DeserializeOwned;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::problem::{Code, Problem};
use crate::job::complaint::Complaint;

/// A JSON body, whatever it says.
pub struct JsonBody(pub Value);

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        check_media_type(request.headers())?;
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
                Problem::new(Code::BodyTooLarge, "The body is larger than this route takes.")
            } else {
                Problem::new(Code::InvalidJson, format!("The body ended early: {}.", rejection.body_text()))
            }
        })?;
        serde_json::from_slice(&bytes).map(Self).map_err(|e| Problem::new(Code::InvalidJson, format!("{e}.")))
    }
}

/// Reads a body as what the route takes.
///
/// # Errors
/// The first thing that is wrong, and where.
pub fn read<T: DeserializeOwned>(body: Value) -> Result<T, Complaint> {
    serde_path_to_error::deserialize(body).map_err(|e| {
        let pointer = format!("/{}", e.path().to_string().replace('.', "/")).replace("/?", "");
        Complaint { pointer, message: e.into_inner().to_string() }
    })
}

fn check_media_type(headers: &HeaderMap) -> Result<(), Problem> {
    let given = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let essence = given.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/json" || essence.starts_with("application/") && essence.ends_with("+json") {
        return Ok(());
    }
    let detail = match given {
        "" => "The body has no Content-Type; send `application/json`.".to_string(),
        given => format!("The body is `{given}`; send `application/json`."),
    };
    Err(Problem::new(Code::UnsupportedMediaType, detail))
}

/// The `{id}` of a job in the path.
pub struct JobId(pub Uuid);

impl<S: Send + Sync> FromRequestParts<S> for JobId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path: Result<Path<JobPath>, _> = Path::from_request_parts(parts, state).await;
        let Path(JobPath { id }) = path.map_err(|e| Problem::new(Code::InvalidId, e.body_text()))?;
        let uuid = Uuid::parse_str(&id);
        uuid.map(Self).map_err(|e| Problem::new(Code::InvalidId, format!("`{id}` is no id: {e}.")))
    }
}

#[derive(serde::Deserialize)]
struct JobPath {
    id: String,
}

/// Which page of a list, newest first: `limit` and `after` of a query that takes nothing else.
pub struct Newest {
    pub size: u32,
    pub after: Option<Uuid>,
}

const DEFAULT_PAGE: u32 = 20;

impl<S: Send + Sync> FromRequestParts<S> for Newest {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Pairs(query) = Pairs::from_request_parts(parts, state).await?;
        let mut page = Self { size: DEFAULT_PAGE, after: None };
        for (name, value) in query {
            match name.as_str() {
                "limit" => page.size = limit(&value, 100)?,
                "after" => page.after = Some(parameter("after", &value)?),
                _ => return Err(Pairs::unknown(&name, "limit, after")),
            }
        }
        Ok(page)
    }
}

/// The query string as it came: names may repeat.
pub struct Pairs(pub Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Pairs {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let query = Query::<Vec<(String, String)>>::from_request_parts(parts, state).await;
        let Query(pairs) = query.map_err(|e| Problem::new(Code::InvalidQuery, e.body_text()))?;
        if pairs.iter().any(|(name, value)| name.contains('\0') || value.contains('\0')) {
            return Err(Problem::new(Code::InvalidQuery, "A parameter contains the character NUL."));
        }
        Ok(Self(pairs))
    }
}

impl Pairs {
    /// A parameter no route of this kind has.
    pub fn unknown(name: &str, known: &str) -> Problem {
        Problem::new(Code::InvalidQuery, format!("`{name}` is no parameter here; there are {known}."))
    }
}

/// Reads one query parameter.
pub fn parameter<T: std::str::FromStr<Err: std::fmt::Display>>(
    name: &str,
    value: &str,
) -> Result<T, Problem> {
    value.parse().map_err(|e| Problem::new(Code::InvalidQuery, format!("`{name}={value}`: {e}.")))
}

/// Reads a point in time.
pub fn instant(name: &str, value: &str) -> Result<OffsetDateTime, Problem> {
    OffsetDateTime::parse(value, &Rfc3339).map_err(|e| {
        let detail = format!("`{name}={value}`: {e}; a time is written as 2026-11-25T10:00:00Z.");
        Problem::new(Code::InvalidQuery, detail)
    })
}

/// How many entries a page may have.
pub fn limit(value: &str, most: u32) -> Result<u32, Problem> {
    let limit: u32 = parameter("limit", value)?;
    if (1..=most).contains(&limit) {
        return Ok(limit);
    }
    Err(Problem::new(Code::InvalidQuery, format!("`limit` must be from 1 to {most}, not {limit}.")))
}

/// Whether the caller prefers `wanted` to `other`, by the quality values of
/// `Accept` (RFC 9110, 12.5.1).
pub fn prefers(headers: &HeaderMap, wanted: &str, other: &str) -> bool {
    quality(headers, wanted) > quality(headers, other)
}

/// Quality of a media type in thousandths.
fn quality(headers: &HeaderMap, media: &str) -> u32 {
    let ranges =
        headers.get_all(header::ACCEPT).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
    let group = media.split('/').next().unwrap_or_default();
    let matching = ranges.filter_map(|range| {
        let mut parts = range.split(';').map(str::trim);
        let name = parts.next()?.to_ascii_lowercase();
        let exactness = match name.as_str() {
            name if name == media => 3,
            name if name.strip_suffix("/*") == Some(group) => 2,
            "*/*" => 1,
            _ => return None,
        };
        let q = parts.find_map(|p| p.strip_prefix("q=")).map_or(Some(1.0), |q| q.parse::<f32>().ok())?;
        Some((exactness, (q.clamp(0.0, 1.0) * 1000.0) as u32))
    });
    matching.max().map_or(0, |(_, quality)| quality)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_is_read_with_its_quality_values() {
        for (accept, stream) in [
            ("text/event-stream", true),
            ("application/json", false),
            ("*/*", false),
            ("text/event-stream;q=0.5, application/json", false),
            ("text/event-stream, application/json;q=0.9", true),
            ("text/*, */*;q=0.1", true),
            ("TEXT/event-stream", true),
            ("nonsense", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            assert_eq!(prefers(&headers, "text/event-stream", "application/json"), stream, "{accept}");
        }
        assert!(!prefers(&HeaderMap::new(), "text/event-stream", "application/json"));
    }
}
