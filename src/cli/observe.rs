//! The two riders of a run: JSON lines for a worker, progress bars for a person.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::process;
use crate::job::progress::{Event, Observer, Stage};

/// One JSON object a line on stdout, flushed, and nothing else there.
#[derive(Default)]
pub struct JsonLines {
    /// The reader is gone: there is nobody to work for.
    closed: AtomicBool,
}

impl Observer for JsonLines {
    fn event(&self, event: Event) {
        let mut line = serde_json::to_vec(&event).expect("an event is plain data. This is a bug.");
        line.push(b'\n');
        let mut out = std::io::stdout().lock();
        if out.write_all(&line).and_then(|()| out.flush()).is_err() {
            self.closed.store(true, Ordering::Relaxed);
        }
    }

    fn stop(&self) -> bool {
        self.closed.load(Ordering::Relaxed) || process::stop_signal().is_some()
    }
}

/// Where there are no bars, a line of progress at most this often.
const PLAIN_LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress bars on a terminal, plain lines elsewhere; all on stderr.
pub struct Terminal {
    bars: bool,
    shown: Mutex<Shown>,
}

#[derive(Default)]
struct Shown {
    task: String,
    bar: Option<ProgressBar>,
    /// When the last plain line told of progress.
    told: Option<Instant>,
    /// The latest value of each series, for the end of the bar.
    loss: Option<f64>,
}

impl Terminal {
    pub fn new() -> Self {
        Self { bars: std::io::stderr().is_terminal(), shown: Mutex::default() }
    }

    fn advanced(&self, shown: &mut Shown, stage: Stage, task: &str, unit: &str, done: u64, total: u64) {
        if shown.task != task {
            clear(shown);
            task.clone_into(&mut shown.task);
            shown.told = None;
            if self.bars {
                shown.bar = Some(bar(stage, task, unit, total));
            }
        }
        let loss = shown.loss.map_or(String::new(), |l| format!("  loss {l:.3}"));
        if let Some(bar) = &shown.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(loss);
            return;
        }
        // The end of a task, and between two of its lines time enough to read them.
        if done == total || shown.told.is_none_or(|t| t.elapsed() > PLAIN_LINE_EVERY) {
            shown.told = Some(Instant::now());
            let (stage, done) = (stage.name(), count(done, total, unit));
            shown.say(&format!("{stage:>8}  {task}: {done}{loss}"));
        }
    }
}

impl Shown {
    fn say(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.println(text);
        } else {
            // A closed stderr is no reason to end the work.
            writeln!(std::io::stderr(), "{text}").ok();
        }
    }
}

impl Observer for Terminal {
    fn event(&self, event: Event) {
        let Ok(mut shown) = self.shown.lock() else { return };
        let shown = &mut *shown;
        match event {
            Event::StageStarted { .. } | Event::Failed { .. } => clear(shown),
            Event::Advanced { stage, task, done, total, unit } => {
                self.advanced(shown, stage, &task, &unit, done, total);
            }
            Event::Measured { name, value, .. } => {
                if name == "loss" {
                    shown.loss = Some(value);
                }
            }
            Event::Noted { stage, message } => {
                let stage = stage.map_or("", Stage::name);
                shown.say(&format!("{stage:>8}  {message}"));
            }
            Event::StageFinished { stage, reused, duration_ms, .. } => {
                clear(shown);
                let took = if reused { "as before".to_owned() } else { seconds(duration_ms) };
                shown.say(&format!("{:>8}  done, {took}", stage.name()));
            }
        }
    }

    fn stop(&self) -> bool {
        process::stop_signal().is_some()
    }
}

fn clear(shown: &mut Shown) {
    if let Some(bar) = shown.bar.take() {
        bar.finish_and_clear();
    }
    shown.task.clear();
    shown.loss = None;
}

fn bar(stage: Stage, task: &str, unit: &str, total: u64) -> ProgressBar {
    let count = if unit == "bytes" { "{bytes}/{total_bytes}" } else { "{pos}/{len} {prefix}" };
    let stage = stage.name();
    let template = format!("{stage:>8}  {task} {{wide_bar:.green}} {count}  {{eta}} left{{msg}}");
    let bar = ProgressBar::new(total);
    // Names of tasks are ours; one with braces would merely show a plain bar.
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar.set_prefix(unit.to_owned());
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

fn count(done: u64, total: u64, unit: &str) -> String {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    match unit {
        "bytes" => format!("{:.1} of {:.1} MB", megabytes(done), megabytes(total)),
        unit => format!("{done} of {total} {unit}"),
    }
}

fn seconds(duration_ms: u64) -> String {
    let seconds = duration_ms as f64 / 1000.0;
    if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {:.0} s", duration_ms / 60_000, seconds % 60.0)
    }
}
