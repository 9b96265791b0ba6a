//! Names become pinned, verified local files before the road begins: the
//! engine's side of the house opens no other socket.

use std::path::Path;

use crate::job::progress::Observer;
use crate::job::report::{Failure, FailureKind};
use crate::job::spec::{Corpus, JobSpec, ModelSource};

/// The same spec, with a local path in place of everything that had to be fetched.
///
/// # Errors
/// What could not be found, and what to do.
pub fn localize(spec: &JobSpec, observer: &dyn Observer) -> Result<JobSpec, Failure> {
    let mut local = spec.clone();
    local.model = ModelSource::Path { path: model(&spec.model, observer)? };
    for (_, corpus) in local.corpora_mut() {
        if let Corpus::Path { path } = corpus {
            check_file(path)?;
        } else if let Corpus::Hub { repo, revision, file } = corpus {
            *corpus = Corpus::Path { path: hub::file(repo, revision, file, observer)? };
        } else if let Corpus::Upload { .. } = corpus {
            return Err(failure(
                FailureKind::Data,
                "uploads are resolved by the service; on the command line use a path",
            ));
        }
    }
    Ok(local)
}

fn model(source: &ModelSource, observer: &dyn Observer) -> Result<String, Failure> {
    match source {
        ModelSource::Path { path } if Path::new(path).is_dir() => Ok(path.clone()),
        ModelSource::Path { path } => Err(failure(
            FailureKind::Model,
            format!("model.path: {path} is not a directory; give the Hugging Face directory of a model"),
        )),
        ModelSource::Hub { repo, revision } => hub::model(repo, revision, observer),
        ModelSource::S3 { uri } => Err(failure(
            FailureKind::Model,
            format!("{uri}: models from S3 are not available in this version; fetch it to a directory first"),
        )),
        ModelSource::Job { job_id } => Err(failure(
            FailureKind::Model,
            format!(
                "job {job_id} is known to its service only; on the command line give the path of its result"
            ),
        )),
    }
}

fn check_file(path: &str) -> Result<(), Failure> {
    match std::fs::File::open(path).and_then(|f| f.metadata()) {
        Ok(about) if about.is_file() => Ok(()),
        Ok(_) => Err(failure(
            FailureKind::Data,
            format!("{path}: is not a file; give a .txt, .jsonl or .parquet file"),
        )),
        Err(e) => Err(failure(
            FailureKind::Data,
            format!("{path}: cannot be read ({e}); check the path in the spec"),
        )),
    }
}

fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure { kind, stage: None, message: message.into() }
}

#[cfg(not(feature = "hub"))]
mod hub {
    use super::{Failure, FailureKind, Observer, failure};

    pub fn model(repo: &str, _: &str, _: &dyn Observer) -> Result<String, Failure> {
        Err(failure(
            FailureKind::Model,
            format!("{repo}: this program was built without the Hub; use a local path"),
        ))
    }

    pub fn file(repo: &str, _: &str, _: &str, _: &dyn Observer) -> Result<String, Failure> {
        Err(failure(
            FailureKind::Data,
            format!("{repo}: this program was built without the Hub; use a local path"),
        ))
    }
}

/// Host and port where the Hub is asked.
#[cfg(feature = "hub")]
#[must_use]
pub fn hub_address() -> (String, u16) {
    let api = hf_hub::api::sync::ApiBuilder::from_env().build().ok();
    let url = api.map(|api| api.model("x".into()).url("x")).unwrap_or_default();
    let (scheme, rest) = url.split_once("://").unwrap_or(("https", &url));
    let host = rest.split('/').next().unwrap_or_default();
    let usual = if scheme == "http" { 80 } else { 443 };
    match host.rsplit_once(':') {
        Some((host, port)) => (host.to_owned(), port.parse().unwrap_or(usual)),
        None => (host.to_owned(), usual),
    }
}

/// The Hugging Face Hub, through its cache (`HF_HOME`, `HF_ENDPOINT` and the stored token count).
#[cfg(feature = "hub")]
mod hub {
    use std::io::Read;
    use std::path::{Path, PathBuf};

    use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
    use hf_hub::{Cache, Repo, RepoType};
    use sha2::{Digest, Sha256};

    use super::{Failure, FailureKind, Observer, failure};
    use crate::job::progress::Event;

    /// Largest part of a repository that counts: what a checkpoint needs, and no code.
    fn needed(name: &str) -> bool {
        let extension = Path::new(name).extension().and_then(|e| e.to_str()).unwrap_or("");
        let legal =
            name.starts_with("LICENSE") || name.starts_with("NOTICE") || name.starts_with("USE_POLICY");
        !name.contains('/')
            && !name.starts_with('.')
            && (matches!(extension, "safetensors" | "json" | "jinja")
                || legal
                || matches!(name, "tokenizer.model" | "merges.txt" | "vocab.txt"))
    }

