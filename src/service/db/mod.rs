//! All SQL lives here, one file per group of tables.
//!
//! Every query names its tenant. Time is the database's. A change of a job's
//! state locks its row, asks [`JobState::after`] and writes the answer; whoever
//! needs both a lease and its job locks the lease first.

mod artifacts;
mod audit;
mod deadlines;
mod endpoints;
mod events;
mod jobs;
mod keys;
mod leases;
mod outbox;
mod requests;
mod signals;
mod stages;
mod sweeps;
mod uploads;
mod workers;

use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgTypeInfo, PgValueRef};
use sqlx::{PgPool, Postgres};
use time::OffsetDateTime;
use tokio::sync::broadcast;

use crate::job::progress::Stage;
use crate::job::state::{IllegalChange, JobState, Wish};

pub use artifacts::{ArtifactRow, NewArtifact, best_checkpoint};
pub use audit::AuditRow;
pub use endpoints::EndpointRow;
pub use events::{Entry, EventRow, JobEvent};
pub use jobs::{Asked, Cursor, Deletion, JobFilter, JobPage, JobRow, NewJob};
pub use keys::{ApiKeyRow, NewApiKey};
pub use leases::{Dead, Lease, Limits, Progress, Renewal};
pub use outbox::{Backlog, DeliveryRow, Message, MessageRow, Tried, body as message_body};
pub use requests::{Inserted, Once};
pub use signals::Signal;
pub use stages::{StageRow, StageState};
pub use sweeps::{SweepJob, SweepRow};
pub use uploads::{UploadDeletion, UploadPart, UploadRow};
pub use workers::{WorkerRow, WorkerSelf};

/// Who owns a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, sqlx::Type)]
#[sqlx(transparent)]
pub struct Tenant(pub i32);

impl Tenant {
    /// The one tenant there is until there are more.
    pub const DEFAULT: Self = Self(1);
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database cannot be reached now; the same call may succeed later.
    #[error("the database does not answer: {0}")]
    Unavailable(sqlx::Error),
    #[error(transparent)]
    Illegal(#[from] IllegalChange),
    /// Somebody else holds the job now, or it has ended: nothing was written.
    #[error("the lease is lost: the job has a newer epoch or has ended")]
    LeaseLost,
    /// So many jobs of the tenant wait, and no more may.
    #[error("{0} jobs of the tenant wait, which is as many as there may be")]
    QueueFull(i32),
    #[error("database: {0}")]
    Sql(sqlx::Error),
    #[error("database schema: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whether there is more than a page of `limit` rows, of which one more was asked for; what is too much goes.
pub fn page_cut<T>(rows: &mut Vec<T>, limit: u32) -> bool {
    let more = rows.len() > limit as usize;
    rows.truncate(limit as usize);
    more
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        let unavailable = match &error {
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed => true,
            // 57P0x: shutting down or starting up; 08xxx: connection trouble; 53300: too many connections.
            sqlx::Error::Database(e) => {
                e.code().is_some_and(|c| c.starts_with("57P") || c.starts_with("08") || c == "53300")
            }
            _ => false,
        };
        if unavailable { Self::Unavailable(error) } else { Self::Sql(error) }
    }
}

const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The job database. Cheap to clone; all clones share one pool.
#[derive(Debug, Clone)]
pub struct Database {
    pool: PgPool,
    signals: broadcast::Sender<Signal>,
}

impl Database {
    /// Opens a pool of at most `connections`. Waits up to `patience` for the
    /// first one, so a wrong address is told at once.
    pub async fn connect(options: PgConnectOptions, connections: u32, patience: Duration) -> Result<Self> {
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(patience)
            // The server finds out within a minute that a machine is gone, and lets go of the rows it had locked.
            .after_connect(|connection, _| {
                Box::pin(async move {
                    let keepalive = "select set_config('tcp_keepalives_idle', '30', false),
                       set_config('tcp_keepalives_interval', '10', false), set_config('tcp_keepalives_count', '3', false)";
                    sqlx::query(keepalive).execute(connection).await.map(drop)
                })
            })
            .connect_with(options.application_name("secateur"))
            .await?;
        Ok(Self { pool, signals: broadcast::Sender::new(1024) })
    }

    /// Brings the schema up to date. Safe to call from many processes at once.
    pub async fn migrate(&self) -> Result<()> {
        Ok(sqlx::migrate!("./migrations").run(&self.pool).await?)
    }

    /// Asks for the database's time: the proof that it answers.
    pub async fn ping(&self) -> Result<OffsetDateTime> {
        Ok(sqlx::query_scalar("select clock_timestamp()").fetch_one(&self.pool).await?)
    }

    /// Lets go of all connections; of those still in use after a moment, without order.
    pub async fn close(&self) {
        if tokio::time::timeout(CLOSE_TIMEOUT, self.pool.close()).await.is_err() {
            tracing::warn!("a database connection is still in use");
        }
    }
}

/// Words that stand as text in a column.
macro_rules! text_column {
    ($($word:ty),*) => {$(
        impl sqlx::Type<Postgres> for $word {
            fn type_info() -> PgTypeInfo {
                <&str as sqlx::Type<Postgres>>::type_info()
            }
            fn compatible(ty: &PgTypeInfo) -> bool {
                <&str as sqlx::Type<Postgres>>::compatible(ty)
            }
        }
        impl<'r> sqlx::Decode<'r, Postgres> for $word {
            fn decode(value: PgValueRef<'r>) -> Result<Self, sqlx::error::BoxDynError> {
                Ok(<&str as sqlx::Decode<Postgres>>::decode(value)?.parse::<Self>()?)
            }
        }
        impl<'q> sqlx::Encode<'q, Postgres> for $word {
            fn encode_by_ref(
                &self,
                buffer: &mut sqlx::postgres::PgArgumentBuffer,
            ) -> Result<sqlx::encode::IsNull, sqlx::error::BoxDynError> {
                <&str as sqlx::Encode<Postgres>>::encode(self.name(), buffer)
            }
        }
    )*};
}
text_column!(JobState, Wish, Stage, StageState);
