//! What a spec may name on this machine, and whether the model can be cut so.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::checkpoint::Index;
use crate::job::complaint::Complaint;
use crate::job::plan::Plan;
use crate::job::spec::{Corpus, JobSpec, ModelSource};

/// The directories models and corpora may lie in.
#[derive(Debug, Clone, Default)]
pub struct Roots(Arc<[PathBuf]>);

impl Roots {
    /// # Errors
    /// A root that is no directory, by its name.
    pub fn new(roots: &[PathBuf]) -> Result<Self, String> {
        let real = roots.iter().map(|root| match root.canonicalize() {
            Ok(real) if real.is_dir() => Ok(real),
            Ok(_) => Err(format!("the root {} is not a directory", root.display())),
            Err(e) => Err(format!("the root {} cannot be used: {e}", root.display())),
        });
        real.collect::<Result<_, _>>().map(Self)
    }

    /// The real path of `path` when it exists below a root. Of what lies
    /// elsewhere nothing is told, not even whether it is there.
    fn find(&self, path: &str) -> Result<PathBuf, String> {
        let outside = || {
            let roots: Vec<_> = self.0.iter().map(|r| r.display().to_string()).collect();
            match roots.as_slice() {
                [] => "may not be read: this service was started without --allow-root".to_string(),
                roots => format!("may not be read: it must be an absolute path below {}", roots.join(" or ")),
            }
        };
        let path = Path::new(path);
        if !path.is_absolute() {
            return Err(outside());
        }
        match path.canonicalize() {
            Ok(real) if self.holds(&real) => Ok(real),
            Ok(_) => Err(outside()),
            Err(_) if self.holds_parent(path) => Err("does not exist, or may not be read".into()),
            Err(_) => Err(outside()),
        }
    }

    fn holds(&self, real: &Path) -> bool {
        self.0.iter().any(|root| real.starts_with(root))
    }

    /// Whether what there is of a missing path lies below a root.
    fn holds_parent(&self, path: &Path) -> bool {
        if path.components().any(|part| part == Component::ParentDir) {
            return false;
        }
        let real = path.ancestors().skip(1).find_map(|ancestor| ancestor.canonicalize().ok());
        real.is_some_and(|real| self.holds(&real))
    }
}

/// A spec that may go into the queue.
#[derive(Debug)]
pub struct Admitted {
    pub spec: JobSpec,
    /// What it will take; absent where its model is not on this machine.
    pub plan: Option<Plan>,
}

/// Checks what `spec` names on this machine and makes its paths absolute and
/// real, so that the worker opens what was checked. Reads files: not for an
/// async thread.
///
/// # Errors
/// Every complaint.
pub fn admit(
    mut spec: JobSpec,
    roots: &Roots,
    uploads: &HashMap<Uuid, u64>,
) -> Result<Admitted, Vec<Complaint>> {
    let mut complaints = Vec::new();
    let mut complain = |pointer: String, message: String| complaints.push(Complaint { pointer, message });
    let mut index = None;
    if let ModelSource::Path { path } = &mut spec.model {
        let found = roots.find(path).and_then(|real| utf8(&real).map(|text| (text, model(&real, roots))));
        match found {
            Ok((real, Ok(model))) => (*path, index) = (real, Some(model)),
            Ok((_, Err(message))) | Err(message) => complain("/model/path".into(), message),
        }
    }
    if spec.resources.in_memory && !matches!(spec.model, ModelSource::Path { .. }) {
        let message = "can be known only of a model on this machine; give `min_memory_bytes` instead";
        complain("/resources/in_memory".into(), message.into());
    }
    for (pointer, corpus) in spec.corpora_mut() {
        if let Corpus::Path { path } = corpus {
            match roots.find(path).and_then(|real| corpus_file(&real)) {
                Ok(real) => *path = real,
                Err(message) => complain(format!("{pointer}/path"), message),
            }
        }
    }
    complaints.extend(index.iter().flat_map(|index| spec.validate_for(&index.config.facts())));
    if complaints.is_empty() {
        // Two spellings of one path are one text now: healing and judging on it shows.
        complaints = spec.validate();
    }
    if !complaints.is_empty() {
        return Err(complaints);
    }
    let bytes_of = |corpus: &Corpus| match corpus {
        Corpus::Path { path } => Path::new(path).metadata().ok().map(|meta| meta.len()),
        Corpus::Text { text } => Some(text.len() as u64),
        Corpus::Upload { upload_id } => uploads.get(upload_id).copied(),
        Corpus::Hub { .. } | Corpus::Model { .. } | Corpus::Mix { .. } => None,
    };
    let plan = index.map(|index| Plan::of(&spec, &index.config.facts(), &index.anatomy(), &bytes_of));
    Ok(Admitted { spec, plan })
}

/// What a job needs to know of the checkpoint in `dir`, all whose files must lie below a root: a link out of it
/// would open a door.
fn model(dir: &Path, roots: &Roots) -> Result<Index, String> {
    for entry in dir.read_dir().into_iter().flatten().flatten() {
        let real = entry.path().canonicalize();
        if real.is_ok_and(|real| !roots.holds(&real)) {
            return Err(format!(
                "{} is a link out of the allowed directories; copy the file itself, or allow where it lies",
                entry.file_name().to_string_lossy()
            ));
        }
    }
    Index::read(dir).map_err(|failure| failure.message)
}

fn corpus_file(real: &Path) -> Result<String, String> {
    let meta = real.metadata().map_err(|_| "does not exist, or may not be read".to_string())?;
    if !meta.is_file() {
        return Err("must be a file: .txt, .jsonl or .parquet, plain or gzip/zstd-compressed".into());
    }
    if meta.len() == 0 {
        return Err("is empty; it must hold text".into());
    }
    utf8(real)
}

fn utf8(path: &Path) -> Result<String, String> {
    path.to_str().map(String::from).ok_or_else(|| "must be UTF-8".into())
}
