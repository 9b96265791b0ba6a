//! `/v1/uploads`: texts that callers bring, in parts that may come in any order, again, and side by side.
//!
//! A part is written to its place in the file; it counts once it is there in
//! full. The whole counts once its sha256 is what the caller said at the start.

use std::io;

use axum::Json;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Extension, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::artifacts::base64;
use super::auth::Caller;
use super::extract::{JsonBody, Newest};
use super::job::Page;
use super::problem::{Code, Problem, ProblemBody};
use crate::job::complaint::Complaint;
use crate::service::db::{Tenant, UploadDeletion, UploadPart, UploadRow, page_cut};
use crate::service::store::upload_prefix;

/// Of all parts but the last.
const PART_BYTES: i64 = 16 << 20;
const MAX_UPLOAD_BYTES: i64 = 16 << 30;
/// All uploads of a tenant, complete or not.
const MAX_TENANT_BYTES: i64 = 64 << 30;
const FORMATS: [&str; 3] = ["txt", "jsonl", "parquet"];
const PACKINGS: [&str; 2] = ["gz", "zst"];

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(get, delete))
        .routes(routes!(put_part).layer(DefaultBodyLimit::disable()))
        .routes(routes!(complete))
}

/// A file to bring.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "name": "corpus.jsonl", "size_bytes": 36,
    "sha256": "5a3b1f0f6fb9a0f9a7c5b2a41dfb2d4a4c63ac8cd7f8f5a2a4d1b8f0e9c7d6b5",
}))]
struct NewUpload {
    /// It ends in .txt, .jsonl or .parquet, each also with .gz or .zst.
    name: String,
    /// At most 16 GiB.
    #[schema(minimum = 1)]
    size_bytes: i64,
    /// Of the whole file, hex.
    sha256: String,
}

/// A file that is being brought, or is here.
#[derive(Debug, Serialize, ToSchema)]
struct Upload {
    /// Always `"upload"`.
    #[schema(example = "upload")]
    object: &'static str,
    /// What a job names: `{"from": "upload", "upload_id": …}`.
    id: Uuid,
    name: String,
    size_bytes: i64,
    sha256: String,
    /// A job may name it.
    complete: bool,
    /// Every part but the last has so many bytes.
    part_size_bytes: i64,
    part_count: i64,
    /// The parts that are here, while it is not complete.
    parts: Vec<Part>,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    completed_at: Option<OffsetDateTime>,
}

/// A part that is here.
#[derive(Debug, Serialize, ToSchema)]
struct Part {
    /// From 1.
    number: i32,
    /// Hex.
    sha256: String,
}

impl Upload {
    fn new(row: UploadRow, parts: Vec<UploadPart>) -> Self {
        Self {
            object: "upload",
            id: row.id,
            complete: row.completed_at.is_some(),
            part_count: row.part_count(),
            name: row.name,
            size_bytes: row.size_bytes,
            sha256: row.sha256,
            part_size_bytes: row.part_size_bytes,
            parts: parts.into_iter().map(|p| Part { number: p.number, sha256: p.sha256 }).collect(),
            created_at: row.created_at,
            completed_at: row.completed_at,
        }
    }
}

