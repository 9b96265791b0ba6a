//! What `examples/` shows must be true.

use std::fs;
use std::path::PathBuf;

use secateur::job::spec::JobSpec;
use secateur::job::sweep::SweepSpec;
use serde_json::Value;

fn examples() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples")
}

fn items(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(examples().join(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_example_spec_is_accepted() {
    let mut read = 0;
    let files = fs::read_dir(examples()).unwrap().map(|entry| entry.unwrap().path());
    // What lies in directories below is no spec.
    for path in files.filter(|path| path.is_file()) {
        let text = fs::read_to_string(&path).unwrap();
        let value: Value = match path.extension().and_then(|e| e.to_str()) {
            Some("json") => serde_json::from_str(&text).unwrap(),
            Some("yaml") => serde_yaml_ng::from_str(&text).unwrap(),
            _ => continue,
        };
        let sweep = value.get("axes").is_some();
        let complaints = if sweep { SweepSpec::read(value).err() } else { JobSpec::read(value).err() };
        assert_eq!(complaints, None, "{}", path.display());
        read += 1;
    }
    assert!(read >= 5, "only {read} specs found");
}

#[test]
fn the_questions_have_one_right_answer_in_no_favourite_place() {
    let items = items("eval_items.jsonl");
    assert!(items.len() >= 120);
    let mut places = [0; 4];
    for item in &items {
        assert_eq!(item["kind"], "multiple_choice", "{item}");
        let mut choices: Vec<&str> =
            item["choices"].as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
        assert_eq!(choices.len(), 4, "{item}");
        choices.sort_unstable();
        choices.dedup();
        assert_eq!(choices.len(), 4, "a choice stands twice: {item}");
        places[usize::try_from(item["gold"].as_u64().unwrap()).unwrap()] += 1;
    }
    let (least, most) = (places.iter().min().unwrap(), places.iter().max().unwrap());
    assert!(most - least <= 1, "{places:?}");
}

#[test]
fn the_last_words_follow_their_sentences() {
    let items = items("last_words.jsonl");
    assert!(items.len() >= 60);
    for item in &items {
        assert_eq!(item["kind"], "loglikelihood", "{item}");
        let (context, word) = (item["context"].as_str().unwrap(), item["continuation"].as_str().unwrap());
        assert!(!context.ends_with(' ') && !word.is_empty() && !word.contains(' '), "{item}");
    }
}
