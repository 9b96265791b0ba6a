//! Wake-up calls from the database: one listening connection per process.
//!
//! A signal says "look again", never what happened: notifications can be lost,
//! so whoever waits also polls.

use std::time::Duration;

use sqlx::postgres::PgListener;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Database, Result};

/// Channels of `notify`. The payload of the last two is the job's id.
pub(super) const QUEUED: &str = "secateur_queued";
pub(super) const WISHED: &str = "secateur_wished";
pub(super) const TOLD: &str = "secateur_told";

/// Something worth looking at again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// A job waits for a worker.
    Queued,
    /// The user wants something of a running job.
    Wished(Uuid),
    /// The job has new events; a change of its state is one.
    Told(Uuid),
    /// The connection was lost and is back: anything may have happened.
    Reconnected,
}

impl Database {
    /// Signals from now on. Nothing comes before [`Database::listen`] runs. A
    /// receiver that lags has missed some and should look again, too.
    pub fn signals(&self) -> broadcast::Receiver<Signal> {
        self.signals.subscribe()
    }

    /// Feeds [`Database::signals`] until `stop`. Call it once per process.
    pub async fn listen(&self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            tokio::select! {
                () = stop.cancelled() => return,
                ended = self.relay() => {
                    let Err(error) = ended;
                    tracing::warn!(%error, "not listening to the database; trying again");
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
    }

    async fn relay(&self) -> Result<std::convert::Infallible> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen_all([QUEUED, WISHED, TOLD]).await?;
        self.send(Signal::Reconnected);
        loop {
            match listener.try_recv().await? {
                None => self.send(Signal::Reconnected),
                Some(notification) => {
                    if let Some(signal) = read(notification.channel(), notification.payload()) {
                        self.send(signal);
                    }
                }
            }
        }
    }

    fn send(&self, signal: Signal) {
        // Nobody listening is no error.
        let _ = self.signals.send(signal);
    }
}

fn read(channel: &str, payload: &str) -> Option<Signal> {
    match channel {
        QUEUED => Some(Signal::Queued),
        WISHED => payload.parse().ok().map(Signal::Wished),
        TOLD => payload.parse().ok().map(Signal::Told),
        _ => None,
    }
}

pub(super) async fn notify(tx: &mut sqlx::PgConnection, channel: &str, payload: &str) -> Result<()> {
    sqlx::query("select pg_notify($1, $2)").bind(channel).bind(payload).execute(tx).await?;
    Ok(())
}
