//! Job specs as people write them.

use std::io::Read;
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

/// Reads a .json, .yaml or .toml file, or JSON from standard input for `-`.
pub fn read(source: &str) -> anyhow::Result<Value> {
    let mut text = String::new();
    if source == "-" {
        std::io::stdin().read_to_string(&mut text).context("standard input")?;
        return serde_json::from_str(&text).context("standard input is not JSON");
    }
    text = std::fs::read_to_string(source).with_context(|| source.to_owned())?;
    let extension = Path::new(source).extension().and_then(|e| e.to_str()).unwrap_or("");
    let parsed = match extension.to_ascii_lowercase().as_str() {
        "yaml" | "yml" => serde_yaml_ng::from_str(&text).map_err(anyhow::Error::from),
        "toml" => toml::from_str(&text).map_err(anyhow::Error::from),
        _ => serde_json::from_str(&text).map_err(anyhow::Error::from),
    };
    parsed.with_context(|| {
        format!("{source} cannot be read as {}", if extension.is_empty() { "json" } else { extension })
    })
}
