//! A bucket of S3, or of whatever speaks as S3 does.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::http::Method;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::buffered::BufWriter;
use object_store::path::Path as Key;
use object_store::signer::Signer;
use object_store::{
    GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, WriteMultipart,
};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;

use super::{Stored, Stream, epoch_of};

/// Larger files go in parts of so many bytes, some at once. A file may have 10 000 parts.
const PART_BYTES: usize = 16 << 20;
const PARTS_AT_ONCE: usize = 4;
/// How long a link can be followed: to begin a download, which may then take as long as it takes.
const LINK_LASTS: Duration = Duration::from_mins(10);
/// Copies of a process that was killed are forgotten after this time.
const COPIES_LAST: Duration = Duration::from_hours(24);

/// Objects below a prefix. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Bucket {
    objects: Arc<AmazonS3>,
    /// Before every key; ends in `/` unless it is empty.
    prefix: String,
    /// Holds copies for programs that want a path.
    scratch: PathBuf,
    /// Whether clients may be sent to the bucket itself.
    links: bool,
}

/// Why a bucket cannot be the store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the store {0} must look like s3://bucket or s3://bucket/prefix")]
    NoBucket(String),
    #[error("the bucket cannot be used: {0}")]
    Bucket(#[from] object_store::Error),
    #[error("copies of the store cannot be kept in {0}: {1}")]
    Scratch(PathBuf, io::Error),
}

impl Bucket {
    /// The bucket that `url` names, such as `s3://bucket/prefix`, by the variables that the tools of AWS read
    /// (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT_URL`, …). Asks nobody yet.
    ///
    /// # Errors
    /// When `url` names no bucket, a variable makes no sense, or `scratch` cannot be read.
    pub fn open(url: &str, scratch: PathBuf, links: bool) -> Result<Self, OpenError> {
        let wrong = || OpenError::NoBucket(url.into());
        let named = url.strip_prefix("s3://").ok_or_else(wrong)?;
        let (bucket, prefix) = named.split_once('/').unwrap_or((named, ""));
        let prefix = prefix.trim_matches('/');
        let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
        if bucket.is_empty() || !prefix.is_empty() && !prefix.split('/').all(plain) {
            return Err(wrong());
        }
        // Two may be at hand, and then neither is chosen by itself. That one is chosen already is no harm.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let endpoint = std::env::var("AWS_ENDPOINT_URL_S3").or_else(|_| std::env::var("AWS_ENDPOINT_URL"));
        let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
        if let Ok(endpoint) = endpoint {
            builder = builder.with_allow_http(endpoint.starts_with("http://")).with_endpoint(endpoint);
        }
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        clear(&scratch).map_err(|e| OpenError::Scratch(scratch.clone(), e))?;
        Ok(Self { objects: Arc::new(builder.build()?), prefix, scratch, links })
    }

    /// Asks whether the bucket is there and may be read.
    pub async fn check(&self) -> io::Result<()> {
        let first = self.objects.list(Some(&self.key("jobs"))).next().await;
        first.transpose().map(drop).map_err(told)
    }

    pub(super) async fn put(&self, key: &str, path: &Path) -> io::Result<Stored> {
        let key = self.key(key);
        let mut file = tokio::fs::File::open(path).await?;
        let size_bytes = file.metadata().await?.len();
        let mut sum = Sha256::new();
        if size_bytes <= PART_BYTES as u64 {
            let mut bytes = Vec::with_capacity(size_bytes as usize);
            file.read_to_end(&mut bytes).await?;
            sum.update(&bytes);
            self.objects.put(&key, bytes.into()).await.map_err(told)?;
        } else {
            let upload = self.objects.put_multipart(&key).await.map_err(told)?;
            let mut upload = WriteMultipart::new_with_chunk_size(upload, part_bytes(size_bytes));
            match send(&mut file, &mut upload, &mut sum).await {
                Ok(()) => drop(upload.finish().await.map_err(told)?),
                Err(error) => {
                    // Or its parts would stay, seen by nobody and paid for.
                    upload.abort().await.map_err(told)?;
                    return Err(error);
                }
            }
        }
        Ok(Stored { sha256: hex::encode(sum.finalize()), size_bytes })
    }

