//! A private PostgreSQL from the binaries installed on this machine.
//!
//! One directory holds cluster, socket and log. No TCP port and no password:
//! only the owner of the 0700 socket directory gets in. As root it drops to the
//! user `postgres`, which must own the directory then. A postmaster that
//! outlived a `kill -9` of its service is adopted by the next one.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use sha2::{Digest, Sha256};
use sqlx::postgres::PgConnectOptions;

/// `sun_path` ends here, with its NUL.
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// Recovery after a crash may take its time.
const START_TIMEOUT: Duration = Duration::from_secs(120);
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
const LOG_LIMIT_BYTES: u64 = 16 << 20;
const PORT: u16 = 5432;
const USER: &str = "secateur";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "no PostgreSQL is installed here: `apt-get install -y postgresql`, or name its programs' directory in \
         SECATEUR_PG_BIN, or use a running server with --database-url"
    )]
    NotInstalled,
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
    #[error("{0} is in use by another secateur; stop it, or choose another --data-dir")]
    InUse(PathBuf),
    #[error(
        "PostgreSQL does not run as root and there is no user `postgres` to run it as; \
         create one, start secateur as another user, or use a running server with --database-url"
    )]
    NoUser,
    #[error(
        "the user `{user}` that runs PostgreSQL cannot get through {at} (mode {mode:o}); choose a --data-dir it \
         can reach, e.g. /var/lib/secateur, or `chmod o+x` that directory"
    )]
    Unreachable { user: String, at: PathBuf, mode: u32 },
    #[error(
        "{data} was written by PostgreSQL {found}, but only {installed} is installed; install postgresql-{found}, \
         or move the data with pg_upgrade"
    )]
    OtherVersion { data: PathBuf, found: String, installed: String },
    #[error("{program} failed:\n{output}")]
    Failed { program: &'static str, output: String },
}

type Result<T, E = Error> = std::result::Result<T, E>;

/// Who runs the cluster when we are root.
#[derive(Debug, Clone)]
struct Owner {
    name: String,
    uid: u32,
    gid: u32,
}

/// The running cluster. [`LocalPg::stop`] ends it; dropping it does not.
#[derive(Debug)]
pub struct LocalPg {
    home: PathBuf,
    sockets: PathBuf,
    programs: PathBuf,
    owner: Option<Owner>,
    postmaster: Mutex<Postmaster>,
    /// Keeps others out of `home` while we live.
    _lock: File,
}

#[derive(Debug)]
enum Postmaster {
    Ours(Child),
    Adopted(Pid),
}

impl LocalPg {
    /// Starts the cluster in `home`, made when missing, and waits until it
    /// takes connections. Blocks.
    pub fn start(home: &Path) -> Result<Self> {
        make_directory(home, 0o755)?;
        let home = home.canonicalize().map_err(|e| Error::Io(home.into(), e))?;
        let owner = if geteuid().is_root() { Some(find_owner()?) } else { None };
        if let Some(owner) = &owner {
            check_reachable(&home, owner)?;
        }
        let lock = take_lock(&home)?;
        let programs = choose_programs(&home.join("data"), candidates())?;
        let sockets = socket_directory(&home);
        if let Some(owner) = &owner {
            hand_over(&home, owner)?;
        }
        private_directory(&sockets, owner.as_ref())?;
        let program = |name: &str| command(&programs.join(name), owner.as_ref());
        initialise(&home, program("initdb"))?;
        let postmaster = match running(&home.join("data")) {
            Some(pid) => {
                tracing::info!(pid = pid.as_raw_nonzero().get(), "found my PostgreSQL still running");
                Postmaster::Adopted(pid)
            }
            None => Postmaster::Ours(spawn(&home, &sockets, program("postgres"))?),
        };
        let cluster =
            Self { home, sockets, programs, owner, postmaster: Mutex::new(postmaster), _lock: lock };
        cluster.await_ready()?;
        Ok(cluster)
    }

    /// How to connect to it.
    pub fn options(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(&self.sockets)
            .port(PORT)
            .username(USER)
            .database("postgres")
    }

    /// Starts the postmaster again if it has died. True if it had. Blocks.
    pub fn keep_running(&self) -> Result<bool> {
        let mut postmaster = self.postmaster.lock().unwrap_or_else(PoisonError::into_inner);
        if postmaster.is_alive(&self.home.join("data")) {
            return Ok(false);
        }
        let program = command(&self.programs.join("postgres"), self.owner.as_ref());
        *postmaster = Postmaster::Ours(spawn(&self.home, &self.sockets, program)?);
        drop(postmaster);
        self.await_ready()?;
        Ok(true)
    }

