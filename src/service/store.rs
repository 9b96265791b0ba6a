//! Where the files of finished jobs live: a directory, read by key.
//!
//! An attempt puts its files under `jobs/<id>/e<epoch>/`; they count only once
//! the fenced commit names them. What no commit names is swept.

use std::fs;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};
use uuid::Uuid;

/// A directory of immutable files. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// What was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Hex.
    pub sha256: String,
    pub size_bytes: u64,
}

/// The prefix of all files of a job.
pub fn job_prefix(job: Uuid) -> String {
    format!("jobs/{job}")
}

/// The prefix of the files of one attempt.
pub fn epoch_prefix(job: Uuid, epoch: i64) -> String {
    format!("jobs/{job}/e{epoch}")
}

/// The prefix of an upload's file.
pub fn upload_prefix(upload: Uuid) -> String {
    format!("uploads/{upload}")
}

impl Store {
    /// Opens the store in `root`, which is made when missing.
    pub fn open(root: impl Into<PathBuf>) -> io::Result<Self> {
        let root = root.into();
        fs::create_dir_all(&root)?;
        Ok(Self { root: root.canonicalize()? })
    }

    /// The file behind `key`, for reading ranges of it.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when there is none, [`io::ErrorKind::InvalidInput`] for
    /// a key that is not a plain relative path.
    pub fn path(&self, key: &str) -> io::Result<PathBuf> {
        let path = self.resolve(key)?;
        if path.is_file() { Ok(path) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Where the file behind `key` is to be written, its directory made.
    pub fn place(&self, key: &str) -> io::Result<PathBuf> {
        let path = self.resolve(key)?;
        fs::create_dir_all(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?;
        Ok(path)
    }

    /// What the file behind `key` comes to now.
    pub fn digest(&self, key: &str) -> io::Result<Stored> {
        digest(&self.path(key)?)
    }

    /// Stores a copy of `file` under `key`, durably: hashed, written, synced.
    /// Shares the disk blocks by a hard link where the file system allows it, so
    /// `file` must not be written to afterwards.
    pub fn put(&self, key: &str, file: &Path) -> io::Result<Stored> {
        let target = self.resolve(key)?;
        let parent = target.parent().ok_or(io::ErrorKind::InvalidInput)?;
        fs::create_dir_all(parent)?;
        match fs::remove_file(&target) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            Err(_) | Ok(()) => {}
        }
        if fs::hard_link(file, &target).is_err() {
            fs::copy(file, &target)?;
        }
        let stored = digest(&target)?;
        fs::File::open(&target)?.sync_all()?;
        fs::File::open(parent)?.sync_all()?;
        Ok(stored)
    }

    /// Removes everything under `prefix`. Nothing there is no error.
    pub fn remove(&self, prefix: &str) -> io::Result<()> {
        match fs::remove_dir_all(self.resolve(prefix)?) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            Err(_) | Ok(()) => Ok(()),
        }
    }

    /// The attempts that have files here, as (job, epoch).
    pub fn epochs(&self) -> io::Result<Vec<(Uuid, i64)>> {
        let mut found = Vec::new();
        for job in names(&self.root.join("jobs"))? {
            let Ok(id) = job.parse::<Uuid>() else { continue };
            for epoch in names(&self.root.join("jobs").join(&job))? {
                if let Some(epoch) = epoch.strip_prefix('e').and_then(|e| e.parse().ok()) {
                    found.push((id, epoch));
                }
            }
        }
        Ok(found)
    }

    /// The uploads that have a file here.
    pub fn uploads(&self) -> io::Result<Vec<Uuid>> {
        Ok(names(&self.root.join("uploads"))?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn resolve(&self, key: &str) -> io::Result<PathBuf> {
        let path = Path::new(key);
        let plain = !key.is_empty() && path.components().all(|c| matches!(c, Component::Normal(_)));
        if plain { Ok(self.root.join(path)) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

fn digest(path: &Path) -> io::Result<Stored> {
    let mut file = fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut size_bytes = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => {
                hasher.update(&buffer[..n]);
                size_bytes += n as u64;
            }
        }
    }
    Ok(Stored { sha256: hex::encode(hasher.finalize()), size_bytes })
}

fn names(directory: &Path) -> io::Result<Vec<String>> {
    match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
        Ok(entries) => entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect(),
    }
}
