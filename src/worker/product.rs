//! What goes into an attempt and what comes out of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::job::report::{Failure, FailureKind};
use crate::job::spec::{JobSpec, ModelSource};
use crate::service::db::{Database, JobRow, Lease, NewArtifact};
use crate::service::store::{Store, epoch_prefix};

/// What a run leaves in its workspace for people; all else is its own record.
const FILES: [&str; 5] = ["profile.json", "selection.json", "eval.json", "report.json", "report.html"];
const DIRECTORIES: [&str; 5] = ["pruned", "healed", "adapter", "gguf", "plots"];
/// The checkpoints a job may leave, the better one first.
const CHECKPOINTS: [&str; 2] = ["healed", "pruned"];

/// The spec with names that only the service knows turned into paths.
pub async fn resolve(database: &Database, store: &Store, job: &JobRow) -> Result<JobSpec, Failure> {
    let mut spec = job.spec.clone();
    let ModelSource::Job { job_id } = &spec.model else { return Ok(spec) };
    let job_id = *job_id;
    let failed = |kind, message| Failure { kind, stage: None, message };
    let files = database
        .artifacts(job.tenant, job_id)
        .await
        .map_err(|e| failed(FailureKind::Storage, format!("cannot look up job {job_id}: {e}")))?;
    let checkpoint = CHECKPOINTS.iter().find_map(|name| {
        let file = files.iter().find(|f| f.path == format!("{name}/config.json"))?;
        store.path(&file.location).ok()?.parent().map(Path::to_path_buf)
    });
    let Some(path) = checkpoint.as_deref().and_then(Path::to_str) else {
        let message = format!("job {job_id} has left no checkpoint; name one that has succeeded");
        return Err(failed(FailureKind::Model, message));
    };
    spec.model = ModelSource::Path { path: path.to_owned() };
    Ok(spec)
}

/// Puts the attempt's files into the store, under its epoch.
pub async fn store(store: &Store, lease: Lease, workspace: &Path) -> Result<Vec<NewArtifact>, Failure> {
    let (store, workspace) = (store.clone(), workspace.to_owned());
    let prefix = epoch_prefix(lease.job, lease.epoch);
    let stored = tokio::task::spawn_blocking(move || put_all(&store, &prefix, &workspace)).await;
    let failed = |kind, message| Failure { kind, stage: None, message };
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
