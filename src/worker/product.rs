//! What goes into an attempt and what comes out of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::job::report::{Failure, FailureKind};
use crate::job::spec::{Corpus, JobSpec, ModelSource};
use crate::service::db::{Database, JobRow, Lease, NewArtifact, Tenant};
use crate::service::store::{Store, epoch_prefix};

/// What a run leaves in its workspace for people; all else is its own record.
const FILES: [&str; 7] = [
    "profile.json",
    "selection.json",
    "eval.json",
    "report.json",
    "report.html",
    "provenance.json",
    "SHA256SUMS",
];
const DIRECTORIES: [&str; 5] = ["pruned", "healed", "adapter", "gguf", "plots"];
/// The checkpoints a job may leave, the better one first.
const CHECKPOINTS: [&str; 2] = ["healed", "pruned"];

/// The spec with names that only the service knows turned into paths.
pub async fn resolve(database: &Database, store: &Store, job: &JobRow) -> Result<JobSpec, Failure> {
    let mut spec = job.spec.clone();
    if let ModelSource::Job { job_id } = spec.model {
        spec.model = ModelSource::Path { path: checkpoint(database, store, job.tenant, job_id).await? };
    }
    for (_, corpus) in spec.corpora_mut() {
        if let Corpus::Upload { upload_id } = corpus {
            *corpus = Corpus::Path { path: upload(database, store, job.tenant, *upload_id).await? };
        }
    }
    Ok(spec)
}

fn failed(kind: FailureKind, message: String) -> Failure {
    Failure { kind, stage: None, message }
}

/// Where the best checkpoint is that job `id` left.
async fn checkpoint(database: &Database, store: &Store, tenant: Tenant, id: Uuid) -> Result<String, Failure> {
    let files = database.artifacts(tenant, id).await;
    let files = files.map_err(|e| failed(FailureKind::Storage, format!("cannot look up job {id}: {e}")))?;
    let checkpoint = CHECKPOINTS.iter().find_map(|name| {
        let file = files.iter().find(|f| f.path == format!("{name}/config.json"))?;
        store.path(&file.location).ok()?.parent().map(Path::to_path_buf)
    });
    let path = checkpoint.as_deref().and_then(Path::to_str).map(String::from);
    path.ok_or_else(|| {
        let message = format!("job {id} has left no checkpoint; name one that has succeeded");
        failed(FailureKind::Model, message)
    })
}

/// Where the file of upload `id` is.
async fn upload(database: &Database, store: &Store, tenant: Tenant, id: Uuid) -> Result<String, Failure> {
    let row = database.upload(tenant, id).await;
    let row = row.map_err(|e| failed(FailureKind::Storage, format!("cannot look up upload {id}: {e}")))?;
    let row = row.filter(|row| row.completed_at.is_some());
    let path = row.and_then(|row| store.path(&row.location).ok()?.to_str().map(String::from));
    path.ok_or_else(|| failed(FailureKind::Data, format!("upload {id} is not here; bring the file again")))
}

/// Puts the attempt's files into the store, under its epoch.
pub async fn store(store: &Store, lease: Lease, workspace: &Path) -> Result<Vec<NewArtifact>, Failure> {
    let (store, workspace) = (store.clone(), workspace.to_owned());
    let prefix = epoch_prefix(lease.job, lease.epoch);
    let stored = tokio::task::spawn_blocking(move || put_all(&store, &prefix, &workspace)).await;
    match stored {
        Ok(Ok(files)) if files.is_empty() => {
            Err(failed(FailureKind::Bug, "the run succeeded but left no files. This is a bug.".into()))
        }
        Ok(Ok(files)) => Ok(files),
        Ok(Err(error)) => Err(failed(FailureKind::Storage, format!("cannot store the result: {error}"))),
        Err(error) => Err(failed(FailureKind::Bug, format!("storing the result: {error}. This is a bug."))),
    }
}

fn put_all(store: &Store, prefix: &str, workspace: &Path) -> io::Result<Vec<NewArtifact>> {
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
    let mut files = Vec::with_capacity(found.len());
    for (path, file) in found {
        let location = format!("{prefix}/{path}");
        let stored = store.put(&location, &file)?;
        files.push(NewArtifact { path, sha256: stored.sha256, size_bytes: stored.size_bytes, location });
    }
    Ok(files)
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
