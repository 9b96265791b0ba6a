//! Adapters in PEFT's layout, loadable by `peft.PeftModel.from_pretrained`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::Tensor;
use serde_json::json;

use crate::checkpoint::{Config, LinearShape};
use crate::engine::model::lora::Adapter;
use crate::engine::{Error, Result};
use crate::job::heal::QloraSettings;

/// Writes `adapter_config.json` and `adapter_model.safetensors` into `dir`, for a model of this `config`.
/// `base` is the checkpoint the adapter belongs to, as its users will find it.
pub fn save(
    dir: &Path,
    base: &str,
    config: &Config,
    adapters: &[(usize, LinearShape, Adapter)],
    settings: &QloraSettings,
) -> Result<()> {
    let names = config.family.names;
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut targets: BTreeSet<&str> = BTreeSet::new();
    for (layer, linear, adapter) in adapters {
        let name = format!("base_model.model.{}{}{layer}.{}", names.base, names.layers, linear.name);
        tensors.insert(format!("{name}.lora_A.weight"), adapter.a.clone());
        tensors.insert(format!("{name}.lora_B.weight"), adapter.b.clone());
        targets.insert(target(config, linear.name));
    }
    let file = dir.join("adapter_model.safetensors");
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors.iter(), Some(metadata), &file)
        .map_err(|e| Error::bug(format!("{}: {e}", file.display())))?;
    let description = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": true,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": config.family.transposed,
        "init_lora_weights": true,
        "modules_to_save": null,
        "use_rslora": false,
        "use_dora": false,
    });
    let text = serde_json::to_string_pretty(&description).map_err(Error::bug)?;
    std::fs::write(dir.join("adapter_config.json"), text + "\n")?;
    Ok(())
}

/// What PEFT calls a linear layer: its last name, unless another one ends alike.
fn target(config: &Config, name: &'static str) -> &'static str {
    let short = |name: &'static str| name.rsplit('.').next().unwrap_or(name);
    let mut all = (0..config.layer_count).flat_map(|layer| config.linears(layer));
    if all.any(|linear| linear.name != name && short(linear.name) == short(name)) {
        name
    } else {
        short(name)
    }
}
