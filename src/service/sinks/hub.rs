//! The Hugging Face Hub: the checkpoint of a job that asks for it, with its model card, as one commit of a model repository.
//!
//! Small files go within the commit, as the Hub decides; large ones before it by Git LFS, which knows them by their sha256 and
//! takes none twice. A commit that an attempt before this one made, and did not live to note, is found by its title.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};
use ureq::http::Response;
use ureq::{Body, RequestBuilder};

use super::call::{Refusal, Result, accepted, agent, beside};
use crate::job::spec::PublishSpec;
use crate::service::db::{Database, JobRow, Message, best_checkpoint};
use crate::service::store::{Local, Store};

/// As the database calls this sink.
pub const NAME: &str = "hub";
/// One call.
const TIMEOUT: Duration = Duration::from_mins(2);
/// Sending one large file, or a part of it.
const UPLOAD_TIMEOUT: Duration = Duration::from_hours(1);
/// Of a file, from which the Hub tells text from weights.
const SAMPLE_BYTES: u64 = 512;
const BRANCH: &str = "main";
const LFS: &str = "application/vnd.git-lfs+json";

/// A Hub, and where on it this service may write.
#[derive(Clone)]
pub struct Hub {
    /// Such as `https://huggingface.co`.
    pub url: String,
    pub token: String,
    /// Users and organisations whose repositories jobs may name.
    pub namespaces: Vec<String>,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hub({}, {:?})", self.url, self.namespaces)
    }
}

/// A file of the checkpoint.
struct Item {
    /// Within the repository.
    path: String,
    file: Local,
    /// Hex.
    sha256: String,
    size_bytes: u64,
}

/// What the Hub says of a file before it comes.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wanted {
    path: String,
    upload_mode: String,
    #[serde(default)]
    should_ignore: bool,
}

/// Where a large file is to go; nowhere when it is there.
#[derive(Deserialize)]
struct Object {
    oid: String,
    #[serde(default)]
    actions: BTreeMap<String, Action>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: BTreeMap<String, Value>,
}

impl Hub {
    /// Publishes the checkpoint of a job that has succeeded and asks for it.
    pub async fn deliver(&self, database: &Database, store: &Store, message: &Message) -> Result<()> {
        let Some(id) = message.job_id.filter(|_| message.kind == "job.succeeded") else { return Ok(()) };
        // A deleted job has nothing left to publish.
        let Some(job) = database.job(message.tenant, id).await? else { return Ok(()) };
        let Some(publish) = job.spec.publish.clone() else { return Ok(()) };
        let rows = database.artifacts(message.tenant, id).await?;
        let mut items = Vec::new();
        for (path, row) in best_checkpoint(&rows) {
            let size_bytes = row.size_bytes as u64;
            let file = store.local(&row.location, size_bytes).await;
            let file = file.map_err(|e| format!("artifact {}: {e}", row.path))?;
            items.push(Item { path: path.to_owned(), file, sha256: row.sha256.clone(), size_bytes });
        }
        let (this, asked) = (self.clone(), publish.clone());
        let (items, large) = beside(move || {
            this.create(&asked)?;
            let large = this.upload(&asked.repo, &items)?;
            Ok((items, large))
        })
        .await?;
        let this = self.clone();
        let commit = || beside(move || this.commit(&publish.repo, &job, &items, &large));
        database.external_run(NAME, id, commit).await??;
        Ok(())
    }

    /// Makes the repository, unless it is there.
    fn create(&self, asked: &PublishSpec) -> Result<()> {
        let (organization, name) = asked.repo.split_once('/').unwrap_or_default();
        let new =
            json!({"name": name, "organization": organization, "type": "model", "private": asked.private});
        match self.call(&format!("{}/api/repos/create", self.base()), &new) {
            Ok(_) | Err(Refusal { status: Some(409), .. }) => Ok(()),
            Err(refusal) => Err(refusal),
        }
    }

    /// Brings over what is not to go within the commit. Gives those paths, in the order of `items`.
    fn upload(&self, repo: &str, items: &[Item]) -> Result<Vec<String>> {
        let mut files = Vec::new();
        for item in items {
            let mut sample = Vec::new();
            open(item)?
                .take(SAMPLE_BYTES)
                .read_to_end(&mut sample)
                .map_err(|e| format!("{}: {e}", item.path))?;
            files
                .push(json!({"path": item.path, "size": item.size_bytes, "sample": STANDARD.encode(sample)}));
        }
        let asked = self.call(
            &format!("{}/api/models/{repo}/preupload/{BRANCH}", self.base()),
            &json!({"files": files}),
        )?;
        let wanted: Vec<Wanted> = read(asked["files"].clone())?;
        let large = |item: &&Item| {
            wanted.iter().any(|w| w.path == item.path && w.upload_mode == "lfs" && !w.should_ignore)
        };
        let large: Vec<&Item> = items.iter().filter(large).collect();
        if large.is_empty() {
            return Ok(Vec::new());
        }
        let objects: Vec<Value> =
            large.iter().map(|item| json!({"oid": item.sha256, "size": item.size_bytes})).collect();
        let batch = json!({
            "operation": "upload", "transfers": ["basic", "multipart"], "objects": objects, "hash_algo": "sha256",
            "ref": {"name": format!("refs/heads/{BRANCH}")},
        });
        let url = format!("{}/{repo}.git/info/lfs/objects/batch", self.base());
        let call = self.post(&url).header("accept", LFS).content_type(LFS);
        let answer = json_of(accepted("the Hub", call.send(&batch.to_string()))?)?;
        for object in read::<Vec<Object>>(answer["objects"].clone())? {
            let item = large.iter().find(|item| item.sha256 == object.oid);
            let item =
                item.ok_or_else(|| format!("the Hub speaks of {}, which nobody offered", object.oid))?;
            self.send(item, object)?;
        }
        Ok(large.into_iter().map(|item| item.path.clone()).collect())
    }

