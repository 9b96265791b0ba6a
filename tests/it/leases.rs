//! Leases: whoever holds the newest epoch writes, nobody else does.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use secateur::job::progress::{Event, Stage};
use secateur::job::report::{Failure, FailureKind};
use secateur::job::spec::JobSpec;
use secateur::job::state::JobState;
use secateur::service::db::{
    Database, Dead, Error, JobRow, Lease, Limits, NewArtifact, NewJob, Progress, Renewal, Tenant, WorkerSelf,
};
use serde_json::{Value, json};
use tokio::time::sleep;
use uuid::Uuid;

use crate::db::{insert, job, log};
use crate::support::postgres::{connect, fresh, fresh_options, worker};

const TENANT: Tenant = Tenant::DEFAULT;
const TTL: Duration = Duration::from_secs(60);
const AT_ONCE: Limits = Limits { attempts: 3, crashes: 3, backoff: Duration::ZERO };

async fn claim(database: &Database) -> Lease {
    database.claim(Uuid::new_v4(), TTL).await.unwrap().unwrap().0
}

/// A lease that has run out already.
async fn expired(database: &Database) -> Lease {
    let lease = database.claim(Uuid::new_v4(), Duration::ZERO).await.unwrap().unwrap().0;
    sleep(Duration::from_millis(2)).await;
    lease
}

fn failure_of(kind: FailureKind) -> Failure {
    Failure { kind, stage: Some(Stage::Heal), message: "it broke".into() }
}

fn file(lease: Lease) -> NewArtifact {
    NewArtifact {
        path: "eval.json".into(),
        sha256: format!("{:064x}", lease.epoch),
        size_bytes: 1,
        location: format!("jobs/{}/e{}/eval.json", lease.job, lease.epoch),
    }
}

#[tokio::test]
async fn the_most_important_job_goes_first_then_the_oldest() {
    let database = fresh().await;
    for (name, priority) in [("old", 0), ("young", 0), ("urgent", 5)] {
        with(&database, TENANT, name, json!({"priority": priority})).await;
    }
    let mut order = Vec::new();
    while let Some((_, row)) = database.claim(Uuid::new_v4(), TTL).await.unwrap() {
        order.push(row.name.unwrap());
    }
    assert_eq!(order, ["urgent", "old", "young"]);
}

/// Puts in a job whose spec has `more`.
async fn with(database: &Database, tenant: Tenant, name: &str, more: Value) -> Uuid {
    let mut spec = serde_json::to_value(job(name).spec).unwrap();
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let job = NewJob::new(JobSpec::read(spec).unwrap());
    database.job_insert(tenant, &job).await.unwrap().id
}

#[tokio::test]
async fn priorities_order_the_jobs_of_a_tenant_and_hold_up_no_other() {
    let options = fresh_options().await;
    let database = connect(&options).await;
    database.migrate().await.unwrap();
    let pool = sqlx::PgPool::connect_with(options).await.unwrap();
    sqlx::query("insert into tenants (id, name) values (2, 'other')").execute(&pool).await.unwrap();
    for name in ["a", "b", "c"] {
        with(&database, TENANT, name, json!({"priority": 100})).await;
    }
    for (name, priority) in [("x", -100), ("y", 0)] {
        with(&database, Tenant(2), name, json!({"priority": priority})).await;
    }
    let mut order = String::new();
    while let Some((_, row)) = database.claim(Uuid::new_v4(), TTL).await.unwrap() {
        order += &row.name.unwrap();
    }
    assert_eq!(order, "aybxc", "each in turn, and of each the most important");
}

#[tokio::test]
async fn a_job_goes_only_to_a_worker_that_has_what_it_asks_for() {
    let database = fresh().await;
    let (plain, gpu) = (Uuid::from_u128(1), Uuid::from_u128(2));
    database.worker_started(&worker(plain, "cpu")).await.unwrap();
    let labels = [("gpu", "a100"), ("zone", "b")].map(|(k, v)| (k.to_string(), v.to_string())).into();
    let large = WorkerSelf { labels, job_memory_bytes: 80 << 30, ..worker(gpu, "cuda:0") };
    database.worker_started(&large).await.unwrap();
    for (name, resources) in [
        ("labelled", json!({"labels": {"gpu": "a100"}})),
        ("large", json!({"min_memory_bytes": 40_u64 << 30})),
        ("nowhere", json!({"labels": {"gpu": "a100", "zone": "a"}})),
        ("anywhere", json!({"min_memory_bytes": 12_u64 << 30})),
    ] {
        with(&database, TENANT, name, json!({"resources": resources})).await;
    }
    let name = |claimed: Option<(Lease, JobRow)>| claimed.map(|(_, row)| row.name.unwrap());
    // One that is nobody known has no labels and no memory to speak of.
    assert_eq!(name(database.claim(Uuid::new_v4(), TTL).await.unwrap()), None);
    assert_eq!(name(database.claim(plain, TTL).await.unwrap()).unwrap(), "anywhere");
    assert_eq!(name(database.claim(plain, TTL).await.unwrap()), None);
    for expected in [Some("labelled".to_string()), Some("large".into()), None] {
        assert_eq!(name(database.claim(gpu, TTL).await.unwrap()), expected);
    }
}

