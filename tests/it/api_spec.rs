//! Bad input: every spec that cannot be run is refused before it waits in the queue.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::{Value, json};

use crate::support::app::{App, checkpoint, pointers, problem};
use crate::support::tiny::Tiny;

/// Posts a spec that must be refused as a whole, and gives the problem.
async fn refused(app: &App, spec: &Value) -> Value {
    let response = app.post("/v1/jobs").json(spec).send().await.unwrap();
    let body = problem(response, 422, "invalid-spec").await;
    assert_eq!(app.json("/v1/jobs").await["data"], json!([]), "nothing was created");
    body
}

/// Posts a spec with one thing wrong and checks where and what.
async fn refused_for(app: &App, spec: &Value, pointer: &str, hint: &str) {
    let body = refused(app, spec).await;
    assert_eq!(pointers(&body), [pointer], "{body}");
    let message = body["errors"][0]["message"].as_str().unwrap();
    assert!(message.contains(hint), "{message}");
}

#[tokio::test]
async fn unknown_fields_wrong_types_and_broken_rules_are_told_all_at_once() {
    let app = App::start().await;
    let mut spec = app.spec(6);
    spec["prunes"] = json!(1);
    spec["prune"]["stratgy"] = json!("deepest");
    spec["calibration"] =
        json!({"corpus": {"from": "text", "text": "words", "encoding": "utf-8"}, "samples": 0});
    spec["heal"] = json!([{"method": "qlora", "rank": "eight", "corpus": {"from": "model", "x": {}}}, {"method": "glue"}]);
    spec["eval"] = json!({"tasks": [{"items": {"from": "path"}}], "perplexity": {}});
    let body = refused(&app, &spec).await;
    let mut found = pointers(&body);
    found.sort_unstable();
    let expected = [
        "/calibration/corpus/encoding",
        "/calibration/samples",
        "/eval/perplexity",
        "/eval/tasks/0/items/path",
        "/eval/tasks/0/task",
        "/heal/0/corpus/x",
        "/heal/0/rank",
        "/heal/1/method",
        "/prune/stratgy",
        "/prunes",
    ];
    assert_eq!(found, expected);
    assert_eq!(body["retryable"], false);
}

#[tokio::test]
async fn more_layers_than_there_are_cannot_be_asked_for() {
    let app = App::start().await;
    let mut spec = app.spec(6);
    spec["prune"] = json!({"amount": {"layers": 6}});
    refused_for(&app, &spec, "/prune/amount", "at most 5 may go").await;
    spec["prune"] = json!({"amount": {"fraction": 0.99}, "keep_first": 2, "keep_last": 2});
    refused_for(&app, &spec, "/prune/amount", "at most 2 may go").await;
    spec["prune"] = json!({"strategy": "explicit", "layers": [1, 6]});
    refused_for(&app, &spec, "/prune/layers/1", "layers 0 to 5").await;
}

#[tokio::test]
async fn a_search_that_cannot_work_is_refused_with_every_place() {
    let app = App::start().await;
    let mut spec = app.spec(6);
    spec["calibration"] = json!({"confidence": 1.0, "zones": {"needed": 0.01, "redundant": 0.02}});
    spec["prune"] = json!({
        "amount": {"layers": 2}, "strategy": "task_accuracy",
        "compare": ["beam_damage", "explicit", "beam_damage"],
        "damage": {
            "samples": 0, "beam": 0, "layers_per_round": 0, "population": 0, "generations": 0, "top_k": 0, "seq_len": 1,
            "max_evaluations": 0, "max_tokens": 0, "corpus": {"from": "text", "text": " "}
        }
    });
    let body = refused(&app, &spec).await;
    let mut found = pointers(&body);
    found.sort_unstable();
    let damage = [
        "beam",
        "corpus/text",
        "generations",
        "layers_per_round",
        "max_evaluations",
        "max_tokens",
        "population",
        "samples",
        "seq_len",
        "tasks",
        "top_k",
    ];
    let mut expected = vec!["/calibration/confidence".to_owned(), "/calibration/zones".to_owned()];
    expected.extend([1, 2].map(|i| format!("/prune/compare/{i}")));
    expected.extend(damage.map(|name| format!("/prune/damage/{name}")));
    assert_eq!(found, expected);

    spec["calibration"] = json!({});
    spec["prune"] = json!({"amount": {"layers": 2}, "compare": ["task_accuracy"]});
    refused_for(&app, &spec, "/prune/damage/tasks", "items").await;
    let items = json!({"from": "path", "path": app.root().join("missing.jsonl")});
    spec["prune"]["damage"] = json!({"tasks": [{"task": "t", "items": items}]});
    refused_for(&app, &spec, "/prune/damage/tasks/0/items/path", "does not exist").await;
    spec["prune"] =
        json!({"strategy": "explicit", "layers": [0, 1, 2, 5], "compare": ["deepest"], "keep_first": 2});
    refused_for(&app, &spec, "/prune/compare", "at most 3 may go").await;
}

