//! What of S3 needs no S3; `scripts/check_s3.py` has one (moto).

use secateur::service::store::Bucket;

use crate::support::app::{App, problem};

#[test]
fn a_store_in_s3_is_named_by_bucket_and_prefix() {
    let scratch = tempfile::tempdir().unwrap();
    for wrong in [
        "",
        "bucket",
        "s3://",
        "s3:///prefix",
        "https://bucket.s3.amazonaws.com",
        "s3://bucket/a/../b",
        "s3://bucket/a//b",
    ] {
        let refused = Bucket::open(wrong, scratch.path().join("copies"), true).unwrap_err();
        assert!(refused.to_string().contains("s3://bucket"), "{wrong}: {refused}");
    }
    for fine in ["s3://bucket", "s3://bucket/", "s3://bucket/prefix/", "s3://bucket/a/b"] {
        Bucket::open(fine, scratch.path().join("copies"), true).unwrap();
    }
}

#[tokio::test]
async fn a_directory_sends_nobody_elsewhere_and_knows_no_other_parameter() {
    let app = App::start().await;
    let id = app.enqueue("here").await.id;
    app.finish(app.claim().await, &[("report.json", b"{}")]).await;
    let at = format!("/v1/jobs/{id}/artifacts/report.json");
    for query in ["", "?proxy=0", "?proxy=1"] {
        assert_eq!(app.get(&format!("{at}{query}")).send().await.unwrap().status(), 200);
    }
    for query in ["?proxy=yes", "?prox=1"] {
        problem(app.get(&format!("{at}{query}")).send().await.unwrap(), 400, "invalid-query").await;
    }
}
