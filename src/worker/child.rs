//! One attempt: a child process that is fed, heard, and stopped.

use std::collections::VecDeque;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::Worker;
use super::lease::Keeper;
use super::record::Recorder;
use super::steward::records;
use crate::job::plan::Machine;
use crate::job::progress::Event;
use crate::job::report::{Failure, FailureKind};
use crate::service::db::{Lease, Renewal};

/// A line beyond this is cut, and then no event.
const MAX_LINE_BYTES: usize = 256 << 10;
/// How many of the child's last words to keep.
const LAST_LINES: usize = 20;
/// Exit code of a program that stopped on SIGTERM.
const STOPPED: i32 = 128 + 15;
/// Exit code for a bad spec.
const BAD_SPEC: i32 = 2;

/// What opens the database, the API, the store and receivers of messages.
const SECRETS: [&str; 9] = [
    "DATABASE_URL",
    "SECATEUR_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "OPENLINEAGE_API_KEY",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
];

/// How an attempt ended.
#[derive(Debug)]
pub enum Outcome {
    Succeeded,
    Failed(Failure),
    /// It stopped because it was asked to; why.
    Stopped(&'static str),
    /// The job is not ours any more.
    Lost,
}

/// Runs one attempt in `workspace` and hears it to its end.
pub async fn run(worker: &Worker, keeper: &Keeper, lease: Lease, spec: &[u8], workspace: &Path) -> Outcome {
    let mut child = match spawn(worker, workspace, &records(&worker.settings.data, lease.tenant)) {
        Ok(child) => child,
        Err(error) => {
            let program = worker.settings.program.first().map(|p| p.to_string_lossy().into_owned());
            let message = format!("cannot start {}: {error}", program.unwrap_or_default());
            return Outcome::Failed(Failure { kind: FailureKind::Crash, stage: None, message });
        }
    };
    let (told, events) = mpsc::channel(1024);
    let lost = CancellationToken::new();
    let recorder = Recorder::new(worker, lease, keeper, lost.clone());
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A child that dies early breaks the pipe; its exit tells more.
            let _ = stdin.write_all(spec).await;
        }
    };
    let hear = hear(child.stdout.take(), told);
    let last_words = last_words(child.stderr.take());
    let supervise = supervise(worker, keeper, &mut child, &lost);
    let mut heard = Box::pin(async { tokio::join!(feed, hear, last_words) });
    tokio::pin!(supervise);
    let record = recorder.run(events);
    let all = async {
        let mut words = None;
        let end = tokio::select! {
            end = &mut supervise => end,
            ((), (), last) = &mut heard => {
                words = Some(last);
                supervise.await
            }
        };
        // A grandchild may hold the pipes open; do not wait for it forever.
        if words.is_none() {
            words = timeout(Duration::from_secs(5), &mut heard).await.ok().map(|((), (), last)| last);
        }
        // With it goes the sender of events: the recorder has heard all.
        drop(heard);
        (end, words.unwrap_or_default())
    };
    let ((end, words), failure) = tokio::join!(all, record);
    classify(end, lost.is_cancelled(), failure, &words)
}

/// The program of an attempt, without what is none of its business.
fn command(worker: &Worker) -> io::Result<Command> {
    let (program, words) = worker.settings.program.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command.args(words);
    for name in SECRETS {
        command.env_remove(name);
    }
    Ok(command)
}