#[tokio::test]
async fn a_job_that_has_waited_as_long_as_it_may_is_not_begun_and_fails() {
    let database = fresh().await;
    let late = with(&database, TENANT, "late", json!({"deadlines": {"max_queue_s": 1}})).await;
    let patient = with(&database, TENANT, "patient", json!({"deadlines": {"max_queue_s": 1000}})).await;
    assert_eq!(database.expire().await.unwrap(), 0);
    sleep(Duration::from_millis(1100)).await;
    assert_eq!(claim(&database).await.job, patient, "the other is too late, found out or not");
    assert_eq!(database.expire().await.unwrap(), 1);
    let row = database.job(TENANT, late).await.unwrap().unwrap();
    let failure = row.failure.unwrap();
    assert_eq!((row.state, failure.kind), (JobState::Failed, FailureKind::QueueDeadline));
    assert!(
        failure.message.contains("deadlines.max_queue_s") && failure.message.contains("1 s"),
        "{failure}"
    );
    log(&database, late).await;
}

#[tokio::test]
async fn each_wait_has_the_whole_deadline_and_a_pause_is_no_wait() {
    let database = fresh().await;
    let id = with(&database, TENANT, "job", json!({"deadlines": {"max_queue_s": 1}})).await;
    database.job_pause(TENANT, id).await.unwrap();
    sleep(Duration::from_millis(1100)).await;
    assert_eq!(database.expire().await.unwrap(), 0);
    database.job_resume(TENANT, id).await.unwrap();
    assert_eq!(database.expire().await.unwrap(), 0, "it waits only since it was resumed");
    assert_eq!(claim(&database).await.job, id);
}

#[tokio::test]
async fn running_time_is_counted_over_all_attempts_and_its_deadline_ends_them() {
    let database = fresh().await;
    let spec = json!({"deadlines": {"max_run_s": 1}});
    let id = with(&database, TENANT, "long", spec.clone()).await;
    let lease = claim(&database).await;
    sleep(Duration::from_millis(600)).await;
    assert_eq!(database.renew(lease, TTL, None).await.unwrap(), Renewal::Go);
    assert_eq!(database.release(lease, "drained").await.unwrap(), JobState::Queued);
    let ran = database.job(TENANT, id).await.unwrap().unwrap().run_seconds;
    assert!((0.6..1.0).contains(&ran), "{ran}");
    let lease = claim(&database).await;
    sleep(Duration::from_millis(500)).await;
    assert_eq!(database.renew(lease, TTL, None).await.unwrap(), Renewal::Spent);
    assert_eq!(database.release(lease, "its time to run is spent").await.unwrap(), JobState::Failed);
    let row = database.job(TENANT, id).await.unwrap().unwrap();
    let failure = row.failure.unwrap();
    assert_eq!(failure.kind, FailureKind::RunDeadline);
    assert!(
        failure.message.contains("deadlines.max_run_s") && failure.message.contains("retry"),
        "{failure}"
    );

    // The user's wish has the word; a result that comes late is a result; and nobody tries again what is spent.
    for (name, ended) in [
        ("cancel", JobState::Cancelled),
        ("finish", JobState::Succeeded),
        ("fail", JobState::Failed),
        ("reap", JobState::Failed),
    ] {
        let id = with(&database, TENANT, name, spec.clone()).await;
        let lease = if name == "reap" { expired(&database).await } else { claim(&database).await };
        sleep(Duration::from_millis(1050)).await;
        match name {
            "cancel" => {
                database.job_cancel(TENANT, id).await.unwrap();
                assert_eq!(database.renew(lease, TTL, None).await.unwrap(), Renewal::Cancel);
                database.release(lease, "cancelled").await.unwrap();
            }
            "finish" => database.finish(lease, &[file(lease)]).await.unwrap(),
            "fail" => drop(database.fail(lease, &failure_of(FailureKind::Device), AT_ONCE).await.unwrap()),
            _ => assert_eq!(database.reap(Dead::Expired, AT_ONCE).await.unwrap(), 1),
        }
        assert_eq!(database.job(TENANT, id).await.unwrap().unwrap().state, ended, "{name}");
        log(&database, id).await;
    }
}

