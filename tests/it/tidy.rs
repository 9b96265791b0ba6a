//! The laws of the house (`ARCHITECTURE.md`), read off the sources.
//!
//! A law is a function from a file to what is wrong with it. Each one is tried
//! on made-up sources first, so that a law which catches nothing is noticed.

use std::fs;
use std::path::{Path, PathBuf};

/// A room and what it may import of ours; the longest matching room counts.
/// Itself it may always import. A name stands for all that lies below it.
const ROOMS: [(&str, &[&str]); 19] = [
    ("job", &[]),
    ("report", &["job"]),
    ("checkpoint", &["job"]),
    ("fetch", &["job"]),
    ("engine", &["job", "checkpoint", "report", "engine"]),
    ("engine::chance", &[]),
    ("engine::select", &["job", "engine::Error", "engine::Result", "engine::chance"]),
    (
        "engine::model",
        &[
            "job",
            "checkpoint",
            "engine::Error",
            "engine::Result",
            "engine::at",
            "engine::Cx",
            "engine::chance",
        ],
    ),
    ("engine::model::kernel", &[]),
    ("service", &["job"]),
    ("service::db", &["job"]),
    (
        "service::http",
        &[
            "job",
            "checkpoint",
            "report",
            "service::db",
            "service::store",
            "service::telemetry",
            "service::seal",
            "service::sinks",
        ],
    ),
    ("service::local_pg", &[]),
    ("service::store", &[]),
    ("service::telemetry", &["job"]),
    ("service::seal", &[]),
    ("service::sinks", &["job", "service::db", "service::store", "service::telemetry", "service::seal"]),
    ("worker", &["job", "fetch", "service"]),
    ("cli", &["job", "checkpoint", "report", "fetch", "engine", "service", "worker"]),
];

/// Crates that only some rooms may use.
const GUARDED: [(&str, &[&str]); 3] =
    [("anyhow", &["cli"]), ("sqlx", &["service", "worker", "cli"]), ("candle_core", &["engine", "cli"])];

/// No tensor in the room that decides.
const CANDLE_FREE: &str = "engine::select";

const BANNED_NAMES: [&str; 7] = ["utils", "util", "helpers", "helper", "common", "misc", "shared"];

const MOST_LINES: usize = 600;

/// Where this machine keeps things, and whom it asks: neither belongs into a
/// file. In two halves, or this file would break its own law.
const FORBIDDEN: [(&str, &str); 9] = [
    ("/wo", "rk/"),
    ("/ro", "ot/"),
    ("/op", "t/"),
    ("pypi", ".org"),
    ("python", "hosted"),
    ("npmjs", ".org"),
    ("static.crates", ".io"),
    ("index.crates", ".io"),
    ("deb.debian", ".org"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `directory`, by path from the root of the project.
fn files(directory: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join(directory)];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            let inside = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path());
            open.extend(inside.filter(|p| p.file_name().is_some_and(|name| name != "__pycache__")));
        } else if path.exists() {
            found.push(path.strip_prefix(root()).unwrap().to_owned());
        }
    }
    found.sort();
    found
}

