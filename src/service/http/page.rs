//! The few plain pages the API serves itself.

use axum::response::Html;

const STYLE: &str = "body{font:1rem/1.5 system-ui,sans-serif;max-width:46rem;margin:3rem auto;padding:0 1rem;\
color:#1d2a21;background:#fbfcfa}h1{font-size:1.5rem}a{color:#1f6b3a}table{border-collapse:collapse}\
td,th{text-align:left;padding:.2rem 1rem .2rem 0}pre{background:#eef2ec;padding:1rem;overflow-x:auto}\
@media(prefers-color-scheme:dark){body{color:#dfe8e0;background:#141a16}a{color:#7fd19b}pre{background:#1e2721}}";

/// One page. `title` is escaped, `body` is HTML.
pub fn page(title: &str, body: &str) -> Html<String> {
    let title = escape(title);
    Html(format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{title} · secateur</title><style>{STYLE}</style><h1>{title}</h1>{body}"
    ))
}

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
