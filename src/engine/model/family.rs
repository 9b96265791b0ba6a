//! Model families as data: one row says what `config.json` leaves unsaid.

/// What sets a family apart from the plain llama decoder.
#[derive(Debug)]
pub struct Family {
    /// `model_type` of `config.json`.
    pub model_type: &'static str,
    /// q, k and v carry a bias whatever the config says.
    pub qkv_bias: bool,
    /// `attention_bias` and `mlp_bias` are read from the config.
    pub bias_by_config: bool,
    pub window: Window,
}

/// How a family says which layers see only a sliding window.
#[derive(Debug, PartialEq, Eq)]
pub enum Window {
    /// Never.
    Full,
    /// `sliding_window` holds for every layer; absent means this many tokens, null means none.
    Every(usize),
    /// `sliding_window` holds from layer `max_window_layers` on, if `use_sliding_window`.
    Upper,
}

const FAMILIES: [Family; 3] = [
    Family { model_type: "llama", qkv_bias: false, bias_by_config: true, window: Window::Full },
    Family { model_type: "mistral", qkv_bias: false, bias_by_config: false, window: Window::Every(4096) },
    Family { model_type: "qwen2", qkv_bias: true, bias_by_config: false, window: Window::Upper },
];

impl Family {
    /// The row of a `model_type`.
    pub fn of(model_type: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|f| f.model_type == model_type)
    }

    /// All `model_type`s, for messages.
    pub fn names() -> String {
        FAMILIES.map(|f| f.model_type).join(", ")
    }
}
