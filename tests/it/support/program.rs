//! `secateur run` as a person or a worker starts it: the real program, as a process.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use secateur::job::progress::{Event, Stage};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::tiny::Tiny;

/// A directory with a tiny model, texts and room for workspaces.
pub struct Bench {
    dir: TempDir,
}

impl Bench {
    pub fn new(tiny: &Tiny) -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        tiny.write(bench.path("model"));
        fs::write(bench.path("calibration.txt"), text(1, 1200)).unwrap();
        fs::write(bench.path("healing.txt"), text(2, 2400)).unwrap();
        fs::write(bench.path("held_out.txt"), text(3, 600)).unwrap();
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A small job on this bench: six layers, two to go, six healing steps.
    pub fn spec(&self) -> Value {
        json!({
            "name": "tiny",
            "model": {"from": "path", "path": self.path("model")},
            "calibration": {
                "corpus": {"from": "path", "path": self.path("calibration.txt")},
                "samples": 12, "seq_len": 32, "batch_size": 4
            },
            "prune": {"amount": {"layers": 2}},
            "heal": [{
                "method": "qlora", "corpus": {"from": "path", "path": self.path("healing.txt")},
                "rank": 4, "steps": 6, "batch_size": 2, "seq_len": 32, "checkpoint_every": 2
            }],
            "eval": {
                "perplexity": [{"from": "path", "path": self.path("held_out.txt")}],
                "speed": false, "seq_len": 64
            }
        })
    }

    /// The spec with the value at `pointer` replaced, or added.
    pub fn spec_with(&self, pointer: &str, value: Value) -> Value {
        let mut spec = self.spec();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        match spec.pointer_mut(parent).unwrap() {
            Value::Object(map) => drop(map.insert(key.into(), value)),
            other => panic!("{pointer} is inside {other}"),
        }
        spec
    }

    /// `secateur run - --workspace NAME …`, the spec on its standard input.
    pub fn start(&self, spec: &Value, workspace: &str, more: &[&str]) -> Child {
        self.start_as("run", spec, workspace, more)
    }

    /// The same of another command.
    pub fn start_as(&self, command: &str, spec: &Value, workspace: &str, more: &[&str]) -> Child {
        let mut child = Command::new(env!("CARGO_BIN_EXE_secateur"))
            .args([command, "-", "--threads", "1", "--workspace"])
            .arg(self.path(workspace))
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        if let Err(error) = stdin.write_all(spec.to_string().as_bytes()) {
            // It refused its arguments and read nothing.
            assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        }
        child
    }

    pub fn run(&self, spec: &Value, workspace: &str, more: &[&str]) -> Output {
        self.start(spec, workspace, more).wait_with_output().unwrap()
    }

    /// Runs to a good end and gives what it told.
    pub fn succeed(&self, spec: &Value, workspace: &str, more: &[&str]) -> Vec<Event> {
        let output = self.run(spec, workspace, &[&["--events", "jsonl"], more].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        events(&output.stdout)
    }

    /// Starts a run and lets it go on until it has told something in particular.
    pub fn start_until(&self, spec: &Value, workspace: &str, told: impl Fn(&Event) -> bool) -> Child {
        let mut child = self.start(spec, workspace, &["--events", "jsonl"]);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| told(&serde_json::from_str(&line.unwrap()).unwrap())), "it was never told");
        // Whoever reads on does so from here; the pipe stays open until the run ends.
        std::thread::spawn(move || lines.for_each(drop));
        child
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Every line must be an event.
pub fn events(stdout: &[u8]) -> Vec<Event> {
    let text = std::str::from_utf8(stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

/// Finished stages and whether they were reused.
pub fn finished(events: &[Event]) -> Vec<(Stage, bool)> {
    let finished = |event: &Event| match event {
        Event::StageFinished { stage, reused, .. } => Some((*stage, *reused)),
        _ => None,
    };
    events.iter().filter_map(finished).collect()
}

/// Every file below `dir`, by relative path, with its bytes.
pub fn tree(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut out = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(at) = open.pop() {
        for entry in fs::read_dir(&at).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                out.push((path.strip_prefix(dir).unwrap().to_owned(), fs::read(&path).unwrap()));
            }
        }
    }
    out.sort();
    out
}

/// Some words, the same for the same seed.
fn text(seed: u32, words: usize) -> String {
    const WORDS: [&str; 12] =
        ["rose", "cut", "shears", "branch", "leaf", "the", "a", "grows", "after", "winter", "and", "heals"];
    let mut state = seed;
    let mut out = String::new();
    for i in 0..words {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        out.push_str(WORDS[(state >> 16) as usize % WORDS.len()]);
        out.push_str(if i % 11 == 10 { ".\n" } else { " " });
    }
    out
}