#[tokio::test]
async fn the_epoch_is_the_fence_and_not_the_clock() {
    let database = fresh().await;
    let id = insert(&database, "job").await.id;
    let old = expired(&database).await;
    assert_eq!(database.renew(old, TTL, None).await.unwrap(), Renewal::Go, "nobody took it away");
    assert_eq!(database.reap(Dead::Expired, AT_ONCE).await.unwrap(), 0, "it lives again");
    assert_eq!(database.renew(old, Duration::ZERO, None).await.unwrap(), Renewal::Go);
    sleep(Duration::from_millis(2)).await;
    assert_eq!(database.reap(Dead::Expired, AT_ONCE).await.unwrap(), 1);
    let new = claim(&database).await;
    assert!(new.epoch > old.epoch);

    let before = database.job(TENANT, id).await.unwrap();
    assert_eq!(database.renew(old, TTL, None).await.unwrap(), Renewal::Lost);
    let told = [Event::StageStarted { stage: Stage::Profile }];
    assert!(matches!(database.record(old, &told).await, Err(Error::LeaseLost)));
    assert!(matches!(database.finish(old, &[file(old)]).await, Err(Error::LeaseLost)));
    assert!(matches!(database.release(old, "late").await, Err(Error::LeaseLost)));
    let late = database.fail(old, &failure_of(FailureKind::Bug), AT_ONCE).await;
    assert!(matches!(late, Err(Error::LeaseLost)));
    assert_eq!(database.job(TENANT, id).await.unwrap(), before, "the old one wrote nothing");
    assert!(database.artifacts(TENANT, id).await.unwrap().is_empty());

    database.finish(new, &[file(new)]).await.unwrap();
    let files = database.artifacts(TENANT, id).await.unwrap();
    assert_eq!((files.len(), files[0].epoch), (1, new.epoch));
    assert_eq!(database.artifact(TENANT, id, "eval.json").await.unwrap().unwrap(), files[0]);
    assert_eq!(database.job(TENANT, id).await.unwrap().unwrap().state, JobState::Succeeded);
    assert!(matches!(database.finish(new, &[]).await, Err(Error::LeaseLost)), "once only");
}

#[tokio::test]
async fn a_heartbeat_carries_progress_up_and_wishes_down() {
    let database = fresh().await;
    let id = insert(&database, "job").await.id;
    let lease = claim(&database).await;
    let progress =
        Progress { stage: Stage::Heal, task: "steps".into(), done: 3, total: 9, unit: "step".into() };
    assert_eq!(database.renew(lease, TTL, Some(&progress)).await.unwrap(), Renewal::Go);
    assert_eq!(database.renew(lease, TTL, None).await.unwrap(), Renewal::Go);
    assert_eq!(database.job(TENANT, id).await.unwrap().unwrap().progress, Some(progress));
    database.job_pause(TENANT, id).await.unwrap();
    assert_eq!(database.renew(lease, TTL, None).await.unwrap(), Renewal::Pause);
    database.job_cancel(TENANT, id).await.unwrap();
    assert_eq!(database.renew(lease, TTL, None).await.unwrap(), Renewal::Cancel);
}

#[tokio::test]
async fn a_failure_that_may_pass_is_tried_three_times_and_any_other_once() {
    let database = fresh().await;
    let id = insert(&database, "device").await.id;
    for state in [JobState::Queued, JobState::Queued, JobState::Failed] {
        let lease = claim(&database).await;
        assert_eq!(database.fail(lease, &failure_of(FailureKind::Device), AT_ONCE).await.unwrap(), state);
    }
    let row = database.job(TENANT, id).await.unwrap().unwrap();
    let spent = row.failure.unwrap();
    assert_eq!(spent.kind, FailureKind::AttemptsSpent);
    assert!(spent.message.contains("3 attempts") && spent.message.contains("it broke"), "{spent}");

    let id = insert(&database, "data").await.id;
    let lease = claim(&database).await;
    let state = database.fail(lease, &failure_of(FailureKind::Data), AT_ONCE).await.unwrap();
    assert_eq!(state, JobState::Failed);
    assert_eq!(database.job(TENANT, id).await.unwrap().unwrap().failure, Some(failure_of(FailureKind::Data)));
}

