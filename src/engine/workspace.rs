//! A run's directory: results by content, written whole or not at all.
//!
//! A stage is a recorded function. [`Workspace::once`] finds the record whose
//! inputs are these very ones, or does the work and records it. Resuming after a
//! crash, ten pruning ratios from one profile, a re-run after a change of the
//! spec: all the same thing, and none needs code of its own.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Cx, Error, Result, at};
use crate::job::progress::{Event, Stage};
use crate::job::report::FailureKind;

/// Part of every input digest: another engine may compute something else. Count
/// the suffix up when a stage's result changes within a version.
const ENGINE: &str = concat!(env!("CARGO_PKG_VERSION"), "+7");

/// The directory of one run, held by this process alone.
pub struct Workspace {
    dir: PathBuf,
    /// Directories of records that other runs use as well, the nearest first.
    shared: Vec<PathBuf>,
    /// The lock goes with the file handle, however the process ends.
    _lock: File,
}

/// The result of a stage, and where it came from.
#[derive(Debug, Clone)]
pub struct Recorded<T> {
    pub value: T,
    /// sha256 of every file the stage left beside its value, by path in the workspace.
    pub files: BTreeMap<String, String>,
    /// An earlier run had done the work.
    pub reused: bool,
    /// How long the work took, whenever that was.
    pub duration_ms: u64,
}

#[derive(Serialize, Deserialize)]
struct Record<T> {
    stage: Stage,
    input_digest: String,
    duration_ms: u64,
    files: BTreeMap<String, String>,
    value: T,
}

#[derive(Serialize, Deserialize)]
struct Kept<T> {
    input_digest: String,
    value: T,
}

