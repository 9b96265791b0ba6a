//! `secateur doctor`: whether this machine has what is needed, and what to do where it has not.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use serde::Serialize;

#[derive(clap::Args)]
pub struct Args {
    #[cfg(feature = "service")]
    #[command(flatten)]
    data: super::options::DataArgs,
    #[cfg(feature = "service")]
    #[command(flatten)]
    database: super::options::DatabaseArgs,
    /// A device that jobs are to run on: `cpu` or `cuda:N`; give it again for another.
    #[arg(long = "device", value_name = "DEVICE", default_value = "cpu")]
    devices: Vec<String>,
    /// Do not try to reach the Hugging Face Hub.
    #[arg(long)]
    offline: bool,
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

/// What was looked at.
#[derive(Serialize)]
struct Finding {
    about: &'static str,
    health: Health,
    /// What was found, and what to do where something is wrong.
    found: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Health {
    Good,
    /// Some jobs will not go well.
    Doubtful,
    /// No job will.
    Bad,
}

impl Health {
    const fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Doubtful => "doubtful",
            Self::Bad => "bad",
        }
    }
}

const GIB: u64 = 1 << 30;
/// Room for a small model and what a job makes of it; and so little that no job ends well.
const ENOUGH_DISK_BYTES: u64 = 20 * GIB;
const LEAST_DISK_BYTES: u64 = GIB;
const ENOUGH_MEMORY_BYTES: u64 = 4 * GIB;
/// Leases and signatures of requests bear a few seconds.
#[cfg(feature = "service")]
const CLOCK_DOUBTFUL_SECONDS: f64 = 5.0;

// Every command has this shape.
#[allow(clippy::needless_pass_by_value)]
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut all = vec![program(), processor(), memory()];
    all.extend(args.devices.iter().map(|name| device(name)));
    all.extend(kept(&args));
    all.push(clock());
    if !args.offline {
        all.push(hub());
    }
    let mut out = String::new();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
    } else {
        for Finding { about, health, found } in &all {
            writeln!(out, "{:<8}  {about:<9}  {found}", health.name())?;
        }
    }
    super::print(&out);
    let bad = all.iter().any(|finding| finding.health == Health::Bad);
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn finding(about: &'static str, health: Health, found: impl Into<String>) -> Finding {
    Finding { about, health, found: found.into() }
}

fn program() -> Finding {
    let has = [
        ("engine", cfg!(feature = "engine")),
        ("service", cfg!(feature = "service")),
        ("hub", cfg!(feature = "hub")),
        ("cuda", cfg!(feature = "cuda")),
    ];
    let has: Vec<&str> = has.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect();
    finding(
        "program",
        Health::Good,
        format!("secateur {} with {}", env!("CARGO_PKG_VERSION"), has.join(", ")),
    )
}

fn processor() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    #[cfg(feature = "engine")]
    let kernels = format!("; products of matrices go by {:?}", crate::engine::model::kernel::path());
    #[cfg(not(feature = "engine"))]
    let kernels = "";
    finding("processor", Health::Good, format!("{cores} cores{kernels}"))
}

