//! The vocabulary of a GGUF file, from `tokenizer.json`: llama.cpp cuts text into tokens by what stands here.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value as Json};

use crate::checkpoint::gguf::Value;
use crate::checkpoint::read_json;
use crate::engine::model::Checkpoint;
use crate::engine::{Error, Result};

/// Kinds of tokens (`enum llama_token_type`).
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// `SentencePiece`'s sign for a space.
const SPACE: &str = "\u{2581}";

/// How a model's tokens are made of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Of bytes, after text was cut into words; how that is done goes by this name.
    Bytes(&'static str),
    /// Of characters, as `SentencePiece` does, with or without a space put before a text.
    Characters { space: bool },
}

/// All keys of the vocabulary.
///
/// # Errors
/// A model error when llama.cpp has no name for how the tokenizer cuts text.
pub fn describe(checkpoint: &Checkpoint) -> Result<Vec<(String, Value)>> {
    let dir = checkpoint.dir();
    let json = read_json(&dir.join("tokenizer.json"))?;
    let model = json.get("model").and_then(Json::as_object);
    let model = model.filter(|model| model.get("type").is_none_or(|kind| kind == "BPE"));
    let model = model
        .ok_or_else(|| refused("it is no BPE, which is the only kind of the families that are known"))?;
    let kind = kind(&json, model)?;
    let vocabulary = Vocabulary::read(&json, model, kind, checkpoint.config().vocab_size)?;
    let mut out = Vec::new();
    let mut put = |key: &str, value: Value| out.push((format!("tokenizer.{key}"), value));
    let text = |text: &str| Value::Text(text.to_owned());
    match kind {
        Kind::Bytes(cut) => {
            put("ggml.model", text("gpt2"));
            put("ggml.pre", text(cut));
            put("ggml.merges", Value::Texts(vocabulary.merges.iter().map(|m| m.join(" ")).collect()));
        }
        Kind::Characters { space } => {
            put("ggml.model", text("llama"));
            put("ggml.pre", text("default"));
            put("ggml.scores", Value::F32s(vocabulary.scores()));
            put("ggml.add_space_prefix", Value::Bool(space));
        }
    }
    let settings = if dir.join("tokenizer_config.json").is_file() {
        read_json(&dir.join("tokenizer_config.json"))?
    } else {
        Map::new()
    };
    let config = checkpoint.config();
    let known = [
        ("bos", config.bos_token),
        ("eos", config.eos_tokens.first().copied()),
        ("unk", None),
        ("pad", None),
    ];
    for ((name, otherwise), key) in known.into_iter().zip(["bos", "eos", "unknown", "padding"]) {
        let said = settings.get(&format!("{name}_token"));
        let said = said.and_then(|token| token.as_str().or(token.get("content")?.as_str()));
        if let Some(id) = said.and_then(|token| vocabulary.id(token)).or(otherwise) {
            put(&format!("ggml.{key}_token_id"), Value::U32(id));
        }
    }
    let (bos, eos) = put_around(checkpoint)?;
    put("ggml.add_bos_token", Value::Bool(bos));
    put("ggml.add_eos_token", Value::Bool(eos));
    if let Some(template) = chat_template(dir, &settings)? {
        put("chat_template", Value::Text(template));
    }
    put("ggml.tokens", Value::Texts(vocabulary.tokens));
    put("ggml.token_type", Value::I32s(vocabulary.kinds));
    Ok(out)
}

fn refused(why: &str) -> Error {
    Error::model(format!(
        "tokenizer.json: {why}, so a GGUF file of it would read other tokens; leave out export.gguf"
    ))
}

/// How the tokenizer cuts text, if llama.cpp has a name for it.
fn kind(json: &Map<String, Json>, model: &Map<String, Json>) -> Result<Kind> {
    let cutting = steps(json.get("pre_tokenizer"), "pretokenizers");
    let normalising = steps(json.get("normalizer"), "normalizers");
    let is = |step: &Json, kind: &str| step["type"] == kind;
    if cutting.iter().any(|step| is(step, "ByteLevel")) {
        if normalising.iter().any(|step| !is(step, "NFC")) {
            return Err(refused("it changes text before it is cut"));
        }
        let merges_whole = model.get("ignore_merges") == Some(&Json::Bool(true));
        let name = cut_name(&cutting, merges_whole);
        return name.map(Kind::Bytes).ok_or_else(|| refused("how it cuts text into words has no name"));
    }
    if model.get("byte_fallback") != Some(&Json::Bool(true)) {
        return Err(refused("what it does with unknown characters has no name"));
    }
    let prepends = |step: &Json| {
        is(step, "Prepend")
            || is(step, "Metaspace")
                && step.get("prepend_scheme").map_or(step["add_prefix_space"] != false, |s| s != "never")
    };
    Ok(Kind::Characters { space: cutting.iter().chain(&normalising).any(|step| prepends(step)) })
}

