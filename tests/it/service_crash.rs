//! `secateur up` as a person starts it, and what a `kill -9` of any part costs: nothing.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use secateur::job::progress::{Event, Stage};
use secateur::job::spec::JobSpec;
use secateur::job::state::JobState;
use secateur::service::db::{Asked, Database, Entry, EventRow, JobRow, NewJob, StageState, Tenant};
use secateur::service::local_pg::LocalPg;
use serde_json::json;
use sqlx::postgres::PgConnectOptions;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::db::log;
use crate::support::app::client;
use crate::support::postgres::{reachable_directory, url};
use crate::support::program::Bench;
use crate::support::tiny::Tiny;
use crate::traces::{Collector, TRACE, tree};

const TENANT: Tenant = Tenant::DEFAULT;
const PATIENCE: Duration = Duration::from_secs(180);

/// A process of the service; killed when the test ends before it does.
struct Process {
    child: Child,
    /// `http://127.0.0.1:PORT`, of what serves.
    url: Option<String>,
}

impl Process {
    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32).unwrap()
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and it must end well.
    async fn stop(mut self) {
        kill_process(self.pid(), Signal::TERM).unwrap();
        let ended = async {
            loop {
                match self.child.try_wait().unwrap() {
                    Some(status) => return status,
                    None => sleep(Duration::from_millis(10)).await,
                }
            }
        };
        assert!(timeout(PATIENCE, ended).await.expect("it ends").success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A data directory with a service that comes and goes.
struct House {
    data: TempDir,
    /// Where traces go.
    collector: Option<String>,
}

impl House {
    fn new() -> Self {
        Self { data: reachable_directory(), collector: None }
    }

    fn address(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(self.data.path().canonicalize().unwrap().join("postgres/s"))
            .username("secateur")
            .database("postgres")
    }

    async fn database(&self) -> Database {
        Database::connect(self.address(), 3, Duration::from_secs(20)).await.unwrap()
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_secateur"));
        command.arg(name).arg("--data-dir").arg(self.data.path());
        command.args(["--lease-ttl-ms", "2000", "--backoff-ms", "100"]);
        command.env_remove("DATABASE_URL").env_remove("SECATEUR_API_KEY");
        command.envs(self.collector.iter().map(|url| ("OTEL_EXPORTER_OTLP_ENDPOINT", url)));
        command
    }

    /// `secateur up`, ready.
    fn up(&self) -> Process {
        let mut child = self
            .command("up")
            .args(["--bind", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .stderr(self.log())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").map(ToOwned::to_owned);
        let process = Process { child, url };
        assert!(process.url.is_some(), "{line}\n{}", self.said());
        process
    }

    fn worker(&self) -> Process {
        let mut command = self.command("worker");
        command.args(["--database-url", &url(&self.address())]).stderr(self.log());
        Process { child: command.spawn().unwrap(), url: None }
    }

    fn log(&self) -> fs::File {
        fs::OpenOptions::new().create(true).append(true).open(self.data.path().join("log")).unwrap()
    }

    /// What the processes said on stderr.
    fn said(&self) -> String {
        fs::read_to_string(self.data.path().join("log")).unwrap()
    }
}

/// The child that works on a job.
fn child_of(job: Uuid) -> Option<Pid> {
    let workspace = format!("work/{job}");
    fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).into_owned();
        (line.contains("\0run\0") && line.contains(&workspace)).then_some(pid)
    })
}

impl Drop for House {
    fn drop(&mut self) {
        // A test that failed may have left the private PostgreSQL behind.
        if let Ok(postgres) = LocalPg::start(&self.data.path().join("postgres")) {
            postgres.stop();
        }
    }
}

/// A tiny job that heals for a while.
fn long_healing(bench: &Bench) -> JobSpec {
    let mut spec = bench.spec_with("/heal/0/steps", json!(HEAL_STEPS));
    spec["heal"][0]["checkpoint_every"] = json!(20);
    JobSpec::read(spec).unwrap()
}
/// Seconds of work on any machine: three times in a row somebody has to be killed in the middle of it.
const HEAL_STEPS: u64 = 5000;

async fn submit(database: &Database, spec: &JobSpec) -> Uuid {
    database.job_insert(TENANT, &NewJob::new(spec.clone())).await.unwrap().id
}

async fn until(house: &House, database: &Database, id: Uuid, good: impl Fn(&JobRow) -> bool) -> JobRow {
    let wait = async {
        loop {
            if let Some(row) = database.job(TENANT, id).await.unwrap().filter(&good) {
                return row;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{}", house.said()))
}

/// Waits until attempt `attempt` is well within healing; it must not be over yet.
async fn until_healing(house: &House, database: &Database, id: Uuid, attempt: i32) {
    let healing = |row: &JobRow| {
        let far = row.progress.as_ref().is_some_and(|p| p.stage == Stage::Heal && p.task.contains("train"));
        row.state.is_terminal() || (row.attempt == attempt && row.state == JobState::Running && far)
    };
    let row = until(house, database, id, healing).await;
    assert_eq!(
        row.state,
        JobState::Running,
        "healed too fast for this test: {:?}\n{}",
        row.failure,
        house.said()
    );
}

/// sha256 of the files people take home.
async fn checkpoints(database: &Database, id: Uuid) -> Vec<(String, String)> {
    let files = database.artifacts(TENANT, id).await.unwrap();
    let wanted = |path: &str| ["pruned/", "healed/", "adapter/"].iter().any(|d| path.starts_with(d));
    files.into_iter().filter(|f| wanted(&f.path)).map(|f| (f.path, f.sha256)).collect()
}

#[tokio::test]
async fn a_job_whose_child_worker_and_service_are_killed_in_turn_ends_with_the_same_bytes() {
    let (bench, mut house) = (Bench::new(&Tiny::llama()), House::new());
    let collector = Collector::default();
    house.collector = Some(collector.start().await);
    let spec = long_healing(&bench);
    let service = house.up();
    let database = house.database().await;
    let calm = submit(&database, &spec).await;
    let row = until(&house, &database, calm, |row| row.state.is_terminal()).await;
    assert_eq!((row.state, row.attempt), (JobState::Succeeded, 1), "{:?}\n{}", row.failure, house.said());

    let asked = Asked { traceparent: Some(format!("00-{TRACE}-00f067aa0ba902b7-01")), at: None };
    let traced = NewJob { asked, ..NewJob::new(spec.clone()) };
    let id = database.job_insert(TENANT, &traced).await.unwrap().id;
    until_healing(&house, &database, id, 1).await;
    kill_process(child_of(id).unwrap(), Signal::KILL).unwrap();
    until_healing(&house, &database, id, 2).await;
    let orphan = child_of(id).unwrap();
    service.kill();
    // PostgreSQL lives on, the child does not.
    timeout(PATIENCE, async {
        while test_kill_process(orphan).is_ok() && child_of(id).is_some() {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    let worker = house.worker();
    until_healing(&house, &database, id, 3).await;
    worker.kill();
    let service = house.up();
    let row = until(&house, &database, id, |row| row.state.is_terminal()).await;
    assert_eq!(row.state, JobState::Succeeded, "{:?}\n{}", row.failure, house.said());
    assert_eq!((row.attempt, row.crashes), (4, 2));

    for stage in database.stages(TENANT, id).await.unwrap() {
        assert_eq!(stage.state, StageState::Finished);
        // What leaves no file is shared with the job before, which came to the same: no export, and the scores.
        let known = !matches!(stage.stage, Stage::Heal | Stage::Report);
        assert_eq!(stage.reused, known, "{stage:?}");
    }
    log(&database, id).await;
    let told = database.events_after(TENANT, id, 0, &[], 100_000).await.unwrap();
    let from_the_middle = |row: &EventRow| {
        row.attempt == 4
            && matches!(&row.body, Entry::Run(Event::Noted { message, .. }) if message.contains("goes on from"))
    };
    assert!(told.iter().any(from_the_middle), "the last attempt began healing in the middle");
    collector.until(&["attempt 1", "attempt 2", "attempt 3", "attempt 4"]).await;
    let spans = collector.traced();
    let shown = tree(&spans, "00f067aa0ba902b7");
    let attempts: Vec<&str> =
        shown.iter().map(|row| row.trim()).filter(|row| row.starts_with("attempt")).collect();
    // The first child was killed, and its worker told; two workers died, and nobody told but the database.
    assert_eq!(
        attempts,
        ["attempt 1: error", "attempt 2: error", "attempt 3: error", "attempt 4: success"],
        "{shown:#?}"
    );
    assert_eq!(shown[0], "RUN secateur: success");
    let cut_off = |row: &&String| row.trim() == "heal: error";
    assert_eq!(shown.iter().filter(cut_off).count(), 3, "{shown:#?}");
    let files = checkpoints(&database, id).await;
    assert!(files.len() > 2 && files == checkpoints(&database, calm).await, "the same bytes");
    database.close().await;
    service.stop().await;
}

#[tokio::test]
async fn a_service_that_is_told_to_stop_gives_its_job_back_and_goes_on_after_the_next_start() {
    let (bench, house) = (Bench::new(&Tiny::llama()), House::new());
    let service = house.up();
    let database = house.database().await;
    let id = submit(&database, &long_healing(&bench)).await;
    until_healing(&house, &database, id, 1).await;
    database.close().await;
    service.stop().await;
    assert!(child_of(id).is_none());
    let pid_file = house.data.path().join("postgres/data/postmaster.pid");
    assert!(!pid_file.exists(), "the private PostgreSQL has stopped, too");

    let service = house.up();
    let database = house.database().await;
    let row = until(&house, &database, id, |row| row.state.is_terminal()).await;
    assert_eq!((row.state, row.attempt, row.crashes), (JobState::Succeeded, 1, 0), "{}", house.said());
    database.close().await;
    service.stop().await;
}

async fn ready(service: &Process) -> bool {
    let url = format!("{}/readyz", service.url.as_ref().unwrap());
    client().get(url).send().await.is_ok_and(|r| r.status() == 200)
}

#[tokio::test]
async fn a_killed_private_postgres_is_started_again_by_its_service() {
    let house = House::new();
    let service = house.up();
    assert!(ready(&service).await);
    let status = fs::read_to_string(house.data.path().join("postgres/data/postmaster.pid")).unwrap();
    let postmaster = Pid::from_raw(status.lines().next().unwrap().parse().unwrap()).unwrap();
    kill_process(postmaster, Signal::KILL).unwrap();
    timeout(PATIENCE, async {
        while !house.said().contains("it runs again") || !ready(&service).await {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("{}", house.said()));
    service.stop().await;
}

fn refused(house: &House, args: &[&str]) -> String {
    let output = house.command("up").args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_service_without_a_key_listens_to_this_machine_only() {
    let house = House::new();
    let said = refused(&house, &["--bind", "0.0.0.0:0"]);
    assert!(said.contains("without an API key") && said.contains("--api-key-file"), "{said}");
    assert!(!house.data.path().join("postgres/data/postmaster.pid").exists(), "nothing is left running");
}

#[test]
fn what_is_missing_is_named_with_the_remedy() {
    let house = House::new();
    let empty = tempfile::tempdir().unwrap();
    let mut command = house.command("up");
    let output = command.env("SECATEUR_PG_BIN", empty.path()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("apt-get install -y postgresql") && said.contains("--database-url"), "{said}");
    let said = refused(&house, &["--allow-root", "/nowhere"]);
    assert!(said.contains("/nowhere"), "{said}");
}
