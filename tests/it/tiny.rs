//! The tiny models the other tests stand on are real ones.

use secateur::engine::model::Checkpoint;

use crate::support::tiny::{END_OF_TEXT, Tiny};

#[test]
fn every_family_opens_sharded_or_not() {
    for tiny in [Tiny::llama(), Tiny::mistral(), Tiny::qwen2()] {
        for shards in [1, 3] {
            let dir = tempfile::tempdir().unwrap();
            let checkpoint = Checkpoint::open(&Tiny { shards, ..tiny.clone() }.write(dir.path())).unwrap();
            assert_eq!(checkpoint.config().layer_count, 6);
        }
    }
}

#[test]
fn the_tokenizer_gives_every_text_back() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Checkpoint::open(&Tiny::llama().write(dir.path())).unwrap().tokenizer().unwrap();
    let text = "Rosen schneiden: \u{e9}, \u{4e16}\n\ttab";
    let ids = tokenizer.encode(text, false).unwrap();
    assert_eq!(ids.get_ids().len(), text.len());
    assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), text);
    assert_eq!(tokenizer.token_to_id("<|endoftext|>"), Some(END_OF_TEXT));
}

#[test]
fn the_same_seed_writes_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let digest = |name: &str, seed| {
        let path = Tiny { seed, ..Tiny::llama() }.write(dir.path().join(name));
        Checkpoint::open(&path).unwrap().digest().unwrap()
    };
    assert_eq!(digest("a", 1), digest("b", 1));
    assert_ne!(digest("a", 1), digest("c", 2));
}
