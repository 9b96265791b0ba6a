//! Corpora become token windows; what is wrong with one is said with its place.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use secateur::engine::data::{Purpose, Wanted, Windows, digest, overlap, windows};
use secateur::engine::model::Checkpoint;
use secateur::job::progress::{Event, Stage};
use secateur::job::report::Overlap;
use secateur::job::spec::{Corpus, JobSpec};
use serde_json::json;

use crate::support::rig::Rig;
use crate::support::tiny::Tiny;

struct Desk {
    rig: Rig,
    base: Checkpoint,
}

impl Desk {
    fn new() -> Self {
        let rig = Rig::new();
        let base = rig.base(&Tiny::llama());
        Self { rig, base }
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> Corpus {
        let path: PathBuf = self.rig.path(name);
        fs::write(&path, content).unwrap();
        Corpus::Path { path: path.to_str().unwrap().to_owned() }
    }

    fn read(&self, corpus: &Corpus, seq_len: usize, at_most: Option<usize>) -> Result<Windows, String> {
        let wanted = Wanted {
            seq_len,
            stride: None,
            at_most,
            insisted_by: None,
            purpose: Purpose::Calibration,
            seed: 1,
        };
        windows(corpus, &wanted, &self.base, self.rig.cx(Stage::Profile)).map_err(|e| e.to_string())
    }

    fn fails(&self, name: &str, content: impl AsRef<[u8]>, words: &[&str]) {
        let error = self.read(&self.file(name, content), 8, None).unwrap_err();
        for word in words {
            assert!(error.contains(word), "{error:?} does not say {word:?}");
        }
    }
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn documents_are_joined_by_one_blank_line_and_cut_without_overlap() {
    let desk = Desk::new();
    let corpus = desk.file("a.jsonl", "{\"text\": \"one two\", \"id\": 1}\n\n{\"text\": \"three\"}\n");
    let found = desk.read(&corpus, 4, None).unwrap();
    let stream = bytes("one two\n\nthree");
    assert_eq!(found.ids, stream.chunks_exact(4).map(<[u32]>::to_vec).collect::<Vec<_>>());
    assert_eq!(found.words, 3, "one, two and the beginning of three");
}

#[test]
fn the_first_windows_are_the_same_however_many_are_wanted() {
    let desk = Desk::new();
    let text: String = (0..400_000).map(|i| format!("word{i} ")).collect();
    let corpus = desk.file("long.txt", &text);
    let few = desk.read(&corpus, 64, Some(3)).unwrap();
    assert_eq!(few.ids.concat(), bytes(&text[..192]));
    assert_eq!(desk.read(&corpus, 64, Some(50)).unwrap().ids[..3], few.ids[..]);
}

#[test]
fn a_file_reads_the_same_plain_gzipped_and_zstd_compressed() {
    let desk = Desk::new();
    let text = "{\"text\": \"some words to be read\"}\n";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(text.as_bytes()).unwrap();
    let plain = desk.read(&desk.file("a.jsonl", text), 5, None).unwrap();
    let gzipped = desk.read(&desk.file("b.jsonl.gz", gzip.finish().unwrap()), 5, None).unwrap();
    let packed = zstd::encode_all(text.as_bytes(), 1).unwrap();
    // A store names files by digest: what it is shows in the content.
    let zstd = desk.read(&desk.file("0badcafe", packed), 5, None).unwrap();
    assert_eq!((&plain, &plain), (&gzipped, &zstd));
    assert_eq!(plain.ids.concat(), bytes("some words to be rea")[..20]);
}

#[test]
fn a_parquet_column_of_text_reads_like_json_lines() {
    let desk = Desk::new();
    let schema =
        Arc::new(parse_message_type("message m { required int32 n; required binary text (UTF8); }").unwrap());
    let mut content = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut content, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<parquet::data_type::Int32Type>().write_batch(&[1, 2], None, None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let rows = [ByteArray::from("first row"), ByteArray::from("second")];
    column.typed::<ByteArrayType>().write_batch(&rows, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    let plain = desk.read(&desk.file("a.parquet", &content), 17, None).unwrap();
    assert_eq!(plain.ids, [bytes("first row\n\nsecond")]);
    let packed = zstd::encode_all(&content[..], 1).unwrap();
    assert_eq!(desk.read(&desk.file("a.parquet.zst", packed), 17, None).unwrap(), plain);
}

#[test]
fn rows_of_token_ids_are_used_as_they_are() {
    let desk = Desk::new();
    let corpus = desk.file("ids.jsonl", "{\"input_ids\": [5, 6, 7]}\n{\"input_ids\": [8, 9]}\n");
    assert_eq!(desk.read(&corpus, 64, None).unwrap().ids, [vec![5, 6, 7], vec![8, 9]]);
    assert_eq!(desk.read(&corpus, 64, Some(1)).unwrap().ids, [vec![5, 6, 7]]);
}

#[test]
fn a_model_writes_another_text_for_every_purpose_and_the_same_for_the_same_seed() {
    let rig = Rig::new();
    // Its logits are flat: one whose every token is certain writes one text only.
    let desk = Desk { base: rig.base(&Tiny::mistral()), rig };
    let write = |purpose, seed| {
        let wanted = Wanted { seq_len: 24, stride: None, at_most: Some(2), insisted_by: None, purpose, seed };
        windows(&Corpus::Model { tokens: None }, &wanted, &desk.base, desk.rig.cx(Stage::Eval)).unwrap().ids
    };
    let heal = write(Purpose::Heal, 1);
    assert_eq!((heal.len(), heal[0].len()), (2, 24));
    assert_eq!(heal, write(Purpose::Heal, 1));
    for other in [write(Purpose::Eval, 1), write(Purpose::Calibration, 1), write(Purpose::Heal, 2)] {
        assert!(other.iter().all(|w| !heal.contains(w)));
    }
}

#[test]
fn fewer_windows_than_asked_are_said_aloud() {
    let desk = Desk::new();
    desk.read(&desk.file("a.txt", "x".repeat(20)), 8, Some(5)).unwrap();
    let said = |e: &Event| matches!(e, Event::Noted { message, .. } if message.contains("gives 2 windows, 5 were asked"));
    assert!(desk.rig.ear.heard().iter().any(said));
}

#[test]
fn what_is_wrong_with_a_corpus_is_said_with_its_place_and_the_remedy() {
    let desk = Desk::new();
    desk.fails("empty.txt", "", &["empty.txt", "empty"]);
    desk.fails("short.txt", "12345", &["short.txt", "5 tokens", "seq_len = 8", "give more text"]);
    desk.fails("broken.jsonl", "{\"text\": \"ok\"}\n{\"text\": \n", &["broken.jsonl, line 2"]);
    desk.fails("other.jsonl", "{\"prompt\": \"x\"}\n", &["line 1", "`text`", "`input_ids`"]);
    desk.fails("beyond.jsonl", "{\"input_ids\": [1, 257]}\n", &["line 1", "257", "vocabulary"]);
    desk.fails("one.jsonl", "{\"input_ids\": [1]}\n", &["line 1", "at least 2"]);
    desk.fails("mixed.jsonl", "{\"text\": \"a\"}\n{\"input_ids\": [1, 2]}\n", &["mixes"]);
    desk.fails("latin1.txt", b"caf\xe9 au lait", &["latin1.txt", "byte 3", "UTF-8"]);
    desk.fails("latin1.jsonl", b"{\"text\": \"caf\xe9\"}\n", &["line 1", "UTF-8"]);
    desk.fails("cut.txt", &"almost all of caf\u{e9}".as_bytes()[..18], &["UTF-8"]);
    desk.fails("not.parquet", "PAR1 but not really", &["not.parquet", "parquet"]);
    desk.fails("cut.txt.gz", [0x1f, 0x8b, 8, 0, 0, 0], &["cut.txt.gz", "cannot be read"]);
    let missing = Corpus::Path { path: "no/such/file.txt".into() };
    assert!(desk.read(&missing, 8, None).unwrap_err().contains("no/such/file.txt"));
    let long = desk.read(&Corpus::Text { text: "x".repeat(999) }, 257, None).unwrap_err();
    assert!(long.contains("257") && long.contains("256"), "{long}");
}

#[test]
fn a_digest_changes_with_the_content_only() {
    let desk = Desk::new();
    let of = |name: &str, content: &str| digest(&desk.file(name, content)).unwrap();
    assert_eq!(of("a.txt", "same"), of("b.txt", "same"));
    assert_ne!(of("a.txt", "same"), of("a.txt", "other"));
}

#[test]
fn words_that_healing_and_measuring_have_in_common_are_counted_and_refused_on_request() {
    let desk = Desk::new();
    let secret = "the old gardener cut every second branch of the tall pear tree before spring came";
    let other = "nobody who lives in this long street has ever asked why the lamps burn at noon";
    let row = |context: &str| {
        json!({"kind": "loglikelihood", "context": context, "continuation": "again"}).to_string() + "\n"
    };
    let items = desk.file("items.jsonl", row(&format!("He said {secret}")) + &row(other) + &row("short"));
    // Case, punctuation and line ends do not hide it.
    let heard = secret.to_uppercase().replace(' ', ",\n");
    let heal = desk.file("heal.txt", format!("Something else comes first. {heard}. And then more."));
    let ids: Vec<u32> = bytes(other);
    let rows = desk.file("rows.jsonl", json!({"input_ids": ids}).to_string());
    let spec = |heal: &[&Corpus], text: &str| {
        let heal: Vec<_> = heal.iter().map(|c| json!({"method": "qlora", "corpus": c})).collect();
        let spec = json!({
            "model": {"from": "path", "path": "m"}, "prune": {"amount": {"layers": 1}}, "heal": heal,
            "eval": {"perplexity": [{"from": "text", "text": text}], "tasks": [{"task": "t", "items": items}]}
        });
        JobSpec::read(spec).unwrap()
    };
    let find = |spec: &JobSpec| overlap::find(spec, &desk.base, desk.rig.cx(Stage::Eval)).unwrap();
    let told = |found: Vec<Overlap>| -> Vec<_> {
        found.into_iter().map(|o| (o.measured, o.healed_on, o.common, o.total)).collect()
    };
    let found = find(&spec(&[&heal, &rows, &heal], &format!("Now {other} and {secret}")));
    assert_eq!(overlap::refuse(&[]).map_err(|e| e.to_string()), Ok(()));
    let refused = overlap::refuse(&found).unwrap_err().to_string();
    assert!(refused.contains("heal.txt holds 13 words in a row of 1 of the 3 items"), "{refused}");
    let at = |a: &str, b: &str, common, total| (a.to_owned(), b.to_owned(), common, total);
    // 33 words are 21 runs of 13; the secret has 15 words, so 3 runs, the other text 16, so 4.
    let expected = [
        at("t", "heal.txt", 1, 3),
        at("text", "heal.txt", 3, 21),
        at("t", "rows.jsonl", 1, 3),
        at("text", "rows.jsonl", 4, 21),
    ];
    assert_eq!(told(found), expected);
    assert!(find(&spec(&[&Corpus::Model { tokens: None }], secret)).is_empty());
    let twelve = secret.split_whitespace().take(12).collect::<Vec<_>>().join(" ");
    assert!(told(find(&spec(&[&desk.file("few.txt", twelve)], "none of it"))).is_empty());
}
