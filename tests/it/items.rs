//! Evaluation items, and the rows of benchmarks that are made into them.

use std::fs;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use secateur::engine::data::items::{self, Item};
use secateur::job::benchmark::Benchmark;
use secateur::job::spec::{Corpus, JobSpec, TaskSpec};
use serde_json::{Value, json};
use tempfile::TempDir;

fn file(desk: &TempDir, name: &str, content: impl AsRef<[u8]>) -> Corpus {
    let path = desk.path().join(name);
    fs::write(&path, content).unwrap();
    Corpus::Path { path: path.to_str().unwrap().to_owned() }
}

fn rows(rows: &[Value]) -> Corpus {
    Corpus::Text { text: rows.iter().map(|row| format!("{row}\n")).collect() }
}

fn choices(context: &str, choices: &[&str], gold: usize) -> Item {
    let choices = choices.iter().map(|choice| (*choice).to_owned()).collect();
    Item::MultipleChoice { context: context.into(), choices, gold }
}

#[test]
fn items_are_read_with_their_kinds_and_refused_with_their_lines() {
    let desk = tempfile::tempdir().unwrap();
    let good = "{\"id\": \"x\", \"kind\": \"multiple_choice\", \"context\": \"c\", \"choices\": [\"a\", \"b\"], \"gold\": 1}\n\
                {\"kind\": \"loglikelihood\", \"context\": \"c\", \"continuation\": \"d\"}\n";
    let read = items::read(&TaskSpec::of("t", file(&desk, "good.jsonl", good))).unwrap();
    assert_eq!(read.len(), 2);
    assert!(matches!(&read[0], Item::MultipleChoice { gold: 1, .. }));
    assert_eq!(
        items::read(&TaskSpec { limit: Some(1), ..TaskSpec::of("t", file(&desk, "good.jsonl", good)) })
            .unwrap()
            .len(),
        1
    );
    for (row, words) in [
        (
            "{\"kind\": \"multiple_choice\", \"context\": \"c\", \"choices\": [\"a\", \"b\"], \"gold\": 2}",
            "`gold` is 2",
        ),
        (
            "{\"kind\": \"multiple_choice\", \"context\": \"c\", \"choices\": [\"a\"], \"gold\": 0}",
            "at least two",
        ),
        ("{\"kind\": \"context_choice\", \"contexts\": [\"a\", \"b\"], \"gold\": 0}", "continuation"),
        ("{\"kind\": \"riddle\"}", "riddle"),
        ("{\"kind\": \"generate_until\", \"context\": \"c\", \"until\": []}", "missing field `answer`"),
        (
            "{\"kind\": \"generate_until\", \"context\": \"c\", \"answer\": \"1\", \"until\": 3}",
            "a list of texts",
        ),
        (
            "{\"kind\": \"generate_until\", \"context\": \"c\", \"answer\": \"1\", \"max_gen_toks\": 0}",
            "`max_gen_toks` must be at least 1",
        ),
        ("{\"question\": \"?\"}", "`format`: arc_challenge"),
        ("not json", "line 1"),
    ] {
        let error = items::read(&TaskSpec::of("t", file(&desk, "bad.jsonl", row))).unwrap_err().to_string();
        assert!(error.contains("bad.jsonl, line 1") && error.contains(words), "{error}");
    }
}