impl Workspace {
    /// Opens `dir`, makes it if need be, and clears what a killed run left half done.
    ///
    /// # Errors
    /// A storage error when the directory cannot be used, or another run holds it.
    pub fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir.join(RECORDS)).map_err(at(dir))?;
        let path = dir.join(LOCK);
        let lock = File::create(&path).map_err(at(&path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(
                    FailureKind::Storage,
                    format!(
                        "{}: another run is using this workspace; wait for it or name another directory",
                        dir.display()
                    ),
                ));
            }
            Err(TryLockError::Error(e)) => return Err(at(&path)(e)),
        }
        let workspace = Self { dir: dir.to_owned(), shared: Vec::new(), _lock: lock };
        remove(&workspace.dir.join(PARTS))?;
        Ok(workspace)
    }

    /// The same workspace, which also looks for records in `directories` and leaves there what it finds out. Records
    /// whose result is in files stay where the files are.
    #[must_use]
    pub fn sharing(self, directories: Vec<PathBuf>) -> Self {
        Self { shared: directories, ..self }
    }

    /// Where to look for records in the stead of this workspace, for [`Workspace::sharing`].
    pub fn sources(&self) -> Vec<PathBuf> {
        std::iter::once(self.dir.join(RECORDS)).chain(self.shared.iter().cloned()).collect()
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The result of `cx.stage` for exactly these inputs: from its record when there is
    /// one and all its files are still as it left them, from `work` otherwise.
    ///
    /// `work` gets a directory of its own, which is not made yet, survives a killed run and goes away
    /// with success, and returns its value and the files or directories it left, by
    /// path in the workspace.
    pub fn once<T: Serialize + DeserializeOwned>(
        &self,
        cx: Cx,
        inputs: &impl Serialize,
        work: impl FnOnce(&Path) -> Result<(T, Vec<String>)>,
    ) -> Result<Recorded<T>> {
        let stage = cx.stage;
        let started = Instant::now();
        cx.observer.event(Event::StageStarted { stage });
        cx.check()?;
        let input_digest = digest_of(&(ENGINE, stage, inputs))?;
        let record_path = self.dir.join(RECORDS).join(format!("{stage}-{}.json", &input_digest[..32]));
        self.fetch(&record_path);
        let found = self.find::<T>(&record_path, &input_digest);
        let reused = found.is_some();
        let record = match found {
            Some(record) => record,
            None => self.work(stage, &input_digest, &record_path, started, work).map_err(|e| e.at(stage))?,
        };
        if !reused && record.files.is_empty() {
            self.share(&record_path);
        }
        self.publish_value(stage, &record.value).map_err(|e| e.at(stage))?;
        let duration_ms = started.elapsed().as_millis() as u64;
        cx.observer.event(Event::StageFinished { stage, reused, duration_ms, input_digest });
        Ok(Recorded { value: record.value, files: record.files, reused, duration_ms: record.duration_ms })
    }

    /// What several stages, or several runs, need made once: kept under `name` for exactly these inputs.
    ///
    /// # Errors
    /// Those of `make`, and a storage error when it cannot be written.
    pub fn kept<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        inputs: &impl Serialize,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let input_digest = digest_of(&(ENGINE, name, inputs))?;
        let path = self.dir.join(RECORDS).join(format!("{name}-{}.json", &input_digest[..32]));
        let read = || serde_json::from_slice::<Kept<T>>(&fs::read(&path).ok()?).ok();
        self.fetch(&path);
        if let Some(kept) = read().filter(|kept| kept.input_digest == input_digest) {
            return Ok(kept.value);
        }
        let kept = Kept { input_digest, value: make()? };
        write_atomic(&path, &serde_json::to_vec(&kept).map_err(Error::bug)?)?;
        self.share(&path);
        Ok(kept.value)
    }

    /// Brings a record here that another run has shared, where there is none.
    fn fetch(&self, record: &Path) {
        let Some(name) = record.file_name().filter(|_| !record.exists()) else { return };
        if let Some(found) = self.shared.iter().map(|dir| dir.join(name)).find(|path| path.exists()) {
            // What cannot be fetched is made again. One that is used is not old.
            let _ = copy_atomic(&found, record);
            let _ = File::options().append(true).open(&found).and_then(|f| f.set_modified(SystemTime::now()));
        }
    }

    /// Leaves a record for other runs. It is for their sake: where it cannot be written, this run goes on.
    fn share(&self, record: &Path) {
        let Some(name) = record.file_name() else { return };
        for dir in &self.shared {
            let _ = fs::create_dir_all(dir).and_then(|()| copy_atomic(record, &dir.join(name)));
        }
    }

    /// Takes over all that another workspace holds, instead of what is here; that one is gone then.
    ///
    /// # Errors
    /// A storage error; what was taken over by then is whole.
    pub fn adopt(&self, other: Self) -> Result<()> {
        let from = other.dir.clone();
        drop(other);
        let records = from.join(RECORDS);
        for entry in fs::read_dir(&from).map_err(at(&from))? {
            let entry = entry.map_err(at(&from))?;
            let name = entry.file_name();
            if ![RECORDS, PARTS, SCRATCH, LOCK].iter().any(|own| name == *own) {
                let target = self.dir.join(&name);
                remove(&target)?;
                fs::rename(entry.path(), &target).map_err(at(&target))?;
            }
        }
        // Last: a record without its files is none.
        for entry in fs::read_dir(&records).map_err(at(&records))? {
            let entry = entry.map_err(at(&records))?;
            let target = self.dir.join(RECORDS).join(entry.file_name());
            fs::rename(entry.path(), &target).map_err(at(&target))?;
        }
        sync_dir(&self.dir)?;
        remove(&from)
    }

    /// A directory to build something in; gone with the next [`Workspace::open`].
    pub fn part(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(PARTS).join(name);
        remove(&path)?;
        fs::create_dir_all(&path).map_err(at(&path))?;
        Ok(path)
    }

    /// Puts a finished directory or file in its place, instead of what was there.
    /// A run killed in between leaves a record without its files: the stage is done again.
    pub fn publish(&self, part: &Path, name: &str) -> Result<()> {
        sync_tree(part)?;
        let target = self.dir.join(name);
        remove(&target)?;
        fs::rename(part, &target).map_err(at(&target))?;
        sync_dir(&self.dir)
    }

    /// Takes away a result that no longer belongs to this run.
    pub fn retract(&self, name: &str) -> Result<()> {
        remove(&self.dir.join(name))
    }

    /// A record that cannot be read or no longer holds, for whatever reason, is none.
    fn find<T: DeserializeOwned>(&self, path: &Path, input_digest: &str) -> Option<Record<T>> {
        let record: Record<T> = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let as_left = |(name, digest): (&String, &String)| {
            file_digest(&self.dir.join(name)).is_ok_and(|found| found == *digest)
        };
        (record.input_digest == input_digest && record.files.iter().all(as_left)).then_some(record)
    }

    fn work<T: Serialize>(
        &self,
        stage: Stage,
        input_digest: &str,
        record_path: &Path,
        started: Instant,
        work: impl FnOnce(&Path) -> Result<(T, Vec<String>)>,
    ) -> Result<Record<T>> {
        // What later stages said of another result must not stand beside this one.
        for stale in Stage::ALL.into_iter().filter(|s| *s >= stage).filter_map(value_file) {
            self.retract(stale)?;
        }
        let scratch = self.dir.join(SCRATCH).join(format!("{stage}-{}", &input_digest[..32]));
        let (value, left) = work(&scratch)?;
        let mut files = BTreeMap::new();
        for name in &left {
            self.digest_tree(Path::new(name), &mut files)?;
        }
        let duration_ms = started.elapsed().as_millis() as u64;
        let record = Record { stage, input_digest: input_digest.into(), duration_ms, files, value };
        write_json(record_path, &record)?;
        remove(&scratch)?;
        Ok(record)
    }

    /// Values are part of the contract with people and scripts under these names.
    fn publish_value(&self, stage: Stage, value: &impl Serialize) -> Result<()> {
        let Some(name) = value_file(stage) else { return Ok(()) };
        let path = self.dir.join(name);
        let bytes = json_bytes(value)?;
        if fs::read(&path).is_ok_and(|there| there == bytes) { Ok(()) } else { write_atomic(&path, &bytes) }
    }

    fn digest_tree(&self, name: &Path, files: &mut BTreeMap<String, String>) -> Result<()> {
        let path = self.dir.join(name);
        if path.is_dir() {
            for entry in fs::read_dir(&path).map_err(at(&path))? {
                self.digest_tree(&name.join(entry.map_err(at(&path))?.file_name()), files)?;
            }
            return Ok(());
        }
        files.insert(name.to_string_lossy().into_owned(), file_digest(&path)?);
        Ok(())
    }
}

