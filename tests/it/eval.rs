//! Scores are what a hand-made calculation on single sequences says they are.

use std::fs;
use std::path::PathBuf;

use secateur::engine::eval::loglikelihood::{Request, likelihoods};
use secateur::engine::eval::tasks::ItemResult;
use secateur::engine::eval::{Checkpoints, Place, evaluate};
use secateur::engine::model::generate::continue_text;
use secateur::engine::model::{Batch, Checkpoint, Decoder};
use secateur::job::progress::Stage;
use secateur::job::report::EvalReport;
use secateur::job::spec::{Corpus, EvalSpec, TaskSpec};

use crate::support::rig::{Rig, windows};
use crate::support::tiny::Tiny;

/// Log-likelihood of `tokens[from..]` and whether all are the likeliest, one sequence alone, in f64.
fn by_hand(decoder: &Decoder, tokens: &[u32], from: usize) -> (f64, bool) {
    let x = decoder.forward(&Batch::of(&[tokens])).unwrap();
    let logits: Vec<Vec<f32>> = decoder.logits(&x).unwrap().to_vec2().unwrap();
    let (mut sum, mut greedy) = (0.0, true);
    for at in from..tokens.len() {
        let row: Vec<f64> = logits[at - 1].iter().map(|v| f64::from(*v)).collect();
        let id = tokens[at] as usize;
        sum += row[id] - row.iter().map(|v| v.exp()).sum::<f64>().ln();
        greedy &= row.iter().all(|v| *v <= row[id]);
    }
    (sum, greedy)
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn assert_near(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-4 * b.abs().max(1.0), "{a} is not {b}");
}

struct Desk {
    rig: Rig,
    base: PathBuf,
    pruned: PathBuf,
}

impl Desk {
    fn new() -> Self {
        let rig = Rig::new();
        let base = Tiny::llama().write(rig.path("base"));
        let pruned = Tiny { layers: 4, ..Tiny::llama() }.write(rig.path("pruned"));
        Self { rig, base, pruned }
    }

    fn base(&self) -> Decoder {
        Decoder::open(&Checkpoint::open(&self.base).unwrap(), &self.rig.compute).unwrap()
    }

    fn evaluate(&self, spec: &EvalSpec) -> Result<EvalReport, String> {
        let place = |dir: &PathBuf| Place { dir: dir.clone(), digest: dir.display().to_string() };
        let checkpoints = Checkpoints {
            base: place(&self.base),
            pruned: place(&self.pruned),
            healed: None,
            gguf: Vec::new(),
        };
        let (items, workspace) = (self.rig.path("eval_items"), self.rig.workspace());
        evaluate(&checkpoints, spec, 3, &items, &workspace, self.rig.cx(Stage::Eval))
            .map_err(|e| e.to_string())
    }

    /// Scores of `rows` as task `t` on both checkpoints, and the base's item results.
    fn task(&self, rows: &[&str]) -> (EvalReport, Vec<ItemResult>) {
        let items = Corpus::Text { text: rows.join("\n") };
        let tasks = vec![TaskSpec::of("a/t", items)];
        let spec =
            EvalSpec { perplexity: Vec::new(), tasks, speed: false, seq_len: 64, ..EvalSpec::default() };
        let report = self.evaluate(&spec).unwrap();
        let lines = fs::read_to_string(self.rig.path("eval_items/base-a_t.jsonl")).unwrap();
        (report, lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect())
    }
}

#[test]
fn a_batch_of_unlike_lengths_scores_as_each_sequence_alone() {
    let desk = Desk::new();
    let decoder = desk.base();
    let mut requests: Vec<Request> =
        windows(9, 200).into_iter().map(|tokens| Request { from: 1 + tokens.len() / 3, tokens }).collect();
    requests.push(Request { tokens: vec![4, 5], from: 1 });
    let scored = likelihoods(&decoder, &requests, "test", desk.rig.cx(Stage::Eval)).unwrap();
    for (request, scored) in requests.iter().zip(scored) {
        assert_near(scored.log_likelihood, by_hand(&decoder, &request.tokens, request.from).0);
    }
}