/// Announces a file. Its parts come next.
#[utoipa::path(
    post, path = "/v1/uploads", operation_id = "create_upload", tag = "uploads", request_body = NewUpload,
    responses(
        (status = 201, description = "Announced", body = Upload, headers(("Location" = String))),
        (status = 400, description = "Not JSON", body = ProblemBody),
        (status = 413, description = "There is no room for it", body = ProblemBody),
        (status = 415, description = "Not declared as JSON", body = ProblemBody),
        (status = 422, description = "It cannot be taken", body = ProblemBody),
    )
)]
async fn create(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let new: NewUpload = serde_path_to_error::deserialize(body).map_err(|e| {
        let pointer = format!("/{}", e.path().to_string().replace('.', "/")).replace("/?", "");
        Problem::upload(vec![Complaint { pointer, message: e.into_inner().to_string() }])
    })?;
    let ending = check(&new).map_err(Problem::upload)?;
    let id = Uuid::now_v7();
    let row = UploadRow {
        id,
        name: new.name,
        location: format!("{}/corpus.{ending}", upload_prefix(id)),
        size_bytes: new.size_bytes,
        sha256: new.sha256.to_ascii_lowercase(),
        part_size_bytes: PART_BYTES,
        created_at: OffsetDateTime::now_utc(),
        completed_at: None,
    };
    if !state.database.upload_insert(tenant, &row, MAX_TENANT_BYTES).await? {
        let detail = "All uploads together may hold 64 GiB; delete some that no job needs any more.";
        return Err(Problem::new(Code::QuotaExceeded, detail));
    }
    let upload = shown(&state, tenant, id).await?;
    let location = [(header::LOCATION, format!("/v1/uploads/{id}"))];
    Ok((StatusCode::CREATED, location, Json(upload)).into_response())
}

/// The ending that its place in the store gets.
fn check(new: &NewUpload) -> Result<String, Vec<Complaint>> {
    let mut complaints = Vec::new();
    let mut complain = |pointer: &str, message: &str| {
        complaints.push(Complaint { pointer: pointer.into(), message: message.into() });
    };
    let ending = ending(&new.name);
    if ending.is_none() || new.name.len() > 255 || new.name.contains('\0') {
        complain(
            "/name",
            "must end in .txt, .jsonl or .parquet, each also with .gz or .zst, and have at most 255 bytes",
        );
    }
    if !(1..=MAX_UPLOAD_BYTES).contains(&new.size_bytes) {
        complain("/size_bytes", "must be from 1 to 17179869184 (16 GiB)");
    }
    if new.sha256.len() != 64 || !new.sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
        complain("/sha256", "must be the sha256 of the whole file: 64 hexadecimal digits");
    }
    match ending {
        Some(ending) if complaints.is_empty() => Ok(ending),
        _ => Err(complaints),
    }
}

fn ending(name: &str) -> Option<String> {
    let (rest, last) = name.rsplit_once('.')?;
    let known = |all: &[&'static str], word: &str| all.iter().copied().find(|k| *k == word);
    match known(&PACKINGS, last) {
        Some(packing) => Some(format!("{}.{packing}", known(&FORMATS, rest.rsplit_once('.')?.1)?)),
        None => known(&FORMATS, last).map(String::from),
    }
}

/// The uploads, newest first.
#[utoipa::path(
    get, path = "/v1/uploads", operation_id = "list_uploads", tag = "uploads",
    params(
        ("limit" = Option<u32>, Query, description = "Uploads per page, 1 to 100; 20 if not given"),
        ("after" = Option<Uuid>, Query, description = "`last_id` of the page before"),
    ),
    responses(
        (status = 200, description = "A page; the parts of each are told by itself", body = Page<Upload>),
        (status = 400, description = "The query is wrong", body = ProblemBody),
    )
)]
async fn list(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Newest { size, after }: Newest,
) -> Result<Json<Page<Upload>>, Problem> {
    let mut rows = state.database.uploads(tenant, after, size + 1).await?;
    let has_more = page_cut(&mut rows, size);
    let uploads = rows.into_iter().map(|row| Upload::new(row, Vec::new())).collect();
    Ok(Json(Page::new(uploads, has_more, |upload| upload.id.to_string())))
}

/// One upload, and which of its parts are here: what a broken upload goes on from.
#[utoipa::path(
    get, path = "/v1/uploads/{id}", operation_id = "get_upload", tag = "uploads", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The upload", body = Upload),
        (status = 404, description = "No such upload", body = ProblemBody),
    )
)]
async fn get(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    UploadId(id): UploadId,
) -> Result<Json<Upload>, Problem> {
    shown(&state, tenant, id).await.map(Json)
}