fn rust_files(directory: &str) -> Vec<PathBuf> {
    files(directory).into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs")).collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// Runs a law over files and shows everything that is wrong at once.
fn hold(paths: &[PathBuf], law: impl Fn(&Path, &str) -> Vec<String>) {
    assert!(!paths.is_empty(), "no files found");
    let wrong: Vec<String> = paths
        .iter()
        .flat_map(|path| law(path, &read(path)).into_iter().map(move |w| format!("{}: {w}", path.display())))
        .collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// `src/engine/heal/mod.rs` is `engine::heal`.
fn room_of(path: &Path) -> String {
    let path = path.strip_prefix("src").unwrap_or(path).with_extension("");
    let parts: Vec<&str> = path.iter().map(|part| part.to_str().unwrap()).filter(|p| *p != "mod").collect();
    parts.join("::")
}

/// The part of a source that ships: no comments, no unit tests.
fn shipped(source: &str) -> String {
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

fn below(path: &str, room: &str) -> bool {
    path == room || path.strip_prefix(room).is_some_and(|rest| rest.starts_with("::"))
}

/// Every path of ours that a source of `room` names, from the root of the crate.
fn our_paths(room: &str, source: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in source.match_indices("crate::") {
        if !source[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            expand("", &source[at + "crate::".len()..], &mut found);
        }
    }
    for (at, _) in source.match_indices("super::") {
        if source[..at].ends_with("super::") || source[..at].ends_with(char::is_alphanumeric) {
            continue;
        }
        let ups = source[at..].split("::").take_while(|part| *part == "super").count();
        let mut parts: Vec<&str> = room.split("::").collect();
        // `super` of a file is the module that holds it; of an inline module, the file.
        let out = ups.saturating_sub(inline_depth(&source[..at]));
        parts.truncate(parts.len().saturating_sub(out));
        expand(&parts.join("::"), &source[at + ups * "super::".len()..], &mut found);
    }
    found
}

/// How many inline modules are open at the end of a (formatted) source.
fn inline_depth(source: &str) -> usize {
    let mut open: Vec<&str> = Vec::new();
    for line in source.lines() {
        let code = line.trim_start();
        let indent = &line[..line.len() - code.len()];
        if code == "}" && open.last() == Some(&indent) {
            open.pop();
        } else if code.ends_with('{') && (code.starts_with("mod ") || code.contains(" mod ")) {
            open.push(indent);
        }
    }
    open.len()
}

/// Unfolds `a::{b, c::d}` into whole paths.
fn expand(prefix: &str, rest: &str, found: &mut Vec<String>) {
    let join = |name: &str| if prefix.is_empty() { name.to_owned() } else { format!("{prefix}::{name}") };
    if let Some(group) = rest.strip_prefix('{') {
        let mut depth = 0;
        let end = group.char_indices().find_map(|(i, c)| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            (depth < 0).then_some(i)
        });
        let group = &group[..end.unwrap_or(group.len())];
        let mut depth = 0;
        let items = group.split(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == ',' && depth == 0
        });
        for item in items.map(str::trim).filter(|item| !item.is_empty()) {
            expand(prefix, item, found);
        }
        return;
    }
    let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    match rest[name.len()..].strip_prefix("::") {
        Some(deeper) if !name.is_empty() => expand(&join(&name), deeper, found),
        _ => found.push(join(&name)),
    }
}

fn import_law(path: &Path, source: &str) -> Vec<String> {
    let room = room_of(path);
    let source = shipped(source);
    let mut wrong = Vec::new();
    if let Some((_, may)) =
        ROOMS.iter().filter(|(name, _)| below(&room, name)).max_by_key(|(name, _)| name.len())
    {
        let own = ROOMS.iter().map(|(name, _)| *name).filter(|n| below(&room, n)).max_by_key(|n| n.len());
        for import in our_paths(&room, &source) {
            let known = own.is_some_and(|own| below(&import, own)) || may.iter().any(|m| below(&import, m));
            if !known {
                wrong.push(format!("`{room}` may not import `crate::{import}`"));
            }
        }
    }
    for (name, rooms) in GUARDED {
        if source.contains(&format!("{name}::")) && !rooms.iter().any(|r| below(&room, r)) {
            wrong.push(format!("`{room}` may not use `{name}`"));
        }
    }
    if below(&room, CANDLE_FREE) && source.contains("candle") {
        wrong.push(format!("`{room}` decides; it may not hold a tensor"));
    }
    wrong
}

fn panic_law(_: &Path, source: &str) -> Vec<String> {
    let source = shipped(source);
    let mut wrong = Vec::new();
    if source.contains(".unwrap()") {
        wrong.push("`unwrap()`: return the error, or `.expect(\"… This is a bug.\")`".to_owned());
    }
    for (at, _) in source.match_indices(".expect(") {
        let argument = source[at + ".expect(".len()..].trim_start();
        let message = argument.strip_prefix('"').and_then(|text| text.split('"').next());
        if !message.is_some_and(|message| message.ends_with("This is a bug.")) {
            let shown: String = argument.chars().take(40).collect();
            wrong.push(format!("`.expect({shown}…`: the message must end with \"This is a bug.\""));
        }
    }
    wrong
}

fn seam_law(_: &Path, source: &str) -> Vec<String> {
    let after = source.split("#[cfg(test)]").skip(1);
    let wrong = after.filter(|rest| {
        let mut lines = rest.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("#["));
        !lines.next().is_some_and(|line| line.starts_with("mod tests"))
    });
    wrong
        .map(|_| "`#[cfg(test)]` is for `mod tests` only; faults come in through `Observer`".into())
        .collect()
}

fn size_law(_: &Path, source: &str) -> Vec<String> {
    let lines = source.lines().count();
    if lines > MOST_LINES { vec![format!("{lines} lines, at most {MOST_LINES}")] } else { Vec::new() }
}

fn name_law(path: &Path, _: &str) -> Vec<String> {
    let parts = path.iter().filter_map(|part| part.to_str()).map(|part| part.trim_end_matches(".rs"));
    parts
        .filter(|p| BANNED_NAMES.contains(p))
        .map(|p| format!("`{p}` says nothing about what is in it"))
        .collect()
}

fn place_law(_: &Path, source: &str) -> Vec<String> {
    let forbidden = FORBIDDEN.iter().map(|(head, tail)| format!("{head}{tail}"));
    forbidden.filter(|word| source.contains(word)).map(|word| format!("holds `{word}`")).collect()
}