#[test]
fn perplexity_scores_every_token_of_a_window_after_the_first() {
    let desk = Desk::new();
    let text = "A text of some words, cut in windows of 16 bytes each, with a rest.";
    let spec = EvalSpec {
        perplexity: vec![Corpus::Text { text: text.into() }],
        tasks: Vec::new(),
        speed: false,
        seq_len: 16,
        ..EvalSpec::default()
    };
    let report = desk.evaluate(&spec).unwrap();
    let decoder = desk.base();
    let nll: f64 = bytes(text).chunks_exact(16).map(|w| -by_hand(&decoder, w, 1).0).sum();
    let (scored, p) = (4 * 15, &report.base.perplexity[0]);
    assert_eq!((p.tokens, p.corpus.as_str()), (scored, "text"));
    assert_near(p.nll_per_token, nll / scored as f64);
    assert_near(p.value, p.nll_per_token.exp());
    assert_near(p.nll_over_ln_vocab, p.nll_per_token / 257f64.ln());
    assert_near(p.word_perplexity.ln(), nll / text[..64].split_whitespace().count() as f64);
    assert!((report.pruned.perplexity[0].value - p.value).abs() > 1e-6, "two models, two scores");
    assert_eq!((report.base.layer_count, report.pruned.layer_count), (6, 4));
    assert!(report.base.size_bytes > report.pruned.size_bytes);
}

#[test]
fn windows_are_never_longer_than_the_model_can_take() {
    let desk = Desk::new();
    let text = Corpus::Text { text: "x".repeat(600) };
    let spec = EvalSpec { perplexity: vec![text], tasks: Vec::new(), speed: true, ..EvalSpec::default() };
    let report = desk.evaluate(&spec).unwrap();
    assert_eq!(report.base.perplexity[0].tokens, 2 * 255);
    let speed = report.base.speed.unwrap();
    assert!(speed.prefill_tokens_per_s > 0.0 && speed.decode_tokens_per_s > 0.0 && speed.latency_ms > 0.0);
    assert!(report.base.peak_memory_bytes > 1 << 20);
}

#[test]
fn choices_are_scored_after_one_space_and_by_their_characters() {
    let desk = Desk::new();
    let choices = ["Paris", "the city of light and of much else", "\u{e9}t\u{e9}", "x"];
    let row = serde_json::json!({"kind": "multiple_choice", "context": "Question: where?\nAnswer:", "choices": choices, "gold": 0});
    let (report, items) = desk.task(&[&row.to_string()]);
    let (decoder, context) = (desk.base(), bytes("Question: where?\nAnswer:"));
    let expected: Vec<f64> = choices
        .iter()
        .map(|c| by_hand(&decoder, &[context.clone(), bytes(&format!(" {c}"))].concat(), context.len()).0)
        .collect();
    for (found, expected) in items[0].log_likelihoods.iter().zip(&expected) {
        assert_near(*found, *expected);
    }
    let best = |values: Vec<f64>| (0..4).max_by(|a, b| values[*a].total_cmp(&values[*b])).unwrap();
    // Code points, not bytes: \u{e9}t\u{e9} has three.
    let norm = expected.iter().zip([5.0, 34.0, 3.0, 1.0]).map(|(l, n)| l / n).collect();
    assert_eq!(items[0].chosen, Some(best(expected)));
    assert_eq!(items[0].chosen_norm, Some(best(norm)));
    let score = &report.base.tasks[0];
    assert_eq!((score.n, score.task.as_str()), (1, "a/t"));
    assert_eq!(score.acc > 0.5, items[0].chosen == Some(0));
    assert_eq!(score.acc_norm.unwrap() > 0.5, items[0].chosen_norm == Some(0));
}

