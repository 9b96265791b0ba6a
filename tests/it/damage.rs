//! Measured damage is what the pruned checkpoint itself would show.

use secateur::engine::damage::{Accuracy, Damage};
use secateur::engine::data::items::Item;
use secateur::engine::eval::loglikelihood::{Request, likelihoods};
use secateur::engine::eval::tasks;
use secateur::engine::model::{Batch, Checkpoint, Decoder};
use secateur::engine::prune::Cut;
use secateur::engine::select::{Measured, Oracle};
use secateur::engine::{Error, Result};
use secateur::job::progress::Stage;
use secateur::job::spec::{DamageMeasure, DamageSpec};

use crate::support::rig::{Rig, windows};
use crate::support::tiny::Tiny;

/// Losses are sums of float32 likelihoods.
const TOLERANCE: f64 = 1e-5;

fn open<'a>(rig: &'a Rig, base: &Checkpoint, windows: Vec<Vec<u32>>) -> Damage<'a> {
    Damage::open(base, windows, &DamageSpec::default(), false, rig.cx(Stage::Select)).unwrap()
}

fn measured(oracle: &mut dyn Oracle, sets: &[&[u32]], windows: usize) -> Vec<Measured> {
    let sets: Vec<Vec<u32>> = sets.iter().map(|set| set.to_vec()).collect();
    oracle.measure(&sets, windows, &mut |_| Ok(())).unwrap()
}

fn measure(oracle: &mut dyn Oracle, sets: &[&[u32]], windows: usize) -> Vec<f64> {
    measured(oracle, sets, windows).into_iter().map(|measured| measured.damage).collect()
}

/// Mean and standard error as in the textbook.
fn mean(values: &[f64]) -> Measured {
    let count = values.len() as f64;
    let damage = values.iter().sum::<f64>() / count;
    let spread = values.iter().map(|v| (v - damage).powi(2)).sum::<f64>() / (count - 1.0);
    Measured { damage, stderr: (spread / count).sqrt() }
}

fn assert_alike(found: Measured, expected: Measured) {
    let gaps = [found.damage - expected.damage, found.stderr - expected.stderr];
    assert!(gaps.iter().all(|gap| gap.abs() < TOLERANCE), "{found:?}, not {expected:?}");
}

fn cut(rig: &Rig, base: &Checkpoint, dropped: &[u32]) -> Decoder {
    let cut = Cut::plan(base.index(), dropped, None).unwrap();
    let written = cut.write(&rig.workspace(), rig.cx(Stage::Prune)).unwrap();
    let pruned = Checkpoint::open(&rig.path("workspace").join(written.path)).unwrap();
    Decoder::open(&pruned, &rig.compute).unwrap()
}

fn loss(rig: &Rig, decoder: &Decoder, windows: &[Vec<u32>]) -> f64 {
    let requests: Vec<Request> = windows.iter().map(|w| Request { tokens: w.clone(), from: 1 }).collect();
    let scored = likelihoods(decoder, &requests, "by hand", rig.cx(Stage::Eval)).unwrap();
    let tokens: usize = windows.iter().map(|w| w.len() - 1).sum();
    -scored.iter().map(|s| s.log_likelihood).sum::<f64>() / tokens as f64
}

#[test]
fn damage_is_the_loss_of_the_pruned_checkpoint_above_the_intact_one() {
    for tiny in [Tiny::llama(), Tiny::qwen2()] {
        let rig = Rig::new();
        let base = rig.base(&tiny);
        let windows = windows(7, 40);
        let mut oracle = open(&rig, &base, windows.clone());
        let intact = Decoder::open(&base, &rig.compute).unwrap();
        for count in [7, 2] {
            let sets: [&[u32]; 4] = [&[0], &[0, 1, 2], &[1, 3, 4], &[5]];
            let damages = measure(&mut oracle, &sets, count);
            for (set, damage) in sets.iter().zip(damages) {
                let above = loss(&rig, &cut(&rig, &base, set), &windows[..count])
                    - loss(&rig, &intact, &windows[..count]);
                assert!((damage - above).abs() < TOLERANCE, "{set:?} on {count}: {damage} {above}");
            }
        }
    }
}

#[test]
fn its_standard_error_is_that_of_the_differences_window_by_window() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    // Of one length, so that the mean over tokens is the mean over windows.
    let windows: Vec<Vec<u32>> = windows(9, 32).into_iter().map(|w| w[..16].to_vec()).collect();
    let intact = Decoder::open(&base, &rig.compute).unwrap();
    for set in [&[0][..], &[1, 4]] {
        let without = cut(&rig, &base, set);
        let each = windows.iter().map(std::slice::from_ref);
        let each: Vec<f64> = each.map(|w| loss(&rig, &without, w) - loss(&rig, &intact, w)).collect();
        let found = measured(&mut open(&rig, &base, windows.clone()), &[set], 9)[0];
        assert!(found.stderr > 100.0 * TOLERANCE, "{found:?}");
        assert_alike(found, mean(&each));
        // The divergence is a difference already.
        let divergence = |windows: &[Vec<u32>]| {
            let spec = DamageSpec { measure: DamageMeasure::Kl, ..DamageSpec::default() };
            let mut oracle =
                Damage::open(&base, windows.to_vec(), &spec, false, rig.cx(Stage::Select)).unwrap();
            measured(&mut oracle, &[set], windows.len())[0]
        };
        let each: Vec<f64> = windows.iter().map(|w| divergence(std::slice::from_ref(w)).damage).collect();
        assert_alike(divergence(&windows), mean(&each));
        assert_eq!(divergence(&windows[..1]).stderr, 0.0, "one window says nothing of others");
    }
}