fn spawn(worker: &Worker, workspace: &Path, records: &Path) -> io::Result<Child> {
    command(worker)?
        .args(["run", "-", "--events", "jsonl", "--device", &worker.device, "--records"])
        .arg(records)
        .arg("--workspace")
        .arg(workspace)
        .args(&worker.settings.flags)
        // It ends itself when this process is gone: nobody would hear it.
        .env("SECATEUR_SUPERVISOR_PID", std::process::id().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Ctrl-C goes to the foreground group: the child shall hear from us only.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

/// Asks the program how fast the device is.
///
/// # Errors
/// When it cannot be started, fails, or says something else.
pub async fn measure(worker: &Worker) -> io::Result<Machine> {
    let output = command(worker)?
        .args(["measure", "--device", &worker.device])
        .args(&worker.settings.flags)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// How the child's process ended.
struct End {
    status: io::Result<ExitStatus>,
    /// Why it was asked to stop.
    asked: Option<&'static str>,
}

/// Waits for the child; stops it when the user, the lease or the shutdown asks.
async fn supervise(worker: &Worker, keeper: &Keeper, child: &mut Child, lost: &CancellationToken) -> End {
    let mut heard = keeper.heard();
    let mut hearing = true;
    let mut asked = None;
    let mut deadline = Instant::now();
    let mut killed = false;
    loop {
        let mut ask = None;
        let mut kill = false;
        tokio::select! {
            status = child.wait() => return End { status, asked },
            changed = heard.changed(), if hearing => match changed {
                Err(_) => hearing = false,
                Ok(()) => match *heard.borrow_and_update() {
                    Renewal::Go => {}
                    Renewal::Cancel => ask = Some("cancelled by the user"),
                    Renewal::Pause => ask = Some("paused by the user"),
                    Renewal::Spent => ask = Some("its time to run is spent"),
                    Renewal::Lost => lost.cancel(),
                },
            },
            () = worker.shutdown.drain.cancelled(), if asked.is_none() => ask = Some("its worker is shutting down"),
            () = worker.shutdown.hurry.cancelled(), if !killed => kill = true,
            () = lost.cancelled(), if !killed => kill = true,
            () = sleep_until(deadline), if asked.is_some() && !killed => {
                tracing::warn!("the child does not stop; killing it");
                kill = true;
            }
        }
        if let (Some(reason), None) = (ask, asked) {
            asked = Some(reason);
            deadline = Instant::now() + worker.settings.stop_grace;
            signal(child, Signal::TERM);
        }
        if kill {
            killed = true;
            signal(child, Signal::KILL);
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    // No id: it has ended and been waited for.
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id as i32))
        && let Err(error) = kill_process(pid, signal)
    {
        tracing::debug!(%error, "cannot signal the child");
    }
}

/// Reads what the run tells, one JSON object per line.
async fn hear(stdout: Option<impl AsyncRead + Unpin>, told: mpsc::Sender<Event>) {
    let Some(stdout) = stdout else { return };
    let mut reader = BufReader::new(stdout);
    let mut line = Vec::new();
    while matches!(read_line(&mut reader, &mut line).await, Ok(true)) {
        // The database's text cannot hold a NUL.
        let text = String::from_utf8_lossy(&line).replace("\\u0000", "");
        match serde_json::from_str(&text) {
            Ok(event) => {
                if told.send(event).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, line = %text.chars().take(200).collect::<String>(), "no event");
            }
        }
    }
}

/// Keeps the end of what the child writes for people, and passes it on to the log.
async fn last_words(stderr: Option<impl AsyncRead + Unpin>) -> String {
    let mut last = VecDeque::new();
    if let Some(stderr) = stderr {
        let mut reader = BufReader::new(stderr);
        let mut line = Vec::new();
        while matches!(read_line(&mut reader, &mut line).await, Ok(true)) {
            let text = String::from_utf8_lossy(&line[..line.len().min(2000)]).trim_end().replace('\0', "");
            tracing::debug!(target: "secateur::child", "{text}");
            if last.len() == LAST_LINES {
                last.pop_front();
            }
            last.push_back(text);
        }
    }
    Vec::from(last).join("\n")
}

/// Reads one line, of which at most [`MAX_LINE_BYTES`] are kept. False at the end.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin), line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    let mut any = false;
    loop {
        let chunk = reader.fill_buf().await?;
        if chunk.is_empty() {
            return Ok(any);
        }
        any = true;
        let end = chunk.iter().position(|b| *b == b'\n');
        let part = &chunk[..end.unwrap_or(chunk.len())];
        line.extend_from_slice(&part[..part.len().min(MAX_LINE_BYTES - line.len())]);
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_some() {
            return Ok(true);
        }
    }
}

/// What the end of the process means for the attempt.
fn classify(end: End, lost: bool, failure: Option<Failure>, words: &str) -> Outcome {
    if lost {
        return Outcome::Lost;
    }
    let failed = |kind, message| Outcome::Failed(Failure { kind, stage: None, message });
    let status = match end.status {
        Ok(status) => status,
        Err(error) => return failed(FailureKind::Crash, format!("cannot wait for the run: {error}")),
    };
    if status.success() {
        return Outcome::Succeeded;
    }
    if let Some(failure) = failure {
        return Outcome::Failed(failure);
    }
    let stopped = status.code() == Some(STOPPED) || status.signal() == Some(15);
    match end.asked {
        Some(reason) if stopped || status.signal() == Some(9) => return Outcome::Stopped(reason),
        None if stopped => return Outcome::Stopped("stopped from outside"),
        Some(_) | None => {}
    }
    if status.code() == Some(BAD_SPEC) {
        return failed(FailureKind::Spec, words.to_owned());
    }
    let hint = if status.signal() == Some(9) { "; perhaps the machine ran out of memory" } else { "" };
    let words = if words.is_empty() { "it said nothing".into() } else { format!("its last words:\n{words}") };
    failed(FailureKind::Crash, format!("the run died ({status}{hint}); {words}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(code: i32, asked: Option<&'static str>) -> End {
        End { status: Ok(ExitStatus::from_raw(code)), asked }
    }

    #[test]
    fn the_end_of_a_process_says_how_the_attempt_ended() {
        let exit = |code: i32| code << 8;
        assert!(matches!(classify(ended(0, None), false, None, ""), Outcome::Succeeded));
        assert!(matches!(classify(ended(0, Some("x")), false, None, ""), Outcome::Succeeded));
        assert!(matches!(classify(ended(0, None), true, None, ""), Outcome::Lost));
        assert!(matches!(classify(ended(exit(143), Some("x")), false, None, ""), Outcome::Stopped("x")));
        assert!(matches!(classify(ended(9, Some("x")), false, None, ""), Outcome::Stopped("x")));
        assert!(matches!(classify(ended(15, None), false, None, ""), Outcome::Stopped(_)));
        let kind = |outcome| match outcome {
            Outcome::Failed(failure) => (failure.kind, failure.message),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            kind(classify(ended(exit(2), None), false, None, "/prune: no")),
            (FailureKind::Spec, "/prune: no".into())
        );
        let (crash, message) = kind(classify(ended(9, None), false, None, "last"));
        assert_eq!(crash, FailureKind::Crash);
        assert!(
            message.contains("signal: 9") && message.contains("memory") && message.ends_with("last"),
            "{message}"
        );
        let told = Failure { kind: FailureKind::Data, stage: None, message: "empty".into() };
        assert_eq!(kind(classify(ended(exit(1), None), false, Some(told), "")).0, FailureKind::Data);
    }

    #[tokio::test]
    async fn a_line_without_end_is_cut_and_the_next_one_is_whole() {
        let mut text = vec![b'x'; 3 * MAX_LINE_BYTES];
        text.extend_from_slice(b"\nnext\nlast");
        let mut reader = BufReader::new(&text[..]);
        let mut line = Vec::new();
        assert!(read_line(&mut reader, &mut line).await.unwrap());
        assert_eq!(line.len(), MAX_LINE_BYTES);
        for expected in [&b"next"[..], b"last"] {
            assert!(read_line(&mut reader, &mut line).await.unwrap());
            assert_eq!(line, expected);
        }
        assert!(!read_line(&mut reader, &mut line).await.unwrap());
    }
}
