//! The private PostgreSQL: starts, is adopted, is restarted, says what is wrong.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Signal, kill_process, test_kill_process};
use secateur::service::db::Database;
use secateur::service::local_pg::{Error, LocalPg};

use crate::support::postgres::reachable_directory;

async fn answers(postgres: &LocalPg) -> Database {
    let database = Database::connect(postgres.options(), 2, Duration::from_secs(10)).await.unwrap();
    database.ping().await.unwrap();
    database
}

#[tokio::test]
async fn a_private_postgres_keeps_its_data_over_a_stop_and_a_start() {
    let home = reachable_directory();
    let postgres = LocalPg::start(home.path()).unwrap();
    let pid = postgres.pid().unwrap();
    let database = answers(&postgres).await;
    database.migrate().await.unwrap();
    database.close().await;
    postgres.stop();
    assert!(test_kill_process(pid).is_err(), "stopped means gone");
    drop(postgres);

    let postgres = start_when_free(home.path());
    let database = answers(&postgres).await;
    assert_eq!(database.job_counts().await.unwrap(), [], "the schema is still there");
    database.close().await;
    postgres.stop();
}

#[tokio::test]
async fn only_one_service_at_a_time_uses_a_directory() {
    let home = reachable_directory();
    let postgres = LocalPg::start(home.path()).unwrap();
    let second = LocalPg::start(home.path());
    assert!(matches!(second, Err(Error::InUse(_))), "{second:?}");
    postgres.stop();
}

/// Starts once the lock of the directory is free: a child of another test has it, too, until it has become its program.
fn start_when_free(home: &Path) -> LocalPg {
    for _ in 0..200 {
        match LocalPg::start(home) {
            Err(Error::InUse(_)) => std::thread::sleep(Duration::from_millis(50)),
            started => return started.unwrap(),
        }
    }
    panic!("somebody holds {}", home.display())
}

#[tokio::test]
async fn a_postmaster_that_outlived_its_service_is_adopted_and_can_be_stopped() {
    let home = reachable_directory();
    let first = LocalPg::start(home.path()).unwrap();
    let pid = first.pid().unwrap();
    // What a kill -9 of the service leaves: the postmaster runs, the lock is free.
    drop(first);
    let second = start_when_free(home.path());
    assert_eq!(second.pid(), Some(pid));
    answers(&second).await.close().await;
    assert!(!second.keep_running().unwrap());
    second.stop();
    drop(second);
    let third = start_when_free(home.path());
    assert_ne!(third.pid(), Some(pid), "the old one is gone");
    third.stop();
}

#[tokio::test]
async fn a_killed_postmaster_is_started_again() {
    let home = reachable_directory();
    let postgres = LocalPg::start(home.path()).unwrap();
    let database = answers(&postgres).await;
    kill_process(postgres.pid().unwrap(), Signal::KILL).unwrap();
    // Backends notice the death of their postmaster a moment later.
    let restarted = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        postgres.keep_running().unwrap_or(false)
    });
    assert!(restarted);
    database.ping().await.unwrap();
    database.close().await;
    postgres.stop();
}

#[tokio::test]
async fn a_data_directory_of_another_version_is_refused_with_the_way_out() {
    let home = reachable_directory();
    fs::create_dir(home.path().join("data")).unwrap();
    fs::write(home.path().join("data/PG_VERSION"), "7\n").unwrap();
    let message = LocalPg::start(home.path()).unwrap_err().to_string();
    assert!(message.contains("PostgreSQL 7") && message.contains("pg_upgrade"), "{message}");
}

#[tokio::test]
async fn a_directory_that_postgres_cannot_reach_is_named() {
    if !rustix::process::geteuid().is_root() {
        return; // Only root gives the directory to another user.
    }
    let home = reachable_directory();
    let closed = home.path().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let message = LocalPg::start(&closed.join("pg")).unwrap_err().to_string();
    assert!(message.contains("closed (mode 700)") && message.contains("--data-dir"), "{message}");
}

#[tokio::test]
async fn a_path_too_long_for_a_socket_still_works() {
    let home = reachable_directory();
    let long = home.path().join("long".repeat(20)).join("longer".repeat(10));
    let postgres = LocalPg::start(&long).unwrap();
    answers(&postgres).await.close().await;
    postgres.stop();
    let sockets = postgres.options().get_socket().unwrap().clone();
    fs::remove_dir_all(sockets).unwrap();
}