#[test]
fn a_layer_that_does_nothing_does_no_damage() {
    let rig = Rig::new();
    let base = rig.base(&Tiny { identity: vec![2, 4], ..Tiny::llama() });
    let mut oracle = open(&rig, &base, windows(4, 32));
    let damages = measure(&mut oracle, &[&[1], &[2], &[2, 4], &[3]], 4);
    for (damage, idle) in damages.iter().zip([false, true, true, false]) {
        assert_eq!(damage.abs() < TOLERANCE, idle, "{damages:?}");
    }
}

#[test]
fn accuracy_lost_is_that_of_the_pruned_checkpoint() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    let item = |i: usize| Item::MultipleChoice {
        context: format!("number {i} is"),
        choices: ["odd", "even", "both", "none of these"].map(String::from).to_vec(),
        gold: i % 4,
    };
    let items: Vec<Item> = (0..24).map(item).collect();
    let mut oracle = Accuracy::open(&base, items.clone(), rig.cx(Stage::Select)).unwrap();
    let right = |decoder: &Decoder, count: usize| -> Vec<f64> {
        let cx = rig.cx(Stage::Eval);
        let answers =
            tasks::answer(decoder, &base.tokenizer().unwrap(), "by hand", "t", &items[..count], cx).unwrap();
        answers.iter().map(|a| f64::from(u8::from(a.correct))).collect()
    };
    let intact = Decoder::open(&base, &rig.compute).unwrap();
    for count in [24, 5] {
        for set in [&[0][..], &[1, 2], &[5]] {
            let (before, after) = (right(&intact, count), right(&cut(&rig, &base, set), count));
            let lost: Vec<f64> = before.iter().zip(after).map(|(before, after)| before - after).collect();
            assert_alike(measured(&mut oracle, &[set], count)[0], mean(&lost));
        }
    }
}

#[test]
fn progress_is_told_after_every_set_and_can_end_the_work() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    let mut oracle = open(&rig, &base, windows(3, 24));
    assert_eq!((oracle.windows(), oracle.tokens(1)), (3, 24));
    let sets: Vec<Vec<u32>> = (0..6).map(|l| vec![l]).collect();
    let mut told = Vec::new();
    let mut tell = |done: usize| -> Result<()> {
        told.push(done);
        if done == 4 { Err(Error::Stopped) } else { Ok(()) }
    };
    assert!(matches!(oracle.measure(&sets, 3, &mut tell), Err(Error::Stopped)));
    assert_eq!(told, [1, 2, 3, 4]);
}

#[test]
fn divergence_from_the_intact_model_is_that_of_all_its_predictions() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    let windows = windows(3, 24);
    let divergence = |top_k: u32, set: &[u32]| {
        let spec = DamageSpec { measure: DamageMeasure::Kl, top_k, ..DamageSpec::default() };
        let mut oracle = Damage::open(&base, windows.clone(), &spec, false, rig.cx(Stage::Select)).unwrap();
        measure(&mut oracle, &[set], 3)[0]
    };
    let intact = Decoder::open(&base, &rig.compute).unwrap();
    let without = cut(&rig, &base, &[2, 3]);
    let (mut sum, mut tokens) = (0.0, 0);
    for window in &windows {
        let batch = Batch::of(&[&window[..window.len() - 1]]);
        let [p, q] = [&intact, &without].map(|decoder| {
            let logits: Vec<Vec<f32>> =
                decoder.logits(&decoder.forward(&batch).unwrap()).unwrap().to_vec2().unwrap();
            logits.iter().map(|row| softmax(row)).collect::<Vec<_>>()
        });
        for (p, q) in p.iter().zip(&q) {
            sum += p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
            tokens += 1;
        }
    }
    let exact = sum / f64::from(tokens);
    assert!((divergence(10_000, &[2, 3]) - exact).abs() < TOLERANCE, "{exact}");
    // Taking the rest as one can only hide some of it.
    let few = divergence(16, &[2, 3]);
    assert!(few > 0.0 && few < exact, "{few} of {exact}");
    assert!(divergence(10_000, &[]).abs() < TOLERANCE);
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let exps: Vec<f64> = logits.iter().map(|v| f64::from(v - most).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| e / sum).collect()
}

#[test]
fn a_corpus_without_a_window_of_two_tokens_is_refused() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    let opened =
        Damage::open(&base, vec![vec![1], Vec::new()], &DamageSpec::default(), false, rig.cx(Stage::Select));
    assert!(opened.err().unwrap().to_string().contains("two tokens"));
}