fn memory() -> Finding {
    let info = rustix::system::sysinfo();
    let total = u64::from(info.mem_unit).saturating_mul(info.totalram as u64);
    #[cfg(feature = "engine")]
    let free = crate::engine::model::memory::available_bytes().unwrap_or(total);
    #[cfg(not(feature = "engine"))]
    let free = total;
    let said = format!("{} free of {}", gigabytes(free), gigabytes(total));
    if free >= ENOUGH_MEMORY_BYTES {
        return finding("memory", Health::Good, said);
    }
    let advice = "weights that do not fit are read from their files layer by layer, which is slow; stop other programs";
    finding("memory", Health::Doubtful, format!("{said}: {advice}"))
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

fn device(name: &str) -> Finding {
    if name == "cpu" {
        return finding("device", Health::Good, "cpu");
    }
    #[cfg(feature = "engine")]
    let Err(opened) = super::run::open_cuda(name) else {
        return finding("device", Health::Good, name);
    };
    #[cfg(not(feature = "engine"))]
    let opened = "this program has no engine";
    let advice = if cfg!(feature = "cuda") {
        "look whether `nvidia-smi` lists it and the driver fits"
    } else {
        "this program was built without CUDA: build it with --features cuda, or give --device cpu"
    };
    finding("device", Health::Bad, format!("{name}: {opened}; {advice}"))
}

/// What the service keeps: files and jobs.
#[cfg(feature = "service")]
fn kept(args: &Args) -> Vec<Finding> {
    let data = match args.data.place() {
        Ok(data) => data,
        Err(error) => return vec![finding("data", Health::Bad, format!("{error:#}"))],
    };
    let mut kept = vec![directory(&data), database(args, &data)];
    kept.extend(bucket(args, &data));
    kept
}

/// The bucket that keeps finished files, where one is named.
#[cfg(feature = "service")]
fn bucket(args: &Args, data: &Path) -> Option<Finding> {
    const ABOUT: &str = "store";
    let url = args.data.store_url()?;
    let opened = super::options::runtime().and_then(|runtime| runtime.block_on(args.data.store(data)));
    Some(match opened {
        Ok(_) => finding(ABOUT, Health::Good, format!("{url} answers")),
        Err(error) => {
            let advice = "look at --store-url, AWS_ENDPOINT_URL, AWS_REGION and the credentials";
            finding(ABOUT, Health::Bad, format!("{error:#}; {advice}"))
        }
    })
}

#[cfg(not(feature = "service"))]
fn kept(_: &Args) -> Vec<Finding> {
    vec![directory(Path::new("."))]
}

/// Whether there is room in `path`, or in what it would be made in.
fn directory(path: &Path) -> Finding {
    let full = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let there: PathBuf =
        full.ancestors().find(|at| at.is_dir()).map_or_else(|| full.clone(), Path::to_path_buf);
    let shown = full.display();
    // The kernel knows best: modes, owners and mounts that are read-only.
    if let Err(error) = rustix::fs::access(&there, rustix::fs::Access::WRITE_OK) {
        let advice = "choose another --data-dir, or make it writable for this user";
        return finding("data", Health::Bad, format!("{shown}: {error}; {advice}"));
    }
    let free = match rustix::fs::statvfs(&there) {
        Ok(disk) => disk.f_bavail.saturating_mul(disk.f_frsize),
        Err(error) => return finding("data", Health::Bad, format!("{shown}: {error}")),
    };
    let said = format!("{shown}: {} free", gigabytes(free));
    let advice = "a job leaves up to three times its model; choose another --data-dir, or make room";
    if free < LEAST_DISK_BYTES {
        finding("data", Health::Bad, format!("{said}; {advice}"))
    } else if free < ENOUGH_DISK_BYTES {
        finding("data", Health::Doubtful, format!("{said}; {advice}"))
    } else {
        finding("data", Health::Good, said)
    }
}

#[cfg(feature = "service")]
fn database(args: &Args, data: &Path) -> Finding {
    const ABOUT: &str = "database";
    let named = match args.database.named() {
        Ok(named) => named,
        Err(error) => return finding(ABOUT, Health::Bad, format!("{error:#}")),
    };
    let Some(named) = named else {
        return match crate::service::local_pg::installed(&data.join("postgres")) {
            Ok((programs, version)) => finding(
                ABOUT,
                Health::Good,
                format!("`secateur up` would start PostgreSQL {version} from {}", programs.display()),
            ),
            Err(error) => finding(ABOUT, Health::Bad, error.to_string()),
        };
    };
    match ask(named) {
        Ok(seconds) if seconds.abs() > CLOCK_DOUBTFUL_SECONDS => finding(
            ABOUT,
            Health::Doubtful,
            format!("answers, but its clock and this machine's are {seconds:.0} s apart; set both by NTP"),
        ),
        Ok(seconds) => {
            finding(ABOUT, Health::Good, format!("answers; its clock is {seconds:+.2} s from this machine's"))
        }
        Err(error) => finding(
            ABOUT,
            Health::Bad,
            format!("{error:#}; look at --database-url and whether the server runs"),
        ),
    }
}

/// Seconds that the database's clock is ahead of ours.
#[cfg(feature = "service")]
fn ask(named: sqlx::postgres::PgConnectOptions) -> anyhow::Result<f64> {
    super::options::runtime()?.block_on(async {
        let database = super::options::connect(named).await?;
        let (before, theirs) = (time::OffsetDateTime::now_utc(), database.ping().await?);
        let between = before + (time::OffsetDateTime::now_utc() - before) / 2;
        database.close().await;
        let ahead: time::Duration = theirs - between;
        Ok(ahead.as_seconds_f64())
    })
}

/// A clock that is behind this very program's file is wrong for certain.
fn clock() -> Finding {
    let now = SystemTime::now();
    let made = std::env::current_exe().and_then(|path| path.metadata()).and_then(|about| about.modified());
    let utc = time::OffsetDateTime::from(now);
    let said = format!("{} {:02}:{:02} UTC", utc.date(), utc.hour(), utc.minute());
    if made.is_ok_and(|made| made > now) {
        return finding(
            "clock",
            Health::Bad,
            format!("{said}, which is before this program was made; set it by NTP"),
        );
    }
    finding("clock", Health::Good, said)
}

#[cfg(feature = "hub")]
fn hub() -> Finding {
    use std::net::{TcpStream, ToSocketAddrs};
    let (host, port) = crate::fetch::hub_address();
    let reached = (host.as_str(), port).to_socket_addrs().and_then(|mut all| {
        let first = all.next().ok_or_else(|| std::io::Error::other("has no address"))?;
        TcpStream::connect_timeout(&first, std::time::Duration::from_secs(5))
    });
    match reached {
        Ok(_) => finding("hub", Health::Good, format!("{host} answers")),
        Err(error) => finding(
            "hub",
            Health::Doubtful,
            format!(
                "{host} cannot be reached ({error}): models by their name on the Hub cannot be fetched unless through \
                 a proxy or another HF_ENDPOINT; models by path can be used"
            ),
        ),
    }
}

#[cfg(not(feature = "hub"))]
fn hub() -> Finding {
    finding("hub", Health::Doubtful, "this program fetches nothing by name; models by path can be used")
}
