//! Real processes over a real PostgreSQL, and what befalls them at random moments: nothing is lost, nothing comes twice.
//!
//! An API, two workers with data directories of their own, and a proxy before the database. `SECATEUR_CHAOS_JOBS`,
//! `SECATEUR_CHAOS_FAULTS` and `SECATEUR_CHAOS_SEED` make it longer, or another one; the seed is said at the beginning.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use secateur::job::report::FailureKind;
use secateur::job::state::JobState;
use secateur::service::db::{Database, Entry, JobEvent, JobRow, Tenant};
use secateur::service::local_pg::LocalPg;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sqlx::PgPool;
use tempfile::TempDir;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use crate::db::log;
use crate::support::postgres::{reachable_directory, url};
use crate::support::program::Bench;
use crate::support::tiny::Tiny;

const TTL: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(300);
/// Small enough to fill at once, large enough for the tiny jobs of one worker.
const SMALL_DISK: &str = "size=24m";
const SOCKET: &str = ".s.PGSQL.5432";

fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Small and seeded: the same dice every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Stands before the database's socket and can be cut.
struct Proxy {
    cut: watch::Sender<bool>,
}

impl Proxy {
    fn start(at: &Path, behind: PathBuf) -> Self {
        let listener = UnixListener::bind(at.join(SOCKET)).unwrap();
        let (cut, cuts) = watch::channel(false);
        tokio::spawn(async move {
            loop {
                let (mut here, _) = listener.accept().await.unwrap();
                let (mut cuts, behind) = (cuts.clone(), behind.clone());
                tokio::spawn(async move {
                    if *cuts.borrow() {
                        return;
                    }
                    let Ok(mut there) = UnixStream::connect(behind).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut here, &mut there) => {}
                        _ = cuts.wait_for(|cut| *cut) => {}
                    }
                });
            }
        });
        Self { cut }
    }

    async fn cut_for(&self, time: Duration) {
        self.cut.send_replace(true);
        sleep(time).await;
        self.cut.send_replace(false);
    }
}

/// What is killed and started again.
struct Town {
    bench: Bench,
    home: TempDir,
    postgres: Arc<LocalPg>,
    proxy: Proxy,
    api: Child,
    url: String,
    workers: [Child; 2],
    small_disk: bool,
}

impl Town {
    async fn found() -> Self {
        let home = reachable_directory();
        let at = home.path().join("postgres");
        let postgres = Arc::new(spawn_blocking(move || LocalPg::start(&at).unwrap()).await.unwrap());
        let proxied = home.path().join("proxy");
        fs::create_dir(&proxied).unwrap();
        let behind = postgres.options().get_socket().unwrap().join(SOCKET);
        let proxy = Proxy::start(&proxied, behind);
        let disk = home.path().join("worker1");
        fs::create_dir(&disk).unwrap();
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", SMALL_DISK, "tmpfs"]).arg(&disk).output();
        let small_disk = mount.is_ok_and(|output| output.status.success());
        let bench = Bench::new(&Tiny::llama());
        let (api, url) = api(home.path(), &bench, &postgres);
        let workers = [0, 1].map(|i| worker(home.path(), &postgres, i));
        Self { bench, home, postgres, proxy, api, url, workers, small_disk }
    }

    fn home(&self) -> &Path {
        self.home.path()
    }