/// A row of each benchmark as it is published, and what the harness asks (checked against it by
/// `scripts/parity_benchmarks.py`).
fn published(benchmark: Benchmark) -> (Value, Item) {
    let labelled = |text: [&str; 3], label: [&str; 3]| json!({"text": text, "label": label});
    let mmlu = json!({
        "question": " What is 2 + 2? ", "subject": "elementary_mathematics", "choices": ["1", "4", "3", "2"], "answer": 1
    });
    match benchmark {
        Benchmark::ArcChallenge | Benchmark::ArcEasy => (
            json!({
                "id": "x", "question": "Which is wet?", "choices": labelled(["sand", "water", "fire"], ["1", "2", "3"]),
                "answerKey": "2"
            }),
            choices("Question: Which is wet?\nAnswer:", &["sand", "water", "fire"], 1),
        ),
        Benchmark::Openbookqa => (
            json!({
                "question_stem": "The sun is", "choices": labelled(["cold", "hot", "wet"], ["A", "B", "C"]),
                "answerKey": " B"
            }),
            choices("The sun is", &["cold", "hot", "wet"], 1),
        ),
        Benchmark::Boolq => (
            json!({"passage": "Water is wet.", "question": "is water wet", "idx": 0, "label": 1}),
            choices("Water is wet.\nQuestion: is water wet?\nAnswer:", &["no", "yes"], 1),
        ),
        Benchmark::Piqa => (
            json!({"goal": "To open a jar", "sol1": "twist the lid", "sol2": "shout", "label": 0}),
            choices("Question: To open a jar\nAnswer:", &["twist the lid", "shout"], 0),
        ),
        Benchmark::Sciq => (
            json!({
                "question": "What falls?", "support": "  Rain falls.", "distractor1": "sun", "distractor2": "moon",
                "distractor3": "sky", "correct_answer": "rain"
            }),
            choices("Rain falls.\nQuestion: What falls?\nAnswer:", &["sun", "moon", "sky", "rain"], 3),
        ),
        Benchmark::Hellaswag => (
            json!({
                "activity_label": "Baking", "ctx_a": "A man bakes [header] bread.", "ctx_b": "he Then",
                "endings": ["eats  it.", " sleeps [title] well"], "label": "1"
            }),
            choices("Baking: A man bakes bread. He then", &["eats it.", "sleeps. well"], 1),
        ),
        Benchmark::Mmlu => (
            mmlu,
            choices(
                "The following are multiple choice questions (with answers) about elementary mathematics.\n\n\
                 What is 2 + 2?\nA. 1\nB. 4\nC. 3\nD. 2\nAnswer:",
                &["A", "B", "C", "D"],
                1,
            ),
        ),
        Benchmark::MmluContinuation => (
            mmlu,
            choices(
                "The following are questions (with answers) about elementary mathematics.\n\n\
                 Question: What is 2 + 2?\nAnswer:",
                &["1", "4", "3", "2"],
                1,
            ),
        ),
        Benchmark::Winogrande | Benchmark::LambadaOpenai | Benchmark::Gsm8k => published_otherwise(benchmark),
    }
}

/// The same of those that are no choice between answers.
fn published_otherwise(benchmark: Benchmark) -> (Value, Item) {
    match benchmark {
        Benchmark::Winogrande => (
            json!({
                "sentence": "The cup broke because the _ was thin.", "option1": "cup", "option2": "table", "answer": "1"
            }),
            Item::ContextChoice {
                contexts: ["The cup broke because the cup", "The cup broke because the table"]
                    .map(String::from)
                    .into(),
                continuation: "was thin.".into(),
                gold: 0,
            },
        ),
        Benchmark::LambadaOpenai => (
            json!({"text": "she took  her hat"}),
            Item::Loglikelihood { context: "she took  her".into(), continuation: "hat".into() },
        ),
        Benchmark::Gsm8k => (
            json!({"question": "Two and two?", "answer": "It is <<2+2=4>>4.\n#### 1,004"}),
            Item::written("Question: Two and two?\nAnswer:".into(), "1,004".into()),
        ),
        _ => unreachable!("a choice between answers"),
    }
}

#[test]
fn rows_as_published_become_the_items_of_the_harness() {
    for benchmark in Benchmark::ALL {
        let (row, expected) = published(benchmark);
        let task = TaskSpec::of(benchmark.name(), rows(std::slice::from_ref(&row)));
        assert_eq!(items::read(&task).unwrap(), std::slice::from_ref(&expected), "{}", benchmark.name());
        // Called otherwise, and told.
        let told =
            TaskSpec { format: Some(benchmark), ..TaskSpec::of("mine", rows(std::slice::from_ref(&row))) };
        assert_eq!(items::read(&told).unwrap(), [expected]);
        // Each field that is missing is named.
        for field in row.as_object().unwrap().keys().filter(|field| !["id", "idx"].contains(&field.as_str()))
        {
            let mut lacking = row.clone();
            lacking.as_object_mut().unwrap().remove(field);
            match items::read(&TaskSpec { items: rows(&[lacking]), ..told.clone() }) {
                Ok(_) => assert_eq!((benchmark, field.as_str()), (Benchmark::MmluContinuation, "subject")),
                Err(error) => {
                    let error = error.to_string();
                    assert!(
                        error.contains("text, line 1") && error.contains(&format!("`{field}`")),
                        "{error}"
                    );
                }
            }
        }
    }
}

