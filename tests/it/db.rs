//! The job database: what goes in comes out, wishes, events without gaps, signals.

use std::collections::BTreeMap;
use std::time::Duration;

use secateur::job::progress::{Event, Stage};
use secateur::job::spec::JobSpec;
use secateur::job::state::{JobState, Wish};
use secateur::service::db::{
    Cursor, Database, Deletion, Entry, Error, JobEvent, JobFilter, JobRow, Lease, NewApiKey, NewJob, Signal,
    Tenant,
};
use serde_json::json;
use time::OffsetDateTime;
use tokio::sync::broadcast::Receiver;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::support::postgres::{connect, fresh, fresh_options};

const TENANT: Tenant = Tenant::DEFAULT;
const TTL: Duration = Duration::from_secs(60);

pub fn job(name: &str) -> NewJob {
    let spec = json!({"name": name, "labels": {"team": "nlp", "n": name},
        "model": {"from": "path", "path": "/models/tiny"}, "prune": {"amount": {"layers": 1}}});
    NewJob::new(JobSpec::read(spec).unwrap())
}

pub async fn insert(database: &Database, name: &str) -> JobRow {
    database.job_insert(TENANT, &job(name)).await.unwrap()
}

async fn claim(database: &Database) -> (Lease, JobRow) {
    database.claim(Uuid::new_v4(), TTL).await.unwrap().unwrap()
}

/// Every event of a job; its numbers must run from 1 without gaps.
pub async fn log(database: &Database, id: Uuid) -> Vec<Entry> {
    let rows = database.events_after(TENANT, id, 0, &[], 100_000).await.unwrap();
    let numbers: Vec<i64> = rows.iter().map(|r| r.seq).collect();
    assert_eq!(numbers, (1..=rows.len() as i64).collect::<Vec<_>>(), "gap-free");
    rows.into_iter().map(|r| r.body).collect()
}

fn names(jobs: &[JobRow]) -> Vec<&str> {
    jobs.iter().filter_map(|j| j.name.as_deref()).collect()
}

#[tokio::test]
async fn a_job_comes_out_as_it_went_in() {
    let database = fresh().await;
    let put = job("first");
    let row = database.job_insert(TENANT, &put).await.unwrap();
    let read = database.job(TENANT, row.id).await.unwrap().unwrap();
    assert_eq!(read, row);
    assert_eq!(read.spec, put.spec);
    assert_eq!((read.state, read.attempt, read.epoch, read.wish), (JobState::Queued, 0, 0, None));
    assert_eq!(read.labels["team"], "nlp");
    assert_eq!(read.id.get_version_num(), 7);
    let queued = Entry::Job(JobEvent::StateChanged { state: JobState::Queued, reason: None });
    assert_eq!(log(&database, row.id).await, [queued]);
    assert_eq!(database.job(TENANT, Uuid::now_v7()).await.unwrap(), None);
}

#[tokio::test]
async fn lists_are_newest_first_paged_and_filtered() {
    let database = fresh().await;
    let mut ids = Vec::new();
    for name in ["a", "b", "c", "d", "e"] {
        ids.push(insert(&database, name).await.id);
    }
    database.job_cancel(TENANT, ids[1]).await.unwrap();
    let list = async |filter: JobFilter| database.job_list(TENANT, &filter, 2).await.unwrap();

    let first = list(JobFilter::default()).await;
    assert_eq!((names(&first.jobs), first.has_more), (vec!["e", "d"], true));
    let second = list(JobFilter { cursor: Cursor::After(first.jobs[1].id), ..JobFilter::default() }).await;
    assert_eq!((names(&second.jobs), second.has_more), (vec!["c", "b"], true));
    let last = list(JobFilter { cursor: Cursor::After(second.jobs[1].id), ..JobFilter::default() }).await;
    assert_eq!((names(&last.jobs), last.has_more), (vec!["a"], false));

    let states = vec![JobState::Cancelled, JobState::Failed];
    assert_eq!(names(&list(JobFilter { states, ..JobFilter::default() }).await.jobs), ["b"]);
    let labels = BTreeMap::from([("n".to_owned(), "c".to_owned()), ("team".to_owned(), "nlp".to_owned())]);
    assert_eq!(names(&list(JobFilter { labels, ..JobFilter::default() }).await.jobs), ["c"]);
    let name = Some("d".to_owned());
    assert_eq!(names(&list(JobFilter { name, ..JobFilter::default() }).await.jobs), ["d"]);
    assert_eq!(database.jobs_ahead(TENANT, ids[3]).await.unwrap(), Some(2));
    assert_eq!(database.jobs_ahead(TENANT, ids[1]).await.unwrap(), None);
    let mut counts = database.job_counts().await.unwrap();
    counts.sort_by_key(|(state, _)| state.name());
    assert_eq!(counts, [(JobState::Cancelled, 1), (JobState::Queued, 4)]);
}

