//! `secateur doctor`: what it finds, and whether it says what to do.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn look(data: &Path, more: &[&str]) -> (Vec<Value>, Option<i32>) {
    let output = Command::new(env!("CARGO_BIN_EXE_secateur"))
        .args(["doctor", "--json", "--offline", "--data-dir"])
        .arg(data)
        .args(more)
        .env_remove("DATABASE_URL")
        .output()
        .unwrap();
    (serde_json::from_slice(&output.stdout).unwrap(), output.status.code())
}

fn about<'a>(all: &'a [Value], what: &str) -> &'a Value {
    all.iter().find(|finding| finding["about"] == what).unwrap()
}

#[test]
fn a_machine_that_has_what_is_needed_is_told_so_and_nothing_is_left_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("not/there/yet");
    let (all, code) = look(&data, &[]);
    assert_eq!(code, Some(0), "{all:?}");
    assert!(about(&all, "database")["found"].as_str().unwrap().contains("would start PostgreSQL"));
    assert_eq!(about(&all, "device")["health"], "good");
    assert!(!dir.path().join("not").exists());
}

#[test]
fn what_is_missing_is_bad_and_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let (all, code) =
        look(dir.path(), &["--device", "cuda:99", "--database-url", "postgres://nobody@127.0.0.1:1/none"]);
    assert_eq!(code, Some(1));
    for (what, advice) in [("device", "cuda:99"), ("database", "--database-url")] {
        let finding = about(&all, what);
        assert_eq!(finding["health"], "bad", "{finding}");
        assert!(finding["found"].as_str().unwrap().contains(advice), "{finding}");
    }
    let (all, _) = look(Path::new("/proc/here"), &[]);
    assert_eq!(about(&all, "data")["health"], "bad", "{all:?}");
}