#[test]
fn the_first_choice_wins_a_tie_and_the_error_is_that_of_a_sample() {
    let desk = Desk::new();
    let row = |gold| {
        format!(
            "{{\"kind\":\"multiple_choice\",\"context\":\"c\",\"choices\":[\"same\",\"same\"],\"gold\":{gold}}}"
        )
    };
    let (report, items) = desk.task(&[&row(0), &row(1), &row(0), &row(0)]);
    assert!(items.iter().all(|i| i.chosen == Some(0) && i.chosen_norm == Some(0)));
    let score = &report.base.tasks[0];
    assert_near(score.acc, 0.75);
    assert_near(score.stderr, (0.75f64 * 0.25 / 3.0).sqrt());
}

#[test]
fn white_space_at_the_end_of_a_context_belongs_to_the_continuation() {
    let desk = Desk::new();
    let row = "{\"kind\":\"loglikelihood\",\"context\":\"abc  \",\"continuation\":\"d\"}";
    let (report, items) = desk.task(&[row]);
    let (log_likelihood, greedy) = by_hand(&desk.base(), &bytes("abc   d"), 3);
    assert_near(items[0].log_likelihoods[0], log_likelihood);
    assert_eq!((items[0].correct, items[0].chosen), (greedy, None));
    assert_eq!(report.base.tasks[0].acc_norm, None);
}

#[test]
fn a_continuation_the_model_would_write_is_greedy_and_another_is_not() {
    let desk = Desk::new();
    let decoder = desk.base();
    let prompt = bytes("abc");
    let written = secateur::engine::model::generate::continue_text(&decoder, &prompt, 4, 0.0, 0).unwrap();
    let mut tokens = [prompt, written].concat();
    assert!(tokens.len() > 3, "the model says nothing here");
    let request = |tokens: &[u32]| Request { tokens: tokens.to_vec(), from: 3 };
    let yes = request(&tokens);
    *tokens.last_mut().unwrap() ^= 1;
    let scored = likelihoods(&decoder, &[yes, request(&tokens)], "test", desk.rig.cx(Stage::Eval)).unwrap();
    assert_eq!((scored[0].greedy, scored[1].greedy), (true, false));
}

#[test]
fn one_continuation_is_scored_after_each_context() {
    let desk = Desk::new();
    let row = "{\"kind\":\"context_choice\",\"contexts\":[\"the cat\",\"the dogs\"],\"continuation\":\"ran.\",\"gold\":1}";
    let (report, items) = desk.task(&[row]);
    let decoder = desk.base();
    assert_near(items[0].log_likelihoods[0], by_hand(&decoder, &bytes("the cat ran."), 7).0);
    assert_near(items[0].log_likelihoods[1], by_hand(&decoder, &bytes("the dogs ran."), 8).0);
    assert_eq!(report.base.tasks[0].acc_norm, None);
}

#[test]
fn a_loss_that_is_not_finite_names_the_checkpoint() {
    let desk = Desk::new();
    Tiny { layers: 4, ..Tiny::llama() }.write_with(&desk.pruned, |w| {
        if w.name.ends_with("2.mlp.up_proj.weight") {
            w.values[0] = f32::NAN;
        }
    });
    let text = Corpus::Text { text: "some text to be scored".into() };
    let spec = EvalSpec {
        perplexity: vec![text],
        tasks: Vec::new(),
        speed: false,
        seq_len: 8,
        ..EvalSpec::default()
    };
    let error = desk.evaluate(&spec).unwrap_err();
    assert!(error.contains("pruned checkpoint") && error.contains("not finite"), "{error}");
}

