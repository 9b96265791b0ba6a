//! The results of jobs as the Hugging Face Hub would serve them, for reading:
//! with `HF_ENDPOINT=<this service>/hf` a job's id is the name of a model.
//!
//! `main` is the best checkpoint that the job left; `healed`, `pruned` and
//! `adapter` are revisions of their own. A revision's commit is made of what its
//! files hold, so caches of clients know the same files again.

use axum::Json;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use serde::Serialize;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::artifacts::answer;
use super::auth::Caller;
use super::problem::{Code, Problem, ProblemBody};
use crate::service::db::{ArtifactRow, Tenant};

/// What may be a revision, and where it lies among the files of the job; the best checkpoint first.
const REVISIONS: [&str; 3] = ["healed", "pruned", "adapter"];
const REPO_COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");
/// By this clients tell a missing file from a missing model.
const ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
/// Of the text that stands for a large file in git; clients read it and do nothing with it.
const POINTER_BYTES: u64 = 134;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(model))
        .routes(routes!(model_at))
        .routes(routes!(tree))
        .routes(routes!(subtree))
        .routes(routes!(file))
}

/// A model as the Hub describes it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct HubModel {
    id: String,
    model_id: String,
    /// The commit: made of the digests of the files.
    #[schema(example = "8a1f1d6f0f3d4d6a9b6e2f6a0c5b7d3e1f2a4c6d")]
    sha: String,
    private: bool,
    gated: bool,
    disabled: bool,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    last_modified: OffsetDateTime,
    tags: Vec<String>,
    #[serde(rename = "library_name")]
    library_name: &'static str,
    siblings: Vec<Sibling>,
}

/// A file of a model.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    #[schema(example = "config.json")]
    rfilename: String,
    size: i64,
    blob_id: String,
    lfs: SiblingDigest,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct SiblingDigest {
    sha256: String,
    size: i64,
    pointer_size: u64,
}

/// A file in a tree.
#[derive(Debug, Serialize, ToSchema)]
struct TreeFile {
    /// Always `"file"`.
    #[serde(rename = "type")]
    kind: &'static str,
    oid: String,
    size: i64,
    path: String,
    lfs: TreeDigest,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct TreeDigest {
    /// sha256, hex.
    oid: String,
    size: i64,
    pointer_size: u64,
}

/// One revision of what a job left.
struct Revision {
    job: Uuid,
    name: &'static str,
    commit: String,
    /// Their paths begin in the directory of the revision.
    files: Vec<ArtifactRow>,
}

/// A job's best checkpoint, as a model of the Hub.
#[utoipa::path(
    get, path = "/hf/api/models/{id}", operation_id = "hub_model", tag = "hub", params(("id" = Uuid, Path, description = "Of the job")),
    responses(
        (status = 200, description = "The model", body = HubModel),
        (status = 404, description = "No such job, or it has left no checkpoint", body = ProblemBody),
    )
)]
async fn model(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<HubModel>, Problem> {
    Ok(Json(Revision::find(&state, tenant, &id, "main").await?.described()))
}

/// A revision of it: `main`, `healed`, `pruned`, `adapter` or a commit.
#[utoipa::path(
    get, path = "/hf/api/models/{id}/revision/{revision}", operation_id = "hub_model_revision", tag = "hub",
    params(("id" = Uuid, Path, description = "Of the job"), ("revision" = String, Path, example = "main")),
    responses(
        (status = 200, description = "The model", body = HubModel),
        (status = 404, description = "No such job or revision", body = ProblemBody),
    )
)]
async fn model_at(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Path((id, revision)): Path<(String, String)>,
) -> Result<Json<HubModel>, Problem> {
    Ok(Json(Revision::find(&state, tenant, &id, &revision).await?.described()))
}

/// The files of a revision.
#[utoipa::path(
    get, path = "/hf/api/models/{id}/tree/{revision}", operation_id = "hub_tree", tag = "hub",
    params(("id" = Uuid, Path, description = "Of the job"), ("revision" = String, Path, example = "main")),
    responses(
        (status = 200, description = "The files", body = Vec<TreeFile>),
        (status = 404, description = "No such job or revision", body = ProblemBody),
    )
)]
async fn tree(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Path((id, revision)): Path<(String, String)>,
) -> Result<Json<Vec<TreeFile>>, Problem> {
    Ok(Json(Revision::find(&state, tenant, &id, &revision).await?.files_below("")))
}

/// The files in a directory of a revision.
#[utoipa::path(
    get, path = "/hf/api/models/{id}/tree/{revision}/{*path}", operation_id = "hub_subtree", tag = "hub",
    params(
        ("id" = Uuid, Path, description = "Of the job"), ("revision" = String, Path, example = "main"),
        ("path" = String, Path, description = "A directory"),
    ),
    responses(
        (status = 200, description = "The files", body = Vec<TreeFile>),
        (status = 404, description = "No such job, revision or directory", body = ProblemBody),
    )
)]
async fn subtree(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Path((id, revision, path)): Path<(String, String, String)>,
) -> Result<Json<Vec<TreeFile>>, Problem> {
    let revision = Revision::find(&state, tenant, &id, &revision).await?;
    let files = revision.files_below(&format!("{}/", path.trim_end_matches('/')));
    if files.is_empty() { Err(revision.no_entry(&path)) } else { Ok(Json(files)) }
}