#[tokio::test]
async fn a_tenant_sees_nothing_of_another() {
    let options = fresh_options().await;
    let database = connect(&options).await;
    database.migrate().await.unwrap();
    let pool = sqlx::PgPool::connect_with(options).await.unwrap();
    sqlx::query("insert into tenants (name) values ('other')").execute(&pool).await.unwrap();
    let other = Tenant(2);
    let id = insert(&database, "mine").await.id;
    assert_eq!(database.job(other, id).await.unwrap(), None);
    assert_eq!(database.job_list(other, &JobFilter::default(), 10).await.unwrap().jobs, []);
    assert_eq!(database.events_after(other, id, 0, &[], 10).await.unwrap(), []);
    assert_eq!(database.job_cancel(other, id).await.unwrap(), None);
    assert_eq!(database.job_delete(other, id).await.unwrap(), Deletion::Unknown);
    assert_eq!(database.job(TENANT, id).await.unwrap().unwrap().state, JobState::Queued);
}

#[tokio::test]
async fn a_waiting_job_is_cancelled_at_once_and_a_running_one_by_wish() {
    let database = fresh().await;
    let waiting = insert(&database, "waiting").await.id;
    let cancelled = database.job_cancel(TENANT, waiting).await.unwrap().unwrap();
    assert_eq!(cancelled.state, JobState::Cancelled);
    assert!(cancelled.finished_at.is_some());
    let again = database.job_cancel(TENANT, waiting).await.unwrap().unwrap();
    assert_eq!(again, cancelled, "cancelling twice changes nothing");
    assert!(matches!(database.job_resume(TENANT, waiting).await, Err(Error::Illegal(_))));

    let running = insert(&database, "running").await.id;
    let (lease, _) = claim(&database).await;
    assert_eq!(lease.job, running);
    assert_eq!(database.job_delete(TENANT, running).await.unwrap(), Deletion::Running);
    let row = database.job_cancel(TENANT, running).await.unwrap().unwrap();
    assert_eq!((row.state, row.wish), (JobState::Running, Some(Wish::Cancel)));
    database.job_cancel(TENANT, running).await.unwrap();
    database.job_pause(TENANT, running).await.unwrap();
    let wishes = log(&database, running).await;
    let wishes = wishes.iter().filter(|e| matches!(e, Entry::Job(JobEvent::WishNoted { .. }))).count();
    assert_eq!(wishes, 1, "said again is not said twice, and cancelling outdoes pausing");
    assert_eq!(database.release(lease, "stopped").await.unwrap(), JobState::Cancelled);
    assert_eq!(database.job_delete(TENANT, running).await.unwrap(), Deletion::Done);
    assert_eq!(database.job(TENANT, running).await.unwrap(), None);
}

#[tokio::test]
async fn a_paused_job_waits_until_it_is_resumed() {
    let database = fresh().await;
    let id = insert(&database, "job").await.id;
    assert_eq!(database.job_pause(TENANT, id).await.unwrap().unwrap().state, JobState::Paused);
    assert!(database.claim(Uuid::new_v4(), TTL).await.unwrap().is_none());
    assert_eq!(database.job_resume(TENANT, id).await.unwrap().unwrap().state, JobState::Queued);
    let (lease, _) = claim(&database).await;
    database.job_pause(TENANT, id).await.unwrap();
    assert_eq!(database.release(lease, "paused").await.unwrap(), JobState::Paused);
    let row = database.job_resume(TENANT, id).await.unwrap().unwrap();
    assert_eq!((row.state, row.wish, row.attempt), (JobState::Queued, None, 0), "a pause costs no attempt");
}

