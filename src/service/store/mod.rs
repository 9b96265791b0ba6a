//! Where the files of finished jobs and uploads live: a directory, or a bucket of S3. They are immutable and read by key.
//!
//! An attempt puts its files under `jobs/<id>/e<epoch>/`; they count only once the fenced commit names them. What no
//! commit names is swept.

mod bucket;
mod directory;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use axum::body::Bytes;
use futures_util::stream::{BoxStream, TryStreamExt};
use uuid::Uuid;

pub use bucket::Bucket;
pub use directory::Directory;

use bucket::ObjectWriter;
use directory::FileWriter;

/// Immutable files under keys. Cheap to clone.
#[derive(Debug, Clone)]
pub enum Store {
    Directory(Directory),
    Bucket(Bucket),
}

/// What was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Hex.
    pub sha256: String,
    pub size_bytes: u64,
}

/// Bytes of a file as they come.
pub type Stream = BoxStream<'static, io::Result<Bytes>>;

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
    /// Opens the store in the directory `root`, which is made when missing.
    pub fn open(root: impl Into<PathBuf>) -> io::Result<Self> {
        Directory::open(root).map(Self::Directory)
    }

    /// Stores a copy of `file` under `key`, durably and hashed. `file` must not be written to afterwards.
    pub async fn put(&self, key: &str, file: &Path) -> io::Result<Stored> {
        match self {
            Self::Directory(directory) => {
                let (directory, key, file) = (directory.clone(), key.to_owned(), file.to_owned());
                beside(move || directory.put(&key, &file)).await
            }
            Self::Bucket(bucket) => bucket.put(key, file).await,
        }
    }

    /// Ends what an attempt puts under `prefix` by a list of it. In a bucket nobody can do so twice.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] when somebody has.
    pub async fn seal(&self, prefix: &str, list: Vec<u8>) -> io::Result<()> {
        match self {
            Self::Directory(_) => Ok(()),
            Self::Bucket(bucket) => bucket.create(&format!("{prefix}/MANIFEST.json"), list).await,
        }
    }

    /// The bytes `part` of the file behind `key`.
    ///
    /// # Errors
    /// When it is not there or not `size_bytes` long.
    pub async fn read(&self, key: &str, size_bytes: u64, part: Range<u64>) -> io::Result<Stream> {
        match self {
            Self::Directory(directory) => directory.read(key, size_bytes, part).await,
            Self::Bucket(bucket) => bucket.read(key, size_bytes, part).await,
        }
    }

    /// All of a file that is known to be small.
    pub async fn bytes(&self, key: &str, size_bytes: u64) -> io::Result<Vec<u8>> {
        let pieces: Vec<Bytes> = self.read(key, size_bytes, 0..size_bytes).await?.try_collect().await?;
        Ok(pieces.concat())
    }

    /// Where anybody can read the file behind `key` for a few minutes, if the store can say so.
    pub async fn link(&self, key: &str) -> io::Result<Option<String>> {
        match self {
            Self::Directory(_) => Ok(None),
            Self::Bucket(bucket) => bucket.link(key).await,
        }
    }

    /// A file of the store for a program that wants a path.
    pub async fn local(&self, key: &str, size_bytes: u64) -> io::Result<Local> {
        match self {
            Self::Directory(directory) => Ok(Local { path: directory.path(key)?, copy: false }),
            Self::Bucket(bucket) => {
                let path = bucket.scratch(key)?;
                bucket.fetch(key, size_bytes, &path).await?;
                Ok(Local { path, copy: true })
            }
        }
    }

    /// The same for longer: in its place, or else copied to `to`, unless it is there already. `parts`: it was written by
    /// [`Store::part`].
    pub async fn bring(&self, key: &str, size_bytes: u64, to: &Path, parts: bool) -> io::Result<PathBuf> {
        match self {
            Self::Directory(directory) => directory.path(key),
            Self::Bucket(bucket) => {
                let here = tokio::fs::metadata(to).await.is_ok_and(|meta| meta.len() == size_bytes);
                match (here, parts) {
                    (true, _) => {}
                    (false, false) => bucket.fetch(key, size_bytes, to).await?,
                    (false, true) => bucket.fetch_parts(key, size_bytes, to).await?,
                }
                Ok(to.to_owned())
            }
        }
    }

    /// To write part `number` of the file behind `key`, which begins at byte `start`. It counts once it is finished.
    pub async fn part(&self, key: &str, number: i32, start: u64) -> io::Result<PartWriter> {
        Ok(match self {
            Self::Directory(directory) => PartWriter::File(directory.part(key, start).await?),
            Self::Bucket(bucket) => PartWriter::Object(bucket.part(key, number)?),
        })
    }

    /// What the parts of the file behind `key` come to together.
    pub async fn digest(&self, key: &str) -> io::Result<Stored> {
        match self {
            Self::Directory(directory) => {
                let (directory, key) = (directory.clone(), key.to_owned());
                beside(move || directory.digest(&key)).await
            }
            Self::Bucket(bucket) => bucket.digest(key).await,
        }
    }

    /// Removes everything under `prefix`. Nothing there is no error.
    pub async fn remove(&self, prefix: &str) -> io::Result<()> {
        match self {
            Self::Directory(directory) => {
                let (directory, prefix) = (directory.clone(), prefix.to_owned());
                beside(move || directory.remove(&prefix)).await
            }
            Self::Bucket(bucket) => bucket.remove(prefix).await,
        }
    }

    /// The attempts that have files here, as (job, epoch).
    pub async fn epochs(&self) -> io::Result<Vec<(Uuid, i64)>> {
        match self {
            Self::Directory(directory) => {
                let directory = directory.clone();
                beside(move || directory.epochs()).await
            }
            Self::Bucket(bucket) => bucket.epochs().await,
        }
    }

    /// The uploads that have a file here.
    pub async fn uploads(&self) -> io::Result<Vec<Uuid>> {
        match self {
            Self::Directory(directory) => {
                let directory = directory.clone();
                beside(move || directory.uploads()).await
            }
            Self::Bucket(bucket) => bucket.uploads().await,
        }
    }
}

/// A file of the store on this machine: its very own, or a copy that goes with this value.
#[derive(Debug)]
pub struct Local {
    pub path: PathBuf,
    copy: bool,
}

impl Drop for Local {
    fn drop(&mut self) {
        if self.copy
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "a copy stays");
        }
    }
}

/// A part of a file on its way.
pub enum PartWriter {
    File(FileWriter),
    Object(ObjectWriter),
}

impl PartWriter {
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.write(bytes).await,
            Self::Object(object) => object.write(bytes).await,
        }
    }

    /// Nothing follows; what was written is durable now.
    pub async fn finish(self) -> io::Result<()> {
        match self {
            Self::File(file) => file.finish().await,
            Self::Object(object) => object.finish().await,
        }
    }
}

/// The attempt whose file lies at `key`.
fn epoch_of(key: &str) -> Option<(Uuid, i64)> {
    let mut parts = key.strip_prefix("jobs/")?.split('/');
    Some((parts.next()?.parse().ok()?, parts.next()?.strip_prefix('e')?.parse().ok()?))
}

async fn beside<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