/// Brings one part: its bytes as they are.
///
/// Part `n` holds the bytes from `(n - 1) * part_size_bytes` on. Parts may come
/// in any order, side by side and again. With a `Content-Digest` (RFC 9530) a
/// part that was damaged on its way is refused at once.
#[utoipa::path(
    put, path = "/v1/uploads/{id}/parts/{number}", operation_id = "put_upload_part", tag = "uploads",
    params(
        ("id" = Uuid, Path), ("number" = u32, Path, description = "From 1", example = 1),
        ("Content-Digest" = Option<String>, Header, description = "`sha-256=:…:` of this part"),
    ),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(
        (status = 204, description = "It is here"),
        (status = 400, description = "It ended early, or is not what its digest says", body = ProblemBody),
        (status = 404, description = "No such upload", body = ProblemBody),
        (status = 409, description = "The upload is complete", body = ProblemBody),
        (status = 413, description = "It is longer than this part", body = ProblemBody),
        (status = 422, description = "There is no such part, or it is shorter than this part", body = ProblemBody),
    )
)]
async fn put_part(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Path((id, number)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Problem> {
    let row = row(&state, tenant, parse(&id)?).await?;
    let number: i32 =
        number.parse().ok().filter(|n| (1..=row.part_count()).contains(&i64::from(*n))).ok_or_else(|| {
            let message = format!("the parts are numbered from 1 to {}", row.part_count());
            Problem::upload(vec![Complaint { pointer: "/number".into(), message }])
        })?;
    if !state.database.upload_part_open(tenant, row.id, number).await? {
        return Err(closed());
    }
    let start = i64::from(number - 1) * row.part_size_bytes;
    let length = row.part_size_bytes.min(row.size_bytes - start) as u64;
    let digest = write(&state, &row, number, (start as u64, length), body).await?;
    let told = headers.get("content-digest").and_then(|v| v.to_str().ok());
    if told.is_some_and(|told| told.trim() != format!("sha-256=:{}:", base64(&digest))) {
        return Err(Problem::new(
            Code::DigestMismatch,
            "The part is not what its Content-Digest says; send it again.",
        ));
    }
    let part = UploadPart { number, sha256: hex::encode(digest) };
    match state.database.upload_part_put(tenant, row.id, &part).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(closed()),
    }
}

/// Writes a part to its place and gives its sha256.
async fn write(
    state: &AppState,
    row: &UploadRow,
    number: i32,
    (start, length): (u64, u64),
    body: Body,
) -> Result<[u8; 32], Problem> {
    let kept = |e: io::Error| Problem::internal(format!("upload {}: {e}", row.id));
    let mut file = state.store.part(&row.location, number, start).await.map_err(kept)?;
    let mut sum = Sha256::new();
    let mut written = 0;
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let early = |e: axum::Error| {
            Problem::new(Code::DigestMismatch, format!("The part ended early: {e}. Send it again."))
        };
        let chunk = chunk.map_err(early)?;
        written += chunk.len() as u64;
        if written > length {
            return Err(Problem::new(Code::BodyTooLarge, format!("This part has {length} bytes, not more.")));
        }
        sum.update(&chunk);
        file.write(&chunk).await.map_err(kept)?;
    }
    if written < length {
        let message = format!("this part has {length} bytes, not {written}");
        return Err(Problem::upload(vec![Complaint { pointer: String::new(), message }]));
    }
    file.finish().await.map_err(kept)?;
    Ok(sum.finalize().into())
}