#[test]
fn a_stride_scores_every_token_once_with_what_the_window_has_before_it() {
    let desk = Desk::new();
    let text = "Fifty bytes of text, and windows that lie so close";
    assert_eq!(text.len(), 50);
    let perplexity = vec![Corpus::Text { text: text.into() }];
    let spec = EvalSpec { perplexity, speed: false, seq_len: 20, stride: Some(8), ..EvalSpec::default() };
    let report = desk.evaluate(&spec).unwrap();
    let (decoder, tokens) = (desk.base(), bytes(text));
    // Windows from 0, 8, 16, 24, and the last one, which ends with the text.
    let windows = [(0, 20, 1), (8, 28, 12), (16, 36, 12), (24, 44, 12), (32, 50, 12)];
    let nll: f64 = windows.iter().map(|(a, b, from)| -by_hand(&decoder, &tokens[*a..*b], *from).0).sum();
    let p = &report.base.perplexity[0];
    assert_eq!(p.tokens, 49);
    assert_near(p.nll_per_token, nll / 49.0);
    assert_near(p.word_perplexity.ln(), nll / text.split_whitespace().count() as f64);
}

#[test]
fn the_perplexity_of_last_words_is_that_of_an_item() {
    let desk = Desk::new();
    let row =
        |word| format!("{{\"kind\":\"loglikelihood\",\"context\":\"the\",\"continuation\":\"{word}\"}}");
    let (report, items) = desk.task(&[&row("end"), &row("beginning")]);
    let sum: f64 = items.iter().map(|i| i.log_likelihoods[0]).sum();
    assert_near(report.base.tasks[0].perplexity.unwrap().ln(), -sum / 2.0);
}

#[test]
fn items_that_stand_twice_or_are_too_long_are_counted() {
    let desk = Desk::new();
    let long = "x".repeat(400);
    let row = |context: &str| {
        format!(
            "{{\"kind\":\"multiple_choice\",\"context\":\"{context}\",\"choices\":[\"a\",\"b\"],\"gold\":0}}"
        )
    };
    let (report, items) = desk.task(&[&row("c"), &row(&long), &row("c"), &row("d"), &row("c")]);
    let score = &report.base.tasks[0];
    assert_eq!((score.n, score.duplicates, score.truncated), (5, 2, 1));
    assert_eq!(items.iter().map(|i| i.truncated).collect::<Vec<_>>(), [false, true, false, false, false]);
    // The end of the context stays: so many tokens as the model reads, and the one that is scored.
    let kept = bytes(&format!("{} a", "x".repeat(255)));
    assert_near(items[1].log_likelihoods[0], by_hand(&desk.base(), &kept, 255).0);
    assert_near(score.chance, 0.5);
}

#[test]
fn an_answer_is_written_until_a_stop_and_its_number_compared() {
    let desk = Desk::new();
    let decoder = desk.base();
    let context = "Question: how many?\nAnswer:";
    let written = continue_text(&decoder, &bytes(context), 12, 0.0, 0).unwrap();
    let written: Vec<u8> = written.iter().map(|token| *token as u8).collect();
    // What a model of noise writes is no UTF-8: the stop must be a piece of it that is.
    let at =
        (2..written.len()).find(|at| written[*at].is_ascii()).expect("twelve bytes and no ASCII among them");
    let stop = char::from(written[at]).to_string();
    let first = written.iter().position(|byte| *byte == written[at]).unwrap();
    let row = serde_json::json!({
        "kind": "generate_until", "context": context, "answer": "7", "until": ["never", stop], "max_gen_toks": 12
    });
    let (report, items) = desk.task(&[&row.to_string()]);
    assert_eq!(items[0].written.as_deref(), Some(&*String::from_utf8_lossy(&written[..first])));
    let score = &report.base.tasks[0];
    assert_eq!((score.n, score.acc, score.chance), (1, 0.0, 0.0));
    assert_eq!(score.exact_match.map(|e| (e.strict, e.flexible)), Some((0.0, 0.0)));
    assert_eq!((score.acc_norm, score.perplexity), (None, None));
    let row = row.to_string().replace("12}", "256}");
    let items = Corpus::Text { text: row };
    let tasks = vec![TaskSpec::of("t", items)];
    let error = desk.evaluate(&EvalSpec { tasks, ..EvalSpec::default() }).unwrap_err();
    assert!(error.contains("`max_gen_toks` 256") && error.contains("256 tokens in all"), "{error}");
}