/// The steps of something that may be a sequence, or nothing.
fn steps<'a>(what: Option<&'a Json>, of: &str) -> Vec<&'a Json> {
    match what {
        None | Some(Json::Null) => Vec::new(),
        Some(step) if step["type"] == "Sequence" => {
            step[of].as_array().into_iter().flatten().flat_map(|step| steps(Some(step), of)).collect()
        }
        Some(step) => vec![step],
    }
}

/// Words as Llama 3 cuts them, but for how many digits stay together.
macro_rules! words {
    ($digits:literal) => {
        concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
}
const UP_TO_THREE_DIGITS: &str = words!(r"\p{N}{1,3}");
const ONE_DIGIT: &str = words!(r"\p{N}");
/// Mistral's Tekken.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// llama.cpp's name for a way of cutting text into words (`tokenizer.ggml.pre`).
fn cut_name(cutting: &[&Json], merges_whole: bool) -> Option<&'static str> {
    let (last, before) = cutting.split_last()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
        return None;
    }
    // Absent is on.
    let words = last["use_regex"] != false;
    match (before, words) {
        ([], true) => Some("gpt-2"),
        ([digits], true) if digits["type"] == "Digits" && digits["individual_digits"] == true => {
            Some("smollm")
        }
        ([split], false)
            if split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] != true =>
        {
            match split["pattern"]["Regex"].as_str()? {
                // Its other peculiarity is to take a word that is a token as it is.
                UP_TO_THREE_DIGITS if merges_whole => Some("llama-bpe"),
                UP_TO_THREE_DIGITS => Some("dbrx"),
                ONE_DIGIT => Some("qwen2"),
                TEKKEN => Some("tekken"),
                _ => None,
            }
        }
        _ => None,
    }
}

struct Vocabulary {
    /// By id.
    tokens: Vec<String>,
    kinds: Vec<i32>,
    merges: Vec<[String; 2]>,
}

impl Vocabulary {
    fn read(json: &Map<String, Json>, model: &Map<String, Json>, kind: Kind, size: usize) -> Result<Self> {
        let place = |id: Option<u64>, token: &str| match id {
            Some(id) if id < size as u64 => Ok(id as usize),
            _ => Err(refused(&format!("token {token:?} has no place in the model's vocabulary of {size}"))),
        };
        let mut tokens: Vec<String> = (0..size).map(|id| format!("[PAD{id}]")).collect();
        let mut kinds = vec![UNUSED; size];
        let unknown = model.get("unk_token").and_then(Json::as_str);
        for (token, id) in model.get("vocab").and_then(Json::as_object).into_iter().flatten() {
            let id = place(id.as_u64(), token)?;
            let characters = matches!(kind, Kind::Characters { .. });
            kinds[id] = match characters && is_byte(token) {
                true => BYTE,
                false if characters && unknown == Some(token.as_str()) => UNKNOWN,
                false => NORMAL,
            };
            tokens[id].clone_from(token);
        }
        for added in json.get("added_tokens").and_then(Json::as_array).into_iter().flatten() {
            let token = added["content"].as_str().unwrap_or_default();
            let id = place(added["id"].as_u64(), token)?;
            let special = added["special"] == true;
            if kinds[id] != UNKNOWN {
                kinds[id] = if special { CONTROL } else { USER_DEFINED };
            }
            // Those are looked for in the text as it is.
            let plain = matches!(kind, Kind::Characters { .. }) && !special;
            tokens[id] = if plain { token.replace(SPACE, " ") } else { token.to_owned() };
        }
        let merges = model.get("merges").and_then(Json::as_array).into_iter().flatten();
        let merges =
            merges.map(|merge| read_merge(merge).ok_or_else(|| refused("a merge is not of two tokens")));
        Ok(Self { tokens, kinds, merges: merges.collect::<Result<_>>()? })
    }

    fn id(&self, token: &str) -> Option<u32> {
        self.tokens.iter().position(|known| known == token).map(|id| id as u32)
    }