#[tokio::test]
async fn nothing_outside_the_roots_is_read_or_told_of() {
    let app = App::start().await;
    let mut spec = app.spec(6);
    let outside = app.outside();
    checkpoint(6).write(outside.join("there"));
    fs::write(outside.join("words.txt"), "words").unwrap();
    let root = app.root();
    symlink(&outside, root.join("link")).unwrap();
    let mut told = Vec::new();
    for path in [
        outside.join("there").display().to_string(),
        outside.join("not-there").display().to_string(),
        root.join("../outside/there").display().to_string(),
        root.join("../outside/not-there").display().to_string(),
        root.join("missing/../../outside/there").display().to_string(),
        root.join("link/there").display().to_string(),
        root.join("link/not-there").display().to_string(),
        "/etc".into(),
        "model".into(),
        "../outside/there".into(),
    ] {
        spec["model"]["path"] = json!(path);
        let body = refused(&app, &spec).await;
        assert_eq!(pointers(&body), ["/model/path"], "{path}");
        told.push(body["errors"][0]["message"].as_str().unwrap().to_owned());
    }
    told.dedup();
    assert_eq!(told.len(), 1, "what is there and what is not must look the same: {told:?}");

    let mut spec = app.spec(6);
    spec["eval"] = json!({"perplexity": [{"from": "path", "path": outside.join("words.txt")}]});
    refused_for(&app, &spec, "/eval/perplexity/0/path", "below").await;
}

#[tokio::test]
async fn every_path_of_a_spec_is_checked() {
    let app = App::start().await;
    let mut spec = app.spec(6);
    let missing = json!({"from": "path", "path": app.root().join("missing.txt")});
    fs::write(app.root().join("empty.txt"), "").unwrap();
    let empty = json!({"from": "path", "path": app.root().join("empty.txt")});
    let folder = json!({"from": "path", "path": app.root()});
    spec["model"]["path"] = json!(app.root().join("no-model"));
    spec["calibration"] = json!({"corpus": missing});
    spec["heal"] = json!([{"method": "qlora", "corpus": empty}]);
    spec["eval"] = json!({"perplexity": [folder], "tasks": [{"task": "t", "items": missing}]});
    let body = refused(&app, &spec).await;
    let expected = [
        "/model/path",
        "/calibration/corpus/path",
        "/heal/0/corpus/path",
        "/eval/perplexity/0/path",
        "/eval/tasks/0/items/path",
    ];
    assert_eq!(pointers(&body), expected);
    let messages: Vec<&str> =
        body["errors"].as_array().unwrap().iter().map(|e| e["message"].as_str().unwrap()).collect();
    for (message, hint) in messages.iter().zip([
        "does not exist",
        "does not exist",
        "is empty",
        "must be a file",
        "does not exist",
    ]) {
        assert!(message.contains(hint), "{message}");
    }
}

#[tokio::test]
async fn accepted_paths_are_kept_as_the_real_ones() {
    let app = App::start().await;
    let mut spec = app.spec(6);
    symlink(app.root().join("model"), app.root().join("alias")).unwrap();
    spec["model"]["path"] = json!(app.root().join("alias/../alias"));
    let response = app.post("/v1/jobs").json(&spec).send().await.unwrap();
    assert_eq!(response.status(), 201);
    let job: Value = response.json().await.unwrap();
    assert_eq!(job["spec"]["model"]["path"], json!(app.root().join("model")));
}

#[tokio::test]
async fn healing_on_the_text_that_judges_shows_under_any_spelling() {
    let app = App::start().await;
    let mut spec = app.spec(6);
    fs::write(app.root().join("words.txt"), "words").unwrap();
    symlink(app.root().join("words.txt"), app.root().join("alias.txt")).unwrap();
    spec["heal"] =
        json!([{"method": "qlora", "corpus": {"from": "path", "path": app.root().join("alias.txt")}}]);
    spec["eval"] = json!({"perplexity": [{"from": "path", "path": app.root().join("words.txt")}]});
    refused_for(&app, &spec, "/eval/perplexity/0", "heals on").await;
}

