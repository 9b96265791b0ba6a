//! Adapters in PEFT's layout, loadable by `peft.PeftModel.from_pretrained`.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use serde_json::json;

use super::backward::Adapters;
use crate::engine::model::checkpoint::{LINEARS, linear_name};
use crate::engine::{Error, Result};
use crate::job::preset::QloraSettings;

/// Writes `adapter_config.json` and `adapter_model.safetensors` into `dir`.
/// `base` is the checkpoint the adapter belongs to, as its users will find it.
pub fn save(dir: &Path, base: &str, adapters: &Adapters, settings: &QloraSettings) -> Result<()> {
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for layer in 0..adapters.layer_count() {
        for target in &adapters.targets {
            if let Some(adapter) = adapters.trained(layer, *target) {
                let name = format!("base_model.model.{}", linear_name(layer, *target));
                tensors.insert(format!("{name}.lora_A.weight"), adapter.a);
                tensors.insert(format!("{name}.lora_B.weight"), adapter.b);
            }
        }
    }
    let file = dir.join("adapter_model.safetensors");
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors.iter(), Some(metadata), &file)
        .map_err(|e| Error::bug(format!("{}: {e}", file.display())))?;
    let targets: Vec<&str> = adapters.targets.iter().map(|t| LINEARS[*t].0).collect();
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": true,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "modules_to_save": null,
        "use_rslora": false,
        "use_dora": false,
    });
    let text = serde_json::to_string_pretty(&config).map_err(Error::bug)?;
    std::fs::write(dir.join("adapter_config.json"), text + "\n")?;
    Ok(())
}
