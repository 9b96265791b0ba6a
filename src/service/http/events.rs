//! What happens to a job: as a page, or as a stream that can be taken up again.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc::{self, Sender};
use tokio_stream::wrappers::ReceiverStream;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::auth::{Caller, CallerKey};
use super::extract::{JobId, Pairs, limit, parameter, prefers};
use super::feed::{News, Told};
use super::job::Page;
use super::jobs::job_row;
use super::limits::StreamPlace;
use super::problem::{Problem, ProblemBody};
use crate::service::db::{self, EventRow, JobRow, Signal, page_cut};

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
        (status = 429, description = "The key has as many streams as one may have", body = ProblemBody),
    )
)]
async fn events(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Extension(key): Extension<CallerKey>,
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
        let place = state.turnstile.stream(&key)?;
        return Ok(stream(state, job, after, kinds, place).into_response());
    }
    let mut rows = state.database.events_after(tenant, id, after, &kinds, size + 1).await?;
    let has_more = page_cut(&mut rows, size);
    Ok(Json(Page::new(rows, has_more, |row| row.seq.to_string())).into_response())
}

fn stream(
    state: AppState,
    job: JobRow,
    after: i64,
    kinds: Vec<String>,
    place: StreamPlace,
) -> Sse<impl futures_util::Stream<Item = Result<sse::Event, Infallible>>> {
    let (to, from) = mpsc::channel(AHEAD);
    let shutdown = state.shutdown.clone();
    let follower = Follower { state, job, seq: after, kinds, to };
    tokio::spawn(async move {
        let _place = place;
        tokio::select! {
            // axum waits for open streams at shutdown (axum #2673): they end here.
            () = shutdown.cancelled() => {}
            () = follower.follow() => {}
        }
    });
    Sse::new(ReceiverStream::new(from)).keep_alive(KeepAlive::new().interval(PING).text("ping"))
}

/// Tells one reader what happens to one job.
struct Follower {
    state: AppState,
    job: JobRow,
    /// Number of the last event told.
    seq: i64,
    /// Those that the reader wants; all when there are none.
    kinds: Vec<String>,
    to: Sender<Result<sse::Event, Infallible>>,
}

/// The reader has left.
struct Gone;

impl Follower {
    async fn follow(mut self) {
        // Watching starts before the events so far are read, so nothing falls between.
        let mut news = self.state.feeds.watch(&self.state.database, &self.job);
        loop {
            match self.catch_up().await {
                Ok(Ok(())) => {}
                Ok(Err(Gone)) => return,
                Err(error) => {
                    tracing::warn!(%error, job = %self.job.id, "an event stream waits");
                    tokio::select! {
                        () = self.to.closed() => return,
                        () = tokio::time::sleep(POLL) => continue,
                    }
                }
            }
            // Until it ends, or this reader is so far behind that it must catch up again.
            loop {
                let heard = tokio::select! {
                    () = self.to.closed() => return,
                    heard = news.recv() => heard,
                };
                match heard {
                    Ok(heard) => {
                        if self.tell(&heard).await.is_err() || matches!(*heard, News::End) {
                            return;
                        }
                    }
                    Err(RecvError::Lagged(_)) => break,
                    Err(RecvError::Closed) => return,
                }
            }
        }
    }

    /// Tells what has happened so far.
    async fn catch_up(&mut self) -> db::Result<Result<(), Gone>> {
        loop {
            let database = &self.state.database;
            let rows =
                database.events_after(self.job.tenant, self.job.id, self.seq, &self.kinds, MAX_PAGE).await?;
            for row in &rows {
                if self.tell(&News::Event(Told::new(row))).await.is_err() {
                    return Ok(Err(Gone));
                }
            }
            if rows.len() < MAX_PAGE as usize {
                return Ok(Ok(()));
            }
        }
    }

    /// Passes on what the reader wants and has not been told.
    async fn tell(&mut self, news: &News) -> Result<(), Gone> {
        let event = match news {
            News::Event(told) if told.seq <= self.seq => return Ok(()),
            News::Event(told) => {
                self.seq = told.seq;
                if !self.kinds.is_empty() && !self.kinds.contains(&told.kind) {
                    return Ok(());
                }
                sse::Event::default().id(told.seq.to_string()).event(&told.kind).data(&told.data)
            }
            News::Progress(data) => sse::Event::default().event("progress").data(data),
            News::End => sse::Event::default().event("end").data("{}"),
        };
        self.to.send(Ok(event)).await.map_err(|_| Gone)
    }
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
