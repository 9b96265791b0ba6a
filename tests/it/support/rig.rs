//! A workspace, a processor and an ear: what a stage needs to run in a test.

use std::path::PathBuf;
use std::sync::Mutex;

use secateur::engine::Cx;
use secateur::engine::model::{Checkpoint, Compute};
use secateur::engine::workspace::Workspace;
use secateur::job::progress::{Event, Observer, Stage};
use tempfile::TempDir;

use super::tiny::Tiny;

pub struct Rig {
    dir: TempDir,
    pub compute: Compute,
    pub ear: Ear,
}

/// Remembers every event; asks to stop when it has heard a chosen one.
#[derive(Default)]
pub struct Ear {
    heard: Mutex<Vec<Event>>,
    pub stop_when: Option<fn(&Event) -> bool>,
}

impl Observer for Ear {
    fn event(&self, event: Event) {
        self.heard.lock().unwrap().push(event);
    }

    fn stop(&self) -> bool {
        self.stop_when.is_some_and(|stop| self.heard().iter().any(stop))
    }
}

impl Ear {
    pub fn heard(&self) -> Vec<Event> {
        self.heard.lock().unwrap().clone()
    }

    /// Finished stages and whether they were reused.
    pub fn finished(&self) -> Vec<(Stage, bool)> {
        let finished = |event| match event {
            Event::StageFinished { stage, reused, .. } => Some((stage, reused)),
            _ => None,
        };
        self.heard().into_iter().filter_map(finished).collect()
    }
}

impl Rig {
    pub fn new() -> Self {
        let compute = Compute::cpu(None);
        Self { dir: tempfile::tempdir().unwrap(), compute, ear: Ear::default() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn cx(&self, stage: Stage) -> Cx<'_> {
        Cx { stage, compute: &self.compute, observer: &self.ear }
    }

    pub fn workspace(&self) -> Workspace {
        Workspace::open(&self.path("workspace")).unwrap()
    }

    pub fn base(&self, tiny: &Tiny) -> Checkpoint {
        Checkpoint::open(&tiny.write(self.path("base"))).unwrap()
    }
}

/// Windows of pseudo-random bytes, of different lengths.
pub fn windows(count: usize, longest: usize) -> Vec<Vec<u32>> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 24
    };
    (0..count).map(|i| (0..longest - i % 3 * (longest / 4)).map(|_| next()).collect()).collect()
}
