//! What happens to a job: as a page, or as a stream that can be taken up again.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc::{self, Sender};
use tokio_stream::wrappers::ReceiverStream;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::auth::Caller;
use super::extract::{JobId, Pairs, limit, parameter, prefers};
use super::job::{JobProgress, Page};
use super::jobs::job_row;
use super::problem::{Problem, ProblemBody};
use crate::service::db::{self, EventRow, JobRow, Signal, Tenant};

/// Wake-up calls can be lost; so we look by ourselves, too.
pub const POLL: Duration = Duration::from_secs(2);
const PING: Duration = Duration::from_secs(15);
const DEFAULT_PAGE: u32 = 100;
const MAX_PAGE: u32 = 1000;
/// Events written ahead of a slow reader.
const AHEAD: usize = 64;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(events))
}

/// What happened to a job, in order and without gaps.
///
/// A JSON page, or with `Accept: text/event-stream` the events so far and those
/// to come. A stream's events have their `seq` as id; give the last one as
/// `Last-Event-ID` (browsers do) or `after` to go on where a stream broke off.
/// Between them come `progress` events, which have no id and are not kept. A
/// comment every 15 seconds keeps the line open. After the last event of a job
/// that has ended comes `event: end`, and the stream closes.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/events", operation_id = "job_events", tag = "jobs",
    params(
        ("id" = Uuid, Path),
        ("after" = Option<i64>, Query, description = "Only events after this `seq`; 0 if not given"),
        ("limit" = Option<u32>, Query, description = "Events per page, 1 to 1000; 100 if not given. A stream has no pages"),
        ("event" = Option<Vec<String>>, Query, description = "Only events of this kind, such as `state_changed`; may be repeated"),
        ("Last-Event-ID" = Option<i64>, Header, description = "For a stream, like `after`"),
    ),
    responses(
        (status = 200, description = "A page, or a stream", content(
            (Page<EventRow> = "application/json"),
            (String = "text/event-stream"),
        )),
        (status = 400, description = "The query is wrong", body = ProblemBody),
        (status = 404, description = "No such job", body = ProblemBody),
    )
)]
async fn events(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
    Pairs(query): Pairs,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (mut after, mut size, mut kinds) = (0, DEFAULT_PAGE, Vec::new());
    for (name, value) in query {
        match name.as_str() {
            "after" => after = parameter("after", &value)?,
            "limit" => size = limit(&value, MAX_PAGE)?,
            "event" => kinds.push(value),
            _ => return Err(Pairs::unknown(&name, "after, limit, event")),
        }
    }
    let job = job_row(&state.database, tenant, id).await?;
    if prefers(&headers, "text/event-stream", "application/json") {
        if let Some(last) = headers.get("last-event-id").and_then(|v| v.to_str().ok()) {
            after = parameter("Last-Event-ID", last)?;
        }
        return Ok(stream(state, job, after, kinds).into_response());
    }
    let mut rows = state.database.events_after(tenant, id, after, &kinds, size + 1).await?;
    let has_more = rows.len() > size as usize;
    rows.truncate(size as usize);
    Ok(Json(Page::new(rows, has_more, |row| row.seq.to_string())).into_response())
}

fn stream(
    state: AppState,
    job: JobRow,
    after: i64,
    kinds: Vec<String>,
) -> Sse<impl futures_util::Stream<Item = Result<sse::Event, Infallible>>> {
    let (to, from) = mpsc::channel(AHEAD);
    // Listening starts before the first look, so nothing falls between.
    let signals = state.database.signals();
    let shutdown = state.shutdown.clone();
    let follower = Follower { state, tenant: job.tenant, id: job.id, seq: after, kinds, progress: None, to };
    tokio::spawn(async move {
        tokio::select! {
            // axum waits for open streams at shutdown (axum #2673): they end here.
            () = shutdown.cancelled() => {}
            () = follower.follow(signals) => {}
        }
    });
    Sse::new(ReceiverStream::new(from)).keep_alive(KeepAlive::new().interval(PING).text("ping"))
}

/// Tells one reader what happens to one job.
struct Follower {
    state: AppState,
    tenant: Tenant,
    id: Uuid,
    /// Number of the last event told.
    seq: i64,
    /// Those that the reader wants; all when there are none.
    kinds: Vec<String>,
    progress: Option<JobProgress>,
    to: Sender<Result<sse::Event, Infallible>>,
}

/// Whether there may be more to tell.
#[derive(PartialEq)]
enum More {
    Yes,
    No,
}

impl Follower {
    async fn follow(mut self, mut signals: Receiver<Signal>) {
        loop {
            match self.tell_news().await {
                Ok(More::Yes) => {}
                Ok(More::No) => return,
                // The reader need not know: the stream goes on when the database is back.
                Err(error) => tracing::warn!(%error, job = %self.id, "an event stream waits"),
            }
            tokio::select! {
                () = self.to.closed() => return,
                () = tokio::time::sleep(POLL) => {}
                () = hear(&mut signals, self.id) => {}
            }
        }
    }

    async fn tell_news(&mut self) -> db::Result<More> {
        // The state first: if the job has ended by now, all its events are there to be read.
        let Some(job) = self.state.database.job(self.tenant, self.id).await? else {
            return Ok(self.end().await);
        };
        loop {
            let rows = self
                .state
                .database
                .events_after(self.tenant, self.id, self.seq, &self.kinds, MAX_PAGE)
                .await?;
            let more = rows.len() == MAX_PAGE as usize;
            for row in rows {
                self.seq = row.seq;
                if self.tell(entry(&row)).await == More::No {
                    return Ok(More::No);
                }
            }
            if !more {
                break;
            }
        }
        if job.state.is_terminal() { Ok(self.end().await) } else { self.tell_progress(&job).await }
    }

    async fn tell_progress(&mut self, job: &JobRow) -> db::Result<More> {
        let Some(progress) = &job.progress else { return Ok(More::Yes) };
        let stages = self.state.database.stages(self.tenant, self.id).await?;
        let progress = JobProgress::new(progress, &stages);
        let same = |old: &JobProgress| {
            (&old.task, old.stage, old.done) == (&progress.task, progress.stage, progress.done)
        };
        if self.progress.as_ref().is_some_and(same) {
            return Ok(More::Yes);
        }
        let event = sse::Event::default().event("progress").data(json!(progress).to_string());
        self.progress = Some(progress);
        Ok(self.tell(event).await)
    }

    async fn end(&self) -> More {
        self.tell(sse::Event::default().event("end").data("{}")).await;
        More::No
    }

    async fn tell(&self, event: sse::Event) -> More {
        match self.to.send(Ok(event)).await {
            Ok(()) => More::Yes,
            Err(_) => More::No,
        }
    }
}

fn entry(row: &EventRow) -> sse::Event {
    let data = serde_json::to_value(row).expect("an event is JSON. This is a bug.");
    let name = data["event"].as_str().unwrap_or("message").to_owned();
    sse::Event::default().id(row.seq.to_string()).event(name).data(data.to_string())
}

/// Returns when there may be news of job `id`.
pub async fn hear(signals: &mut Receiver<Signal>, id: Uuid) {
    loop {
        match signals.recv().await {
            Ok(Signal::Told(job)) if job == id => return,
            Ok(Signal::Told(_) | Signal::Queued | Signal::Wished(_)) => {}
            Ok(Signal::Reconnected) | Err(RecvError::Lagged(_)) => return,
            // Nobody sends any more; polling remains.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}
