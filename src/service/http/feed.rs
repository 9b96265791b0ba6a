//! What happens to a job, read once for all who watch it: one reader for each job that is watched, however many watch.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::json;
use tokio::sync::broadcast;
use uuid::Uuid;

use super::events::{POLL, hear};
use super::job::JobProgress;
use crate::service::db::{self, Database, EventRow, JobRow, Tenant};

/// News that a slow watcher may be behind; one that is further behind reads the database.
const BEHIND: usize = 256;
/// Events read at once.
const MOST: u32 = 1000;

/// Something a watcher hears.
#[derive(Debug)]
pub enum News {
    Event(Told),
    /// How far the job is, as JSON; it is not kept.
    Progress(String),
    /// The job has ended, and this was all.
    End,
}

/// An event as it is told.
#[derive(Debug)]
pub struct Told {
    pub seq: i64,
    /// Its word in `event`.
    pub kind: String,
    /// JSON.
    pub data: String,
}

impl Told {
    pub fn new(row: &EventRow) -> Self {
        let data = serde_json::to_value(row).expect("an event is JSON. This is a bug.");
        let kind = data["event"].as_str().unwrap_or("message").to_owned();
        Self { seq: row.seq, kind, data: data.to_string() }
    }
}

/// The jobs that are watched.
#[derive(Debug, Clone, Default)]
pub struct Feeds(Arc<Mutex<HashMap<Uuid, broadcast::Sender<Arc<News>>>>>);

impl Feeds {
    /// All that happens to `job` after this call; perhaps some of what happened before.
    pub fn watch(&self, database: &Database, job: &JobRow) -> broadcast::Receiver<Arc<News>> {
        let mut feeds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(feed) = feeds.get(&job.id) {
            return feed.subscribe();
        }
        let (to, from) = broadcast::channel(BEHIND);
        feeds.insert(job.id, to.clone());
        let reader = Reader {
            feeds: self.clone(),
            database: database.clone(),
            tenant: job.tenant,
            id: job.id,
            seq: job.last_seq,
            shown: String::new(),
            to,
        };
        tokio::spawn(reader.run());
        from
    }

    /// Forgets the feed of `job`, unless somebody watches and `always` does not say so.
    fn forget(&self, job: Uuid, always: bool) -> bool {
        let mut feeds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let unwatched = feeds.get(&job).is_none_or(|feed| feed.receiver_count() == 0);
        if always || unwatched {
            feeds.remove(&job);
        }
        always || unwatched
    }
}

/// Reads what happens to one job.
struct Reader {
    feeds: Feeds,
    database: Database,
    tenant: Tenant,
    id: Uuid,
    /// Number of the last event told.
    seq: i64,
    /// The progress told last.
    shown: String,
    to: broadcast::Sender<Arc<News>>,
}

impl Reader {
    async fn run(mut self) {
        // Listening starts before the first look, so nothing falls between.
        let mut signals = self.database.signals();
        loop {
            match self.read().await {
                Ok(false) => {}
                Ok(true) => {
                    // Whoever comes from now on has a feed of their own, which ends at once.
                    self.feeds.forget(self.id, true);
                    return self.tell(News::End);
                }
                // Watchers need not know: the stream goes on when the database is back.
                Err(error) => tracing::warn!(%error, job = %self.id, "event streams wait"),
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = hear(&mut signals, self.id) => {}
            }
            if self.feeds.forget(self.id, false) {
                return;
            }
        }
    }

    /// Tells what is new. True when the job has ended, or is gone.
    async fn read(&mut self) -> db::Result<bool> {
        // The state first: if the job has ended by now, all its events are there to be read.
        let Some(job) = self.database.job(self.tenant, self.id).await? else { return Ok(true) };
        while self.seq < job.last_seq {
            let rows = self.database.events_after(self.tenant, self.id, self.seq, &[], MOST).await?;
            let Some(last) = rows.last() else { break };
            self.seq = last.seq;
            rows.iter().for_each(|row| self.tell(News::Event(Told::new(row))));
        }
        if job.state.is_terminal() {
            return Ok(true);
        }
        if let Some(progress) = &job.progress {
            // The time left changes by itself: only what was done is news.
            let done = json!([progress.stage, progress.task, progress.done]).to_string();
            if done != self.shown {
                let stages = self.database.stages(self.tenant, self.id).await?;
                self.tell(News::Progress(json!(JobProgress::new(progress, &stages)).to_string()));
                self.shown = done;
            }
        }
        Ok(false)
    }

    fn tell(&self, news: News) {
        // Nobody watching is no error.
        let _ = self.to.send(Arc::new(news));
    }
}
