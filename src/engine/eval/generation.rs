//! What a checkpoint writes: whether it still can, and how like it is to what the base model writes. Loss and multiple
//! choice are measured on given words; only here does a model follow itself, which is where cut ones come apart
//! (arXiv 2602.01997).

use std::collections::HashSet;
use std::sync::LazyLock;

use candle_core::{DType, Tensor};
use regex::Regex;

use super::likeness::{Pair, bleu, chrf, rouge_l};
use super::loglikelihood::{Request, walk};
use crate::engine::chance::stream_key;
use crate::engine::data::{Purpose, Wanted, items::Item, windows};
use crate::engine::model::cuts::Cuts;
use crate::engine::model::generate::{Prompt, ends_at_end_token, go_on};
use crate::engine::model::{Checkpoint, Decoder};
use crate::engine::{Cx, Error, Result};
use crate::job::report::{Flaw, Generation, Likeness, WrittenText};
use crate::job::spec::{Corpus, GenerationSpec};

/// Keeps what is drawn here apart from what else is drawn by the seed.
const STREAM: u64 = 0x67_65_6e;
/// Tokens of the runs by which repetition is counted (Welleck et al., arXiv 1908.04319).
const RUN: usize = 4;
/// Share of runs that stood before from which on a sampled text is repetitive.
const REPETITIVE: f64 = 0.5;
/// The same where the likeliest token is taken each time: sound small models go round in circles then (SmolLM2-135M in
/// three of ten texts, without two of its layers in six, and never more than nine tenths of the way).
const CIRCLING: f64 = 0.9;
/// How far on the way from the base texts' surprise to that of tokens drawn blindly a text is no longer sense: without
/// two of SmolLM2-135M's layers none of 32 sampled ones is there, without ten every third one.
const NONSENSE: f64 = 0.25;
/// Share of letters of a strange script from which on a text has drifted.
const STRANGE: f64 = 0.3;
/// A text is empty with fewer tokens than this part of what was asked for.
const EMPTY: usize = 16;

/// Prompts for `spec`, each to be gone on from greedily (the first half) and sampled (the second half).
///
/// # Errors
/// Those of the corpora.
pub fn prompts(
    spec: &GenerationSpec,
    texts: &[&[Vec<u32>]],
    items: &[&Item],
    base: &Checkpoint,
    seed: u64,
    cx: Cx,
) -> Result<Vec<Prompt>> {
    let (tokenizer, longest) = (base.tokenizer()?, base.config().max_position_embeddings);
    let most = (spec.tokens as usize).min(longest / 2).max(1);
    let (samples, len) = (spec.samples as usize, (spec.prompt_tokens as usize).min(longest - most).max(1));
    let cut = |windows: &[Vec<u32>]| -> Vec<Vec<u32>> {
        windows.iter().flat_map(|window| window.chunks_exact(len)).map(<[u32]>::to_vec).collect()
    };
    let gathered = |corpus: &Corpus| {
        let wanted = Wanted {
            seq_len: len,
            stride: None,
            at_most: Some(samples),
            insisted_by: None,
            purpose: Purpose::Eval,
            seed,
        };
        windows(corpus, &wanted, base, cx)
    };
    let mut starts: Vec<Vec<u32>> = match &spec.prompts {
        Some(corpus) => cut(&gathered(corpus)?.ids),
        None => texts.iter().flat_map(|windows| cut(windows)).collect(),
    };
    if starts.is_empty() {
        for item in items {
            let text = item.text();
            let encoded =
                tokenizer.encode(text, false).map_err(|e| Error::model(format!("tokenizer.json: {e}")))?;
            starts.extend(cut(&[encoded.get_ids().to_vec()]).into_iter().take(1));
        }
    }
    if starts.is_empty() {
        starts = gathered(&Corpus::default())?.ids;
    }
    // Spread evenly over all there is.
    let count = samples.min(starts.len());
    let chosen = (0..count).map(|i| &starts[i * starts.len() / count]);
    let begin = tokenizer.encode("", true).map_err(|e| Error::model(format!("tokenizer.json: {e}")))?;
    let begin = begin.get_ids().to_vec();
    let chosen: Vec<Vec<u32>> = chosen
        .map(|start| {
            if start.starts_with(&begin) {
                start.clone()
            } else {
                [&begin[..], &start[..len - begin.len().min(len - 1)]].concat()
            }
        })
        .collect();
    let prompt = |temperature: f64| {
        chosen.iter().enumerate().map(move |(i, tokens)| Prompt {
            tokens: tokens.clone(),
            most,
            temperature,
            seed: stream_key(&[seed, STREAM, i as u64]),
        })
    };
    Ok(prompt(0.0).chain(prompt(spec.temperature)).collect())
}

