//! The worker and its child: what the child does, and what becomes of the job.
//! The child is a script here, so that it can misbehave on purpose.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secateur::job::progress::{Event, Stage};
use secateur::job::report::FailureKind;
use secateur::job::spec::JobSpec;
use secateur::job::state::JobState;
use secateur::service::db::{Database, Dead, Entry, JobRow, Limits, NewJob, Tenant, UploadRow};
use secateur::service::local_pg::LocalPg;
use secateur::service::store::{Store, upload_prefix};
use secateur::worker::{self, Settings, Shutdown, StartError, Turn};
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::db::log;
use crate::support::postgres::{fresh, reachable_directory};

const TENANT: Tenant = Tenant::DEFAULT;

/// Does what the job's name says.
const CHILD: &str = r#"
workspace="${@: -1}"; cd "$workspace"; cat > spec.json; echo $$ > pid
say() { echo "$1"; }
finish() {
  say '{"event":"stage_finished","stage":"profile","reused":false,"duration_ms":5,"input_digest":"abc"}'
  mkdir -p healed/deep; echo '{"layers":1}' > profile.json; echo '{}' > healed/config.json
  echo w > healed/deep/w.safetensors; echo no > healed/.lock; echo no > healed/x.part; echo no > notes.txt
  cp spec.json healed/spec.json; exit 0
}
say '{"event":"stage_started","stage":"profile"}'
for i in 1 2 3; do say '{"event":"advanced","stage":"profile","task":"windows","done":'$i',"total":3,"unit":"window"}'; done
case "$(cat spec.json)" in
  *'"name":"succeed"'*) finish ;;
  *'"name":"babble"'*) say 'no json'; head -c 900000 /dev/zero | tr '\0' x; echo; say '{"event":"noted","stage":null,"message":"a\u0000b"}'; finish ;;
  *'"name":"data"'*) say '{"event":"failed","failure":{"kind":"data","stage":"profile","message":"the corpus is empty"}}'; exit 1 ;;
  *'"name":"spec"'*) echo '/prune/amount: too many' >&2; exit 2 ;;
  *'"name":"empty"'*) exit 0 ;;
  *'"name":"die once"'*) if [ -e died ]; then finish; fi; touch died; echo 'last words' >&2; kill -9 $$ ;;
  *'"name":"fail once"'*) if [ -e failed ]; then finish; fi; touch failed
    say '{"event":"failed","failure":{"kind":"data","stage":"profile","message":"not yet"}}'; exit 1 ;;
  *'"name":"slow"'*) trap 'exit 143' TERM; touch ready; while [ ! -e go ]; do sleep 0.05; done; finish ;;
  *'"name":"stubborn"'*) trap '' TERM; touch ready; while true; do sleep 0.05; done ;;
esac
"#;

struct Shop {
    directory: TempDir,
    database: Database,
    settings: Settings,
    shutdown: Shutdown,
    running: JoinHandle<Result<(), StartError>>,
}

impl Shop {
    async fn open() -> Self {
        Self::with(fresh().await, |_| {})
    }

