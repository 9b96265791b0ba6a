//! The outbox is drained here: what a state change wrote for others is delivered, at least once.
//!
//! Jobs do not notice: a message is a row of the transaction that changed the job, and all the rest happens here. A
//! receiver that is away for hours misses nothing. Every instance drains; a row that one works on the others leave.

mod address;
mod call;
mod hub;
mod lineage;
mod mlflow;
mod traces;
mod webhook;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::db::{Database, Message, Signal, Tried};
use super::seal::Seal;
use super::store::Store;
use super::telemetry;
use call::Refusal;

pub use address::Reach;
pub use hub::Hub;
pub use lineage::Lineage;
pub use mlflow::Mlflow;
pub use traces::{Parent, Traces};
pub use webhook::shown;

/// Tries at once of one endpoint, so that a slow one leaves room for others.
const MOST_OF_ONE: usize = 4;
const LEAST_LEASE: Duration = Duration::from_secs(20);
/// How long what came of a try is told to a database that is away.
const KEEP_TRYING: Duration = Duration::from_secs(30);
/// Wake-up calls can be lost; so we look by ourselves, too.
const POLL: Duration = Duration::from_secs(5);
const TIDY_EVERY: Duration = Duration::from_hours(1);

/// A kind of receiver and where it is. Each has a loop and slots of its own: one that hangs takes nothing from the others.
#[derive(Debug, Clone)]
pub enum Sink {
    Webhooks(Reach),
    Mlflow(Mlflow),
    Traces(Traces),
    Lineage(Lineage),
    Hub(Hub),
}

impl Sink {
    /// As the database and the metrics call it.
    const fn name(&self) -> &'static str {
        match self {
            Self::Webhooks(_) => "webhook",
            Self::Mlflow(_) => mlflow::NAME,
            Self::Traces(_) => "traces",
            Self::Lineage(_) => "openlineage",
            Self::Hub(_) => hub::NAME,
        }
    }

    /// Tries at once.
    const fn most(&self) -> usize {
        match self {
            Self::Webhooks(_) => 32,
            Self::Traces(_) | Self::Lineage(_) => 4,
            Self::Mlflow(_) | Self::Hub(_) => 2,
        }
    }

    /// Nobody else tries within this time; a try of whoever is gone then is made anew. At worst two try the same at
    /// once, which the receiver can tell by the message's id.
    const fn lease(&self) -> Duration {
        match self {
            Self::Webhooks(_) | Self::Traces(_) | Self::Lineage(_) => Duration::from_mins(1),
            Self::Mlflow(_) => Duration::from_mins(5),
            // Whole checkpoints go over; one that is sent twice is taken once.
            Self::Hub(_) => Duration::from_hours(1),
        }
    }

    /// Tries to deliver a message once. Gives the status of the answer, where one tells enough.
    async fn deliver(&self, drain: &Drain, message: &Message) -> call::Result<Option<u16>> {
        let Drain { database, store, seal, .. } = drain;
        match self {
            Self::Webhooks(reach) => webhook::deliver(database, seal, *reach, message).await.map(Some),
            Self::Mlflow(mlflow) => mlflow.deliver(database, store, message).await.map(|()| None),
            Self::Traces(traces) => traces.deliver(database, message).await,
            Self::Lineage(lineage) => lineage.deliver(database, message).await,
            Self::Hub(hub) => hub.deliver(database, store, message).await.map(|()| None),
        }
    }
}

/// Waits before the second try and each one after, in seconds: as Standard Webhooks advise, 28 hours together.
const WAITS_S: [u32; 9] = [5, 60, 300, 1800, 7200, 18_000, 18_000, 28_800, 28_800];

/// What is delivered, and how.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where receivers of webhooks may be.
    pub reach: Reach,
    /// All waits are multiplied by this: one, but for those who try them out.
    pub patience: f64,
    /// Receivers besides webhooks, of which there may be some at any time.
    pub named: Vec<Sink>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { reach: Reach::Public, patience: 1.0, named: Vec::new() }
    }
}

