//! Keeps what a run tells: in small batches, in order, over outages.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::Worker;
use super::lease::Keeper;
use crate::job::progress::Event;
use crate::job::report::Failure;
use crate::service::db::{Database, Error, Lease, Progress};
use crate::service::telemetry;

/// Events wait at most this long before they are written.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// While the database is away no more than this many events wait.
const MAX_WAITING: usize = 10_000;

pub struct Recorder<'a> {
    database: Database,
    lease: Lease,
    device: String,
    keeper: &'a Keeper,
    /// Cancelled when the lease proves to be lost.
    lost: CancellationToken,
    waiting: Vec<Event>,
    failure: Option<Failure>,
}

impl<'a> Recorder<'a> {
    pub fn new(worker: &Worker, lease: Lease, keeper: &'a Keeper, lost: CancellationToken) -> Self {
        let (database, device) = (worker.database.clone(), worker.device.clone());
        Self { database, lease, device, keeper, lost, waiting: Vec::new(), failure: None }
    }

    /// Records until the run tells no more. Gives the failure it told, if any.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>) -> Option<Failure> {
        let mut flush_at = Instant::now();
        loop {
            tokio::select! {
                event = events.recv() => {
                    let Some(event) = event else { break };
                    if self.waiting.is_empty() {
                        flush_at = flush_at.max(Instant::now() + FLUSH_EVERY);
                    }
                    if is_milestone(&event) {
                        flush_at = Instant::now();
                    }
                    self.take(event);
                }
                () = sleep_until(flush_at), if !self.waiting.is_empty() => {
                    self.flush().await;
                    flush_at = Instant::now() + FLUSH_EVERY;
                }
            }
        }
        let (keeper, database, lease) = (self.keeper, self.database.clone(), self.lease);
        let rest = std::mem::take(&mut self.waiting);
        if !rest.is_empty() && !self.lost.is_cancelled() {
            let written = keeper.persist(|| database.record(lease, &rest)).await;
            self.judge(written);
        }
        self.failure
    }

    fn take(&mut self, event: Event) {
        match &event {
            Event::Advanced { stage, task, done, total, unit } => {
                let (stage, done, total) = (*stage, *done, *total);
                // Only the newest count of a task is news.
                self.waiting.retain(
                    |e| !matches!(e, Event::Advanced { stage: s, task: t, .. } if *s == stage && t == task),
                );
                self.keeper.show(Progress { stage, task: task.clone(), done, total, unit: unit.clone() });
            }
            Event::StageFinished { stage, reused, duration_ms, .. } => {
                telemetry::stage_finished(*stage, *reused, *duration_ms);
            }
            Event::Failed { failure } => self.failure = Some(failure.clone()),
            Event::Measured { stage, name, value, .. } => {
                telemetry::measured(&self.device, *stage, name, *value);
            }
            Event::StageStarted { .. } | Event::Noted { .. } => {}
        }
        if self.waiting.len() < MAX_WAITING || is_milestone(&event) {
            self.waiting.push(event);
        } else {
            tracing::warn!(job = %self.lease.job, "too many events wait for the database; one is dropped");
        }
    }

    async fn flush(&mut self) {
        let written = self.database.record(self.lease, &self.waiting).await;
        if self.judge(written) {
            self.waiting.clear();
        }
    }

    /// Whether the batch is done with, for good or bad.
    fn judge(&self, written: Result<(), Error>) -> bool {
        match written {
            Ok(()) => true,
            Err(Error::Unavailable(error)) => {
                tracing::warn!(job = %self.lease.job, %error, "events wait for the database");
                false
            }
            Err(Error::LeaseLost) => {
                self.lost.cancel();
                true
            }
            Err(error) => {
                tracing::error!(job = %self.lease.job, %error, "events could not be kept");
                true
            }
        }
    }
}

/// Worth telling at once.
fn is_milestone(event: &Event) -> bool {
    match event {
        Event::StageStarted { .. } | Event::StageFinished { .. } | Event::Failed { .. } => true,
        Event::Advanced { .. } | Event::Measured { .. } | Event::Noted { .. } => false,
    }
}