    fn with(database: Database, change: impl FnOnce(&mut Settings)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("child.sh"), CHILD).unwrap();
        let mut settings = Settings::new(directory.path().join("data")).unwrap();
        settings.program = vec!["bash".into(), directory.path().join("child.sh").into()];
        settings.ttl = Duration::from_secs(2);
        settings.poll = Duration::from_millis(50);
        settings.measure = false;
        settings.stop_grace = Duration::from_secs(20);
        settings.limits = Limits { backoff: Duration::from_millis(1), ..Limits::default() };
        change(&mut settings);
        let shutdown = Shutdown::default();
        let listening = database.clone();
        let stop = shutdown.drain.clone();
        tokio::spawn(async move { listening.listen(stop).await });
        let store = Store::open(directory.path().join("store")).unwrap();
        let (db, set, stop) = (database.clone(), settings.clone(), shutdown.clone());
        let running = tokio::spawn(async move { worker::run(db, store, set, &["cpu".into()], stop).await });
        Self { directory, database, settings, shutdown, running }
    }

    fn store(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    fn workspace(&self, id: Uuid) -> PathBuf {
        self.settings.data.join("work").join(id.to_string())
    }

    async fn submit(&self, name: &str) -> Uuid {
        self.submit_on(name, json!({"from": "path", "path": "/models/tiny"})).await
    }

    async fn submit_on(&self, name: &str, model: serde_json::Value) -> Uuid {
        self.submit_spec(json!({"name": name, "model": model, "prune": {"amount": {"layers": 1}}})).await
    }

    async fn submit_spec(&self, spec: serde_json::Value) -> Uuid {
        let spec = JobSpec::read(spec).unwrap();
        self.database.job_insert(TENANT, &NewJob::new(spec)).await.unwrap().id
    }

    async fn until(&self, id: Uuid, good: impl Fn(&JobRow) -> bool) -> JobRow {
        let wait = async {
            loop {
                // The database may be away for a moment: some tests kill it.
                if let Ok(Some(row)) = self.database.job(TENANT, id).await
                    && good(&row)
                {
                    return row;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(Duration::from_secs(60), wait).await.unwrap()
    }

    async fn end(&self, id: Uuid) -> JobRow {
        self.until(id, |row| row.state.is_terminal()).await
    }

    async fn file(&self, path: &Path) {
        let there = async {
            while !path.exists() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(60), there).await.unwrap();
    }

    async fn gone(&self, path: &Path) {
        let gone = async {
            while path.exists() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(60), gone).await.unwrap();
    }

    async fn close(self) {
        self.shutdown.drain.cancel();
        timeout(Duration::from_secs(60), self.running).await.unwrap().unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_run_that_succeeds_leaves_its_files_in_the_store() {
    let shop = Shop::open().await;
    let id = shop.submit("succeed").await;
    let row = shop.end(id).await;
    assert_eq!((row.state, row.attempt, row.failure), (JobState::Succeeded, 1, None));
    let files = shop.database.artifacts(TENANT, id).await.unwrap();
    let paths: Vec<&str> = files.iter().map(|f| f.path.as_str()).collect();
    assert_eq!(
        paths,
        ["healed/config.json", "healed/deep/w.safetensors", "healed/spec.json", "profile.json"]
    );
    for file in &files {
        let bytes = fs::read(shop.store().join(&file.location)).unwrap();
        assert_eq!(file.size_bytes, bytes.len() as i64);
        assert_eq!(file.sha256, hex::encode(Sha256::digest(&bytes)));
        assert!(file.location.starts_with(&format!("jobs/{id}/e1/")), "{}", file.location);
    }
    let stages = shop.database.stages(TENANT, id).await.unwrap();
    assert_eq!((stages.len(), stages[0].stage, stages[0].duration_ms), (1, Stage::Profile, Some(5)));
    let counts: Vec<u64> = log(&shop.database, id)
        .await
        .iter()
        .filter_map(|e| match e {
            Entry::Run(Event::Advanced { done, .. }) => Some(*done),
            _ => None,
        })
        .collect();
    assert_eq!(counts.last(), Some(&3), "the newest count is kept: {counts:?}");
    shop.gone(&shop.workspace(id)).await;
    assert_eq!(shop.database.workers().await.unwrap().len(), 1);
    let database = shop.database.clone();
    shop.close().await;
    assert_eq!(database.workers().await.unwrap(), []);
}

#[tokio::test]
async fn a_job_on_the_result_of_another_is_given_its_healed_checkpoint() {
    let shop = Shop::open().await;
    let first = shop.submit("succeed").await;
    shop.end(first).await;
    let second = shop.submit_on("succeed", json!({"from": "job", "job_id": first})).await;
    assert_eq!(shop.end(second).await.state, JobState::Succeeded);
    let told = fs::read(shop.store().join(format!("jobs/{second}/e1/healed/spec.json"))).unwrap();
    let told: JobSpec = serde_json::from_slice(&told).unwrap();
    let path = shop.store().canonicalize().unwrap().join(format!("jobs/{first}/e1/healed"));
    assert_eq!(json!(told.model), json!({"from": "path", "path": path}));

    let orphan = shop.submit_on("succeed", json!({"from": "job", "job_id": Uuid::nil()})).await;
    let failure = shop.end(orphan).await.failure.unwrap();
    assert_eq!(failure.kind, FailureKind::Model);
    shop.close().await;
}

#[tokio::test]
async fn a_text_that_was_brought_is_given_to_the_run_as_a_file() {
    let shop = Shop::open().await;
    let id = Uuid::now_v7();
    let row = UploadRow {
        id,
        name: "corpus.txt".into(),
        location: format!("{}/corpus.txt", upload_prefix(id)),
        size_bytes: 5,
        sha256: "0".repeat(64),
        part_size_bytes: 5,
        created_at: shop.database.ping().await.unwrap(),
        completed_at: None,
    };
    assert!(shop.database.upload_insert(TENANT, &row, 100).await.unwrap());
    let store = Store::open(shop.store()).unwrap();
    let mut part = store.part(&row.location, 1, 0).await.unwrap();
    part.write(b"words").await.unwrap();
    part.finish().await.unwrap();
    let spec = json!({
        "name": "succeed", "model": {"from": "path", "path": "/models/tiny"}, "prune": {"amount": {"layers": 1}},
        "calibration": {"corpus": {"from": "upload", "upload_id": id}},
    });
    let new = NewJob::new(JobSpec::read(spec).unwrap());
    let early = shop.database.job_insert(TENANT, &new).await.unwrap().id;
    assert_eq!(shop.end(early).await.failure.unwrap().kind, FailureKind::Data, "it is not complete");
    shop.database.upload_complete(TENANT, id).await.unwrap();
    let job = shop.database.job_insert(TENANT, &new).await.unwrap().id;
    assert_eq!(shop.end(job).await.state, JobState::Succeeded);
    let told = fs::read(shop.store().join(format!("jobs/{job}/e1/healed/spec.json"))).unwrap();
    let told: JobSpec = serde_json::from_slice(&told).unwrap();
    let path = shop.store().canonicalize().unwrap().join(&row.location);
    assert_eq!(json!(told.calibration.corpus), json!({"from": "path", "path": path}));
    shop.close().await;
}

#[tokio::test]
async fn failures_are_told_apart() {
    let shop = Shop::open().await;
    for (name, kind, message) in [
        ("data", FailureKind::Data, "the corpus is empty"),
        ("spec", FailureKind::Spec, "/prune/amount: too many"),
        ("empty", FailureKind::Bug, "left no files"),
    ] {
        let id = shop.submit(name).await;
        let row = shop.end(id).await;
        let failure = row.failure.unwrap();
        assert_eq!((row.state, failure.kind, row.attempt), (JobState::Failed, kind, 1), "{name}");
        assert!(failure.message.contains(message), "{failure}");
        assert!(shop.workspace(id).exists(), "another try may go on with its records");
    }
    shop.close().await;
}

#[tokio::test]
async fn another_try_of_a_failed_job_goes_on_in_its_workspace() {
    let shop = Shop::open().await;
    let first = shop.submit("fail once").await;
    let row = shop.end(first).await;
    assert_eq!(row.state, JobState::Failed);
    let again = NewJob { retry_of: Some(first), ..NewJob::new(row.spec.clone()) };
    let second = shop.database.job_insert(TENANT, &again).await.unwrap().id;
    assert_eq!(shop.end(second).await.state, JobState::Succeeded);
    assert!(!shop.workspace(first).exists(), "it was handed on, not copied");
    // Who comes too late for it begins anew.
    let third = shop.database.job_insert(TENANT, &again).await.unwrap().id;
    assert_eq!(shop.end(third).await.state, JobState::Failed);
    shop.close().await;
}

#[tokio::test]
async fn the_workspace_of_a_failed_job_is_swept_when_its_time_is_over() {
    let shop = Shop::open().await;
    let id = shop.submit("data").await;
    shop.end(id).await;
    let database = shop.database.clone();
    assert_eq!(database.workspaces_wanted(&[id], Duration::from_secs(3600)).await.unwrap(), [id]);
    assert_eq!(database.workspaces_wanted(&[id], Duration::ZERO).await.unwrap(), [] as [Uuid; 0]);
    let (workspace, directory) = (shop.workspace(id), shop.settings.data.clone());
    assert!(workspace.exists());
    shop.shutdown.drain.cancel();
    let Shop { directory: kept, running, .. } = shop;
    timeout(Duration::from_secs(60), running).await.unwrap().unwrap().unwrap();
    let mut settings = Settings::new(directory).unwrap();
    settings.keep_failed = Duration::ZERO;
    settings.ttl = Duration::from_secs(1);
    let (shutdown, store) = (Shutdown::default(), Store::open(kept.path().join("store")).unwrap());
    let told = shutdown.clone();
    let running =
        tokio::spawn(async move { worker::run(database, store, settings, &["cpu".into()], told).await });
    while workspace.exists() {
        sleep(Duration::from_millis(20)).await;
    }
    shutdown.drain.cancel();
    timeout(Duration::from_secs(60), running).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn what_is_no_event_does_no_harm() {
    let shop = Shop::open().await;
    let id = shop.submit("babble").await;
    assert_eq!(shop.end(id).await.state, JobState::Succeeded);
    let noted = log(&shop.database, id).await;
    assert!(noted.iter().any(|e| matches!(e, Entry::Run(Event::Noted { message, .. }) if message == "ab")));
    shop.close().await;
}

#[tokio::test]
async fn a_child_that_died_is_followed_by_another_in_the_same_workspace() {
    let shop = Shop::open().await;
    let id = shop.submit("die once").await;
    let row = shop.end(id).await;
    assert_eq!((row.state, row.attempt, row.crashes), (JobState::Succeeded, 2, 0));
    let told = log(&shop.database, id).await;
    let reasons = format!("{told:?}");
    assert!(reasons.contains("signal: 9") && reasons.contains("last words"), "{reasons}");
    shop.close().await;
}

#[tokio::test]
async fn a_cancelled_job_stops_and_leaves_no_files_but_records_for_another_try() {
    let shop = Shop::open().await;
    let id = shop.submit("slow").await;
    shop.file(&shop.workspace(id).join("ready")).await;
    shop.database.job_cancel(TENANT, id).await.unwrap();
    let row = shop.end(id).await;
    assert_eq!((row.state, row.failure), (JobState::Cancelled, None));
    assert!(shop.workspace(id).exists());
    assert!(!shop.store().join("jobs").join(id.to_string()).exists());
    shop.close().await;
}

#[tokio::test]
async fn a_job_that_has_run_as_long_as_it_may_is_stopped_and_its_records_wait_for_another_try() {
    let shop = Shop::open().await;
    let spec = json!({"name": "slow", "model": {"from": "path", "path": "/models/tiny"},
        "prune": {"amount": {"layers": 1}}, "deadlines": {"max_run_s": 1}});
    let id = shop.submit_spec(spec).await;
    let row = shop.end(id).await;
    assert_eq!((row.state, row.attempt), (JobState::Failed, 0), "{:?}", row.failure);
    assert_eq!(row.failure.unwrap().kind, FailureKind::RunDeadline);
    assert!((1.0..10.0).contains(&row.run_seconds), "{}", row.run_seconds);
    assert!(shop.workspace(id).exists() && !shop.store().join("jobs").join(id.to_string()).exists());
    shop.close().await;
}

#[tokio::test]
async fn a_job_waits_for_a_worker_of_the_right_label() {
    let shop = Shop::with(fresh().await, |s| s.labels = [("zone".into(), "b".into())].into());
    let spec = |zone: &str| {
        json!({"name": "succeed", "model": {"from": "path", "path": "/models/tiny"},
            "prune": {"amount": {"layers": 1}}, "resources": {"labels": {"zone": zone}}})
    };
    let waits = shop.submit_spec(spec("a")).await;
    let runs = shop.submit_spec(spec("b")).await;
    assert_eq!(shop.end(runs).await.state, JobState::Succeeded);
    assert_eq!(shop.database.job(TENANT, waits).await.unwrap().unwrap().state, JobState::Queued);
    shop.close().await;
}

#[tokio::test]
async fn a_paused_job_keeps_its_workspace_and_goes_on() {
    let shop = Shop::open().await;
    let id = shop.submit("slow").await;
    shop.file(&shop.workspace(id).join("ready")).await;
    shop.database.job_pause(TENANT, id).await.unwrap();
    shop.until(id, |row| row.state == JobState::Paused).await;
    fs::write(shop.workspace(id).join("go"), "").unwrap();
    shop.database.job_resume(TENANT, id).await.unwrap();
    let row = shop.end(id).await;
    assert_eq!((row.state, row.attempt, row.epoch), (JobState::Succeeded, 1, 2));
    shop.close().await;
}

#[tokio::test]
async fn a_child_that_does_not_stop_is_killed() {
    let shop = Shop::with(fresh().await, |s| s.stop_grace = Duration::from_millis(200));
    let id = shop.submit("stubborn").await;
    shop.file(&shop.workspace(id).join("ready")).await;
    shop.database.job_cancel(TENANT, id).await.unwrap();
    assert_eq!(shop.end(id).await.state, JobState::Cancelled);
    shop.close().await;
}

#[tokio::test]
async fn a_draining_worker_gives_its_job_back_for_free() {
    let shop = Shop::open().await;
    let id = shop.submit("slow").await;
    shop.file(&shop.workspace(id).join("ready")).await;
    let database = shop.database.clone();
    let workspace = shop.workspace(id);
    shop.shutdown.drain.cancel();
    timeout(Duration::from_secs(60), shop.running).await.unwrap().unwrap().unwrap();
    let row = database.job(TENANT, id).await.unwrap().unwrap();
    assert_eq!((row.state, row.attempt, row.crashes, row.wish), (JobState::Queued, 0, 0, None));
    assert!(workspace.exists());
}

#[tokio::test]
async fn a_worker_in_a_hurry_does_not_wait_for_its_child() {
    let shop = Shop::open().await;
    let id = shop.submit("stubborn").await;
    shop.file(&shop.workspace(id).join("ready")).await;
    let database = shop.database.clone();
    shop.shutdown.drain.cancel();
    shop.shutdown.hurry.cancel();
    timeout(Duration::from_secs(15), shop.running).await.unwrap().unwrap().unwrap();
    assert_eq!(database.job(TENANT, id).await.unwrap().unwrap().state, JobState::Queued);
}

#[tokio::test]
async fn a_worker_that_lost_its_lease_kills_its_child_and_writes_nothing() {
    let shop = Shop::open().await;
    let id = shop.submit("stubborn").await;
    shop.file(&shop.workspace(id).join("ready")).await;
    let pid = fs::read_to_string(shop.workspace(id).join("pid")).unwrap();
    let me = shop.database.workers().await.unwrap()[0].id;
    let once = Limits { crashes: 1, ..Limits::default() };
    // A row that is just being written is passed over.
    while shop.database.reap(Dead::Worker(me), once).await.unwrap() == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    shop.gone(&Path::new("/proc").join(pid.trim())).await;
    let row = shop.database.job(TENANT, id).await.unwrap().unwrap();
    assert_eq!((row.state, row.crashes), (JobState::Failed, 1));
    shop.close().await;
}

#[tokio::test]
async fn two_workers_never_share_a_device() {
    let shop = Shop::open().await;
    let id = shop.submit("succeed").await;
    shop.end(id).await;
    let store = Store::open(shop.store()).unwrap();
    let second = worker::run(
        shop.database.clone(),
        store,
        shop.settings.clone(),
        &["cpu".into()],
        Shutdown::default(),
    )
    .await;
    assert!(matches!(second, Err(StartError::DeviceTaken { .. })), "{second:?}");
    shop.close().await;
}

#[tokio::test]
async fn a_job_survives_the_death_of_its_database() {
    let home = reachable_directory();
    let postgres = LocalPg::start(home.path()).unwrap();
    let database = Database::connect(postgres.options(), 10, Duration::from_secs(1)).await.unwrap();
    database.migrate().await.unwrap();
    let shop = Shop::with(database, |_| {});
    let id = shop.submit("slow").await;
    shop.file(&shop.workspace(id).join("ready")).await;
    rustix::process::kill_process(postgres.pid().unwrap(), rustix::process::Signal::KILL).unwrap();
    fs::write(shop.workspace(id).join("go"), "").unwrap();
    // The run ends while the database is away.
    shop.file(&shop.workspace(id).join("healed/spec.json")).await;
    sleep(Duration::from_millis(500)).await;
    while !postgres.keep_running().unwrap_or(false) {
        sleep(Duration::from_millis(50)).await;
    }
    let row = shop.end(id).await;
    assert_eq!((row.state, row.attempt, row.crashes), (JobState::Succeeded, 1, 0));
    log(&shop.database, id).await;
    let database = shop.database.clone();
    shop.close().await;
    database.close().await;
    postgres.stop();
}

#[tokio::test]
async fn what_no_job_needs_is_swept() {
    let directory = tempfile::tempdir().unwrap();
    let database = fresh().await;
    let orphan = Uuid::now_v7();
    let shop = Shop::with(database, |settings| {
        settings.data = directory.path().to_owned();
        fs::create_dir_all(directory.path().join("work").join(orphan.to_string())).unwrap();
    });
    shop.gone(&shop.workspace(orphan)).await;
    shop.close().await;
}

/// A worker for one job, on a fresh database, beside `shop`'s files.
async fn once(shop: &Shop, wait: Duration, shutdown: &Shutdown) -> Turn {
    let store = Store::open(shop.store()).unwrap();
    let (database, settings) = (shop.database.clone(), shop.settings.clone());
    worker::run_once(database, store, settings, "cpu", wait, shutdown.clone()).await.unwrap()
}

#[tokio::test]
async fn a_worker_for_one_job_works_it_and_leaves_the_next_one() {
    let shop = Shop::open().await;
    // The other worker of this data directory is busy, and stays out of the way.
    let busy = shop.submit("slow").await;
    shop.file(&shop.workspace(busy).join("ready")).await;
    let (first, second) = (shop.submit("data").await, shop.submit("succeed").await);
    let long = Duration::from_secs(30);
    assert_eq!(once(&shop, long, &Shutdown::default()).await, Turn::Ended(JobState::Failed));
    assert_eq!(shop.end(first).await.state, JobState::Failed);
    assert_eq!(once(&shop, long, &Shutdown::default()).await, Turn::Ended(JobState::Succeeded));
    assert_eq!(shop.end(second).await.state, JobState::Succeeded);
    assert_eq!(once(&shop, Duration::from_millis(100), &Shutdown::default()).await, Turn::Idle);
    fs::write(shop.workspace(busy).join("go"), "").unwrap();
    assert_eq!(shop.end(busy).await.state, JobState::Succeeded);
    assert_eq!(shop.database.workers().await.unwrap().len(), 1, "who has left is not listed");
    shop.close().await;
}

#[tokio::test]
async fn a_worker_for_one_job_that_is_told_to_stop_gives_it_back_and_another_goes_on() {
    let shop = Shop::open().await;
    let busy = shop.submit("slow").await;
    shop.file(&shop.workspace(busy).join("ready")).await;
    let id = shop.submit("slow").await;
    let shutdown = Shutdown::default();
    let stop = async {
        shop.file(&shop.workspace(id).join("ready")).await;
        shutdown.drain.cancel();
    };
    let (turn, ()) = tokio::join!(once(&shop, Duration::from_secs(30), &shutdown), stop);
    assert_eq!(turn, Turn::Ended(JobState::Queued));
    fs::write(shop.workspace(id).join("go"), "").unwrap();
    let turn = once(&shop, Duration::from_secs(30), &Shutdown::default()).await;
    assert_eq!(turn, Turn::Ended(JobState::Succeeded));
    let row = shop.end(id).await;
    assert_eq!((row.state, row.attempt), (JobState::Succeeded, 1), "giving it back costs no attempt");
    fs::write(shop.workspace(busy).join("go"), "").unwrap();
    shop.end(busy).await;
    shop.close().await;
}
