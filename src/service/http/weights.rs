//! What can be known of a checkpoint without reading its weights: enough to
//! refuse a job before it waits in the queue.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

/// Far above any real one; a bound on what a request can make us read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// The bound of the safetensors format itself.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const MAX_INDEX_BYTES: u64 = 64 << 20;
const MAX_SHARDS: usize = 1000;
const MAX_LAYERS: u64 = 10_000;
const PICKLES: [&str; 5] = ["bin", "pt", "pth", "pkl", "ckpt"];

/// The number of layers of the Hugging Face checkpoint in `directory`.
///
/// # Errors
/// What is wrong with it and what to do, for a person.
pub fn layer_count(directory: &Path) -> Result<u32, String> {
    if !directory.is_dir() {
        return Err("must be a directory with config.json and *.safetensors".into());
    }
    let config = read_json(&directory.join("config.json"), MAX_CONFIG_BYTES)?;
    let Some(layers) = config["num_hidden_layers"].as_u64().filter(|n| (1..=MAX_LAYERS).contains(n)) else {
        return Err(format!("config.json must give `num_hidden_layers` from 1 to {MAX_LAYERS}"));
    };
    let mut found = BTreeSet::new();
    for shard in shards(directory)? {
        let header = header(&directory.join(&shard)).map_err(|wrong| format!("{shard} {wrong}"))?;
        check_embedding(&config, &header)?;
        found.extend(header.keys().filter_map(|tensor| layer_of(tensor)));
    }
    if found.len() as u64 != layers {
        let held = found.len();
        return Err(format!(
            "config.json says {layers} layers, but the weights hold {held}; one of them is wrong"
        ));
    }
    Ok(layers as u32)
}

fn read_json(path: &Path, most_bytes: u64) -> Result<Value, String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let file = File::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => format!("has no {name}; it must be a Hugging Face checkpoint"),
        _ => format!("{name} cannot be read: {e}"),
    })?;
    let mut bytes = Vec::new();
    file.take(most_bytes + 1).read_to_end(&mut bytes).map_err(|e| format!("{name} cannot be read: {e}"))?;
    if bytes.len() as u64 > most_bytes {
        return Err(format!("{name} is larger than {most_bytes} bytes"));
    }
    serde_json::from_slice(&bytes).map_err(|e| format!("{name} is not JSON: {e}"))
}

/// File names of the weights: by the index, or the one file there is.
fn shards(directory: &Path) -> Result<BTreeSet<String>, String> {
    if directory.join("model.safetensors").is_file() {
        return Ok(BTreeSet::from(["model.safetensors".into()]));
    }
    if !directory.join("model.safetensors.index.json").is_file() {
        return Err(no_safetensors(directory));
    }
    let index = read_json(&directory.join("model.safetensors.index.json"), MAX_INDEX_BYTES)?;
    let map = index["weight_map"].as_object().ok_or("model.safetensors.index.json has no `weight_map`")?;
    let shards: BTreeSet<String> = map.values().filter_map(Value::as_str).map(String::from).collect();
    let plain = |name: &String| !name.is_empty() && !name.contains(['/', '\\', '\0']) && name != "..";
    if shards.is_empty() || shards.len() > MAX_SHARDS || !shards.iter().all(plain) {
        return Err(format!(
            "model.safetensors.index.json must name 1 to {MAX_SHARDS} files of the same directory"
        ));
    }
    Ok(shards)
}

fn no_safetensors(directory: &Path) -> String {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let pickle = entries.map(|entry| entry.path()).find(|path| {
        path.extension()
            .and_then(|e| e.to_str())
            .is_some_and(|e| PICKLES.contains(&e.to_ascii_lowercase().as_str()))
    });
    match pickle {
        Some(path) => format!(
            "holds its weights as a pickle ({}), which can run code when it is loaded; convert it: load it with \
             transformers and save_pretrained(…, safe_serialization=True)",
            path.file_name().unwrap_or_default().to_string_lossy()
        ),
        None => "has no model.safetensors and no model.safetensors.index.json".into(),
    }
}

/// The header of a safetensors file whose length fits it.
fn header(path: &Path) -> Result<serde_json::Map<String, Value>, String> {
    let mut file = File::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            "is named by the index but missing; download the checkpoint again".to_string()
        }
        _ => format!("cannot be read: {e}"),
    })?;
    let size_bytes = file.metadata().map_err(|e| format!("cannot be read: {e}"))?.len();
    let alien = || "is not a safetensors file".to_string();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|_| alien())?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return Err(alien());
    }
    let truncated = |wanted: u64| {
        format!("is truncated: {size_bytes} bytes instead of {wanted}; download the checkpoint again")
    };
    if 8 + length > size_bytes {
        return Err(truncated(8 + length));
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact(&mut bytes).map_err(|e| format!("cannot be read: {e}"))?;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes).map_err(|_| alien())?;
    let end = header.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64()).max().unwrap_or(0);
    match end.saturating_add(8 + length) {
        wanted if wanted > size_bytes => Err(truncated(wanted)),
        wanted if wanted < size_bytes => Err(format!(
            "is {size_bytes} bytes long, but its header describes {wanted}; download the checkpoint again"
        )),
        _ => Ok(header),
    }
}

/// A config that lies about its shapes is found out by the largest tensor.
fn check_embedding(config: &Value, header: &serde_json::Map<String, Value>) -> Result<(), String> {
    let Some(tensor) = header.get("model.embed_tokens.weight") else { return Ok(()) };
    let (vocab, hidden) = (&config["vocab_size"], &config["hidden_size"]);
    if tensor["shape"] == serde_json::json!([vocab, hidden]) {
        return Ok(());
    }
    let held = &tensor["shape"];
    Err(format!(
        "config.json says vocab_size {vocab} and hidden_size {hidden}, but the embedding has shape {held}"
    ))
}

fn layer_of(tensor: &str) -> Option<u32> {
    let (_, rest) = tensor.split_once(".layers.")?;
    rest.split('.').next()?.parse().ok()
}