#[tokio::test]
async fn the_next_attempt_waits_twice_as_long_each_time() {
    let database = fresh().await;
    insert(&database, "job").await;
    let limits = Limits { backoff: Duration::from_secs(600), ..AT_ONCE };
    let lease = claim(&database).await;
    database.fail(lease, &failure_of(FailureKind::Storage), limits).await.unwrap();
    assert!(database.claim(Uuid::new_v4(), TTL).await.unwrap().is_none());
    let row = database.job(TENANT, lease.job).await.unwrap().unwrap();
    let wait = row.run_after - database.ping().await.unwrap();
    assert!(wait > Duration::from_secs(500) && wait <= Duration::from_secs(600), "{wait}");
}

#[tokio::test]
async fn a_drain_costs_no_attempt() {
    let database = fresh().await;
    let id = insert(&database, "job").await.id;
    for _ in 0..10 {
        let lease = claim(&database).await;
        assert_eq!(database.release(lease, "its worker is shutting down").await.unwrap(), JobState::Queued);
    }
    let row = database.job(TENANT, id).await.unwrap().unwrap();
    assert_eq!((row.attempt, row.crashes, row.epoch), (0, 0, 10));
}

#[tokio::test]
async fn a_job_that_loses_three_workers_is_poison() {
    let database = fresh().await;
    let id = insert(&database, "poison").await.id;
    for state in [JobState::Queued, JobState::Queued, JobState::Failed] {
        expired(&database).await;
        assert_eq!(database.reap(Dead::Expired, AT_ONCE).await.unwrap(), 1);
        assert_eq!(database.job(TENANT, id).await.unwrap().unwrap().state, state);
    }
    let row = database.job(TENANT, id).await.unwrap().unwrap();
    assert_eq!(row.failure.unwrap().kind, FailureKind::AttemptsSpent);
    assert!(database.claim(Uuid::new_v4(), TTL).await.unwrap().is_none());
}

#[tokio::test]
async fn lost_workers_and_failures_are_counted_apart() {
    let database = fresh().await;
    let id = insert(&database, "unlucky").await.id;
    for _ in 0..2 {
        expired(&database).await;
        database.reap(Dead::Expired, AT_ONCE).await.unwrap();
        let lease = claim(&database).await;
        let state = database.fail(lease, &failure_of(FailureKind::Crash), AT_ONCE).await.unwrap();
        assert_eq!(state, JobState::Queued);
    }
    let lease = claim(&database).await;
    database.finish(lease, &[]).await.unwrap();
    let row = database.job(TENANT, id).await.unwrap().unwrap();
    assert_eq!((row.state, row.attempt, row.crashes, row.failure), (JobState::Succeeded, 5, 2, None));
}

#[tokio::test]
async fn a_wish_is_granted_when_its_worker_is_lost() {
    let database = fresh().await;
    for (name, state) in [("cancel", JobState::Cancelled), ("pause", JobState::Paused)] {
        let id = insert(&database, name).await.id;
        expired(&database).await;
        match state {
            JobState::Cancelled => database.job_cancel(TENANT, id).await.unwrap(),
            _ => database.job_pause(TENANT, id).await.unwrap(),
        };
        database.reap(Dead::Expired, AT_ONCE).await.unwrap();
        assert_eq!(database.job(TENANT, id).await.unwrap().unwrap().state, state);
    }
}

#[tokio::test]
async fn the_leases_of_one_dead_worker_are_taken_and_no_others() {
    let database = fresh().await;
    insert(&database, "a").await;
    insert(&database, "b").await;
    let (dead, alive) = (Uuid::new_v4(), Uuid::new_v4());
    let (lost, _) = database.claim(dead, TTL).await.unwrap().unwrap();
    let (kept, _) = database.claim(alive, TTL).await.unwrap().unwrap();
    assert_eq!(database.reap(Dead::Worker(dead), AT_ONCE).await.unwrap(), 1);
    assert_eq!(database.renew(lost, TTL, None).await.unwrap(), Renewal::Lost);
    assert_eq!(database.renew(kept, TTL, None).await.unwrap(), Renewal::Go);
}

/// What the workers of the chaos saw.
#[derive(Default)]
struct History {
    claims: Vec<(Uuid, i64)>,
    finishes: Vec<(Uuid, i64)>,
    rejected: usize,
}