    /// Fetches a model repository and returns its local directory.
    pub fn model(repo: &str, revision: &str, observer: &dyn Observer) -> Result<String, Failure> {
        let hub = Hub::open(FailureKind::Model)?;
        let named = hub.repo(repo, RepoType::Model, revision);
        let info = named.info().map_err(|e| hub.failed(repo, revision, &e))?;
        let mut names: Vec<&str> =
            info.siblings.iter().map(|s| s.rfilename.as_str()).filter(|n| needed(n)).collect();
        if !names.iter().any(|n| n.ends_with(".safetensors")) {
            return Err(failure(
                FailureKind::Model,
                format!(
                    "{repo}: holds no safetensors weights; convert it, or choose a repository that has them"
                ),
            ));
        }
        // Small files first: a wrong model shows before gigabytes are fetched.
        names.sort_by_key(|n| (n.ends_with(".safetensors"), *n));
        // From here on the commit counts, not the branch: it may move while files arrive.
        let pinned = hub.repo(repo, RepoType::Model, &info.sha);
        let mut dir = PathBuf::new();
        for (i, name) in names.iter().enumerate() {
            tell(observer, format!("fetching {repo}@{}: {name} ({} of {})", &info.sha, i + 1, names.len()));
            let path = hub.get(repo, &pinned, &info.sha, RepoType::Model, name)?;
            dir = path.parent().map(Path::to_owned).unwrap_or_default();
        }
        Ok(dir.display().to_string())
    }

    /// Fetches one file of a data set repository.
    pub fn file(repo: &str, revision: &str, file: &str, observer: &dyn Observer) -> Result<String, Failure> {
        let hub = Hub::open(FailureKind::Data)?;
        let named = hub.repo(repo, RepoType::Dataset, revision);
        let info = named.info().map_err(|e| hub.failed(repo, revision, &e))?;
        tell(observer, format!("fetching {repo}@{}: {file}", info.sha));
        let pinned = hub.repo(repo, RepoType::Dataset, &info.sha);
        Ok(hub.get(repo, &pinned, &info.sha, RepoType::Dataset, file)?.display().to_string())
    }

    fn tell(observer: &dyn Observer, message: String) {
        observer.event(Event::Noted { stage: None, message });
    }

    struct Hub {
        api: Api,
        cache: Cache,
        kind: FailureKind,
    }

    impl Hub {
        fn open(kind: FailureKind) -> Result<Self, Failure> {
            let api = ApiBuilder::from_env().with_progress(false).with_retries(5).build();
            let api =
                api.map_err(|e| failure(kind, format!("the Hugging Face Hub cannot be reached: {e}")))?;
            Ok(Self { api, cache: Cache::from_env(), kind })
        }

        fn repo(&self, repo: &str, of: RepoType, revision: &str) -> ApiRepo {
            self.api.repo(Repo::with_revision(repo.to_owned(), of, revision.to_owned()))
        }

        /// A file from the cache, or from the Hub and then verified.
        fn get(
            &self,
            repo: &str,
            from: &ApiRepo,
            commit: &str,
            of: RepoType,
            name: &str,
        ) -> Result<PathBuf, Failure> {
            let cached = Repo::with_revision(repo.to_owned(), of, commit.to_owned());
            if let Some(path) = self.cache.repo(cached).get(name) {
                return Ok(path);
            }
            let path = from.download(name).map_err(|e| self.failed(&format!("{repo}/{name}"), commit, &e))?;
            verify(&path).map_err(|e| failure(self.kind, format!("{repo}/{name}: {e}")))?;
            Ok(path)
        }

        fn failed(&self, what: &str, revision: &str, error: &ApiError) -> Failure {
            let text = error.to_string();
            let remedy = if text.contains("404") {
                "it does not exist there; check the name and the revision"
            } else if text.contains("401") || text.contains("403") {
                "it needs a login; accept its licence on the Hub and set HF_TOKEN"
            } else {
                "check the network and HF_ENDPOINT, or fetch it by other means and give its path"
            };
            failure(self.kind, format!("{what} at {revision} cannot be fetched ({text}): {remedy}"))
        }
    }

    /// Large files are stored under their own sha256. What does not keep that word is taken away again.
    fn verify(path: &Path) -> Result<(), String> {
        let blob = std::fs::canonicalize(path).map_err(|e| e.to_string())?;
        let Some(named) = blob.file_name().and_then(|n| n.to_str()) else { return Ok(()) };
        if named.len() != 64 || !named.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(());
        }
        let mut file = std::fs::File::open(&blob).map_err(|e| e.to_string())?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer).map_err(|e| e.to_string())? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
        if hex::encode(hash.finalize()) == named.to_ascii_lowercase() {
            return Ok(());
        }
        let removed = std::fs::remove_file(&blob).and_then(|()| std::fs::remove_file(path));
        Err(match removed {
            Ok(()) => "arrived damaged and was removed; run again to fetch it anew".to_owned(),
            Err(e) => format!("arrived damaged; remove {} yourself ({e})", blob.display()),
        })
    }
}