/// Ends an upload: from here on a job may name it, and nothing changes it.
///
/// Asking twice is asking once.
#[utoipa::path(
    post, path = "/v1/uploads/{id}/complete", operation_id = "complete_upload", tag = "uploads", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "It is whole and right", body = Upload),
        (status = 400, description = "It is whole but not what its sha256 says", body = ProblemBody),
        (status = 404, description = "No such upload", body = ProblemBody),
        (status = 409, description = "Parts are missing", body = ProblemBody),
    )
)]
async fn complete(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    UploadId(id): UploadId,
) -> Result<Json<Upload>, Problem> {
    let row = row(&state, tenant, id).await?;
    if row.completed_at.is_none() {
        let here: Vec<i64> =
            state.database.upload_parts(tenant, id).await?.iter().map(|p| i64::from(p.number)).collect();
        let missing: Vec<String> =
            (1..=row.part_count()).filter(|n| !here.contains(n)).take(20).map(|n| n.to_string()).collect();
        if !missing.is_empty() {
            let detail = format!(
                "Parts are missing: {}{}",
                missing.join(", "),
                if missing.len() == 20 { " and more." } else { "." }
            );
            return Err(Problem::new(Code::UploadIncomplete, detail));
        }
        let stored = state.store.digest(&row.location).await.map_err(Problem::internal)?;
        if stored.sha256 != row.sha256 {
            let detail = format!(
                "All parts are here, but together their sha256 is {}; compare the parts' and send those that differ again.",
                stored.sha256
            );
            return Err(Problem::new(Code::DigestMismatch, detail));
        }
        state.database.upload_complete(tenant, id).await?.ok_or_else(|| unknown(id))?;
    }
    shown(&state, tenant, id).await.map(Json)
}

/// Forgets an upload and its file.
#[utoipa::path(
    delete, path = "/v1/uploads/{id}", operation_id = "delete_upload", tag = "uploads", params(("id" = Uuid, Path)),
    responses(
        (status = 204, description = "Gone"),
        (status = 404, description = "No such upload", body = ProblemBody),
        (status = 409, description = "A job that has not ended reads it", body = ProblemBody),
    )
)]
async fn delete(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    UploadId(id): UploadId,
) -> Result<StatusCode, Problem> {
    match state.database.upload_delete(tenant, id).await? {
        UploadDeletion::Done => {
            if let Err(error) = state.store.remove(&upload_prefix(id)).await {
                // No row names it any more: the sweep of the store takes it later.
                tracing::warn!(%error, upload = %id, "the file of a deleted upload stays for now");
            }
            Ok(StatusCode::NO_CONTENT)
        }
        UploadDeletion::InUse(job) => {
            Err(Problem::new(Code::StateConflict, format!("The job {job} reads it; it has not ended.")))
        }
        UploadDeletion::Unknown => Err(unknown(id)),
    }
}

fn unknown(id: Uuid) -> Problem {
    Problem::new(Code::UploadNotFound, format!("There is no upload {id}."))
}

fn closed() -> Problem {
    Problem::new(Code::StateConflict, "The upload is complete; nothing changes it any more.")
}

async fn row(state: &AppState, tenant: Tenant, id: Uuid) -> Result<UploadRow, Problem> {
    state.database.upload(tenant, id).await?.ok_or_else(|| unknown(id))
}

async fn shown(state: &AppState, tenant: Tenant, id: Uuid) -> Result<Upload, Problem> {
    let row = row(state, tenant, id).await?;
    let parts =
        if row.completed_at.is_some() { Vec::new() } else { state.database.upload_parts(tenant, id).await? };
    Ok(Upload::new(row, parts))
}

fn parse(id: &str) -> Result<Uuid, Problem> {
    Uuid::parse_str(id)
        .map_err(|e| Problem::new(Code::InvalidId, format!("`{id}` is no id of an upload: {e}.")))
}

/// The `{id}` of an upload in the path.
struct UploadId(Uuid);

impl<S: Send + Sync> axum::extract::FromRequestParts<S> for UploadId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> Result<Self, Problem> {
        let Path(id): Path<String> = Path::from_request_parts(parts, state)
            .await
            .map_err(|e| Problem::new(Code::InvalidId, e.body_text()))?;
        parse(&id).map(Self)
    }
}
