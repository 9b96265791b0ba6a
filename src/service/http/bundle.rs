//! All files of a job as one tar file, whose length and bytes are known before
//! it is made: it can be read in ranges, so a broken download goes on.

use std::io;
use std::ops::Range;

use axum::body::{Body, Bytes};
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::Response;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use sha2::{Digest, Sha256};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::artifacts::{Sent, send};
use super::auth::Caller;
use super::extract::JobId;
use super::jobs::job_row;
use super::problem::{Code, Problem, ProblemBody};
use crate::service::db::ArtifactRow;
use crate::service::store::{Store, Stream};

/// tar counts in these.
const BLOCK_BYTES: u64 = 512;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(bundle))
}

/// All files of a job in one tar file.
///
/// They lie in a directory named after the job, with a `SHA256SUMS` that
/// `sha256sum -c` reads. The file is the same each time, so a range of it may be
/// asked for and a broken download goes on, as with a single file.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/bundle.tar", operation_id = "get_bundle", tag = "results",
    params(
        ("id" = Uuid, Path),
        ("Range" = Option<String>, Header, example = "bytes=1048576-"),
        ("If-Range" = Option<String>, Header, description = "Send the part only if the bundle still has this ETag"),
        ("If-None-Match" = Option<String>, Header, description = "Send nothing if the bundle has this ETag"),
    ),
    responses(
        (status = 200, description = "The bundle", body = Vec<u8>, content_type = "application/x-tar",
         headers(("ETag" = String), ("Content-Length" = u64))),
        (status = 206, description = "The part", body = Vec<u8>, content_type = "application/x-tar",
         headers(("Content-Range" = String), ("ETag" = String))),
        (status = 304, description = "You have it"),
        (status = 404, description = "No such job, or it has left nothing yet", body = ProblemBody),
        (status = 410, description = "The job was deleted", body = ProblemBody),
        (status = 416, description = "It has no such bytes", body = ProblemBody),
    )
)]
async fn bundle(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    job_row(&state.database, tenant, id).await?;
    let mut files = state.database.artifacts(tenant, id).await?;
    // The bundle's own list tells more: of these files, and of every other.
    files.retain(|file| file.path != "SHA256SUMS");
    if files.is_empty() {
        return Err(Problem::new(Code::ResultNotReady, "The job has left no files yet."));
    }
    let pieces = lay_out(id, &files).map_err(Problem::internal)?;
    let size_bytes = pieces.iter().map(Piece::size_bytes).sum();
    let etag = tag(&files);
    let mut described = HeaderMap::new();
    for (name, value) in [
        (header::ETAG, etag.as_str()),
        (header::CONTENT_TYPE, "application/x-tar"),
        (header::CONTENT_DISPOSITION, &format!("attachment; filename=\"{id}.tar\"")),
        (header::ACCEPT_RANGES, "bytes"),
        (header::CACHE_CONTROL, "private, no-cache"),
    ] as [(HeaderName, &str); 5]
    {
        described.insert(name, HeaderValue::from_str(value).map_err(Problem::internal)?);
    }
    let store = state.store.clone();
    send(Sent { etag, size_bytes, described }, &headers, async |bytes| Ok(read(store, pieces, &bytes))).await
}

/// A run of bytes of the bundle.
#[derive(Debug, Clone)]
enum Piece {
    Bytes(Bytes),
    /// A file of the store.
    File {
        location: String,
        size_bytes: u64,
    },
}

impl Piece {
    fn size_bytes(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { size_bytes, .. } => *size_bytes,
        }
    }
}

/// The bundle as it will be: headers, files and what fills their last blocks.
fn lay_out(job: Uuid, files: &[ArtifactRow]) -> io::Result<Vec<Piece>> {
    let sums: String = files.iter().map(|f| format!("{}  {}\n", f.sha256, f.path)).collect();
    let at = files.iter().map(|f| f.created_at.unix_timestamp()).max().unwrap_or_default();
    let entry = |path: &str, size_bytes: u64| -> io::Result<Piece> {
        let mut header = tar::Header::new_ustar();
        header.set_path(format!("{job}/{path}"))?;
        header.set_size(size_bytes);
        header.set_mode(0o644);
        header.set_mtime(at.max(0) as u64);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        Ok(Piece::Bytes(Bytes::copy_from_slice(header.as_bytes())))
    };
    let fill = |size_bytes: u64| {
        let missing = size_bytes.next_multiple_of(BLOCK_BYTES) - size_bytes;
        Piece::Bytes(Bytes::from(vec![0; missing as usize]))
    };
    let mut pieces = vec![entry("SHA256SUMS", sums.len() as u64)?, Piece::Bytes(sums.clone().into())];
    pieces.push(fill(sums.len() as u64));
    for file in files {
        let size_bytes = file.size_bytes as u64;
        pieces.push(entry(&file.path, size_bytes)?);
        pieces.push(Piece::File { location: file.location.clone(), size_bytes });
        pieces.push(fill(size_bytes));
    }
    // Two empty blocks end a tar file.
    pieces.push(Piece::Bytes(Bytes::from_static(&[0; 2 * BLOCK_BYTES as usize])));
    Ok(pieces)
}

/// Everything the bytes depend on: same tag, same bytes. The number is that of this layout.
fn tag(files: &[ArtifactRow]) -> String {
    let mut sum = Sha256::new_with_prefix(b"bundle 1\n");
    for file in files {
        sum.update(format!("{} {} {} {}\n", file.sha256, file.size_bytes, file.created_at, file.path));
    }
    format!("\"{}\"", hex::encode(sum.finalize()))
}

/// The bytes `asked` of all pieces, each file opened when its turn comes.
fn read(store: Store, pieces: Vec<Piece>, asked: &Range<u64>) -> Body {
    let mut parts = Vec::new();
    let mut at = 0;
    for piece in pieces {
        let end = at + piece.size_bytes();
        let (from, to) = (asked.start.max(at), asked.end.min(end));
        if from < to {
            parts.push((piece, from - at..to - at));
        }
        at = end;
    }
    let opened = stream::iter(parts).map(Ok).and_then(move |(piece, part)| open(store.clone(), piece, part));
    Body::from_stream(opened.try_flatten())
}

async fn open(store: Store, piece: Piece, part: Range<u64>) -> io::Result<Stream> {
    Ok(match piece {
        Piece::Bytes(bytes) => {
            let bytes = bytes.slice(part.start as usize..part.end as usize);
            stream::once(async move { Ok(bytes) }).boxed()
        }
        Piece::File { location, size_bytes } => {
            store.read(&location, size_bytes, part).await.inspect_err(|error| {
                // The status is sent; all that is left is to break off, so that nobody takes the rest for whole.
                tracing::error!(%error, location, "a bundle breaks off");
            })?
        }
    })
}
