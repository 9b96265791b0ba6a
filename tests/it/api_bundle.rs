//! All files of a job in one: as tar reads it, and as HTTP reads parts of it.

use std::process::Command;

use crate::support::app::{App, problem};

async fn finished() -> (App, String) {
    let app = App::start().await;
    let id = app.enqueue("leaves").await.id;
    let lease = app.claim().await;
    let long = format!("plots/{}.svg", "p".repeat(60));
    let files: [(&str, &[u8]); 5] = [
        ("healed/config.json", b"{}"),
        ("healed/model.safetensors", &[7; 5000]),
        ("empty.txt", b""),
        ("block.bin", &[1; 512]),
        (&long, b"<svg/>"),
    ];
    app.finish(lease, &files).await;
    (app, id.to_string())
}

#[tokio::test]
async fn the_bundle_has_the_length_it_says_and_tar_and_sha256sum_agree_with_it() {
    let (app, id) = finished().await;
    let response = app.get(&format!("/v1/jobs/{id}/bundle.tar")).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/x-tar");
    let length: usize = response.headers()["content-length"].to_str().unwrap().parse().unwrap();
    let bytes = response.bytes().await.unwrap();
    assert_eq!(bytes.len(), length);
    let out = tempfile::tempdir().unwrap();
    std::fs::write(out.path().join("b.tar"), &bytes).unwrap();
    let untar = Command::new("tar").args(["-xf", "b.tar"]).current_dir(out.path()).output().unwrap();
    assert!(untar.status.success() && untar.stderr.is_empty(), "{}", String::from_utf8_lossy(&untar.stderr));
    let check = Command::new("sha256sum")
        .args(["-c", "--quiet", "SHA256SUMS"])
        .current_dir(out.path().join(&id))
        .output()
        .unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
    let sums = std::fs::read_to_string(out.path().join(&id).join("SHA256SUMS")).unwrap();
    assert_eq!(sums.lines().count(), 5);
}

#[tokio::test]
async fn every_range_of_the_bundle_is_that_part_of_the_whole() {
    let (app, id) = finished().await;
    let path = format!("/v1/jobs/{id}/bundle.tar");
    let whole = app.get(&path).send().await.unwrap();
    let etag = whole.headers()["etag"].to_str().unwrap().to_owned();
    let whole = whole.bytes().await.unwrap();
    // Ends and beginnings in headers, files, fillings and at their borders.
    for start in (0..whole.len()).step_by(487) {
        for length in [1, 511, 1024, 6000] {
            let end = (start + length).min(whole.len());
            let range = format!("bytes={start}-{}", end - 1);
            let part = app.get(&path).header("range", &range).header("if-range", &etag).send().await.unwrap();
            assert_eq!(part.status(), 206, "{range}");
            assert_eq!(part.headers()["content-range"], format!("bytes {start}-{}/{}", end - 1, whole.len()));
            assert_eq!(part.bytes().await.unwrap(), whole[start..end], "{range}");
        }
    }
    let known = app.get(&path).header("if-none-match", &etag).send().await.unwrap();
    assert_eq!(known.status(), 304);
    let beyond = app.get(&path).header("range", format!("bytes={}-", whole.len())).send().await.unwrap();
    problem(beyond, 416, "range-not-satisfiable").await;
    let changed =
        app.get(&path).header("range", "bytes=1-2").header("if-range", "\"old\"").send().await.unwrap();
    assert_eq!(changed.status(), 200);
}

#[tokio::test]
async fn a_bundle_whose_file_is_damaged_breaks_off_and_is_not_taken_for_whole() {
    let (app, id) = finished().await;
    let job = id.parse().unwrap();
    let tenant = secateur::service::db::Tenant::DEFAULT;
    let row = app.database.artifact(tenant, job, "healed/model.safetensors").await.unwrap().unwrap();
    let file = app.store.local(&row.location, 0).await.unwrap().path.clone();
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, b"short").unwrap();
    // It may break off before the first bytes have left.
    let broken = match app.get(&format!("/v1/jobs/{id}/bundle.tar")).send().await {
        Ok(response) => response.bytes().await.is_err(),
        Err(_) => true,
    };
    assert!(broken);
}

#[tokio::test]
async fn a_job_that_has_left_nothing_has_no_bundle() {
    let app = App::start().await;
    let id = app.enqueue("waits").await.id;
    problem(app.get(&format!("/v1/jobs/{id}/bundle.tar")).send().await.unwrap(), 404, "result-not-ready")
        .await;
}