    fn said(&self) -> String {
        let text = fs::read_to_string(self.home().join("log")).unwrap();
        text.lines().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Posts job `n`, as often as it takes.
    async fn submit(&self, client: &reqwest::Client, n: u64) -> Uuid {
        let mut spec = self.bench.spec_with("/name", json!(format!("chaos {n}")));
        spec["heal"] = json!([]);
        spec["eval"] = json!({"perplexity": [], "speed": false});
        let ask = client.post(format!("{}/v1/jobs", self.url)).header("idempotency-key", format!("n{n}"));
        let job: Value =
            ask.json(&spec).send().await.unwrap().error_for_status().unwrap().json().await.unwrap();
        job["id"].as_str().unwrap().parse().unwrap()
    }

    fn restart_api(&mut self) {
        self.api.kill().unwrap();
        self.api.wait().unwrap();
        (self.api, self.url) = api(self.home.path(), &self.bench, &self.postgres);
    }

    async fn restart_worker(&mut self, i: usize, away: Duration) {
        self.workers[i].kill().unwrap();
        self.workers[i].wait().unwrap();
        sleep(away).await;
        self.workers[i] = worker(self.home.path(), &self.postgres, i);
    }

    /// One misfortune; gives its name.
    async fn strike(&mut self, dice: &mut Dice) -> &'static str {
        let i = dice.below(2) as usize;
        let some_time = Duration::from_millis(100 + dice.below(1500));
        match dice.below(8) {
            0 => match children(self.home()).first() {
                Some(child) => {
                    // It may have ended by itself.
                    let _ = kill_process(*child, Signal::KILL);
                    "a child killed"
                }
                None => "no child to kill",
            },
            1 => {
                self.restart_worker(i, some_time).await;
                "a worker killed"
            }
            2 => {
                self.restart_api();
                "the API killed"
            }
            3 => {
                kill_process(self.postgres.pid().unwrap(), Signal::KILL).unwrap();
                sleep(some_time).await;
                let postgres = self.postgres.clone();
                spawn_blocking(move || postgres.keep_running().unwrap()).await.unwrap();
                "PostgreSQL killed"
            }
            4 => {
                let worker = Pid::from_raw(self.workers[i].id() as i32).unwrap();
                kill_process(worker, Signal::STOP).unwrap();
                sleep(TTL * 5 / 2).await;
                kill_process(worker, Signal::CONT).unwrap();
                "a worker asleep past its lease"
            }
            5 => {
                let pool = PgPool::connect_with(self.postgres.options()).await.unwrap();
                let all = "select pg_terminate_backend(pid) from pg_stat_activity
                           where application_name = 'secateur' and pid <> pg_backend_pid()";
                sqlx::query(all).execute(&pool).await.unwrap();
                pool.close().await;
                "all connections terminated"
            }
            6 => {
                self.proxy.cut_for(some_time * 2).await;
                "the network cut"
            }
            _ if self.small_disk => {
                let filler = self.home().join("worker1/filler");
                // It stops where the disk is full.
                let _ = fs::write(&filler, vec![0; 32 << 20]);
                sleep(some_time / 2).await;
                fs::remove_file(filler).unwrap();
                "a disk full"
            }
            _ => "no small disk here: it takes root to mount one",
        }
    }
}

impl Drop for Town {
    fn drop(&mut self) {
        for process in self.workers.iter_mut().chain([&mut self.api]) {
            let _ = process.kill();
            let _ = process.wait();
        }
        self.postgres.stop();
        if self.small_disk {
            let _ = Command::new("umount").arg("--lazy").arg(self.home().join("worker1")).status();
        }
    }
}