#[test]
fn shots_are_the_first_solved_questions_of_the_same_subject() {
    let ask = |question: &str, subject: &str| json!({"question": question, "subject": subject, "choices": ["a", "b", "c", "d"], "answer": 2});
    let shots = rows(&[
        ask("one", "law"),
        ask("two", "art"),
        ask("three", "law"),
        ask("four", "law"),
        ask("five", "law"),
    ]);
    let task = TaskSpec {
        shots: 2,
        shots_from: Some(shots),
        // A question is not its own shot.
        ..TaskSpec::of("mmlu", rows(&[ask("three", "law"), ask("six", "art")]))
    };
    let shown = |question: &str| format!("{question}\nA. a\nB. b\nC. c\nD. d\nAnswer:");
    let about = "The following are multiple choice questions (with answers) about law.\n\n";
    let first = TaskSpec { limit: Some(1), ..task.clone() };
    let context = format!("{about}{} C\n\n{} C\n\n{}", shown("one"), shown("four"), shown("three"));
    assert_eq!(items::read(&first).unwrap(), [choices(&context, &["A", "B", "C", "D"], 2)]);
    let none = TaskSpec { shots_from: Some(rows(&[])), ..first };
    let error = items::read(&none).unwrap_err().to_string();
    assert!(error.contains("0 questions about law"), "{error}");
    let error = items::read(&task).unwrap_err().to_string();
    assert!(error.contains("1 questions about art") && error.contains("the 2 of `shots`"), "{error}");
}

#[test]
fn rows_of_parquet_files_are_read_with_their_lists() {
    let desk = tempfile::tempdir().unwrap();
    let schema = "message m {
        required binary question (UTF8); required binary subject (UTF8);
        required group choices (LIST) { repeated group list { required binary element (UTF8); } }
        required int64 answer; }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut content = Vec::new();
    let mut file = SerializedFileWriter::new(&mut content, schema, Arc::default()).unwrap();
    let mut group = file.next_row_group().unwrap();
    let texts = |all: &[&str]| all.iter().map(|text| ByteArray::from(*text)).collect::<Vec<_>>();
    for (values, repeated) in [
        (texts(&["Why?", "How?"]), None),
        (texts(&["law", "law"]), None),
        (texts(&["w", "x", "y", "z", "1", "2", "3", "4"]), Some([0, 1, 1, 1, 0, 1, 1, 1])),
    ] {
        let mut column = group.next_column().unwrap().unwrap();
        let levels = repeated.map(|_| [1; 8]);
        let (levels, repeated) = (levels.as_ref().map(|l| &l[..]), repeated.as_ref().map(|r| &r[..]));
        column.typed::<ByteArrayType>().write_batch(&values, levels, repeated).unwrap();
        column.close().unwrap();
    }
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&[3, 0], None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    file.close().unwrap();
    let task = TaskSpec::of("mmlu_continuation", file_of(&desk, &content));
    let about = "The following are questions (with answers) about law.\n\nQuestion: ";
    let asked = |question: &str| format!("{about}{question}\nAnswer:");
    let expected = [
        choices(&asked("Why?"), &["w", "x", "y", "z"], 3),
        choices(&asked("How?"), &["1", "2", "3", "4"], 0),
    ];
    assert_eq!(items::read(&task).unwrap(), expected);
}

fn file_of(desk: &TempDir, content: &[u8]) -> Corpus {
    file(desk, "test-00000-of-00001.parquet", content)
}

#[test]
fn a_benchmark_without_items_is_taken_from_the_hub() {
    let read = |task: Value| {
        JobSpec::read(json!({
            "model": {"from": "path", "path": "m"}, "prune": {"amount": {"layers": 1}}, "eval": {"tasks": [task]}
        }))
    };
    let spec = read(json!({"task": "mmlu", "shots": 5})).unwrap();
    let hub = |file: &str| Corpus::Hub {
        repo: "cais/mmlu".into(),
        file: file.into(),
        revision: "refs/convert/parquet".into(),
    };
    assert_eq!(spec.eval.tasks[0].items, hub("all/test/0000.parquet"));
    assert_eq!(spec.eval.tasks[0].shots_from, Some(hub("all/dev/0000.parquet")));
    // What is read again stays as it is.
    assert_eq!(JobSpec::read(serde_json::to_value(&spec).unwrap()).unwrap(), spec);
    for (task, pointer, words) in [
        (json!({"task": "riddles"}), "/eval/tasks/0/items", "arc_challenge, arc_easy"),
        (
            json!({"task": "t", "items": {"from": "path", "path": "i.jsonl"}, "shots": 3}),
            "/eval/tasks/0/shots_from",
            "name the solved questions",
        ),
        (json!({"task": "mmlu", "shots": 65}), "/eval/tasks/0/shots", "at most 64"),
    ] {
        let complaints = read(task).unwrap_err();
        let said = complaints.iter().any(|c| c.pointer == pointer && c.message.contains(words));
        assert!(said, "{complaints:?}");
    }
}