#[test]
fn rooms_import_only_what_the_plan_allows() {
    let wrong = |path: &str, source: &str| import_law(Path::new(path), source).len();
    assert_eq!(wrong("src/job/spec.rs", "use crate::engine::Cx;"), 1);
    assert_eq!(wrong("src/job/spec.rs", "use super::report::Block;\nuse crate::job::state;"), 0);
    assert_eq!(
        wrong("src/engine/select/mod.rs", "use crate::{job::spec::JobSpec, engine::{Error, model::Config}};"),
        1
    );
    assert_eq!(wrong("src/engine/select/mod.rs", "use candle_core::Tensor;"), 1);
    assert_eq!(wrong("src/engine/select/search.rs", "use candle_core::Tensor;"), 1);
    assert_eq!(
        wrong("src/engine/heal/qlora.rs", "use super::super::model::Decoder;\nuse anyhow::Context;"),
        1
    );
    assert_eq!(wrong("src/engine/profile.rs", "fn f() { super::super::service::db::open() }"), 1);
    assert_eq!(wrong("src/service/db/jobs.rs", "use crate::service::http::problem;"), 1);
    assert_eq!(wrong("src/service/http/jobs.rs", "use crate::service::db::jobs;\nuse super::auth;"), 0);
    assert_eq!(wrong("src/worker/mod.rs", "use crate::engine::pipeline;"), 1);
    assert_eq!(wrong("src/cli/up.rs", "use crate::worker::{self, lease};\nuse anyhow::Context;"), 0);
    assert_eq!(
        wrong("src/job/spec.rs", "// crate::engine::Cx\n#[cfg(test)]\nmod tests { use crate::cli; }"),
        0
    );
    let inline = "mod hub {\n    use super::Hub;\n}\nuse super::engine;";
    assert_eq!(wrong("src/fetch.rs", inline), 1);
    hold(&rust_files("src"), import_law);
}

#[test]
fn what_ships_panics_only_for_a_bug_and_says_so() {
    let wrong = |source: &str| panic_law(Path::new("src/x.rs"), source).len();
    assert_eq!(wrong("a.unwrap();"), 1);
    assert_eq!(wrong("a.expect(\"it is there\");\nb.expect(\n    \"it was checked. This is a bug.\");"), 1);
    assert_eq!(wrong("a.expect(&message);"), 1);
    assert_eq!(wrong("#[cfg(test)]\nmod tests { fn f() { a.unwrap(); } }"), 0);
    hold(&rust_files("src"), panic_law);
}

#[test]
fn production_code_holds_no_scaffolding_for_tests() {
    let wrong = |source: &str| seam_law(Path::new("src/x.rs"), source).len();
    assert_eq!(wrong("#[cfg(test)]\n#[allow(clippy::unwrap_used)]\nmod tests {}"), 0);
    assert_eq!(wrong("#[cfg(test)]\nstatic BREAK: bool = true;\n#[cfg(test)]\nmod tests {}"), 1);
    hold(&rust_files("src"), seam_law);
}

#[test]
fn files_have_one_subject() {
    assert_eq!(size_law(Path::new("x.rs"), &"\n".repeat(MOST_LINES + 1)).len(), 1);
    assert_eq!(name_law(Path::new("src/engine/utils.rs"), "").len(), 1);
    assert_eq!(name_law(Path::new("src/common/mod.rs"), "").len(), 1);
    let all = [rust_files("src"), rust_files("tests")].concat();
    hold(&all, size_law);
    hold(&all, name_law);
}

#[test]
fn no_file_knows_the_machine_it_was_written_on() {
    for (head, tail) in FORBIDDEN {
        assert_eq!(place_law(Path::new("x"), &format!("see {head}{tail}x")).len(), 1);
    }
    let top =
        ["Makefile", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "Cargo.toml", "deny.toml", ".ci/run"];
    let rooms = [
        "src",
        "tests",
        "scripts",
        "clients",
        "examples",
        "docs",
        "docker",
        "deploy",
        "migrations",
        "openapi",
    ];
    let all: Vec<PathBuf> = top.into_iter().chain(rooms).flat_map(files).collect();
    let text: Vec<PathBuf> = all.into_iter().filter(|p| fs::read_to_string(root().join(p)).is_ok()).collect();
    hold(&text, place_law);
}

/// A test file that no `mod` names is never compiled, and never fails.
#[test]
fn every_test_file_is_listed() {
    let main = read(Path::new("tests/it/main.rs"));
    let listed: Vec<&str> =
        main.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';')).collect();
    let entries = fs::read_dir(root().join("tests/it")).unwrap().map(|entry| entry.unwrap().path());
    let modules = entries.filter(|path| path.is_dir() || path.extension().is_some_and(|e| e == "rs"));
    for module in modules.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()) {
        assert!(
            module == "main" || listed.contains(&module.as_str()),
            "tests/it/main.rs lacks `mod {module};`"
        );
    }
}
