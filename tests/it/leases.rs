//! Leases: whoever holds the newest epoch writes, nobody else does.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use secateur::job::progress::{Event, Stage};
use secateur::job::report::{Failure, FailureKind};
use secateur::job::state::JobState;
use secateur::service::db::{
    Database, Dead, Error, Lease, Limits, NewArtifact, NewJob, Progress, Renewal, Tenant,
};
use tokio::time::sleep;
use uuid::Uuid;

use crate::db::{insert, job, log};
use crate::support::postgres::{connect, fresh, fresh_options};

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

fn failure(kind: FailureKind) -> Failure {
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
        database.job_insert(TENANT, &NewJob { priority, ..job(name) }).await.unwrap();
    }
    let mut order = Vec::new();
    while let Some((_, row)) = database.claim(Uuid::new_v4(), TTL).await.unwrap() {
        order.push(row.name.unwrap());
    }
    assert_eq!(order, ["urgent", "old", "young"]);
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
    let late = database.fail(old, &failure(FailureKind::Bug), AT_ONCE).await;
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
        assert_eq!(database.fail(lease, &failure(FailureKind::Device), AT_ONCE).await.unwrap(), state);
    }
    let row = database.job(TENANT, id).await.unwrap().unwrap();
    let spent = row.failure.unwrap();
    assert_eq!(spent.kind, FailureKind::AttemptsSpent);
    assert!(spent.message.contains("3 attempts") && spent.message.contains("it broke"), "{spent}");

    let id = insert(&database, "data").await.id;
    let lease = claim(&database).await;
    let state = database.fail(lease, &failure(FailureKind::Data), AT_ONCE).await.unwrap();
    assert_eq!(state, JobState::Failed);
    assert_eq!(database.job(TENANT, id).await.unwrap().unwrap().failure, Some(failure(FailureKind::Data)));
}

#[tokio::test]
async fn the_next_attempt_waits_twice_as_long_each_time() {
    let database = fresh().await;
    insert(&database, "job").await;
    let limits = Limits { backoff: Duration::from_secs(600), ..AT_ONCE };
    let lease = claim(&database).await;
    database.fail(lease, &failure(FailureKind::Storage), limits).await.unwrap();
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
        let state = database.fail(lease, &failure(FailureKind::Crash), AT_ONCE).await.unwrap();
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