fn command(home: &Path, postgres: &LocalPg, name: &str, data: &str) -> Command {
    let log = fs::OpenOptions::new().create(true).append(true).open(home.join("log")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_secateur"));
    command.arg(name).arg("--data-dir").arg(home.join(data)).arg("--store-dir").arg(home.join("store"));
    command.args(["--database-url", &url(&postgres.options().socket(home.join("proxy")))]);
    command.env_remove("SECATEUR_API_KEY").stderr(log);
    command
}

fn api(home: &Path, bench: &Bench, postgres: &LocalPg) -> (Child, String) {
    let mut command = command(home, postgres, "api", "api");
    command.args(["--bind", "127.0.0.1:0", "--allow-root"]).arg(bench.path(""));
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let url = line
        .trim()
        .strip_prefix("listening on ")
        .unwrap_or_else(|| panic!("it does not start:\n{}", fs::read_to_string(home.join("log")).unwrap()));
    (child, url.to_owned())
}

fn worker(home: &Path, postgres: &LocalPg, i: usize) -> Child {
    let mut command = command(home, postgres, "worker", &format!("worker{i}"));
    let ttl = TTL.as_millis().to_string();
    command.args(["--threads", "1", "--lease-ttl-ms", &ttl, "--backoff-ms", "100"]);
    command.spawn().unwrap()
}

/// The runs of jobs below `home`.
fn children(home: &Path) -> Vec<Pid> {
    let ours = |entry: fs::DirEntry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).into_owned();
        (line.contains("\0run\0") && line.contains(home.to_str()?)).then_some(pid)
    };
    fs::read_dir("/proc").unwrap().flatten().filter_map(ours).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_befalls_processes_network_and_disk_no_job_is_lost_and_none_ends_twice() {
    let jobs = setting("SECATEUR_CHAOS_JOBS", 50);
    let faults = setting("SECATEUR_CHAOS_FAULTS", 16);
    let seed = setting("SECATEUR_CHAOS_SEED", 9);
    println!("seed {seed}: {jobs} jobs, {faults} faults");
    let mut dice = Dice(seed);
    let mut town = Town::found().await;
    let client = crate::support::app::client();
    let mut ids = Vec::new();
    for n in 0..jobs {
        ids.push(town.submit(&client, n).await);
    }
    for n in 0..faults {
        sleep(Duration::from_millis(dice.below(1000))).await;
        let begun = Instant::now();
        let what = town.strike(&mut dice).await;
        println!("{n}: {what} ({:.1} s)", begun.elapsed().as_secs_f64());
    }
    let options = town.postgres.options();
    let database = Database::connect(options.clone(), 3, Duration::from_secs(20)).await.unwrap();
    let ended = async {
        for id in &ids {
            while !row(&database, *id).await.state.is_terminal() {
                sleep(Duration::from_millis(100)).await;
            }
        }
    };
    timeout(PATIENCE, ended).await.unwrap_or_else(|_| panic!("some never end:\n{}", town.said()));
    // Asked again, each request tells of its own job.
    for (n, id) in (0..jobs).zip(&ids) {
        assert_eq!(town.submit(&client, n).await, *id);
    }
    let mut failed = 0;
    let mut weights = Vec::new();
    for id in &ids {
        failed += usize::from(check(&database, &town, *id, &mut weights).await == JobState::Failed);
    }
    println!("{} succeeded, {failed} gave up", ids.len() - failed);
    assert!(failed * 5 <= ids.len(), "{failed} of {} jobs gave up\n{}", ids.len(), town.said());
    weights.dedup();
    assert_eq!(weights.len(), 1, "one spec, one result");
    let pool = PgPool::connect_with(options).await.unwrap();
    for (law, statement) in [
        ("there are no other jobs", "select count(*) - $1 from jobs"),
        ("nobody holds what has ended", "select count(*) + 0 * $1 from leases"),
        (
            "no epoch was claimed twice",
            "select count(*) + 0 * $1 from (select from events where body ->> 'state' = 'running'
               group by job_id, epoch having count(*) > 1) twice",
        ),
        (
            "files are of the attempt that counted",
            "select count(*) + 0 * $1 from artifacts a join jobs j on j.id = a.job_id
             where a.epoch <> j.epoch or j.state <> 'succeeded'",
        ),
    ] {
        let broken: i64 = sqlx::query_scalar(statement).bind(jobs as i64).fetch_one(&pool).await.unwrap();
        assert_eq!(broken, 0, "{law}");
    }
    pool.close().await;
    database.close().await;
}

async fn row(database: &Database, id: Uuid) -> JobRow {
    database.job(Tenant::DEFAULT, id).await.unwrap().expect("no job is lost")
}

/// Looks whether a job that has ended is whole. `weights`: what the jobs' files of weights come to.
async fn check(database: &Database, town: &Town, id: Uuid, weights: &mut Vec<String>) -> JobState {
    let job = row(database, id).await;
    let told = log(database, id).await;
    let states: Vec<JobState> = told
        .iter()
        .filter_map(|entry| match entry {
            Entry::Job(JobEvent::StateChanged { state, .. }) => Some(*state),
            _ => None,
        })
        .collect();
    let ends = states.iter().filter(|state| state.is_terminal()).count();
    assert_eq!(
        (ends, states.last()),
        (1, Some(&job.state)),
        "{id} ends once, and then nothing more: {states:?}"
    );
    let files = database.artifacts(Tenant::DEFAULT, id).await.unwrap();
    if job.state == JobState::Succeeded {
        for wanted in ["report.json", "pruned/config.json", "pruned/model.safetensors", "SHA256SUMS"] {
            assert!(files.iter().any(|file| file.path == wanted), "{id} has no {wanted}");
        }
    } else {
        assert_eq!(job.failure.unwrap().kind, FailureKind::AttemptsSpent, "{id}");
    }
    for file in files {
        let bytes = fs::read(town.home().join("store").join(&file.location)).unwrap();
        assert_eq!(
            (bytes.len() as i64, hex::encode(Sha256::digest(&bytes))),
            (file.size_bytes, file.sha256.clone())
        );
        if file.path == "pruned/model.safetensors" {
            weights.push(file.sha256);
        }
    }
    job.state
}
