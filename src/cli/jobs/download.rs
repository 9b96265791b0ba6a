//! Fetches the files of a job: what is here stays, what broke off goes on, and nothing counts but what its digest says.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::client::{Client, Refused, encoded};

/// Breaks without a single byte between them before we give up.
const MAX_IDLE_BREAKS: u32 = 8;
const CHUNK_BYTES: usize = 256 << 10;

/// A file to fetch.
struct Wanted {
    path: String,
    sha256: String,
    size_bytes: u64,
}

/// Fetches the files of job `id` at or below `paths` (all when there are none) into `out`, and lists them.
///
/// # Errors
/// When a file is not what its digest says, or the line stays broken.
pub fn all(client: &Client, id: Uuid, paths: &[String], out: &Path) -> anyhow::Result<Value> {
    let page = client.get(&format!("/v1/jobs/{id}/artifacts"))?;
    let files: Vec<Wanted> = page["data"].as_array().into_iter().flatten().filter_map(wanted).collect();
    if files.is_empty() {
        bail!("the job {id} has left no files (yet)");
    }
    let below = |file: &Wanted, at: &str| {
        let at = at.trim_end_matches('/');
        file.path == at || file.path.strip_prefix(at).is_some_and(|rest| rest.starts_with('/'))
    };
    if let Some(unknown) = paths.iter().find(|at| !files.iter().any(|file| below(file, at))) {
        bail!("the job {id} has left no {unknown}; `secateur jobs download {id}` fetches all it has");
    }
    let files: Vec<Wanted> =
        files.into_iter().filter(|f| paths.is_empty() || paths.iter().any(|at| below(f, at))).collect();
    let bar = bar(files.iter().map(|f| f.size_bytes).sum());
    for file in &files {
        bar.set_message(file.path.clone());
        fetch(client, id, file, out, &bar).with_context(|| file.path.clone())?;
    }
    bar.finish_and_clear();
    let listed =
        files.iter().map(|f| json!({"path": f.path, "sha256": f.sha256, "size_bytes": f.size_bytes}));
    Ok(listed.collect())
}

fn wanted(file: &Value) -> Option<Wanted> {
    Some(Wanted {
        path: file["path"].as_str()?.to_owned(),
        sha256: file["sha256"].as_str()?.to_owned(),
        size_bytes: file["size_bytes"].as_u64()?,
    })
}

fn bar(size_bytes: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec}  {msg}");
    ProgressBar::new(size_bytes).with_style(style.expect("the template is right. This is a bug."))
}

fn fetch(client: &Client, id: Uuid, file: &Wanted, out: &Path, bar: &ProgressBar) -> anyhow::Result<()> {
    let target = place(out, &file.path)?;
    if target.metadata().is_ok_and(|m| m.len() == file.size_bytes) && hash(&target)?.finish() == file.sha256 {
        bar.inc(file.size_bytes);
        return Ok(());
    }
    let mut part = target.clone().into_os_string();
    part.push(".part");
    let part = PathBuf::from(part);
    if part.metadata().is_ok_and(|m| m.len() > file.size_bytes) {
        fs::remove_file(&part)?;
    }
    OpenOptions::new().create(true).append(true).open(&part)?;
    let begun = bar.position();
    let mut idle = 0;
    loop {
        let mut have = hash(&part)?;
        bar.set_position(begun + have.size_bytes);
        if have.size_bytes == file.size_bytes {
            if have.finish() == file.sha256 {
                break;
            }
            fs::remove_file(&part)?;
            bail!("what came is not what its digest says; try again");
        }
        let came = go_on(client, id, file, &part, have.size_bytes, bar);
        let idles = part.metadata().map_or(0, |m| m.len()) <= have.size_bytes;
        idle = if idles { idle + 1 } else { 0 };
        match came {
            Err(error) if idle == MAX_IDLE_BREAKS || error.is::<Refused>() => return Err(error),
            Ok(()) if idle == MAX_IDLE_BREAKS => bail!("the service sends nothing; try again later"),
            Err(_) => std::thread::sleep(Duration::from_secs(1)),
            Ok(()) => {}
        }
    }
    File::open(&part)?.sync_all()?;
    fs::rename(&part, &target)?;
    Ok(())
}

/// Fetches what is missing from byte `from` on, as far as the line holds.
fn go_on(
    client: &Client,
    id: Uuid,
    file: &Wanted,
    part: &Path,
    from: u64,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    let path: Vec<String> = file.path.split('/').map(encoded).collect();
    let (range, tag) = (format!("bytes={from}-"), format!("\"{}\"", file.sha256));
    let mut headers = vec![("accept-encoding", "identity")];
    if from > 0 {
        headers.extend([("range", range.as_str()), ("if-range", tag.as_str())]);
    }
    let answer = client.open(&format!("/v1/jobs/{id}/artifacts/{}?proxy=1", path.join("/")), &headers)?;
    let whole = answer.status().as_u16() != 206;
    let mut to = OpenOptions::new().create(true).append(!whole).write(true).truncate(whole).open(part)?;
    let mut body = answer.into_body().into_reader();
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match body.read(&mut buffer)? {
            0 => return Ok(()),
            count => {
                to.write_all(&buffer[..count])?;
                bar.inc(count as u64);
            }
        }
    }
}

/// Where a file of the job goes. Nothing a service says leads out of `out`.
fn place(out: &Path, path: &str) -> anyhow::Result<PathBuf> {
    let plain = !path.is_empty() && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
    if !plain {
        bail!("the service names a file that would lie elsewhere; nothing is written");
    }
    let target = out.join(path);
    let parent = target.parent().unwrap_or(out);
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    Ok(target)
}

struct Hashed {
    sum: Sha256,
    size_bytes: u64,
}

impl Hashed {
    fn finish(&mut self) -> String {
        hex::encode(std::mem::take(&mut self.sum).finalize())
    }
}

/// What there is of a file so far; nothing when it is not there.
fn hash(path: &Path) -> io::Result<Hashed> {
    let mut hashed = Hashed { sum: Sha256::new(), size_bytes: 0 };
    let mut file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(hashed),
        opened => opened?,
    };
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hashed),
            count => {
                hashed.sum.update(&buffer[..count]);
                hashed.size_bytes += count as u64;
            }
        }
    }
}
