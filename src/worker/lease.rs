//! Keeps a lease while its child works.

use std::future::Future;
use std::time::Duration;

use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use uuid::Uuid;

use super::Settings;
use crate::service::db::{Database, Error, Lease, Progress, Renewal, Signal};

/// The heartbeat of one attempt. It beats from its start until it is dropped,
/// in a task of its own in the supervising process: no computation starves it.
pub struct Keeper {
    heard: watch::Receiver<Renewal>,
    progress: watch::Sender<Option<Progress>>,
    max_offline: Duration,
    task: JoinHandle<()>,
}

impl Keeper {
    pub fn start(database: &Database, lease: Lease, worker: Uuid, settings: &Settings) -> Self {
        let (hear, heard) = watch::channel(Renewal::Go);
        let (progress, shown) = watch::channel(None);
        let beat = Beat {
            signals: database.signals(),
            database: database.clone(),
            lease,
            worker,
            ttl: settings.ttl,
            max_offline: settings.max_offline,
            hear,
            shown,
        };
        Self { heard, progress, max_offline: settings.max_offline, task: tokio::spawn(beat.run()) }
    }

    /// What the heartbeat hears; starts with [`Renewal::Go`].
    pub fn heard(&self) -> watch::Receiver<Renewal> {
        self.heard.clone()
    }

    /// Shown to the user from the next beat on.
    pub fn show(&self, progress: Progress) {
        self.progress.send_replace(Some(progress));
    }

    /// Writes, and writes again while the database is away: the attempt's work
    /// must not be lost to an outage.
    pub async fn persist<T, F: Future<Output = Result<T, Error>>>(
        &self,
        mut write: impl FnMut() -> F,
    ) -> Result<T, Error> {
        let begun = Instant::now();
        loop {
            match write().await {
                Err(Error::Unavailable(error)) if begun.elapsed() < self.max_offline => {
                    tracing::warn!(%error, "waiting for the database");
                    sleep(Duration::from_secs(1)).await;
                }
                done => return done,
            }
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Beat {
    database: Database,
    signals: broadcast::Receiver<Signal>,
    lease: Lease,
    worker: Uuid,
    ttl: Duration,
    max_offline: Duration,
    hear: watch::Sender<Renewal>,
    shown: watch::Receiver<Option<Progress>>,
}

impl Beat {
    async fn run(mut self) {
        let mut ticks = interval(self.ttl / 4);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut answered = Instant::now();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = wish(&mut self.signals, self.lease.job) => {}
            }
            let progress = self.shown.borrow().clone();
            let renewal = self.database.renew(self.lease, self.ttl, progress.as_ref());
            match timeout(self.ttl / 2, renewal).await {
                Ok(Ok(word)) => {
                    answered = Instant::now();
                    self.hear.send_if_modified(|heard| std::mem::replace(heard, word) != word);
                    if word == Renewal::Lost {
                        return;
                    }
                    if let Err(error) = self.database.worker_seen(self.worker).await {
                        tracing::debug!(%error, "not seen");
                    }
                }
                Ok(Err(error)) => tracing::warn!(job = %self.lease.job, %error, "heartbeat not heard"),
                Err(_) => tracing::warn!(job = %self.lease.job, "heartbeat not answered in time"),
            }
            if answered.elapsed() > self.max_offline {
                tracing::error!(job = %self.lease.job, "the database is away for too long; giving up the job");
                self.hear.send_replace(Renewal::Lost);
                return;
            }
        }
    }
}

/// Returns when the user may want something of the job.
async fn wish(signals: &mut broadcast::Receiver<Signal>, job: Uuid) {
    loop {
        match signals.recv().await {
            Ok(Signal::Wished(id)) if id == job => return,
            Ok(Signal::Reconnected) | Err(broadcast::error::RecvError::Lagged(_)) => return,
            Ok(Signal::Queued | Signal::Told(_) | Signal::Wished(_)) => {}
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}