#[tokio::test]
async fn events_of_many_writers_are_numbered_without_gaps() {
    let database = fresh().await;
    let id = insert(&database, "job").await.id;
    let (lease, _) = claim(&database).await;
    let writers = (0..8).map(|writer| {
        let database = database.clone();
        tokio::spawn(async move {
            for step in 0..10 {
                let value = f64::from(writer) + 0.1;
                let name = format!("loss{writer}");
                let told = vec![Event::Measured { stage: Stage::Heal, name, step, value }; 3];
                database.record(lease, &told).await.unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    assert_eq!(log(&database, id).await.len(), 2 + 8 * 10 * 3);
    let page = database.events_after(TENANT, id, 5, &[], 7).await.unwrap();
    assert_eq!((page.len(), page[0].seq), (7, 6));
    let series = database.series(TENANT, id, Some("loss3")).await.unwrap();
    assert_eq!(series.len(), 10, "each step once");
}

#[tokio::test]
async fn stage_rows_follow_what_the_run_tells() {
    let database = fresh().await;
    let id = insert(&database, "job").await.id;
    let (lease, _) = claim(&database).await;
    let started = |stage| Event::StageStarted { stage };
    let finished =
        |stage, reused| Event::StageFinished { stage, reused, duration_ms: 7, input_digest: "d".repeat(64) };
    let told = [started(Stage::Profile), finished(Stage::Profile, false), started(Stage::Select)];
    database.record(lease, &told).await.unwrap();
    let states = async || {
        let rows = database.stages(TENANT, id).await.unwrap();
        rows.iter().map(|r| (r.stage, r.state.name(), r.reused, r.attempt)).collect::<Vec<_>>()
    };
    assert_eq!(
        states().await,
        [(Stage::Profile, "finished", false, 1), (Stage::Select, "running", false, 1)]
    );
    database.release(lease, "drain").await.unwrap();
    assert_eq!(states().await[1], (Stage::Select, "stopped", false, 1));
    let (lease, _) = claim(&database).await;
    database.record(lease, &[started(Stage::Profile), finished(Stage::Profile, true)]).await.unwrap();
    assert_eq!(states().await[0], (Stage::Profile, "finished", true, 1));
}

async fn hear(signals: &mut Receiver<Signal>, wanted: Signal) {
    let heard = async { while signals.recv().await.unwrap() != wanted {} };
    tokio::time::timeout(Duration::from_secs(20), heard).await.unwrap();
}

#[tokio::test]
async fn signals_wake_listeners_also_after_a_lost_connection() {
    let options = fresh_options().await;
    let database = connect(&options).await;
    database.migrate().await.unwrap();
    let (mut signals, stop) = (database.signals(), CancellationToken::new());
    let listener = database.clone();
    let token = stop.clone();
    let listening = tokio::spawn(async move { listener.listen(token).await });
    hear(&mut signals, Signal::Reconnected).await;
    let id = insert(&database, "job").await.id;
    hear(&mut signals, Signal::Queued).await;
    let (lease, _) = claim(&database).await;
    database.job_cancel(TENANT, id).await.unwrap();
    hear(&mut signals, Signal::Wished(id)).await;
    database.record(lease, &[Event::StageStarted { stage: Stage::Profile }]).await.unwrap();
    hear(&mut signals, Signal::Told(id)).await;

    let pool = sqlx::PgPool::connect_with(options).await.unwrap();
    let cut = "select pg_terminate_backend(pid) from pg_stat_activity
               where datname = current_database() and pid <> pg_backend_pid()";
    sqlx::query(cut).execute(&pool).await.unwrap();
    hear(&mut signals, Signal::Reconnected).await;
    insert(&database, "next").await;
    hear(&mut signals, Signal::Queued).await;
    stop.cancel();
    listening.await.unwrap();
}

#[tokio::test]
async fn many_processes_may_migrate_at_once() {
    let options = fresh_options().await;
    let (one, two) = (connect(&options).await, connect(&options).await);
    let (first, second) = tokio::join!(one.migrate(), two.migrate());
    first.unwrap();
    second.unwrap();
    insert(&one, "job").await;
}

#[tokio::test]
async fn a_key_opens_until_it_expires_or_is_revoked() {
    let database = fresh().await;
    assert!(!database.key_exists().await.unwrap());
    let key = |id: &str, expires_at| NewApiKey {
        id: id.into(),
        tenant: TENANT,
        name: "test".into(),
        sha256: [7; 32],
        scopes: vec!["admin".into()],
        expires_at,
    };
    let past = OffsetDateTime::now_utc() - Duration::from_secs(3600);
    database.key_put(&key("old", Some(past))).await.unwrap();
    assert_eq!(database.key("old").await.unwrap(), None);
    assert!(database.key_exists().await.unwrap(), "time does not open the door");
    assert!(!database.key_exists_with(TENANT, "admin").await.unwrap());
    database.key_put(&key("new", None)).await.unwrap();
    let row = database.key("new").await.unwrap().unwrap();
    assert_eq!((row.tenant, &row.sha256[..], row.last_used_at), (TENANT, &[7; 32][..], None));
    database.key_used("new").await.unwrap();
    assert!(database.key("new").await.unwrap().unwrap().last_used_at.is_some());
    assert!(database.key_revoke(TENANT, "new").await.unwrap());
    assert!(!database.key_revoke(TENANT, "new").await.unwrap());
    assert_eq!(database.key("new").await.unwrap(), None);
    assert_eq!(database.keys(TENANT).await.unwrap().len(), 1);
}