    /// `SentencePiece` puts together first what has the highest score: what is merged first. A character is not made by
    /// merging; its score is of no account.
    fn scores(&self) -> Vec<f32> {
        let mut first: BTreeMap<String, usize> = BTreeMap::new();
        for (rank, merge) in self.merges.iter().enumerate() {
            first.entry(merge.concat()).or_insert(rank);
        }
        let beyond = self.merges.len();
        let score = |(id, (token, kind)): (usize, (&String, &i32))| match *kind {
            NORMAL => -(*first.get(token).unwrap_or(&(beyond + id)) as f32),
            _ => 0.0,
        };
        self.tokens.iter().zip(&self.kinds).enumerate().map(score).collect()
    }
}

/// `<0x0A>`
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// One text, or a list of two in newer files.
fn read_merge(merge: &Json) -> Option<[String; 2]> {
    let pair = match merge {
        Json::String(text) => {
            let (a, b) = text.split_once(' ')?;
            [a.to_owned(), b.to_owned()]
        }
        Json::Array(pair) => match &pair[..] {
            // What stands for a space in tokens made of bytes.
            [Json::String(a), Json::String(b)] => [a.replace(' ', "Ġ"), b.replace(' ', "Ġ")],
            _ => return None,
        },
        _ => return None,
    };
    Some(pair)
}

/// Whether the tokenizer puts a token before a text, and one after it.
fn put_around(checkpoint: &Checkpoint) -> Result<(bool, bool)> {
    let tokenizer = checkpoint.tokenizer()?;
    let read = |special| {
        let encoded = tokenizer.encode("a", special);
        encoded.map_err(|e| Error::model(format!("tokenizer.json: it cannot read \"a\": {e}")))
    };
    let (plain, whole) = (read(false)?, read(true)?);
    let (plain, whole) = (plain.get_ids(), whole.get_ids());
    Ok((whole.first() != plain.first(), whole.last() != plain.last()))
}

/// The template of a chat: a file of its own in newer checkpoints.
fn chat_template(dir: &Path, settings: &Map<String, Json>) -> Result<Option<String>> {
    let path = dir.join("chat_template.jinja");
    if path.is_file() {
        return Ok(Some(std::fs::read_to_string(&path).map_err(crate::engine::at(&path))?));
    }
    Ok(match settings.get("chat_template") {
        Some(Json::String(template)) => Some(template.clone()),
        Some(Json::Array(several)) => {
            let default = several.iter().find(|one| one["name"] == "default").or(several.first());
            default.and_then(|one| one["template"].as_str()).map(String::from)
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn name(pre_tokenizer: Json, merges_whole: bool) -> Option<&'static str> {
        cut_name(&steps(Some(&pre_tokenizer), "pretokenizers"), merges_whole)
    }

    #[test]
    fn a_way_of_cutting_text_goes_by_llama_cpps_name_or_by_none() {
        let bytes = |words: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": words});
        let split = |regex: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}, bytes(false)
            ]})
        };
        assert_eq!(name(bytes(true), false), Some("gpt-2"));
        let digits = json!({"type": "Digits", "individual_digits": true});
        assert_eq!(
            name(json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]}), false),
            Some("smollm")
        );
        assert_eq!(name(split(UP_TO_THREE_DIGITS), true), Some("llama-bpe"));
        assert_eq!(name(split(UP_TO_THREE_DIGITS), false), Some("dbrx"));
        assert_eq!(name(split(ONE_DIGIT), false), Some("qwen2"));
        assert_eq!(name(split(r"\w+"), false), None);
        assert_eq!(name(json!({"type": "ByteLevel", "add_prefix_space": true}), false), None);
    }

    #[test]
    fn what_is_merged_first_scores_highest() {
        let json = json!({
            "model": {"vocab": {"<unk>": 0, "<0x0A>": 1, "a": 2, "b": 3, "ab": 4, "aba": 5}, "unk_token": "<unk>",
                "merges": ["a b", ["ab", "a"], ["a", "ba"]]},
            "added_tokens": [{"id": 6, "content": "▁▁", "special": false}]
        });
        let json = json.as_object().unwrap();
        let model = json["model"].as_object().unwrap();
        let read = Vocabulary::read(json, model, Kind::Characters { space: true }, 8).unwrap();
        assert_eq!(read.kinds, [UNKNOWN, BYTE, NORMAL, NORMAL, NORMAL, NORMAL, USER_DEFINED, UNUSED]);
        assert_eq!(read.tokens[6..], ["  ", "[PAD7]"]);
        assert_eq!(read.scores()[2..6], [-5.0, -6.0, 0.0, -1.0]);
    }
}