    /// Puts an object where there is none.
    pub(super) async fn create(&self, key: &str, bytes: Vec<u8>) -> io::Result<()> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        self.objects.put_opts(&self.key(key), PutPayload::from(bytes), options).await.map_err(told)?;
        Ok(())
    }

    pub(super) async fn read(&self, key: &str, size_bytes: u64, part: Range<u64>) -> io::Result<Stream> {
        if part.is_empty() {
            return Ok(stream::empty().boxed());
        }
        let options = GetOptions { range: Some(part.into()), ..GetOptions::default() };
        let got = self.objects.get_opts(&self.key(key), options).await.map_err(told)?;
        if got.meta.size != size_bytes {
            return Err(io::Error::other("it has not its recorded length"));
        }
        Ok(got.into_stream().map_err(told).boxed())
    }

    pub(super) async fn link(&self, key: &str) -> io::Result<Option<String>> {
        if !self.links {
            return Ok(None);
        }
        let url = self.objects.signed_url(Method::GET, &self.key(key), LINK_LASTS).await;
        url.map(|url| Some(url.into())).map_err(told)
    }

    /// A file for a copy of `key`, unlike any other.
    pub(super) fn scratch(&self, key: &str) -> io::Result<PathBuf> {
        std::fs::create_dir_all(&self.scratch)?;
        let name = key.rsplit('/').next().unwrap_or_default();
        Ok(self.scratch.join(format!("{}-{name}", Uuid::new_v4())))
    }

    /// Copies an object to the file `to`, which is there only when it is whole.
    pub(super) async fn fetch(&self, key: &str, size_bytes: u64, to: &Path) -> io::Result<()> {
        let bytes = self.read(key, size_bytes, 0..size_bytes).await?;
        write(bytes, size_bytes, to).await
    }

    /// The same with one that was written in parts.
    pub(super) async fn fetch_parts(&self, key: &str, size_bytes: u64, to: &Path) -> io::Result<()> {
        write(self.parts(key).await?, size_bytes, to).await
    }

    pub(super) async fn digest(&self, key: &str) -> io::Result<Stored> {
        let mut bytes = self.parts(key).await?;
        let (mut sum, mut size_bytes) = (Sha256::new(), 0);
        while let Some(piece) = bytes.try_next().await? {
            sum.update(&piece);
            size_bytes += piece.len() as u64;
        }
        Ok(Stored { sha256: hex::encode(sum.finalize()), size_bytes })
    }

    /// All parts of a file, one after the other.
    async fn parts(&self, key: &str) -> io::Result<Stream> {
        let prefix = self.key(key);
        let mut keys: Vec<Key> = self
            .objects
            .list(Some(&prefix))
            .map_ok(|meta| meta.location)
            .try_collect()
            .await
            .map_err(told)?;
        keys.sort();
        let objects = self.objects.clone();
        let opened = stream::iter(keys).map(io::Result::Ok).and_then(move |key| {
            let objects = objects.clone();
            async move { Ok(objects.get(&key).await.map_err(told)?.into_stream().map_err(told)) }
        });
        Ok(opened.try_flatten().boxed())
    }

    pub(super) fn part(&self, key: &str, number: i32) -> io::Result<ObjectWriter> {
        // So many digits that names sort as numbers do.
        let key = self.key(&format!("{key}/{number:010}"));
        let objects: Arc<dyn ObjectStore> = self.objects.clone();
        Ok(ObjectWriter(BufWriter::with_capacity(objects, key, PART_BYTES)))
    }

    pub(super) async fn remove(&self, prefix: &str) -> io::Result<()> {
        let found = self.objects.list(Some(&self.key(prefix))).map_ok(|meta| meta.location).boxed();
        let removed = self.objects.delete_stream(found);
        removed.try_for_each(|_| async { Ok(()) }).await.map_err(told)
    }

    pub(super) async fn epochs(&self) -> io::Result<Vec<(Uuid, i64)>> {
        Ok(self.known("jobs", epoch_of).await?.into_iter().collect())
    }

    pub(super) async fn uploads(&self) -> io::Result<Vec<Uuid>> {
        let upload = |key: &str| key.strip_prefix("uploads/")?.split('/').next()?.parse().ok();
        Ok(self.known("uploads", upload).await?.into_iter().collect())
    }

    /// What the keys below `prefix` are of.
    async fn known<T: Ord>(&self, prefix: &str, of: impl Fn(&str) -> Option<T>) -> io::Result<BTreeSet<T>> {
        let mut found = BTreeSet::new();
        let mut keys = self.objects.list(Some(&self.key(prefix)));
        while let Some(meta) = keys.try_next().await.map_err(told)? {
            found.extend(meta.location.as_ref().strip_prefix(&self.prefix).and_then(&of));
        }
        Ok(found)
    }

    fn key(&self, key: &str) -> Key {
        Key::from(format!("{}{key}", self.prefix))
    }
}

/// An object on its way; it is there once it is finished.
pub struct ObjectWriter(BufWriter);

impl ObjectWriter {
    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes).await
    }

    pub(super) async fn finish(mut self) -> io::Result<()> {
        self.0.shutdown().await
    }
}

async fn send(file: &mut tokio::fs::File, upload: &mut WriteMultipart, sum: &mut Sha256) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).await? {
            0 => return Ok(()),
            n => {
                sum.update(&buffer[..n]);
                upload.wait_for_capacity(PARTS_AT_ONCE).await.map_err(told)?;
                upload.write(&buffer[..n]);
            }
        }
    }
}

/// So large that 10 000 parts are enough.
fn part_bytes(size_bytes: u64) -> usize {
    PART_BYTES.max(size_bytes.div_ceil(10_000) as usize)
}

async fn write(mut bytes: Stream, size_bytes: u64, to: &Path) -> io::Result<()> {
    if let Some(parent) = to.parent() {
        tokio::fs::create_dir_all(parent).await?;
    }
    let part = to.with_added_extension("part");
    let mut file = tokio::fs::File::create(&part).await?;
    let mut written = 0;
    while let Some(piece) = bytes.try_next().await? {
        written += piece.len() as u64;
        file.write_all(&piece).await?;
    }
    if written != size_bytes {
        return Err(io::Error::other(format!("{written} bytes came of {size_bytes}")));
    }
    file.sync_all().await?;
    tokio::fs::rename(part, to).await
}

/// Removes copies that nobody can still need.
fn clear(scratch: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(scratch) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let age = SystemTime::now().duration_since(entry.metadata()?.modified()?).unwrap_or_default();
        if age > COPIES_LAST {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn told(error: object_store::Error) -> io::Error {
    let kind = match &error {
        object_store::Error::NotFound { .. } => io::ErrorKind::NotFound,
        object_store::Error::AlreadyExists { .. } => io::ErrorKind::AlreadyExists,
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
            io::ErrorKind::PermissionDenied
        }
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}
