//! Taking layers out of a checkpoint's description: every key of `config.json` and every tensor name
//! that speaks of layers.

use serde_json::{Map, Value};

use super::config::{Config, DEFAULT_WINDOW_START};
use super::family::{Rope, Window};
use super::{Result, wrong};

/// Lists that may have as many entries as there are layers by chance.
const OTHER_LISTS: [&str; 8] = [
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "keys_to_ignore_at_inference",
];

/// Keys that count layers, by the names families have given them.
const COUNTS: [&str; 4] = ["num_hidden_layers", "n_layer", "n_layers", "num_layers"];

/// Lists of numbers of layers.
const INDICES: &str = "mlp_only_layers";

impl Config {
    /// The `config.json` of the same model without these layers: every key that counts or lists layers
    /// is cut with them, and what followed from the number of a layer is written out.
    ///
    /// # Errors
    /// A model error when a list seems to speak of layers and has not one entry for each.
    pub fn without_layers(&self, dropped: &[u32]) -> Result<Map<String, Value>> {
        let kept: Vec<usize> = (0..self.layer_count).filter(|l| !dropped.contains(&(*l as u32))).collect();
        let mut raw = self.raw.clone();
        // The code it names does not come along.
        raw.remove("auto_map");
        for (key, value) in &mut raw {
            self.cut_list(key, value, &kept)?;
        }
        for key in COUNTS {
            if raw.get(key).and_then(Value::as_u64) == Some(self.layer_count as u64) {
                raw.insert(key.into(), kept.len().into());
            }
        }
        if kept.len() < self.layer_count {
            self.spell_out(&mut raw, &kept);
        }
        Ok(raw)
    }

    /// Cuts a list with one entry for each layer, whatever its name.
    fn cut_list(&self, key: &str, value: &mut Value, kept: &[usize]) -> Result<()> {
        let Value::Array(list) = value else { return Ok(()) };
        if OTHER_LISTS.contains(&key) {
            return Ok(());
        }
        if key == INDICES {
            let place = |v: &Value| kept.iter().position(|l| v.as_u64() == Some(*l as u64));
            *list = list.iter().filter_map(place).map(Value::from).collect();
            return Ok(());
        }
        if list.len() == self.layer_count {
            *list = kept.iter().map(|l| list[*l].clone()).collect();
        } else if key.contains("layer") && !list.is_empty() {
            return Err(wrong(format!(
                "config.json: {key} seems to speak of layers, but has {} entries for {} layers; \
                 cutting it blindly could break the checkpoint",
                list.len(),
                self.layer_count
            )));
        }
        Ok(())
    }

    /// Rules that go by the number of a layer would hit other layers after the cut: says for each
    /// layer that stays what it is.
    fn spell_out(&self, raw: &mut Map<String, Value>, kept: &[usize]) {
        let family = self.family;
        let listed = matches!(family.window, Window::Upper | Window::Pattern(_) | Window::Unrotated);
        let sliding = self.layers.iter().any(|layer| layer.window.is_some());
        if listed && sliding && !raw.contains_key("layer_types") {
            let kind = |l: &usize| match self.layers[*l].window {
                Some(_) => "sliding_attention",
                None => "full_attention",
            };
            raw.insert("layer_types".into(), kept.iter().map(kind).collect());
        }
        if matches!(family.rope, Rope::SomeLayers { .. }) {
            let flag = |l: &usize| u8::from(self.layers[*l].rope.is_some());
            raw.insert("no_rope_layers".into(), kept.iter().map(flag).collect());
        }
        let first = raw.get("max_window_layers").and_then(Value::as_u64).map(|n| n as usize);
        let unsaid = sliding.then_some(DEFAULT_WINDOW_START).filter(|_| family.window == Window::Upper);
        if let Some(first) = first.or(unsaid) {
            // Layers from this number on see a window: count how many below it stay.
            raw.insert("max_window_layers".into(), kept.iter().filter(|l| **l < first).count().into());
        }
        let stepped = raw.get("decoder_sparse_step").and_then(Value::as_u64).is_some_and(|step| step != 1);
        if family.experts.is_some_and(|experts| experts.some_layers) && stepped {
            let dense = (0..kept.len()).filter(|new| !self.layers[kept[*new]].sparse);
            raw.insert(INDICES.into(), dense.collect());
            raw.insert("decoder_sparse_step".into(), 1.into());
        }
    }