impl Settings {
    /// Owners of repositories of the Hub that results may go to.
    pub fn publish_to(&self) -> Vec<String> {
        let of = |sink: &Sink| match sink {
            Sink::Hub(hub) => hub.namespaces.clone(),
            Sink::Webhooks(_) | Sink::Mlflow(_) | Sink::Traces(_) | Sink::Lineage(_) => Vec::new(),
        };
        self.named.iter().flat_map(of).collect()
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
        let mut loops = JoinSet::new();
        let webhooks = Sink::Webhooks(self.settings.reach);
        for sink in std::iter::once(webhooks).chain(self.settings.named.clone()) {
            loops.spawn(self.clone().drain(Arc::new(sink), stop.clone()));
        }
        loops.join_all().await;
    }

    async fn drain(self, sink: Arc<Sink>, stop: CancellationToken) {
        telemetry::sink_ready(sink.name());
        let mut signals = self.database.signals();
        let mut tries = Tries::default();
        let mut tidied: Option<Instant> = None;
        loop {
            if let Err(error) = self.begin(&sink, &mut tries).await {
                tracing::warn!(sink = sink.name(), %error, "the outbox waits for the database");
            }
            telemetry::tidy();
            if tidied.is_none_or(|at| at.elapsed() >= TIDY_EVERY) {
                tidied = Some(Instant::now());
                if let Err(error) = self.database.forget_old_messages().await {
                    tracing::warn!(%error, "old messages stay for now");
                }
            }
            let full = tries.running.len() >= sink.most();
            let news = async { while let Ok(Signal::Queued | Signal::Wished(_)) = signals.recv().await {} };
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(POLL) => {}
                Some(ended) = tries.running.join_next() => tries.ended(ended.ok()),
                () = news, if !full => {}
            }
        }
    }

    async fn begin(&self, sink: &Arc<Sink>, tries: &mut Tries) -> Result<(), super::db::Error> {
        if !matches!(**sink, Sink::Webhooks(_)) {
            self.database.sink_seen(sink.name()).await?;
        }
        let free = sink.most() - tries.running.len();
        if free == 0 {
            return Ok(());
        }
        let (busy, lease) = (tries.busy(), sink.lease().mul_f64(self.settings.patience).max(LEAST_LEASE));
        for message in self.database.messages_due(sink.name(), &busy, free as i64, lease).await? {
            let (drain, sink, endpoint) =
                (self.clone(), sink.clone(), message.endpoint_id.unwrap_or_default());
            *tries.by_endpoint.entry(endpoint).or_default() += 1;
            tries.running.spawn(async move {
                drain.deliver(&sink, message).await;
                endpoint
            });
        }
        Ok(())
    }

    async fn deliver(&self, sink: &Sink, message: Message) {
        let begun = Instant::now();
        let (status, error) = match sink.deliver(self, &message).await {
            Ok(status) => (status, None),
            Err(Refusal { status, message, .. }) => (status, Some(message)),
        };
        let tried = Tried { status, error, duration: begun.elapsed() };
        let again = tried.error.as_ref().and_then(|_| self.wait(message.attempts));
        let outcome = match (&tried.error, again) {
            (None, _) => "delivered",
            (Some(_), Some(_)) => "retried",
            (Some(_), None) => "given_up",
        };
        telemetry::delivery_tried(sink.name(), outcome, tried.duration);
        self.keep(&message, &tried, again).await;
    }

    /// What came of a try is told to the database, again and again while that is away.
    async fn keep(&self, message: &Message, tried: &Tried, again: Option<Duration>) {
        if let Some(error) = &tried.error {
            tracing::warn!(message = %message.id, sink = message.sink, kind = message.kind, error, "not delivered");
        }
        let until = Instant::now() + KEEP_TRYING;
        while let Err(error) = self.database.message_tried(message, tried, again).await {
            if Instant::now() > until {
                tracing::warn!(message = %message.id, %error, "what came of a delivery is forgotten; it comes again");
                return;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// How long to wait after try number `attempts` has failed; not at all after the last.
    fn wait(&self, attempts: i32) -> Option<Duration> {
        let wait = WAITS_S.get(usize::try_from(attempts - 1).ok()?)?;
        // Spread by a fifth, so that what failed together does not come back together.
        let spread = 0.9 + 0.2 * f64::from(super::seal::random::<1>()[0]) / 255.0;
        Some(Duration::from_secs_f64(f64::from(*wait) * self.settings.patience * spread))
    }
}
