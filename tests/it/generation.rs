//! What a model writes, and what is made of it.

use std::fs;
use std::path::PathBuf;

use secateur::engine::eval::exact_match::matches;
use secateur::engine::eval::likeness::{bleu, chrf, rouge_l};
use secateur::engine::model::generate::{Prompt, continue_text, ends_at_end_token, go_on};
use secateur::engine::model::{Decoder, Memory};
use serde_json::Value;

use crate::support::rig::{Rig, windows};
use crate::support::tiny::Tiny;

fn golden() -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/scores.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// More prompts than go through the model together, of lengths from 1 to 40 and with as unlike ends.
fn prompts() -> Vec<Prompt> {
    let prompt = |(i, window): (usize, Vec<u32>)| Prompt {
        tokens: window[..=i * 7 % 40].to_vec(),
        most: i % 11,
        temperature: if i % 3 == 0 { 1.0 } else { 0.0 },
        seed: i as u64,
    };
    windows(90, 80).into_iter().enumerate().map(prompt).collect()
}

#[test]
fn texts_of_all_lengths_written_together_are_those_written_alone() {
    for tiny in [Tiny::llama(), Tiny::mistral()] {
        let rig = Rig::new();
        let decoder = Decoder::open(&rig.base(&tiny), &rig.compute).unwrap();
        let prompts = prompts();
        let mut told = 0;
        let mut tell = |done| {
            assert!(done > told, "{done} tokens after {told}");
            told = done;
            Ok(())
        };
        let mut ends = ends_at_end_token(&decoder);
        let together = go_on(&decoder, &prompts, &mut ends, &mut tell).unwrap();
        for (prompt, mut written) in prompts.iter().zip(together) {
            written.pop_if(|last| decoder.config().eos_tokens.contains(last));
            let Prompt { tokens, most, temperature, seed } = prompt;
            assert_eq!(written, continue_text(&decoder, tokens, *most, *temperature, *seed).unwrap());
        }
    }
}

#[test]
fn what_is_written_does_not_depend_on_the_memory_there_is() {
    let mut rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    let write = |rig: &Rig| {
        let decoder = Decoder::open(&base, &rig.compute).unwrap();
        go_on(&decoder, &prompts(), &mut |_, _| Ok(false), &mut |_| Ok(())).unwrap()
    };
    let plenty = write(&rig);
    assert!(plenty.iter().zip(prompts()).all(|(written, prompt)| written.len() == prompt.most));
    rig.compute.memory = Memory::new(Some(97 << 20), &rig.path("spill"));
    assert_eq!(write(&rig), plenty);
}

#[test]
fn written_answers_are_matched_as_lm_evaluation_harness_matches_them() {
    for case in golden()["answers"].as_array().unwrap() {
        let found = matches(case["answer"].as_str().unwrap(), case["written"].as_str().unwrap());
        let expected = (case["strict"].as_bool().unwrap(), case["flexible"].as_bool().unwrap());
        assert_eq!(found, expected, "{case}");
    }
}

#[test]
fn an_answer_without_a_number_is_compared_as_it_is_written() {
    assert_eq!(matches("Paris", " Paris\n"), (true, true));
    assert_eq!(matches("The  Hague", "the Hague."), (false, true));
    assert_eq!(matches("Paris", "Paris, 1900"), (false, false));
}

#[test]
fn texts_are_as_like_as_sacrebleu_and_rouge_score_say() {
    for case in golden()["texts"].as_array().unwrap() {
        let pair =
            |pair: &Value| (pair[0].as_str().unwrap().to_owned(), pair[1].as_str().unwrap().to_owned());
        let pairs: Vec<(String, String)> = case["pairs"].as_array().unwrap().iter().map(pair).collect();
        let pairs: Vec<(&str, &str)> = pairs.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        for (name, found) in [("bleu", bleu(&pairs)), ("chrf", chrf(&pairs)), ("rouge_l", rouge_l(&pairs))] {
            let expected = case[name].as_f64().unwrap();
            assert!((found - expected).abs() < 1e-9, "{name} of {}: {found}, not {expected}", case["name"]);
        }
    }
}
