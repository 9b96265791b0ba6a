//! A directory of files.

use std::fs;
use std::io::{self, Read, SeekFrom};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use futures_util::StreamExt;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio_util::io::ReaderStream;
use uuid::Uuid;

use super::{Stored, Stream};

const CHUNK_BYTES: usize = 256 << 10;

/// A directory of immutable files. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Directory {
    root: PathBuf,
}

impl Directory {
    pub(super) fn open(root: impl Into<PathBuf>) -> io::Result<Self> {
        let root = root.into();
        fs::create_dir_all(&root)?;
        Ok(Self { root: root.canonicalize()? })
    }

    /// The file behind `key`, for reading ranges of it.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when there is none, [`io::ErrorKind::InvalidInput`] for
    /// a key that is not a plain relative path.
    pub(super) fn path(&self, key: &str) -> io::Result<PathBuf> {
        let path = self.resolve(key)?;
        if path.is_file() { Ok(path) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    pub(super) async fn read(&self, key: &str, size_bytes: u64, part: Range<u64>) -> io::Result<Stream> {
        let mut file = tokio::fs::File::open(self.path(key)?).await?;
        if file.metadata().await?.len() != size_bytes {
            return Err(io::Error::other("it has not its recorded length"));
        }
        file.seek(SeekFrom::Start(part.start)).await?;
        let part = file.take(part.end - part.start);
        Ok(ReaderStream::with_capacity(part, CHUNK_BYTES).boxed())
    }

    /// To write the file behind `key` from byte `start` on, its directory made.
    pub(super) async fn part(&self, key: &str, start: u64) -> io::Result<FileWriter> {
        let path = self.resolve(key)?;
        fs::create_dir_all(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?;
        let mut file =
            tokio::fs::OpenOptions::new().create(true).truncate(false).write(true).open(path).await?;
        file.seek(SeekFrom::Start(start)).await?;
        Ok(FileWriter(file))
    }

    /// What the file behind `key` comes to now.
    pub(super) fn digest(&self, key: &str) -> io::Result<Stored> {
        digest(&self.path(key)?)
    }

    /// Shares the disk blocks by a hard link where the file system allows it, so
    /// `file` must not be written to afterwards.
    pub(super) fn put(&self, key: &str, file: &Path) -> io::Result<Stored> {
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
    pub(super) fn remove(&self, prefix: &str) -> io::Result<()> {
        match fs::remove_dir_all(self.resolve(prefix)?) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            Err(_) | Ok(()) => Ok(()),
        }
    }

    /// The attempts that have files here, as (job, epoch).
    pub(super) fn epochs(&self) -> io::Result<Vec<(Uuid, i64)>> {
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
    pub(super) fn uploads(&self) -> io::Result<Vec<Uuid>> {
        Ok(names(&self.root.join("uploads"))?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn resolve(&self, key: &str) -> io::Result<PathBuf> {
        let path = Path::new(key);
        let plain = !key.is_empty() && path.components().all(|c| matches!(c, Component::Normal(_)));
        if plain { Ok(self.root.join(path)) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

/// A file that is being written from some byte on.
pub struct FileWriter(tokio::fs::File);

impl FileWriter {
    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes).await
    }

    pub(super) async fn finish(mut self) -> io::Result<()> {
        self.0.flush().await?;
        self.0.sync_all().await
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
