//! One private PostgreSQL for all test processes, a fresh database per test.
//!
//! Whoever comes first starts it; it stops when the last test process is gone.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use secateur::service::db::{Database, WorkerSelf};
use secateur::service::local_pg::LocalPg;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

struct Cluster {
    options: PgConnectOptions,
    /// Shared by all test processes; the watcher waits to have it alone.
    _users: File,
}

static CLUSTER: OnceLock<Cluster> = OnceLock::new();

/// A fresh, migrated database.
pub async fn fresh() -> Database {
    let database = connect(&fresh_options().await).await;
    database.migrate().await.unwrap();
    database
}

/// Another pool on the same database: what another process would have.
pub async fn connect(options: &PgConnectOptions) -> Database {
    Database::connect(options.clone(), 10, Duration::from_secs(30)).await.unwrap()
}

/// How to reach a fresh, empty database.
pub async fn fresh_options() -> PgConnectOptions {
    let options = tokio::task::spawn_blocking(|| CLUSTER.get_or_init(cluster).options.clone()).await.unwrap();
    let name = format!("t_{}", uuid::Uuid::new_v4().simple());
    let pool = PgPoolOptions::new().max_connections(1).connect_with(options.clone()).await.unwrap();
    let create = sqlx::AssertSqlSafe(format!("create database {name}"));
    sqlx::query(create).execute(&pool).await.unwrap();
    pool.close().await;
    options.database(&name)
}

/// A worker of 16 GiB and two cores, of which three quarters are for a job.
pub fn worker(id: uuid::Uuid, device: &str) -> WorkerSelf {
    WorkerSelf {
        id,
        host: "here".into(),
        pid: 1,
        device: device.into(),
        version: "1".into(),
        core_count: 2,
        memory_bytes: 16 << 30,
        job_memory_bytes: 12 << 30,
        labels: BTreeMap::new(),
    }
}

/// The same as a URL, for a process of its own.
#[cfg(feature = "engine")]
pub fn url(options: &PgConnectOptions) -> String {
    let socket = options.get_socket().unwrap().display().to_string();
    let database = options.get_database().unwrap();
    format!("postgres:///{database}?host={socket}&user={}", options.get_username())
}

/// A directory that the user `postgres` can reach, whoever runs the tests.
pub fn reachable_directory() -> tempfile::TempDir {
    let directory = tempfile::Builder::new().prefix("secateur-").tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

fn cluster() -> Cluster {
    let mut hasher = DefaultHasher::new();
    env!("CARGO_TARGET_TMPDIR").hash(&mut hasher);
    let home = std::env::temp_dir().join(format!("secateur-test-{:016x}", hasher.finish()));
    fs::create_dir_all(&home).unwrap();
    fs::set_permissions(&home, fs::Permissions::from_mode(0o755)).unwrap();
    let users = open(&home.join("users"));
    flock(&users, FlockOperation::LockShared).unwrap();
    let starting = open(&home.join("starting"));
    flock(&starting, FlockOperation::LockExclusive).unwrap();
    let data = home.join("pg");
    let alive = is_alive(&data);
    if !alive {
        let _ = fs::remove_dir_all(&data);
    }
    let postgres = LocalPg::start(&data).unwrap();
    if !alive {
        watch(&home, postgres.pid().unwrap().as_raw_nonzero().get());
    }
    Cluster { options: postgres.options(), _users: users }
}

fn open(path: &PathBuf) -> File {
    OpenOptions::new().create(true).truncate(false).write(true).open(path).unwrap()
}

fn is_alive(data: &Path) -> bool {
    let status = fs::read_to_string(data.join("data/postmaster.pid")).unwrap_or_default();
    let pid = status.lines().next().and_then(|l| l.trim().parse::<u32>().ok());
    pid.is_some_and(|pid| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains(data.to_str().unwrap()))
    })
}

/// Stops the postmaster when the last test process is gone.
#[allow(clippy::zombie_processes)] // It outlives us: that is its purpose.
fn watch(home: &Path, pid: i32) {
    let stop = format!("kill -INT {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done");
    Command::new("flock")
        .arg(home.join("users"))
        .args(["sh", "-c", &stop])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
}
