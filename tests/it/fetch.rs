//! Models by name, from a Hub made in the test on the loopback device.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::support::program::{Bench, stderr};
use crate::support::tiny::Tiny;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Answers as the Hub does: one repository, one commit, byte ranges.
struct Hub {
    /// File names and contents.
    files: Vec<(String, Vec<u8>)>,
    /// Weights arrive with a flipped bit.
    damaged: bool,
}

impl Hub {
    fn of(dir: &PathBuf) -> Self {
        let read = |entry: std::io::Result<fs::DirEntry>| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap())
        };
        Self { files: fs::read_dir(dir).unwrap().map(read).collect(), damaged: false }
    }

    /// Serves from a thread that ends with the test process; gives its address.
    fn serve(self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let hub = Arc::new(self);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let hub = Arc::clone(&hub);
                std::thread::spawn(move || hub.answer(&stream.unwrap()));
            }
        });
        address
    }

    fn answer(&self, stream: &TcpStream) {
        let mut lines = BufReader::new(stream).lines();
        let mut next = || lines.next().and_then(Result::ok).unwrap_or_default();
        let request = next();
        let path = request.split(' ').nth(1).unwrap_or("").to_owned();
        let mut range = None;
        loop {
            let line = next().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(bytes) = line.strip_prefix("range: bytes=") {
                let (from, to) = bytes.split_once('-').unwrap();
                range = Some((from.parse::<usize>().unwrap(), to.parse::<usize>().ok()));
            }
        }
        let (head, body) = self.reply(&path, range);
        let mut stream = stream;
        let head = format!("HTTP/1.1 {head}content-length: {}\r\nconnection: close\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body)).ok();
    }

    fn reply(&self, path: &str, range: Option<(usize, Option<usize>)>) -> (String, Vec<u8>) {
        if path == "/api/models/garden/rose/revision/main" {
            let siblings: Vec<_> = self.files.iter().map(|(name, _)| json!({"rfilename": name})).collect();
            return (
                "200 OK\r\n".into(),
                json!({"siblings": siblings, "sha": COMMIT}).to_string().into_bytes(),
            );
        }
        let file = path.strip_prefix(&format!("/garden/rose/resolve/{COMMIT}/"));
        let Some((name, content)) = file.and_then(|f| self.files.iter().find(|(name, _)| name == f)) else {
            return ("404 Not Found\r\n".into(), Vec::new());
        };
        let (from, to) = range.unwrap_or((0, None));
        let end = to.map_or(content.len(), |to| (to + 1).min(content.len()));
        let mut body = content[from..end].to_vec();
        if self.damaged && name.ends_with(".safetensors") {
            *body.last_mut().unwrap() ^= 1;
        }
        let digest = hex::encode(Sha256::digest(content));
        // Small files carry a shorter, git-like tag, as on the Hub.
        let etag = if name.ends_with(".safetensors") { &digest[..] } else { &digest[..40] };
        let head = format!(
            "206 Partial Content\r\netag: \"{etag}\"\r\nx-repo-commit: {COMMIT}\r\n\
             content-range: bytes {from}-{}/{}\r\n",
            end - 1,
            content.len()
        );
        (head, body)
    }
}

/// Profiles the model `repo` of the Hub at `address`.
fn run(bench: &Bench, address: &str, repo: &str) -> Output {
    let mut spec = bench.spec_with("/model", json!({"from": "hub", "repo": repo}));
    spec["heal"] = json!([]);
    fs::write(bench.path("spec.json"), spec.to_string()).unwrap();
    Command::new(env!("CARGO_BIN_EXE_secateur"))
        .args(["run", "--until", "profile", "--workspace"])
        .arg(bench.path("out"))
        .arg(bench.path("spec.json"))
        .env("HF_ENDPOINT", address)
        .env("HF_HOME", bench.path("cache"))
        .env("NO_PROXY", "127.0.0.1")
        .output()
        .unwrap()
}

#[test]
fn a_model_is_fetched_by_name_without_code_or_pickles_and_once() {
    let bench = Bench::new(&Tiny::llama());
    fs::write(bench.path("model/modeling_rose.py"), "print()").unwrap();
    fs::write(bench.path("model/pytorch_model.bin"), "x").unwrap();
    let address = Hub::of(&bench.path("model")).serve();
    let first = run(&bench, &address, "garden/rose");
    assert!(first.status.success(), "{}", stderr(&first));
    assert!(stderr(&first).contains(COMMIT), "the commit is told: {}", stderr(&first));
    let snapshot = bench.path("cache/hub/models--garden--rose/snapshots").join(COMMIT);
    let names: Vec<_> = fs::read_dir(&snapshot).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(names.iter().any(|n| n == "model.safetensors"));
    assert!(!names.iter().any(|n| n == "modeling_rose.py" || n == "pytorch_model.bin"), "{names:?}");
    let same = |name: &str| {
        fs::read(snapshot.join(name)).unwrap() == fs::read(bench.path("model").join(name)).unwrap()
    };
    assert!(same("model.safetensors") && same("config.json"));
    // What is in the cache is not fetched again: a Hub that would send damaged weights is not asked for them.
    let damaged = Hub { damaged: true, ..Hub::of(&bench.path("model")) }.serve();
    let second = run(&bench, &damaged, "garden/rose");
    assert!(second.status.success(), "{}", stderr(&second));
}

#[test]
fn weights_that_arrive_damaged_are_refused_and_removed() {
    let bench = Bench::new(&Tiny::llama());
    let address = Hub { damaged: true, ..Hub::of(&bench.path("model")) }.serve();
    let output = run(&bench, &address, "garden/rose");
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("model.safetensors") && said.contains("arrived damaged"), "{said}");
    let snapshot = bench.path("cache/hub/models--garden--rose/snapshots").join(COMMIT);
    assert!(!snapshot.join("model.safetensors").exists());
    // The next run gets them whole.
    let output = run(&bench, &Hub::of(&bench.path("model")).serve(), "garden/rose");
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn a_repository_that_is_not_there_or_has_no_safetensors_is_refused_with_a_remedy() {
    let bench = Bench::new(&Tiny::llama());
    let address = Hub::of(&bench.path("model")).serve();
    let absent = run(&bench, &address, "garden/tulip");
    assert_eq!(absent.status.code(), Some(1));
    assert!(
        stderr(&absent).contains("garden/tulip") && stderr(&absent).contains("check the name"),
        "{}",
        stderr(&absent)
    );
    fs::rename(bench.path("model/model.safetensors"), bench.path("model/pytorch_model.bin")).unwrap();
    let pickled = run(&bench, &Hub::of(&bench.path("model")).serve(), "garden/rose");
    assert_eq!(pickled.status.code(), Some(1));
    assert!(stderr(&pickled).contains("no safetensors"), "{}", stderr(&pickled));
}
