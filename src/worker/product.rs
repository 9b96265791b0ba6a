//! What goes into an attempt and what comes out of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::json;
use uuid::Uuid;

use crate::job::report::{FILES, Failure, FailureKind};
use crate::job::spec::{Corpus, JobSpec, ModelSource};
use crate::service::db::{Database, JobRow, Lease, NewArtifact, Tenant, best_checkpoint};
use crate::service::store::{Store, epoch_prefix};

const DIRECTORIES: [&str; 5] = ["pruned", "healed", "adapter", "gguf", "plots"];
/// What comes from the store, where that is not on this machine.
const INPUTS: &str = "inputs";

/// The spec with names that only the service knows turned into paths.
pub async fn resolve(
    database: &Database,
    store: &Store,
    job: &JobRow,
    workspace: &Path,
) -> Result<JobSpec, Failure> {
    let inputs = workspace.join(INPUTS);
    let mut spec = job.spec.clone();
    if let ModelSource::Job { job_id } = spec.model {
        spec.model =
            ModelSource::Path { path: checkpoint(database, store, job.tenant, job_id, &inputs).await? };
    }
    for (_, corpus) in spec.corpora_mut() {
        if let Corpus::Upload { upload_id } = corpus {
            *corpus = Corpus::Path { path: upload(database, store, job.tenant, *upload_id, &inputs).await? };
        }
    }
    Ok(spec)
}

fn failed(kind: FailureKind, message: String) -> Failure {
    Failure { kind, stage: None, message }
}

/// Where the best checkpoint is that job `id` left.
async fn checkpoint(
    database: &Database,
    store: &Store,
    tenant: Tenant,
    id: Uuid,
    inputs: &Path,
) -> Result<String, Failure> {
    let files = database.artifacts(tenant, id).await;
    let files = files.map_err(|e| failed(FailureKind::Storage, format!("cannot look up job {id}: {e}")))?;
    let mut config = None;
    for (path, file) in best_checkpoint(&files) {
        let to = inputs.join(id.to_string()).join(path);
        let here = store.bring(&file.location, file.size_bytes as u64, &to, false).await;
        let here =
            here.map_err(|e| failed(FailureKind::Storage, format!("cannot get {path} of job {id}: {e}")))?;
        config = config.or_else(|| (path == "config.json").then_some(here));
    }
    let directory = config.as_deref().and_then(Path::parent).and_then(Path::to_str).map(String::from);
    directory.ok_or_else(|| {
        let message = format!("job {id} has left no checkpoint; name one that has succeeded");
        failed(FailureKind::Model, message)
    })
}

/// Where the file of upload `id` is.
async fn upload(
    database: &Database,
    store: &Store,
    tenant: Tenant,
    id: Uuid,
    inputs: &Path,
) -> Result<String, Failure> {
    let row = database.upload(tenant, id).await;
    let row = row.map_err(|e| failed(FailureKind::Storage, format!("cannot look up upload {id}: {e}")))?;
    let gone = || failed(FailureKind::Data, format!("upload {id} is not here; bring the file again"));
    let row = row.filter(|row| row.completed_at.is_some()).ok_or_else(gone)?;
    // Its ending says what it holds.
    let name = row.location.rsplit('/').next().unwrap_or_default();
    let to = inputs.join(id.to_string()).join(name);
    match store.bring(&row.location, row.size_bytes as u64, &to, true).await {
        Ok(path) => path.to_str().map(String::from).ok_or_else(gone),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(gone()),
        Err(error) => Err(failed(FailureKind::Storage, format!("cannot get upload {id}: {error}"))),
    }
}

/// Puts the attempt's files into the store, under its epoch.
pub async fn store(store: &Store, lease: Lease, workspace: &Path) -> Result<Vec<NewArtifact>, Failure> {
    let prefix = epoch_prefix(lease.job, lease.epoch);
    match put_all(store, &prefix, workspace).await {
        Ok(files) if files.is_empty() => {
            Err(failed(FailureKind::Bug, "the run succeeded but left no files. This is a bug.".into()))
        }
        Ok(files) => Ok(files),
        Err(error) => Err(failed(FailureKind::Storage, format!("cannot store the result: {error}"))),
    }
}

async fn put_all(store: &Store, prefix: &str, workspace: &Path) -> io::Result<Vec<NewArtifact>> {
    let mut files = Vec::new();
    for (path, file) in found(workspace)? {
        let location = format!("{prefix}/{path}");
        let stored = store.put(&location, &file).await?;
        files.push(NewArtifact { path, sha256: stored.sha256, size_bytes: stored.size_bytes, location });
    }
    let list = files.iter().map(|f| json!({"path": f.path, "sha256": f.sha256, "size_bytes": f.size_bytes}));
    store.seal(prefix, json!({"files": list.collect::<Vec<_>>()}).to_string().into_bytes()).await?;
    Ok(files)
}

/// What a run has left for people, by path.
fn found(workspace: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for name in FILES {
        if workspace.join(name).is_file() {
            found.push((name.to_owned(), workspace.join(name)));
        }
    }
    for name in DIRECTORIES {
        if workspace.join(name).is_dir() {
            walk(&workspace.join(name), name, &mut found)?;
        }
    }
    Ok(found)
}

/// Files under `directory`; hidden and half-written ones are nobody's business.
fn walk(directory: &Path, name: &str, found: &mut Vec<(String, PathBuf)>) -> io::Result<()> {
    let mut entries = fs::read_dir(directory)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let file_name = entry.file_name();
        let Some(part) = file_name
            .to_str()
            .filter(|n| !n.starts_with('.') && Path::new(n).extension() != Some("part".as_ref()))
        else {
            continue;
        };
        let path = format!("{name}/{part}");
        if entry.path().is_dir() {
            walk(&entry.path(), &path, found)?;
        } else {
            found.push((path, entry.path().canonicalize()?));
        }
    }
    Ok(())
}
