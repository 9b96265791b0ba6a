//! Housekeeping: who sits where, dead leases, files nobody needs.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use time::OffsetDateTime;
use tokio::sync::broadcast::error::TryRecvError;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Settings, StartError};
use crate::service::db::{Database, Dead, Error, Signal, Tenant};
use crate::service::store::{Store, epoch_prefix, upload_prefix};
use crate::service::telemetry;

const SWEEP_EVERY: Duration = Duration::from_mins(5);

/// A worker's place at a device. Its lock falls with the process, so whoever
/// takes it next knows that the worker before is dead, and has its id.
pub struct Seat {
    pub id: Uuid,
    _lock: File,
}

/// Takes the place at `device`. Two workers never share one.
pub fn take_seat(data: &Path, device: &str) -> Result<Seat, StartError> {
    let directory = data.join("workers");
    let name: String = device.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let at = directory.join(name);
    let io = |e: io::Error| StartError::Io(at.clone(), e);
    fs::create_dir_all(&directory).map_err(io)?;
    let mut lock =
        OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&at).map_err(io)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(StartError::DeviceTaken { device: device.into(), at });
        }
        Err(e) => return Err(io(e.into())),
    }
    // The id is good on this host only: a copied directory is another place.
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let mut text = String::new();
    lock.read_to_string(&mut text).map_err(io)?;
    let known = text.split_once(' ').filter(|(_, h)| h.trim() == host).and_then(|(id, _)| id.parse().ok());
    let id = known.unwrap_or_else(Uuid::new_v4);
    let write = |lock: &mut File| {
        lock.rewind()?;
        lock.set_len(0)?;
        writeln!(lock, "{id} {host}")?;
        lock.sync_all()
    };
    write(&mut lock).map_err(io)?;
    Ok(Seat { id, _lock: lock })
}

/// Workers of one device's name that may share a data directory.
const SEATS: u32 = 256;

/// Takes a place at `device` that nobody has.
pub fn take_some_seat(data: &Path, device: &str) -> Result<Seat, StartError> {
    let mut taken = take_seat(data, device);
    for n in 2..=SEATS {
        if !matches!(taken, Err(StartError::DeviceTaken { .. })) {
            break;
        }
        taken = take_seat(data, &format!("{device}.{n}"));
    }
    taken
}

/// Removes the workspace of a job that has ended.
pub async fn remove_workspace(workspace: &Path) {
    let path = workspace.to_owned();
    let removed = tokio::task::spawn_blocking(move || fs::remove_dir_all(path)).await;
    match removed {
        Ok(Err(error)) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, workspace = %workspace.display(), "workspace not removed; swept later");
        }
        Ok(_) | Err(_) => {}
    }
}

/// Hands the workspace of a job that failed or was cancelled on to the one that tries it again, which finds in it what
/// it need not compute anew. Nothing is there when another try has it already, or it was swept.
pub fn inherit(from: &Path, to: &Path) -> io::Result<()> {
    if to.exists() {
        return Ok(());
    }
    match fs::rename(from, to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Where jobs of one tenant share what they have measured of models: nobody learns from it what others work on.
pub fn records(data: &Path, tenant: Tenant) -> PathBuf {
    data.join("records").join(tenant.0.to_string())
}

/// Removes records that nobody has looked for in `keep`. Those in use are made anew, should it come to that.
fn sweep_records(data: &Path, keep: Duration) -> io::Result<()> {
    for tenant in read_dir(&data.join("records"))? {
        for record in read_dir(&tenant)? {
            let used = record.metadata().and_then(|meta| meta.modified());
            if used.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > keep)) {
                fs::remove_file(&record)?;
            }
        }
    }
    Ok(())
}