/// What the checkpoint called `which` writes after the prompts, without its end tokens.
pub fn write(decoder: &Decoder, which: &str, prompts: &[Prompt], cx: Cx) -> Result<Vec<Vec<u32>>> {
    let total = prompts.iter().map(|prompt| prompt.most as u64).sum();
    let name = format!("{which}: writing");
    let mut tell = |done: usize| cx.advanced(&name, done as u64, total, "tokens");
    let mut written = go_on(decoder, prompts, &mut ends_at_end_token(decoder), &mut tell)?;
    for text in &mut written {
        text.pop_if(|last| decoder.config().eos_tokens.contains(last));
    }
    Ok(written)
}

/// What each checkpoint's texts, the base model's first, are worth beside those of the base model.
///
/// # Errors
/// Model errors.
pub fn judge(
    base: &Checkpoint,
    prompts: &[Prompt],
    written: &[Vec<Vec<u32>>],
    cx: Cx,
) -> Result<Vec<Generation>> {
    let (decoder, tokenizer) = (Decoder::open(base, cx.compute)?, base.tokenizer()?);
    let readings =
        written.iter().map(|texts| read(&decoder, prompts, texts, cx)).collect::<Result<Vec<_>>>()?;
    let decode = |tokens: &[u32]| {
        tokenizer.decode(tokens, true).map_err(|e| Error::model(format!("tokenizer.json: {e}")))
    };
    let starts = prompts.iter().map(|prompt| decode(&prompt.tokens)).collect::<Result<Vec<_>>>()?;
    let decoded = |written: &[Vec<u32>]| written.iter().map(|text| decode(text)).collect::<Result<Vec<_>>>();
    let base_texts = decoded(&written[0])?;
    let known = base_texts.iter().chain(&starts).flat_map(|text| scripts(text)).collect();
    let bounds = Bounds { unlikely: unlikely(prompts, &readings[0], base.config().vocab_size), known };
    let mut out = Vec::with_capacity(written.len());
    for (i, (tokens, reading)) in written.iter().zip(&readings).enumerate() {
        let own = decoded(tokens)?;
        let texts = own.iter().zip(tokens).zip(prompts).zip(reading).zip(&starts);
        let texts: Vec<WrittenText> = texts
            .map(|((((text, tokens), prompt), reading), start)| WrittenText {
                prompt: start.clone(),
                text: text.clone(),
                sampled: prompt.temperature > 0.0,
                tokens: tokens.len() as u32,
                repetition: repetition(tokens),
                surprise: reading.surprise,
                flaw: bounds.flaw(text, tokens, prompt, reading.surprise),
            })
            .collect();
        let mean = |of: &dyn Fn(&WrittenText) -> f64| texts.iter().map(of).sum::<f64>() / texts.len() as f64;
        out.push(Generation {
            repetition: mean(&|text| text.repetition),
            surprise: mean(&|text| text.surprise),
            broken: mean(&|text| f64::from(u8::from(text.flaw.is_some()))),
            likeness: (i > 0).then(|| likeness(&texts, &base_texts, reading, &readings[0])),
            texts,
        });
    }
    Ok(out)
}

fn likeness(texts: &[WrittenText], base: &[String], own: &[Reading], bases: &[Reading]) -> Likeness {
    let greedy = texts.iter().zip(base).filter(|(text, _)| !text.sampled);
    let pairs: Vec<Pair> = greedy.map(|(text, base)| (text.text.as_str(), base.as_str())).collect();
    let cosines = own.iter().zip(bases).map(|(own, base)| cosine(&own.stream, &base.stream));
    Likeness {
        bleu: bleu(&pairs),
        chrf: chrf(&pairs),
        rouge_l: rouge_l(&pairs),
        similarity: cosines.sum::<f64>() / own.len().max(1) as f64,
    }
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}

/// What the base model makes of a text.
struct Reading {
    /// Negative log-likelihood per token, in nats; 0 for a text without one.
    surprise: f64,
    /// Mean of the streams that its tokens are predicted from, `[h]`.
    stream: Vec<f64>,
}

