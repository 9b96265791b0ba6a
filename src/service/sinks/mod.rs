//! The outbox is drained here: what a state change wrote for others is delivered, at least once.
//!
//! Jobs do not notice: a message is a row of the transaction that changed the job, and all the rest happens here. A
//! receiver that is away for hours misses nothing. Every instance drains; a row that one works on the others leave.

mod address;
mod mlflow;
mod webhook;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::db::{Database, Message, Signal, Tried};
use super::seal::Seal;
use super::store::Store;
use super::telemetry;

pub use address::Reach;
pub use mlflow::Mlflow;
pub use webhook::shown;

const WEBHOOK: &str = "webhook";
const MLFLOW: &str = "mlflow";

/// Tries at once.
const MOST_WEBHOOKS: usize = 32;
const MOST_RUNS: usize = 2;
/// Tries at once of one endpoint, so that a slow one leaves room for others.
const MOST_OF_ONE: usize = 4;
/// Nobody else tries within this time; a try of whoever is gone then is made anew. At worst two try the same at once,
/// which the receiver can tell by the message's id.
const WEBHOOK_LEASE: Duration = Duration::from_mins(1);
const MLFLOW_LEASE: Duration = Duration::from_mins(5);
const LEAST_LEASE: Duration = Duration::from_secs(20);
/// Wake-up calls can be lost; so we look by ourselves, too.
const POLL: Duration = Duration::from_secs(5);
const TIDY_EVERY: Duration = Duration::from_hours(1);

/// Waits before the second try and each one after, in seconds: as Standard Webhooks advise, 28 hours together.
const WAITS_S: [u32; 9] = [5, 60, 300, 1800, 7200, 18_000, 18_000, 28_800, 28_800];

/// What is delivered, and how.
#[derive(Debug, Clone)]
pub struct Settings {
    pub reach: Reach,
    /// All waits are multiplied by this: one, but for those who try them out.
    pub patience: f64,
    pub mlflow: Option<Mlflow>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { reach: Reach::Public, patience: 1.0, mlflow: None }
    }
}

/// What is being tried.
#[derive(Default)]
struct Tries {
    running: JoinSet<Uuid>,
    by_endpoint: HashMap<Uuid, usize>,
}

impl Tries {
    /// Endpoints that get no more for now.
    fn busy(&self) -> Vec<Uuid> {
        let full = self.by_endpoint.iter().filter(|(_, count)| **count >= MOST_OF_ONE);
        full.map(|(id, _)| *id).filter(|id| !id.is_nil()).collect()
    }

    /// A try is over; `None` when it panicked, and then nobody knows whose it was.
    fn ended(&mut self, endpoint: Option<Uuid>) {
        if let Some(count) = endpoint.and_then(|endpoint| self.by_endpoint.get_mut(&endpoint)) {
            *count -= 1;
        }
        if self.running.is_empty() {
            self.by_endpoint.clear();
        }
    }
}

/// Delivers messages.
#[derive(Debug, Clone)]
pub struct Drain {
    pub database: Database,
    pub store: Store,
    pub seal: Seal,
    pub settings: Settings,
}

impl Drain {
    /// Delivers until `stop`. What is being tried then is tried again later, by whoever comes next.
    pub async fn serve(self, stop: CancellationToken) {
        // Each sink has a loop and slots of its own: one that hangs takes nothing from the others.
        let webhooks = self.clone().drain(WEBHOOK, MOST_WEBHOOKS, stop.clone());
        let mlflow = async {
            if self.settings.mlflow.is_some() {
                self.clone().drain(MLFLOW, MOST_RUNS, stop.clone()).await;
            }
        };
        tokio::join!(webhooks, mlflow);
    }

    async fn drain(self, sink: &'static str, most: usize, stop: CancellationToken) {
        telemetry::sink_ready(sink);
        let mut signals = self.database.signals();
        let mut tries = Tries::default();
        let mut tidied: Option<Instant> = None;
        loop {
            if let Err(error) = self.begin(sink, most, &mut tries).await {
                tracing::warn!(sink, %error, "the outbox waits for the database");
            }
            telemetry::tidy();
            if tidied.is_none_or(|at| at.elapsed() >= TIDY_EVERY) {
                tidied = Some(Instant::now());
                if let Err(error) = self.database.forget_old_messages().await {
                    tracing::warn!(%error, "old messages stay for now");
                }
            }
            let full = tries.running.len() >= most;
            let news = async { while let Ok(Signal::Queued | Signal::Wished(_)) = signals.recv().await {} };
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(POLL) => {}
                Some(ended) = tries.running.join_next() => tries.ended(ended.ok()),
                () = news, if !full => {}
            }
        }
    }

    async fn begin(
        &self,
        sink: &'static str,
        most: usize,
        tries: &mut Tries,
    ) -> Result<(), super::db::Error> {
        if sink == MLFLOW {
            self.database.sink_seen(sink).await?;
        }
        let free = most - tries.running.len();
        if free == 0 {
            return Ok(());
        }
        let busy = tries.busy();
        for message in self.database.messages_due(sink, &busy, free as i64, self.lease(sink)).await? {
            let (drain, endpoint) = (self.clone(), message.endpoint_id.unwrap_or_default());
            *tries.by_endpoint.entry(endpoint).or_default() += 1;
            tries.running.spawn(async move {
                drain.deliver(message).await;
                endpoint
            });
        }
        Ok(())
    }

    async fn deliver(&self, message: Message) {
        let (sink, tried) = match &self.settings.mlflow {
            Some(mlflow) if message.sink == MLFLOW => {
                (MLFLOW, mlflow.deliver(&self.database, &self.store, &message).await)
            }
            _ => {
                let (database, seal) = (&self.database, &self.seal);
                (WEBHOOK, webhook::deliver(database, seal, self.settings.reach, &message).await)
            }
        };
        let again = tried.error.as_ref().and_then(|_| self.wait(message.attempts));
        let outcome = match (&tried.error, again) {
            (None, _) => "delivered",
            (Some(_), Some(_)) => "retried",
            (Some(_), None) => "given_up",
        };
        telemetry::delivery_tried(sink, outcome, tried.duration);
        self.keep(&message, &tried, again).await;
    }

    /// What came of a try is told to the database, again and again while that is away.
    async fn keep(&self, message: &Message, tried: &Tried, again: Option<Duration>) {
        if let Some(error) = &tried.error {
            tracing::warn!(message = %message.id, sink = message.sink, kind = message.kind, error, "not delivered");
        }
        let until = Instant::now() + WEBHOOK_LEASE / 2;
        while let Err(error) = self.database.message_tried(message, tried, again).await {
            if Instant::now() > until {
                tracing::warn!(message = %message.id, %error, "what came of a delivery is forgotten; it comes again");
                return;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    fn lease(&self, sink: &str) -> Duration {
        let lease = if sink == MLFLOW { MLFLOW_LEASE } else { WEBHOOK_LEASE };
        lease.mul_f64(self.settings.patience).max(LEAST_LEASE)
    }

    /// How long to wait after try number `attempts` has failed; not at all after the last.
    fn wait(&self, attempts: i32) -> Option<Duration> {
        let wait = WAITS_S.get(usize::try_from(attempts - 1).ok()?)?;
        // Spread by a fifth, so that what failed together does not come back together.
        let spread = 0.9 + 0.2 * f64::from(super::seal::random::<1>()[0]) / 255.0;
        Some(Duration::from_secs_f64(f64::from(*wait) * self.settings.patience * spread))
    }
}