    /// Stops it: connections are cut, what was committed is on disk. Blocks.
    pub fn stop(&self) {
        let mut postmaster = self.postmaster.lock().unwrap_or_else(PoisonError::into_inner);
        let data = self.home.join("data");
        // "Fast" shutdown first, the immediate one if that takes too long.
        for signal in [Signal::INT, Signal::QUIT, Signal::KILL] {
            let deadline = Instant::now() + STOP_TIMEOUT;
            let Some(pid) = postmaster.pid() else { return };
            if let Err(error) = kill_process(pid, signal) {
                tracing::debug!(%error, "cannot signal PostgreSQL");
            }
            while Instant::now() < deadline {
                if !postmaster.is_alive(&data) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// The process to watch, or to kill in a test.
    pub fn pid(&self) -> Option<Pid> {
        self.postmaster.lock().unwrap_or_else(PoisonError::into_inner).pid()
    }

    fn await_ready(&self) -> Result<()> {
        let mut postmaster = self.postmaster.lock().unwrap_or_else(PoisonError::into_inner);
        let data = self.home.join("data");
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            // The eighth line of postmaster.pid says how far it is.
            let status = fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
            let of_this = status.lines().next().and_then(|l| l.trim().parse().ok()).and_then(Pid::from_raw);
            let ready = status.lines().nth(7).is_some_and(|l| l.trim() == "ready");
            if ready && of_this.is_some() && of_this == postmaster.pid() {
                return Ok(());
            }
            if !postmaster.is_alive(&data) || Instant::now() > deadline {
                let output = tail(&self.home.join("log"));
                return Err(Error::Failed { program: "postgres", output });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Postmaster {
    fn pid(&self) -> Option<Pid> {
        match self {
            Self::Ours(child) => Pid::from_raw(child.id() as i32),
            Self::Adopted(pid) => Some(*pid),
        }
    }

    fn is_alive(&mut self, data: &Path) -> bool {
        match self {
            Self::Ours(child) => matches!(child.try_wait(), Ok(None)),
            Self::Adopted(pid) => is_postmaster(*pid, data),
        }
    }
}

/// The programs that would serve the cluster in `home`, their version, and that there is somebody to run them as.
///
/// # Errors
/// What is missing, and what to do.
pub fn installed(home: &Path) -> Result<(PathBuf, String)> {
    let programs = choose_programs(&home.join("data"), candidates())?;
    let version = major_version(&programs).ok_or(Error::NotInstalled)?;
    if geteuid().is_root() {
        find_owner()?;
    }
    Ok((programs, version))
}

/// Where PostgreSQL's programs may be, best first.
fn candidates() -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os("SECATEUR_PG_BIN") {
        return vec![named.into()];
    }
    let mut found = Vec::new();
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        found.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    let mut debian: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| Some((e.file_name().to_str()?.parse().ok()?, e.path().join("bin"))))
        .collect();
    debian.sort_unstable_by(|a, b| b.cmp(a));
    found.extend(debian.into_iter().map(|(_, path)| path));
    found.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
    found
}

/// The first candidate that fits the cluster; the first of all for a new one.
fn choose_programs(data: &Path, candidates: Vec<PathBuf>) -> Result<PathBuf> {
    let mut installed = candidates
        .into_iter()
        .filter(|d| d.join("postgres").is_file() && d.join("initdb").is_file())
        .filter_map(|d| Some((major_version(&d)?, d)))
        .peekable();
    let Ok(found) = fs::read_to_string(data.join("PG_VERSION")) else {
        return installed.next().map(|(_, d)| d).ok_or(Error::NotInstalled);
    };
    let found = found.trim().to_owned();
    let first = installed.peek().map(|(version, _)| version.clone()).ok_or(Error::NotInstalled)?;
    installed.find(|(version, _)| *version == found).map(|(_, d)| d).ok_or(Error::OtherVersion {
        data: data.into(),
        found,
        installed: first,
    })
}

/// `postgres (PostgreSQL) 15.18 (Debian …)` → `15`.
fn major_version(programs: &Path) -> Option<String> {
    let output = Command::new(programs.join("postgres")).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.split_whitespace().nth(2)?;
    Some(version.chars().take_while(char::is_ascii_digit).collect())
}

fn find_owner() -> Result<Owner> {
    let at = Path::new("/etc/passwd");
    let passwd = fs::read_to_string(at).map_err(|e| Error::Io(at.into(), e))?;
    let entry = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|n| *n == "postgres")?;
        Some(Owner {
            name: name.into(),
            uid: fields.nth(1)?.parse().ok()?,
            gid: fields.next()?.parse().ok()?,
        })
    });
    entry.ok_or(Error::NoUser)
}

/// Every directory on the way must let the owner through.
fn check_reachable(home: &Path, owner: &Owner) -> Result<()> {
    for at in home.ancestors().skip(1) {
        let meta = fs::metadata(at).map_err(|e| Error::Io(at.into(), e))?;
        let bit = match (meta.uid() == owner.uid, meta.gid() == owner.gid) {
            (true, _) => 0o100,
            (false, true) => 0o010,
            (false, false) => 0o001,
        };
        if meta.mode() & bit == 0 {
            let (user, mode) = (owner.name.clone(), meta.mode() & 0o7777);
            return Err(Error::Unreachable { user, at: at.into(), mode });
        }
    }
    Ok(())
}

fn take_lock(home: &Path) -> Result<File> {
    let at = home.join("lock");
    let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&at);
    let lock = lock.map_err(|e| Error::Io(at.clone(), e))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::InUse(home.into())),
        Err(e) => Err(Error::Io(at, e.into())),
    }
}