    fn send(&self, item: &Item, object: Object) -> Result<()> {
        if let Some(error) = object.error {
            return Err(format!("the Hub does not take {}: {}", item.path, error["message"]).into());
        }
        // Without an upload the Hub has it.
        let Some(upload) = object.actions.get("upload") else { return Ok(()) };
        match upload.header.get("chunk_size") {
            None => {
                let mut call = agent(UPLOAD_TIMEOUT).put(&upload.href);
                for (name, value) in &upload.header {
                    call = call.header(name, value.as_str().unwrap_or_default());
                }
                accepted("the Hub's storage", call.send(&open(item)?))?;
            }
            Some(size) => send_parts(item, upload, &plain(size))?,
        }
        if let Some(verify) = object.actions.get("verify") {
            let told = json!({"oid": item.sha256, "size": item.size_bytes});
            accepted("the Hub", self.post(&verify.href).content_type(LFS).send(&told.to_string()))?;
        }
        Ok(())
    }

    /// Makes the commit, unless it is there. Gives its id.
    fn commit(&self, repo: &str, job: &JobRow, items: &[Item], large: &[String]) -> Result<String> {
        let title = format!("The result of job {}", job.id);
        let url = format!("{}/api/models/{repo}/commits/{BRANCH}", self.base());
        let call = agent(TIMEOUT).get(&url).header("authorization", self.authorization());
        let commits = json_of(accepted("the Hub", call.call())?)?;
        let before =
            commits.as_array().into_iter().flatten().find(|commit| commit["title"] == title.as_str());
        if let Some(id) = before.and_then(|commit| commit["id"].as_str()) {
            return Ok(id.to_owned());
        }
        let header =
            json!({"summary": title, "description": format!("{} made of {}", job.spec.title(), job.id)});
        let mut lines = json!({"key": "header", "value": header}).to_string();
        for item in items {
            let line = if large.contains(&item.path) {
                let value =
                    json!({"path": item.path, "algo": "sha256", "oid": item.sha256, "size": item.size_bytes});
                json!({"key": "lfsFile", "value": value})
            } else {
                let content = std::fs::read(&item.file.path).map_err(|e| format!("{}: {e}", item.path))?;
                let value =
                    json!({"path": item.path, "encoding": "base64", "content": STANDARD.encode(content)});
                json!({"key": "file", "value": value})
            };
            lines.push('\n');
            lines.push_str(&line.to_string());
        }
        let call = self.post(&format!("{}/api/models/{repo}/commit/{BRANCH}", self.base()));
        let made = json_of(accepted("the Hub", call.content_type("application/x-ndjson").send(&lines))?)?;
        let id = made["commitOid"].as_str().map(String::from);
        id.ok_or_else(|| "the Hub answered without the commit's id".to_owned().into())
    }

    fn call(&self, url: &str, body: &Value) -> Result<Value> {
        json_of(accepted("the Hub", self.post(url).send_json(body))?)
    }

    fn post(&self, url: &str) -> RequestBuilder<ureq::typestate::WithBody> {
        agent(TIMEOUT).post(url).header("authorization", self.authorization())
    }

    fn authorization(&self) -> String {
        format!("Bearer {}", self.token)
    }

    fn base(&self) -> &str {
        self.url.trim_end_matches('/')
    }
}

/// In parts, each to a URL of its own, which `upload.header` holds by the part's number.
fn send_parts(item: &Item, upload: &Action, size: &str) -> Result<()> {
    let size: u64 = size.parse().map_err(|_| format!("the Hub wants parts of `{size}` bytes"))?;
    let numbered =
        upload.header.iter().filter_map(|(name, url)| Some((name.parse::<u64>().ok()?, url.as_str()?)));
    let urls: BTreeMap<u64, &str> = numbered.collect();
    if size == 0 || urls.len() as u64 != item.size_bytes.div_ceil(size) {
        return Err(format!("the Hub wants {} parts of {size} bytes of {}", urls.len(), item.path).into());
    }
    let mut parts = Vec::new();
    for (place, (number, url)) in urls.into_iter().enumerate() {
        let mut file = open(item)?;
        let mut part = Vec::new();
        let read = file
            .seek(SeekFrom::Start(place as u64 * size))
            .and_then(|_| file.take(size).read_to_end(&mut part));
        read.map_err(|e| format!("{}: {e}", item.path))?;
        let answer = accepted("the Hub's storage", agent(UPLOAD_TIMEOUT).put(url).send(&part))?;
        let etag = answer.headers().get("etag").and_then(|etag| etag.to_str().ok());
        let etag = etag.ok_or_else(|| "the Hub's storage took a part and gave no ETag".to_owned())?;
        parts.push(json!({"partNumber": number, "etag": etag}));
    }
    let done = json!({"oid": item.sha256, "parts": parts});
    // It is the storage's: the URL opens it, and the token is none of its business.
    let call = agent(TIMEOUT).post(&upload.href).header("accept", LFS).content_type(LFS);
    accepted("the Hub's storage", call.send(&done.to_string()))?;
    Ok(())
}

fn open(item: &Item) -> Result<File> {
    File::open(&item.file.path).map_err(|e| format!("{}: {e}", item.path).into())
}

/// A number that may stand as text.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), String::from)
}

fn json_of(mut answer: Response<Body>) -> Result<Value> {
    let text = answer.body_mut().read_to_string().map_err(|e| format!("the Hub: {e}"))?;
    serde_json::from_str(&text).map_err(|e| format!("the Hub answered with what is no JSON: {e}").into())
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value)
        .map_err(|e| format!("the Hub answered otherwise than it should: {e}").into())
}