#[tokio::test]
async fn checkpoints_that_cannot_be_right_are_refused_with_the_remedy() {
    let app = App::start().await;
    let spec = app.spec(6);
    let model = app.root().join("model");
    let weights = model.join("model.safetensors");
    let good = fs::read(&weights).unwrap();
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    let refused = async |hint: &str| refused_for(&app, &spec, "/model/path", hint).await;

    fs::write(&weights, &good[..good.len() - 1]).unwrap();
    refused("cut short").await;
    fs::write(&weights, &good[..20]).unwrap();
    refused("cut short").await;
    fs::write(&weights, [&good[..], b"more"].concat()).unwrap();
    refused("its header describes").await;
    fs::write(&weights, b"").unwrap();
    refused("cut short").await;
    fs::write(&weights, b"PK\x03\x04 this is a zip of pickles").unwrap();
    refused("is a pickle, not safetensors").await;
    fs::write(&weights, b"{} these are no weights at all").unwrap();
    refused("not a safetensors file").await;
    fs::write(&weights, &good).unwrap();

    for (from, to, hint) in [
        ("\"num_hidden_layers\": 6", "\"num_hidden_layers\": 7", "tensor model.layers.6."),
        ("\"num_hidden_layers\": 6", "\"num_hidden_layers\": 5", "beyond the 5"),
        ("\"num_hidden_layers\": 6", "\"num_hidden_layers\": 4000000000", "num_hidden_layers"),
        ("\"num_hidden_layers\": 6", "\"layers\": 6", "num_hidden_layers"),
        ("\"hidden_size\": 8", "\"hidden_size\": 4096", "has shape [257, 8]"),
        ("\"model_type\": \"llama\"", "\"model_type\": \"mamba\"", "mamba"),
        ("{", "", "is not a JSON object"),
    ] {
        assert!(config.contains(from));
        fs::write(model.join("config.json"), config.replacen(from, to, 1)).unwrap();
        refused(hint).await;
    }
    fs::write(model.join("config.json"), vec![b' '; 65 << 20]).unwrap();
    refused("larger than").await;
    fs::remove_file(model.join("config.json")).unwrap();
    refused("config.json: is not there").await;
    fs::write(model.join("config.json"), &config).unwrap();

    fs::remove_file(&weights).unwrap();
    refused("neither model.safetensors").await;
    fs::write(model.join("pytorch_model.bin"), b"\x80\x04pickle").unwrap();
    refused("pickle (pytorch_model.bin)").await;
}

#[tokio::test]
async fn shards_are_checked_through_their_index() {
    let app = App::start().await;
    let spec = app.spec(2);
    let model = app.root().join("model");
    fs::remove_file(model.join("model.safetensors")).unwrap();
    Tiny { shards: 2, ..checkpoint(2) }.write(&model);
    let index_file = model.join("model.safetensors.index.json");
    let index = fs::read_to_string(&index_file).unwrap();
    let second = "model-00002-of-00002.safetensors";

    fs::write(&index_file, index.replace(second, "b.safetensors")).unwrap();
    refused_for(&app, &spec, "/model/path", "b.safetensors: is named by the index, but not there").await;
    fs::write(&index_file, index.replace(second, "../../outside/b.safetensors")).unwrap();
    refused_for(&app, &spec, "/model/path", "in the same directory").await;
    fs::write(&index_file, "{}").unwrap();
    refused_for(&app, &spec, "/model/path", "no weight_map").await;
    fs::write(&index_file, &index).unwrap();
    fs::copy(model.join("model-00001-of-00002.safetensors"), model.join(second)).unwrap();
    refused_for(&app, &spec, "/model/path", "in two weight files").await;

    let outside = app.outside().join("shard");
    Tiny { shards: 2, ..checkpoint(2) }.write(&model);
    fs::rename(model.join(second), &outside).unwrap();
    symlink(&outside, model.join(second)).unwrap();
    refused_for(&app, &spec, "/model/path", "link out of the allowed directories").await;

    fs::remove_file(model.join(second)).unwrap();
    fs::rename(&outside, model.join(second)).unwrap();
    let mut fine = spec;
    fine["prune"] = json!({"amount": {"layers": 1}});
    assert_eq!(app.post("/v1/jobs").json(&fine).send().await.unwrap().status(), 201);
}

#[tokio::test]
async fn texts_that_can_be_seen_to_be_empty_or_too_long_are_refused() {
    let app = App::start().await;
    let mut spec = app.spec(6);
    spec["calibration"] = json!({"corpus": {"from": "text", "text": " \n"}});
    refused_for(&app, &spec, "/calibration/corpus/text", "is empty").await;
    spec["calibration"] = json!({"corpus": {"from": "text", "text": "x".repeat((8 << 20) + 1)}});
    refused_for(&app, &spec, "/calibration/corpus/text", "8 MiB").await;
    spec["calibration"] = json!({"corpus": {"from": "text", "text": "x".repeat(8 << 20)}});
    assert_eq!(app.post("/v1/jobs").json(&spec).send().await.unwrap().status(), 201);
}

#[tokio::test]
async fn a_job_can_only_start_from_one_that_succeeded() {
    let app = App::start().await;
    let id = app.enqueue("source").await.id;
    let spec = json!({"model": {"from": "job", "job_id": id}, "prune": {"amount": {"layers": 1}}});
    let body = problem(app.post("/v1/jobs").json(&spec).send().await.unwrap(), 422, "invalid-spec").await;
    assert_eq!(pointers(&body), ["/model/job_id"]);
    let unknown =
        json!({"model": {"from": "job", "job_id": uuid::Uuid::now_v7()}, "prune": {"amount": {"layers": 1}}});
    let body = problem(app.post("/v1/jobs").json(&unknown).send().await.unwrap(), 422, "invalid-spec").await;
    assert_eq!(body["errors"][0]["message"], "there is no such job");
    let lease = app.claim().await;
    app.finish(lease, &[]).await;
    assert_eq!(app.post("/v1/jobs").json(&spec).send().await.unwrap().status(), 201);
}