/// The socket lies beside the data, or, where that path is too long for a
/// socket, in a directory named after it.
fn socket_directory(home: &Path) -> PathBuf {
    let beside = home.join("s");
    if beside.as_os_str().len() + format!("/.s.PGSQL.{PORT}").len() < MAX_SOCKET_PATH_BYTES {
        return beside;
    }
    let digest = hex::encode(Sha256::digest(home.as_os_str().as_bytes()));
    Path::new("/tmp").join(format!("secateur-{}", &digest[..16]))
}

/// A directory that only the cluster's owner can enter. One that is there
/// already and belongs to someone else is refused.
fn private_directory(at: &Path, owner: Option<&Owner>) -> Result<()> {
    let io = |e| Error::Io(at.into(), e);
    let uid = owner.map_or(geteuid().as_raw(), |o| o.uid);
    make_directory(at, 0o700)?;
    let meta = fs::symlink_metadata(at).map_err(io)?;
    if !meta.is_dir() || (meta.uid() != uid && meta.uid() != geteuid().as_raw()) {
        return Err(io(io::Error::other("belongs to someone else")));
    }
    if let Some(owner) = owner {
        chown(at, Some(owner.uid), Some(owner.gid)).map_err(io)?;
    }
    fs::set_permissions(at, fs::Permissions::from_mode(0o700)).map_err(io)
}

fn make_directory(at: &Path, mode: u32) -> Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(at).map_err(|e| Error::Io(at.into(), e))
}

fn hand_over(at: &Path, owner: &Owner) -> Result<()> {
    chown(at, Some(owner.uid), Some(owner.gid)).map_err(|e| Error::Io(at.into(), e))
}

/// A command that runs as the cluster's owner, away from our terminal's signals.
fn command(program: &Path, owner: Option<&Owner>) -> Command {
    let mut command = Command::new(program);
    command.current_dir("/").process_group(0).stdin(Stdio::null());
    command.env_remove("DATABASE_URL").env_remove("SECATEUR_API_KEY");
    if let Some(owner) = owner {
        command.uid(owner.uid).gid(owner.gid);
    }
    command
}

/// Makes the cluster under another name first: what bears its name is whole.
fn initialise(home: &Path, mut initdb: Command) -> Result<()> {
    let (data, part) = (home.join("data"), home.join("data.part"));
    if data.join("PG_VERSION").exists() {
        return Ok(());
    }
    if part.exists() {
        fs::remove_dir_all(&part).map_err(|e| Error::Io(part.clone(), e))?;
    }
    let output = initdb
        .arg("-D")
        .arg(&part)
        .args([
            "-U",
            USER,
            "-E",
            "UTF8",
            "--no-locale",
            "--auth=trust",
            "--data-checksums",
            "--no-instructions",
        ])
        .output()
        .map_err(|e| Error::Io(initdb.get_program().into(), e))?;
    if !output.status.success() {
        let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Failed { program: "initdb", output });
    }
    fs::rename(&part, &data).map_err(|e| Error::Io(data, e))
}

fn spawn(home: &Path, sockets: &Path, mut postgres: Command) -> Result<Child> {
    let at = home.join("log");
    let grown = fs::metadata(&at).is_ok_and(|m| m.len() > LOG_LIMIT_BYTES);
    let log = OpenOptions::new().create(true).write(true).append(!grown).truncate(grown).open(&at);
    let log = log.map_err(|e| Error::Io(at, e))?;
    let settings = [
        "listen_addresses=",
        "fsync=on",
        "unix_socket_permissions=0700",
        "max_connections=100",
        "log_destination=stderr",
        "logging_collector=off",
        "log_timezone=UTC",
        "timezone=UTC",
    ];
    postgres.arg("-D").arg(home.join("data")).arg("-k").arg(sockets).args(["-p", &PORT.to_string()]);
    postgres.args(settings.iter().flat_map(|s| ["-c", s]));
    postgres.stdout(Stdio::null()).stderr(log);
    postgres.spawn().map_err(|e| Error::Io(postgres.get_program().into(), e))
}

/// The postmaster of this cluster, if one runs.
fn running(data: &Path) -> Option<Pid> {
    let status = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    let pid = Pid::from_raw(status.lines().next()?.trim().parse().ok()?)?;
    is_postmaster(pid, data).then_some(pid)
}

/// A number in a file may have gone to another program since: look at what it runs.
fn is_postmaster(pid: Pid, data: &Path) -> bool {
    let Ok(line) = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())) else { return false };
    let mut words = line.split(|b| *b == 0);
    let program = words.next().unwrap_or_default();
    program.ends_with(b"postgres") && words.any(|w| w == data.as_os_str().as_bytes())
}

/// The last words of the log.
fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}