const RECORDS: &str = "records";
const PARTS: &str = "parts";
const SCRATCH: &str = "scratch";
const LOCK: &str = ".lock";

const fn value_file(stage: Stage) -> Option<&'static str> {
    match stage {
        Stage::Profile => Some("profile.json"),
        Stage::Select => Some("selection.json"),
        Stage::Prune | Stage::Heal | Stage::Export => None,
        Stage::Eval => Some("eval.json"),
        Stage::Report => Some("report.json"),
    }
}

/// sha256 of a value's JSON.
pub fn digest_of(value: &impl Serialize) -> Result<String> {
    Ok(hex::encode(Sha256::digest(serde_json::to_vec(value).map_err(Error::bug)?)))
}

/// sha256 of a file's bytes.
pub fn file_digest(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(at(path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(at(path))? {
            0 => return Ok(hex::encode(hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// Writes a JSON file for people and programs, whole or not at all.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write_atomic(path, &json_bytes(value)?)
}

fn json_bytes(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(Error::bug)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Writes a file whole or not at all, even when the power goes.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let mut file = File::create(&part).map_err(at(&part))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(at(&part))?;
    fs::rename(&part, path).map_err(at(path))?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Copies a file, whole or not at all, whoever else writes it.
fn copy_atomic(from: &Path, to: &Path) -> io::Result<()> {
    let mut part = to.as_os_str().to_owned();
    part.push(format!(".{}.part", std::process::id()));
    fs::copy(from, &part)?;
    fs::rename(&part, to)
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(at(dir))
}

fn sync_tree(path: &Path) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(at(path))? {
            sync_tree(&entry.map_err(at(path))?.path())?;
        }
    }
    sync_dir(path)
}

/// Removes a file or a tree; that it is not there is no error.
fn remove(path: &Path) -> Result<()> {
    let removed =
        if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(at(path)(e)),
        Ok(()) | Err(_) => Ok(()),
    }
}