/// A file of a revision, or a part of it: as with the files of the job.
#[utoipa::path(
    get, path = "/hf/{id}/resolve/{revision}/{*path}", operation_id = "hub_file", tag = "hub",
    params(
        ("id" = Uuid, Path, description = "Of the job"), ("revision" = String, Path, example = "main"),
        ("path" = String, Path, example = "config.json"), ("Range" = Option<String>, Header, example = "bytes=0-1023"),
    ),
    responses(
        (status = 200, description = "The file", body = Vec<u8>, content_type = "application/octet-stream",
         headers(("ETag" = String, description = "sha256"), ("X-Repo-Commit" = String))),
        (status = 206, description = "The part", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 304, description = "You have it"),
        (status = 404, description = "No such job, revision or file", body = ProblemBody),
        (status = 416, description = "It has no such bytes", body = ProblemBody),
    )
)]
async fn file(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Path((id, revision, path)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let mut revision = Revision::find(&state, tenant, &id, &revision).await?;
    let commit = HeaderValue::from_str(&revision.commit).map_err(Problem::internal)?;
    let Some(at) = revision.files.iter().position(|f| f.path == path) else {
        return Err(revision.no_entry(&path).with_header(REPO_COMMIT, commit));
    };
    let mut response = answer(&state.store, revision.files.swap_remove(at), &headers).await?;
    response.headers_mut().insert(REPO_COMMIT, commit);
    Ok(response)
}

impl Revision {
    /// The revision `asked` of what job `id` has left.
    async fn find(state: &AppState, tenant: Tenant, id: &str, asked: &str) -> Result<Self, Problem> {
        let missing = |code, word, detail: String| {
            Problem::new(code, detail).with_header(ERROR_CODE, HeaderValue::from_static(word))
        };
        let unknown = || {
            let detail = format!("There is no job `{id}`; the id of a job is the name of its model here.");
            missing(Code::JobNotFound, "RepoNotFound", detail)
        };
        let job = Uuid::parse_str(id).map_err(|_| unknown())?;
        state.database.job(tenant, job).await?.ok_or_else(unknown)?;
        let files = state.database.artifacts(tenant, job).await?;
        let mut revisions: Vec<Self> =
            REVISIONS.into_iter().filter_map(|name| Self::of(job, name, &files)).collect();
        if revisions.is_empty() {
            let detail = format!("The job {job} has left no checkpoint yet.");
            return Err(missing(Code::ResultNotReady, "RepoNotFound", detail));
        }
        let found = match asked {
            "main" => Some(0),
            asked => revisions.iter().position(|r| r.name == asked || r.commit == asked),
        };
        let Some(found) = found else {
            let names: Vec<&str> = revisions.iter().map(|r| r.name).collect();
            let detail = format!("There is no revision `{asked}`; there are main, {}.", names.join(", "));
            return Err(missing(Code::ArtifactNotFound, "RevisionNotFound", detail));
        };
        Ok(revisions.swap_remove(found))
    }

    fn of(job: Uuid, name: &'static str, all: &[ArtifactRow]) -> Option<Self> {
        let inside = |file: &ArtifactRow| {
            let path = file.path.strip_prefix(name)?.strip_prefix('/')?.to_owned();
            Some(ArtifactRow { path, ..file.clone() })
        };
        let files: Vec<ArtifactRow> = all.iter().filter_map(inside).collect();
        let mut sum = Sha256::new();
        files.iter().for_each(|f| sum.update(format!("{} {}\n", f.sha256, f.path)));
        let commit = blob_id(&hex::encode(sum.finalize()));
        (!files.is_empty()).then_some(Self { job, name, commit, files })
    }

    fn no_entry(&self, path: &str) -> Problem {
        let detail = format!("The revision {} has no `{path}`.", self.name);
        Problem::new(Code::ArtifactNotFound, detail)
            .with_header(ERROR_CODE, HeaderValue::from_static("EntryNotFound"))
    }

    fn described(&self) -> HubModel {
        let times = || self.files.iter().map(|f| f.created_at);
        HubModel {
            id: self.job.to_string(),
            model_id: self.job.to_string(),
            sha: self.commit.clone(),
            private: true,
            gated: false,
            disabled: false,
            created_at: times().min().unwrap_or(OffsetDateTime::UNIX_EPOCH),
            last_modified: times().max().unwrap_or(OffsetDateTime::UNIX_EPOCH),
            tags: vec!["secateur".into(), self.name.into()],
            library_name: if self.name == "adapter" { "peft" } else { "transformers" },
            siblings: self.files.iter().map(Sibling::new).collect(),
        }
    }

    fn files_below(&self, prefix: &str) -> Vec<TreeFile> {
        self.files.iter().filter(|f| f.path.starts_with(prefix)).map(TreeFile::new).collect()
    }
}

impl Sibling {
    fn new(file: &ArtifactRow) -> Self {
        let lfs =
            SiblingDigest { sha256: file.sha256.clone(), size: file.size_bytes, pointer_size: POINTER_BYTES };
        Self { rfilename: file.path.clone(), size: file.size_bytes, blob_id: blob_id(&file.sha256), lfs }
    }
}

impl TreeFile {
    fn new(file: &ArtifactRow) -> Self {
        let lfs = TreeDigest { oid: file.sha256.clone(), size: file.size_bytes, pointer_size: POINTER_BYTES };
        let (oid, path) = (blob_id(&file.sha256), file.path.clone());
        Self { kind: "file", oid, size: file.size_bytes, path, lfs }
    }
}

/// As long as an id of git, which is what clients expect.
fn blob_id(sha256: &str) -> String {
    sha256.chars().take(40).collect()
}
