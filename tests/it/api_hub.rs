//! Results as a client of the Hugging Face Hub asks for them (`HF_ENDPOINT=<service>/hf`).

use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::app::{App, KEY, problem};

async fn finished() -> (App, Uuid) {
    let app = App::start().await;
    let id = app.enqueue("leaves").await.id;
    let lease = app.claim().await;
    let files: [(&str, &[u8]); 6] = [
        ("healed/config.json", br#"{"healed": true}"#),
        ("healed/model.safetensors", &[7; 300]),
        ("pruned/config.json", br#"{"healed": false}"#),
        ("adapter/adapter_config.json", b"{}"),
        ("profile.json", b"{}"),
        ("healed/extra/notes.txt", b"below"),
    ];
    app.finish(lease, &files).await;
    (app, id)
}

#[tokio::test]
async fn a_client_of_the_hub_finds_the_model_its_commit_and_its_files() {
    let (app, id) = finished().await;
    let model = app.json(&format!("/hf/api/models/{id}")).await;
    assert_eq!((&model["id"], &model["private"]), (&json!(id), &json!(true)));
    let commit = model["sha"].as_str().unwrap().to_owned();
    assert!(commit.len() == 40 && commit.bytes().all(|b| b.is_ascii_hexdigit()));
    let names: Vec<&str> =
        model["siblings"].as_array().unwrap().iter().map(|s| s["rfilename"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["config.json", "extra/notes.txt", "model.safetensors"],
        "the healed one, and only that"
    );
    for revision in ["main", "healed", &commit] {
        assert_eq!(app.json(&format!("/hf/api/models/{id}/revision/{revision}")).await, model, "{revision}");
    }
    let pruned = app.json(&format!("/hf/api/models/{id}/revision/pruned")).await;
    assert_ne!(pruned["sha"], model["sha"]);
    let adapter = app.json(&format!("/hf/api/models/{id}/revision/adapter")).await;
    assert_eq!(adapter["library_name"], "peft");

    let tree = app.json(&format!("/hf/api/models/{id}/tree/main?recursive=true")).await;
    assert_eq!(tree.as_array().unwrap().len(), 3);
    assert_eq!((&tree[2]["type"], &tree[2]["size"]), (&json!("file"), &json!(300)));
    let below = app.json(&format!("/hf/api/models/{id}/tree/main/extra")).await;
    assert_eq!(below[0]["path"], "extra/notes.txt");

    // What a client does first with each file.
    let path = format!("/hf/{id}/resolve/main/model.safetensors");
    let head = app.request(Method::HEAD, &path).header("accept-encoding", "identity").send().await.unwrap();
    assert_eq!(head.status(), 200);
    assert_eq!(head.headers()["x-repo-commit"], commit.as_str());
    assert_eq!(head.headers()["content-length"], "300");
    assert_eq!(head.headers()["etag"], format!("\"{}\"", tree[2]["lfs"]["oid"].as_str().unwrap()));
    assert_eq!(app.get(&path).send().await.unwrap().bytes().await.unwrap(), vec![7; 300]);
    let rest = app.get(&path).header("range", "bytes=290-").send().await.unwrap();
    assert_eq!((rest.status().as_u16(), rest.bytes().await.unwrap()), (206, vec![7; 10].into()));
    let other = app.get(&format!("/hf/{id}/resolve/pruned/config.json")).send().await.unwrap();
    assert_eq!(other.json::<Value>().await.unwrap(), json!({"healed": false}));
}

#[tokio::test]
async fn a_client_of_the_hub_is_told_what_is_missing_in_its_own_words() {
    let (app, id) = finished().await;
    let waiting = app.enqueue("waits").await.id;
    let unknown = Uuid::now_v7();
    for (path, word) in [
        (format!("/hf/{id}/resolve/main/chat_template.jinja"), "EntryNotFound"),
        (format!("/hf/{id}/resolve/main/../../profile.json"), ""),
        (format!("/hf/{id}/resolve/main/%2e%2e/profile.json"), ""),
        (format!("/hf/{id}/resolve/main/..%2Fprofile.json"), "EntryNotFound"),
        (format!("/hf/api/models/{id}/tree/main/additional_chat_templates"), "EntryNotFound"),
        (format!("/hf/{id}/resolve/v2/config.json"), "RevisionNotFound"),
        (format!("/hf/api/models/{id}/revision/v2"), "RevisionNotFound"),
        (format!("/hf/api/models/{unknown}"), "RepoNotFound"),
        (format!("/hf/{unknown}/resolve/main/config.json"), "RepoNotFound"),
        ("/hf/gpt2/resolve/main/config.json".into(), "RepoNotFound"),
        (format!("/hf/api/models/{waiting}"), "RepoNotFound"),
    ] {
        let response = app.get(&path).send().await.unwrap();
        assert_eq!(response.status(), 404, "{path}");
        let told = response.headers().get("x-error-code").map(|v| v.to_str().unwrap().to_owned());
        assert_eq!(told.unwrap_or_default(), word, "{path}");
    }
}

#[tokio::test]
async fn the_token_of_a_client_of_the_hub_is_an_api_key() {
    let app = App::start_locked().await;
    let id = app.enqueue("leaves").await.id;
    let lease = app.claim().await;
    app.finish(lease, &[("pruned/config.json", b"{}")]).await;
    let path = format!("/hf/{id}/resolve/main/config.json");
    problem(app.get(&path).send().await.unwrap(), 401, "unauthorized").await;
    assert_eq!(app.get(&path).bearer_auth(KEY).send().await.unwrap().status(), 200);
}