    /// The name of a tensor when the layers `dropped` are gone; none when it goes with them.
    ///
    /// # Errors
    /// A model error for a tensor of a layer that is none of the decoder's.
    pub fn renamed(&self, name: &str, dropped: &[u32]) -> Result<Option<String>> {
        let layers = self.layers_prefix();
        if let Some((layer, rest)) = name.strip_prefix(&layers).and_then(|rest| rest.split_once('.'))
            && let Ok(layer) = layer.parse::<u32>()
        {
            let before = dropped.iter().filter(|d| **d < layer).count() as u32;
            return Ok((!dropped.contains(&layer)).then(|| format!("{layers}{}.{rest}", layer - before)));
        }
        if name.split('.').any(|part| part.parse::<u32>().is_ok()) {
            return Err(wrong(format!(
                "tensor {name} seems to belong to a layer, but not to one of {layers}N; \
                 dropping layers around it could break the checkpoint"
            )));
        }
        Ok(Some(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(changes: Value) -> Config {
        let mut raw = json!({
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 12,
            "num_attention_heads": 2, "vocab_size": 10
        });
        let Value::Object(changes) = changes else { unreachable!("an object. This is a bug.") };
        raw.as_object_mut().unwrap().extend(changes);
        Config::read(raw.as_object().unwrap().clone()).unwrap()
    }

    #[test]
    fn layers_behind_the_cut_move_up_and_the_rest_stays() {
        let config = config(json!({}));
        let new = |name| config.renamed(name, &[1, 2, 5]).unwrap();
        assert_eq!(new("model.layers.0.mlp.up_proj.weight").unwrap(), "model.layers.0.mlp.up_proj.weight");
        assert_eq!(new("model.layers.1.mlp.up_proj.weight"), None);
        assert_eq!(new("model.layers.3.mlp.up_proj.weight").unwrap(), "model.layers.1.mlp.up_proj.weight");
        assert_eq!(new("model.layers.10.x").unwrap(), "model.layers.7.x");
        assert_eq!(new("model.norm.weight").unwrap(), "model.norm.weight");
        let error = config.renamed("model.vision.blocks.3.weight", &[1]).unwrap_err();
        assert!(error.message.contains("model.vision.blocks.3.weight"));
    }

    #[test]
    fn what_followed_from_the_number_of_a_layer_is_written_out() {
        let gemma = config(json!({"model_type": "gemma2", "sliding_window": 4, "head_dim": 4}));
        let cut = gemma.without_layers(&[0, 3]).unwrap();
        let types = cut["layer_types"].as_array().unwrap();
        // Layers 1 and 2 stay as they were: full, sliding.
        assert_eq!(
            types[..3],
            [json!("full_attention"), json!("sliding_attention"), json!("sliding_attention")]
        );

        let nope = config(json!({"model_type": "smollm3"}));
        let cut = nope.without_layers(&[0]).unwrap();
        assert_eq!(cut["no_rope_layers"], json!([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0]));
    }

    #[test]
    fn layers_with_experts_keep_them() {
        let moe = config(json!({
            "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4,
            "decoder_sparse_step": 2, "mlp_only_layers": [3]
        }));
        let kept = [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
        let cut = Config::read(moe.without_layers(&[1]).unwrap()).unwrap();
        for (new, old) in kept.into_iter().enumerate() {
            assert_eq!(cut.layers[new].sparse, moe.layers[old].sparse, "layer {old}");
        }
    }

    #[test]
    fn lists_of_any_name_are_cut_and_lists_of_another_length_are_refused() {
        let lists = config(json!({"a_b": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], "eos_token_id": [1, 2]}));
        let cut = lists.without_layers(&[0, 11]).unwrap();
        assert_eq!(cut["a_b"], json!([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]));
        assert_eq!(cut["eos_token_id"], json!([1, 2]));
        let mut odd = lists;
        odd.raw.insert("x_layers".into(), json!([1]));
        assert!(odd.without_layers(&[0]).unwrap_err().message.contains("x_layers"));
    }
}
