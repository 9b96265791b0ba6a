//! What a job will take, before it is run.

use std::time::Duration;

use secateur::job::plan::{Machine, Plan};
use secateur::job::report::Report;
use secateur::service::db::{NewArtifact, WorkerSelf};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::app::{App, problem};
use crate::support::postgres::worker;
use crate::support::program::{Bench, stderr};
use crate::support::tiny::Tiny;

fn planned(bench: &Bench, spec: &Value) -> Plan {
    let file = bench.path("plan.json");
    std::fs::write(&file, spec.to_string()).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_secateur"))
        .args(["plan", "--json", "--threads", "1"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn flops(plan: &Plan) -> Vec<f64> {
    plan.stages.iter().map(|stage| stage.flops).collect()
}

#[test]
fn a_plan_knows_the_size_of_the_result() {
    for tiny in [Tiny::llama(), Tiny::qwen2()] {
        let bench = Bench::new(&tiny);
        let plan = planned(&bench, &bench.spec());
        bench.succeed(&bench.spec(), "out", &["--until", "report"]);
        let report: Report =
            serde_json::from_slice(&std::fs::read(bench.path("out/report.json")).unwrap()).unwrap();
        assert_eq!((plan.least_layers, plan.most_layers), (2, 2));
        assert_eq!(plan.pruned.layer_count, report.pruned.layer_count);
        assert_eq!(plan.pruned.parameters, report.pruned.parameters);
        // The header of a weight file names fewer tensors then.
        let (size, real) = (plan.pruned.size_bytes, report.pruned.size_bytes);
        assert!(size >= real && size - real < 4096, "{size} {real}");
        assert!(plan.seconds().is_some_and(|s| s > 0.0) && plan.notes.is_empty(), "{plan:?}");
    }
}

#[test]
fn the_more_is_asked_the_more_a_plan_says_it_takes() {
    let bench = Bench::new(&Tiny::llama());
    let plan = planned(&bench, &bench.spec());
    let more = |pointer: &str, value: Value| flops(&planned(&bench, &bench.spec_with(pointer, value)));
    let base = flops(&plan);
    assert!(more("/calibration/samples", json!(6))[0] < base[0]);
    assert!(more("/prune/strategy", json!("greedy_damage"))[1] > base[1]);
    assert!(more("/heal", json!([]))[3] == 0.0 && base[3] > 0.0);
    assert!(more("/eval/generation", json!(null))[5] < base[5]);
    assert!(more("/export", json!({"gguf": ["f16"]}))[5] > base[5]);
    let disk = |kinds: Value| {
        planned(&bench, &bench.spec_with("/export", json!({"gguf": kinds}))).stages[4].disk_bytes
    };
    assert!(disk(json!([])) == 0 && disk(json!(["q8_0"])) < disk(json!(["f16"])));
    // Fewer layers left, less to train and to measure.
    let fewer = more("/prune/amount", json!({"layers": 4}));
    assert!(fewer[3] < base[3] && fewer[5] < base[5]);
}

#[test]
fn a_plan_of_a_budget_says_what_is_open_and_of_a_faster_machine_takes_less_time() {
    let bench = Bench::new(&Tiny::llama());
    let spec = bench.spec_with("/prune/amount", json!({"budget": {"max_perplexity_ratio": 2.0}}));
    let plan = planned(&bench, &spec);
    assert_eq!((plan.least_layers, plan.most_layers, plan.pruned.layer_count), (1, 5, 5));
    assert!(plan.notes.iter().any(|note| note.contains("numbers of layers are tried")));
    let fast = plan.clone().on(Machine { flops_per_s: 1e12, bytes_per_s: 1e11 }).seconds().unwrap();
    let slow = plan.on(Machine { flops_per_s: 1e10, bytes_per_s: 1e9 }).seconds().unwrap();
    assert!(slow > 5.0 * fast);
    let output = bench.start_as("plan", &bench.spec_with("/prune/amount", json!({"layers": 6})), "x", &[]);
    // `plan` takes no workspace.
    assert_eq!(output.wait_with_output().unwrap().status.code(), Some(2));
}

#[tokio::test]
async fn the_service_plans_for_every_worker_and_makes_no_job() {
    let app = App::start().await;
    let spec = app.spec(6);
    let plan = || async {
        let answer = app.post("/v1/plans").json(&spec).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.json::<Value>().await.unwrap()
    };
    let nobody = plan().await;
    assert_eq!((&nobody["workers"], &nobody["begins_in_s"]), (&json!([]), &json!(null)));
    assert_eq!(nobody["plan"]["pruned"]["layer_count"], 4);
    assert!(nobody["plan"]["stages"][0]["seconds"].is_null());
    for (i, flops_per_s) in [1e11, 1e12].into_iter().enumerate() {
        let id = Uuid::from_u128(i as u128 + 1);
        let me = worker(id, &format!("cpu:{i}"));
        app.database.worker_started(&me).await.unwrap();
        let machine = Machine { flops_per_s, bytes_per_s: flops_per_s / 20.0 };
        app.database.worker_measured(id, machine).await.unwrap();
    }
    let known = plan().await;
    let seconds = |i: usize| known["workers"][i]["seconds"].as_f64().unwrap();
    assert!(seconds(0) > 2.0 * seconds(1), "{known}");
    assert_eq!((&known["workers"][0]["fits_in_memory"], &known["jobs_ahead"]), (&json!(true), &json!(0)));
    assert_eq!(known["workers"][0]["eligible"], true);
    // The plan itself is that of the fastest.
    let all: f64 =
        known["plan"]["stages"].as_array().unwrap().iter().map(|s| s["seconds"].as_f64().unwrap()).sum();
    assert!((all - seconds(1)).abs() < 1e-9);
    assert!(app.json("/v1/jobs").await["data"].as_array().unwrap().is_empty());
    let wrong = app
        .spec(6)
        .as_object()
        .map(|spec| json!({"model": spec["model"], "prune": {"amount": {"layers": 9}}}));
    let refused = app.post("/v1/plans").json(&wrong).send().await.unwrap();
    let body = problem(refused, 422, "invalid-spec").await;
    assert_eq!(body["errors"][0]["pointer"], "/prune/amount");
}

#[tokio::test]
async fn a_plan_says_which_workers_have_what_the_job_asks_for() {
    let app = App::start().await;
    let labelled =
        WorkerSelf { labels: [("gpu".into(), "a100".into())].into(), ..worker(Uuid::from_u128(1), "a") };
    let small = WorkerSelf { job_memory_bytes: 1 << 20, ..worker(Uuid::from_u128(2), "b") };
    for me in [labelled, small] {
        app.database.worker_started(&me).await.unwrap();
    }
    for (resources, eligible) in [
        (json!({}), [true, true]),
        (json!({"labels": {"gpu": "a100"}}), [true, false]),
        (json!({"labels": {"gpu": "h100"}}), [false, false]),
        (json!({"in_memory": true}), [true, false]),
        (json!({"min_memory_bytes": 1_u64 << 40}), [false, false]),
    ] {
        let mut spec = app.spec(6);
        spec["resources"] = resources.clone();
        let plan: Value = app.post("/v1/plans").json(&spec).send().await.unwrap().json().await.unwrap();
        let told = |i: usize| plan["workers"][i]["eligible"].as_bool().unwrap();
        assert_eq!([told(0), told(1)], eligible, "{resources}");
    }
    let hub = json!({"model": {"from": "hub", "repo": "org/name"}, "prune": {"amount": {"layers": 2}},
        "resources": {"in_memory": true}});
    let refused = app.post("/v1/jobs").json(&hub).send().await.unwrap();
    let body = problem(refused, 422, "invalid-spec").await;
    assert_eq!(body["errors"][0]["pointer"], "/resources/in_memory");
}

#[tokio::test]
async fn a_job_keeps_its_plan_and_the_next_one_hears_what_it_can_reuse() {
    let app = App::start().await;
    let spec = app.spec(6);
    let job: Value = app.post("/v1/jobs").json(&spec).send().await.unwrap().json().await.unwrap();
    assert_eq!(job["plan"]["most_layers"], 2);
    let lease = app.database.claim(Uuid::now_v7(), Duration::from_secs(60)).await.unwrap().unwrap().0;
    app.database.finish(lease, &[] as &[NewArtifact]).await.unwrap();
    let next = |layers: u32| {
        let mut spec = spec.clone();
        spec["prune"]["amount"] = json!({"layers": layers});
        let request = app.post("/v1/plans").json(&spec).send();
        async move { request.await.unwrap().json::<Value>().await.unwrap()["reusable"].clone() }
    };
    let reused = |stage: &str| json!({"stage": stage, "job_id": job["id"]});
    assert_eq!(next(2).await, json!([reused("profile"), reused("select")]));
    assert_eq!(next(3).await, json!([reused("profile")]));
}