/// Small and seeded: the same dice every time.
struct Dice(u64);

impl Dice {
    fn percent(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % 100
    }
}

const CHAOS_TTL: Duration = Duration::from_millis(200);
const PATIENT: Limits = Limits { attempts: 10_000, crashes: 10_000, backoff: Duration::from_millis(5) };

/// Claims and works until all is done; stalls past its lease and vanishes now and then.
async fn chaotic_worker(database: Database, history: Arc<Mutex<History>>, seed: u64, jobs: usize) {
    let mut dice = Dice(seed);
    while history.lock().unwrap().finishes.len() < jobs {
        let Some((lease, _)) = database.claim(Uuid::new_v4(), CHAOS_TTL).await.unwrap() else {
            sleep(Duration::from_millis(10)).await;
            continue;
        };
        history.lock().unwrap().claims.push((lease.job, lease.epoch));
        let told = [Event::StageStarted { stage: Stage::Heal }];
        let recorded = database.record(lease, &told).await;
        assert!(matches!(recorded, Ok(()) | Err(Error::LeaseLost)), "{recorded:?}");
        if dice.percent() < 15 {
            sleep(CHAOS_TTL * 2).await;
        }
        database.renew(lease, CHAOS_TTL, None).await.unwrap();
        if dice.percent() < 10 {
            continue; // Vanished: the lease runs out.
        }
        match database.finish(lease, &[file(lease)]).await {
            Ok(()) => history.lock().unwrap().finishes.push((lease.job, lease.epoch)),
            Err(Error::LeaseLost) => history.lock().unwrap().rejected += 1,
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_workers_do_each_job_is_finished_exactly_once() {
    const JOBS: usize = 60;
    const MAX_RUNNING: i64 = 4;
    let options = fresh_options().await;
    let database = connect(&options).await;
    database.migrate().await.unwrap();
    let pool = sqlx::PgPool::connect_with(options).await.unwrap();
    sqlx::query("update tenants set max_running = $1").bind(MAX_RUNNING as i32).execute(&pool).await.unwrap();
    for i in 0..JOBS {
        insert(&database, &format!("job{i}")).await;
    }
    let history = Arc::new(Mutex::new(History::default()));
    let mut tasks = tokio::task::JoinSet::new();
    for seed in 0..8 {
        tasks.spawn(chaotic_worker(database.clone(), history.clone(), seed, JOBS));
    }
    let reapers = (0..2).map(|_| {
        let (database, pool) = (database.clone(), pool.clone());
        tokio::spawn(async move {
            loop {
                database.reap(Dead::Expired, PATIENT).await.unwrap();
                let count = "select count(*) from leases";
                let running: i64 = sqlx::query_scalar(count).fetch_one(&pool).await.unwrap();
                assert!(running <= MAX_RUNNING, "{running} run at once");
                sleep(Duration::from_millis(20)).await;
            }
        })
    });
    let reapers: Vec<_> = reapers.collect();
    tokio::time::timeout(Duration::from_secs(120), async {
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    })
    .await
    .expect("every job ends while workers stay up");
    for reaper in reapers {
        assert!(!reaper.is_finished(), "the limit held");
        reaper.abort();
    }
    let (claims, finishes) = {
        let history = history.lock().unwrap();
        assert!(history.rejected > 0 && history.claims.len() > JOBS, "nothing was lost: no chaos");
        (history.claims.clone(), history.finishes.clone())
    };
    check(&database, &claims, &finishes, JOBS).await;
}

async fn check(database: &Database, claims: &[(Uuid, i64)], finishes: &[(Uuid, i64)], jobs: usize) {
    assert_eq!(claims.iter().collect::<HashSet<_>>().len(), claims.len(), "an epoch was claimed twice");
    let accepted: HashMap<Uuid, i64> = finishes.iter().copied().collect();
    assert_eq!((accepted.len(), finishes.len()), (jobs, jobs), "each job is finished once");
    for (id, epoch) in claims {
        assert!(accepted[id] >= *epoch, "a finished job was claimed again");
    }
    for (id, epoch) in &accepted {
        let row = database.job(TENANT, *id).await.unwrap().unwrap();
        assert_eq!((row.state, row.epoch), (JobState::Succeeded, *epoch));
        let files = database.artifacts(TENANT, *id).await.unwrap();
        assert!(files.len() == 1 && files[0].epoch == *epoch, "files are of the attempt that counted");
        log(database, *id).await;
    }
}