fn read(decoder: &Decoder, prompts: &[Prompt], written: &[Vec<u32>], cx: Cx) -> Result<Vec<Reading>> {
    let request = |(prompt, text): (&Prompt, &Vec<u32>)| Request {
        tokens: [&prompt.tokens[..], text].concat(),
        from: prompt.tokens.len(),
    };
    let requests: Vec<Request> = prompts.iter().zip(written).map(request).collect();
    let width = decoder.config().hidden_size;
    let mut out: Vec<Reading> =
        requests.iter().map(|_| Reading { surprise: 0.0, stream: vec![0.0; width] }).collect();
    let mut score = |_: &[usize], places: &[(usize, usize)], x: &Tensor| {
        if places.is_empty() {
            return Ok(());
        }
        let targets: Vec<u32> = places.iter().map(|(i, at)| requests[*i].tokens[*at]).collect();
        let streams: Vec<Vec<f32>> = x.to_dtype(DType::F32)?.to_vec2()?;
        for ((likelihood, (i, _)), stream) in
            decoder.likelihoods(x, &targets)?.iter().zip(places).zip(streams)
        {
            let tokens = written[*i].len() as f64;
            out[*i].surprise -= likelihood.log_likelihood / tokens;
            out[*i].stream.iter_mut().zip(stream).for_each(|(sum, v)| *sum += f64::from(v) / tokens);
        }
        Ok(())
    };
    walk(decoder, &requests, Cuts::plain(&[&[]]), &|| cx.check(), &mut |_| Ok(()), &mut score)?;
    Ok(out)
}

/// What the texts of the base model say is still sound.
struct Bounds {
    /// Of greedy and of sampled texts, in nats per token.
    unlikely: [f64; 2],
    known: HashSet<usize>,
}

impl Bounds {
    fn flaw(&self, text: &str, tokens: &[u32], prompt: &Prompt, surprise: f64) -> Option<Flaw> {
        let strange = scripts(text);
        let letters = strange.len() as f64;
        let strange = strange.iter().filter(|script| !self.known.contains(script)).count() as f64;
        if tokens.len() * EMPTY < prompt.most || text.trim().is_empty() {
            Some(Flaw::Empty)
        } else if repetition(tokens) > if prompt.temperature > 0.0 { REPETITIVE } else { CIRCLING } {
            Some(Flaw::Repetitive)
        } else if letters > 0.0 && strange > STRANGE * letters {
            Some(Flaw::Drifted)
        } else if surprise > self.unlikely[usize::from(prompt.temperature > 0.0)] {
            Some(Flaw::Unlikely)
        } else {
            None
        }
    }
}

/// The surprise from which on a text is nonsense, of greedy and sampled texts.
fn unlikely(prompts: &[Prompt], readings: &[Reading], vocabulary: usize) -> [f64; 2] {
    [false, true].map(|sampled| {
        let of = prompts.iter().zip(readings).filter(|(prompt, _)| (prompt.temperature > 0.0) == sampled);
        let (count, sum) = of.fold((0.0, 0.0), |(n, sum), (_, reading)| (n + 1.0, sum + reading.surprise));
        let own = sum / f64::max(count, 1.0);
        own + NONSENSE * ((vocabulary as f64).ln() - own)
    })
}

/// Share of the runs of four tokens that stand in the text before.
fn repetition(tokens: &[u32]) -> f64 {
    let mut seen = HashSet::new();
    let runs = tokens.windows(RUN);
    let count = runs.len();
    let again = runs.filter(|run| !seen.insert(*run)).count();
    again as f64 / count.max(1) as f64
}

/// The script of each letter, as far as it has one that tells languages apart.
fn scripts(text: &str) -> Vec<usize> {
    static SCRIPTS: LazyLock<Vec<Regex>> = LazyLock::new(|| {
        const NAMES: [&str; 14] = [
            "Latin",
            "Greek",
            "Cyrillic",
            "Armenian",
            "Hebrew",
            "Arabic",
            "Devanagari",
            "Bengali",
            "Tamil",
            "Thai",
            "Hangul",
            "Han",
            "Hiragana",
            "Katakana",
        ];
        let script =
            |name| Regex::new(&format!(r"\A\p{{{name}}}")).expect("a script has a name. This is a bug.");
        NAMES.map(script).to_vec()
    });
    let mut letter = [0; 4];
    let of = |c: char| SCRIPTS.iter().position(|script| script.is_match(c.encode_utf8(&mut letter)));
    text.chars().filter(|c| c.is_alphabetic()).filter_map(of).collect()
}