fn read_dir(path: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(path) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Looks after what no single worker looks after. Each process has one; they
/// need no leader.
pub struct Steward {
    pub database: Database,
    pub store: Store,
    pub settings: Settings,
    pub stop: CancellationToken,
}

impl Steward {
    pub async fn serve(self) {
        let mut signals = self.database.signals();
        let mut ticks = interval(self.settings.ttl / 4);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watch = Watch::default();
        let mut swept: Option<Instant> = None;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            telemetry::tidy();
            loop {
                match signals.try_recv() {
                    Ok(Signal::Reconnected) | Err(TryRecvError::Lagged(_)) => watch.broken(),
                    Ok(_) => {}
                    Err(TryRecvError::Empty | TryRecvError::Closed) => break,
                }
            }
            if let Err(error) = self.reap(&mut watch).await {
                watch.broken();
                tracing::warn!(%error, "cannot look for dead leases");
                continue;
            }
            if let Err(error) = self.database.expire().await {
                tracing::warn!(%error, "cannot look for jobs that have waited too long");
            }
            if swept.is_none_or(|at| at.elapsed() >= SWEEP_EVERY) {
                swept = Some(Instant::now());
                if let Err(error) = self.sweep().await {
                    tracing::warn!(%error, "cannot sweep");
                }
            }
        }
    }

    /// Takes dead leases away once the database has been in reach for a whole TTL:
    /// after an outage every living worker needs that time to beat again.
    async fn reap(&self, watch: &mut Watch) -> Result<(), Error> {
        let now = self.database.ping().await?;
        if watch.unbroken(Instant::now(), now, self.settings.ttl) < self.settings.ttl {
            return Ok(());
        }
        let dead = self.database.reap(Dead::Expired, self.settings.limits).await?;
        telemetry::leases_reaped("expired", dead);
        if dead > 0 {
            tracing::warn!(dead, "leases had run out");
        }
        Ok(())
    }

    /// Removes uploads that were never completed, and files of uploads that are forgotten.
    async fn sweep_uploads(&self) -> Result<(), Error> {
        self.database.forget_stale_uploads().await?;
        // The row comes before the file: a file that is seen here and has no row is nobody's.
        let Some(ids) = listed(self.store.uploads().await) else { return Ok(()) };
        let wanted = self.database.uploads_wanted(&ids).await?;
        for id in ids.into_iter().filter(|id| !wanted.contains(id)) {
            if let Err(error) = self.store.remove(&upload_prefix(id)).await {
                tracing::warn!(%error, upload = %id, "the file of an upload is not removed");
            }
        }
        Ok(())
    }

    /// Removes workspaces nobody goes on in, stored files no commit names, and requests that are forgotten.
    async fn sweep(&self) -> Result<(), Error> {
        let work = self.settings.data.join("work");
        let at = work.clone();
        let Ok(workspaces) = tokio::task::spawn_blocking(move || workspaces(&at)).await else {
            return Ok(());
        };
        let epochs = listed(self.store.epochs().await).unwrap_or_default();
        self.database.forget_old_requests().await?;
        let (data, keep) = (self.settings.data.clone(), self.settings.keep_records);
        let swept = tokio::task::spawn_blocking(move || sweep_records(&data, keep)).await;
        if let Ok(Err(error)) = swept {
            tracing::warn!(%error, "old records are not removed");
        }
        self.sweep_uploads().await?;
        let wanted = self.database.workspaces_wanted(&workspaces, self.settings.keep_failed).await?;
        for id in workspaces.into_iter().filter(|id| !wanted.contains(id)) {
            remove_workspace(&work.join(id.to_string())).await;
        }
        let wanted = self.database.epochs_wanted(&epochs).await?;
        for (job, epoch) in epochs.into_iter().filter(|e| !wanted.contains(e)) {
            tracing::info!(%job, epoch, "removing files of an attempt that did not count");
            if let Err(error) = self.store.remove(&epoch_prefix(job, epoch)).await {
                tracing::warn!(%error, %job, epoch, "files not removed");
            }
        }
        Ok(())
    }
}

/// What the store holds; nothing when it does not answer now.
fn listed<T>(found: io::Result<T>) -> Option<T> {
    found.inspect_err(|error| tracing::warn!(%error, "the store is not swept")).ok()
}

fn workspaces(work: &PathBuf) -> Vec<Uuid> {
    let entries = fs::read_dir(work).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

/// How long the database has been in reach without a break.
#[derive(Default)]
struct Watch {
    since: Option<Instant>,
    /// The last look: our clock and the database's.
    last: Option<(Instant, OffsetDateTime)>,
}

impl Watch {
    fn broken(&mut self) {
        self.since = None;
    }

    /// Notes that the database answered `here` at its time `there`. If its clock
    /// has moved much more than ours, one of us was asleep, and so may have been
    /// the other workers.
    fn unbroken(&mut self, here: Instant, there: OffsetDateTime, ttl: Duration) -> Duration {
        if let Some((last_here, last_there)) = self.last {
            let passed = here - last_here;
            if there - last_there > passed + ttl / 4 || passed > ttl {
                self.since = None;
            }
        }
        self.last = Some((here, there));
        here - *self.since.get_or_insert(here)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_ttl_without_a_break_allows_to_reap() {
        let (ttl, step) = (Duration::from_secs(60), Duration::from_secs(15));
        let (mut here, mut there) = (Instant::now(), OffsetDateTime::UNIX_EPOCH);
        let mut watch = Watch::default();
        let mut look = |watch: &mut Watch, passed_there: Duration| {
            here += step;
            there += passed_there;
            watch.unbroken(here, there, ttl) >= ttl
        };
        for _ in 0..4 {
            assert!(!look(&mut watch, step));
        }
        assert!(look(&mut watch, step));
        watch.broken();
        for _ in 0..4 {
            assert!(!look(&mut watch, step));
        }
        assert!(look(&mut watch, step));
        assert!(!look(&mut watch, Duration::from_hours(1)), "the machine slept");
    }
}
