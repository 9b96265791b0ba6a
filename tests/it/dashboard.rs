//! The dashboard: what is served, and that nothing a person wrote can become part of the page.

use std::fs;
use std::path::PathBuf;

use reqwest::Method;
use reqwest::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH};

use crate::support::app::{App, problem};

fn sources() -> Vec<(String, String)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/service/http/assets");
    let files =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    files
        .map(|path| {
            (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(path).unwrap())
        })
        .collect()
}

/// Every file that a page or a module names, by its path on the service.
fn named(at: &str, text: &str) -> Vec<String> {
    let quoted = |start: &str| -> Vec<String> {
        text.split(start).skip(1).filter_map(|rest| rest.split('"').next()).map(String::from).collect()
    };
    let directory = at.rsplit_once('/').unwrap().0;
    let modules = [quoted(" from \"./"), quoted("from\"./")].concat();
    let above = quoted("from\"../");
    let parent = directory.rsplit_once('/').map_or("", |(parent, _)| parent);
    quoted("=\"/assets/")
        .into_iter()
        .map(|path| format!("/assets/{path}"))
        .chain(modules.into_iter().map(|path| format!("{directory}/{path}")))
        .chain(above.into_iter().map(|path| format!("{parent}/{path}")))
        .collect()
}

#[tokio::test]
async fn the_page_and_everything_it_names_are_served_from_the_binary() {
    let app = App::start().await;
    let (mut open, mut seen) = (vec!["/".to_owned()], Vec::new());
    while let Some(path) = open.pop() {
        if seen.contains(&path) {
            continue;
        }
        let response = app.get(&path).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        let kind = response.headers()[CONTENT_TYPE].to_str().unwrap().to_owned();
        let expected = match path.rsplit_once('.').map(|(_, ending)| ending) {
            None => "text/html",
            Some("js") => "text/javascript",
            Some("css") => "text/css",
            Some("svg") => "image/svg+xml",
            Some(other) => panic!("{path}: {other}"),
        };
        assert!(kind.starts_with(expected), "{path}: {kind}");
        let text = response.text().await.unwrap();
        if expected != "image/svg+xml" {
            open.extend(named(if path == "/" { "/assets/index.html" } else { &path }, &text));
        }
        seen.push(path);
    }
    assert!(seen.len() > 15, "{seen:?}");
    let (files, reached) = (sources().len(), seen.iter().filter(|p| !p.contains("vendor")).count());
    assert_eq!(files, reached, "every file of ours is reached from the page, and only those: {seen:?}");
}

#[tokio::test]
async fn the_page_may_run_its_own_scripts_and_nothing_else() {
    let app = App::start().await;
    for path in ["/", "/assets/page.js"] {
        let response = app.get(path).send().await.unwrap();
        let policy = response.headers()[CONTENT_SECURITY_POLICY].to_str().unwrap();
        for rule in ["default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"]
        {
            assert!(policy.contains(rule), "{path}: {policy}");
        }
        assert!(!policy.contains("unsafe"), "{path}: {policy}");
        assert_eq!(response.headers()["x-content-type-options"], "nosniff");
        assert_eq!(response.headers()["referrer-policy"], "no-referrer");
    }
    let page = app.get("/").send().await.unwrap().text().await.unwrap();
    for script in page.split("<script").skip(1) {
        assert!(script.starts_with(" src=\"/assets/"), "an inline script");
    }
    assert!(!page.contains("<style") && !page.contains("style=") && !page.contains("://"));
}

/// What a person wrote reaches the page by templates that make text of it. These words are the ways around.
#[test]
fn no_script_of_ours_makes_html_of_strings() {
    let ways = [
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "unsafeHTML",
        "unsafe-html",
        "document.write",
        "eval(",
    ];
    for (name, text) in sources() {
        for way in ways {
            assert!(!text.contains(way), "{name}: {way}");
        }
        for attribute in [" style=", " onclick=", " srcdoc="] {
            assert!(!text.contains(attribute), "{name}:{attribute}");
        }
    }
}

#[tokio::test]
async fn files_are_sent_once_and_then_only_asked_after() {
    let app = App::start().await;
    for path in ["/", "/assets/page.css", "/assets/vendor/lit-html.js"] {
        let first = app.get(path).send().await.unwrap();
        assert_eq!(first.headers()["cache-control"], "no-cache");
        let tag = first.headers()[ETAG].clone();
        assert!(!first.bytes().await.unwrap().is_empty());
        let again = app.get(path).header(IF_NONE_MATCH, tag.clone()).send().await.unwrap();
        assert_eq!((again.status().as_u16(), &again.headers()[ETAG]), (304, &tag), "{path}");
        let other = app.get(path).header(IF_NONE_MATCH, "\"old\"").send().await.unwrap();
        assert_eq!(other.status(), 200, "{path}");
    }
    for path in [
        "/assets/",
        "/assets/nothing.js",
        "/assets/../page.rs",
        "/assets/%2e%2e/page.rs",
        "/assets/index.html/x",
    ] {
        problem(app.get(path).send().await.unwrap(), 404, "route-not-found").await;
    }
    problem(app.request(Method::POST, "/").send().await.unwrap(), 405, "method-not-allowed").await;
}

#[tokio::test]
async fn a_locked_service_shows_the_empty_page_and_keeps_its_jobs() {
    let app = App::start_locked().await;
    for path in ["/", "/assets/page.js"] {
        assert_eq!(app.get(path).send().await.unwrap().status(), 200, "{path}");
    }
    problem(app.get("/v1/jobs").send().await.unwrap(), 401, "unauthorized").await;
}
