//! How like two texts are, word by word and letter by letter.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::LazyLock;

use regex::Regex;

/// A text and what it should have been.
pub type Pair<'a> = (&'a str, &'a str);

/// BLEU of a corpus, 0 to 100, as sacrebleu computes it unless told otherwise: n-grams of one to four words of the
/// tokenizer 13a, brevity penalty, exponential smoothing (Papineni et al. 2002; Post 2018; Chen & Cherry 2014).
pub fn bleu(pairs: &[Pair]) -> f64 {
    const ORDER: usize = 4;
    let (mut right, mut all) = ([0usize; ORDER], [0usize; ORDER]);
    let (mut length, mut wanted) = (0usize, 0usize);
    for (text, reference) in pairs {
        let (text, reference) = (words_13a(text), words_13a(reference));
        length += text.len();
        wanted += reference.len();
        for n in 1..=ORDER {
            right[n - 1] += in_common(&grams(&text, n), &grams(&reference, n));
            all[n - 1] += (text.len() + 1).saturating_sub(n);
        }
    }
    if length == 0 || right.iter().all(|n| *n == 0) || all.contains(&0) {
        return 0.0;
    }
    let (mut smooth, mut logs) = (1.0, 0.0);
    for (right, all) in right.iter().zip(all) {
        let precision = if *right == 0 {
            smooth *= 2.0;
            100.0 / (smooth * all as f64)
        } else {
            100.0 * *right as f64 / all as f64
        };
        logs += precision.ln();
    }
    let brevity = if length < wanted { (1.0 - wanted as f64 / length as f64).exp() } else { 1.0 };
    brevity * (logs / ORDER as f64).exp()
}

/// chrF2 of a corpus, 0 to 100, as sacrebleu computes it unless told otherwise: n-grams of one to six letters, white
/// space left out, recall weighing twice as much (Popović 2015).
pub fn chrf(pairs: &[Pair]) -> f64 {
    const ORDER: usize = 6;
    const BETA: f64 = 2.0;
    let mut sums = [[0usize; 3]; ORDER];
    for (text, reference) in pairs {
        let letters = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<Vec<char>>();
        let (text, reference) = (letters(text), letters(reference));
        for (n, sums) in (1..=ORDER).zip(&mut sums) {
            let (text, reference) = (grams(&text, n), grams(&reference, n));
            let counted = |grams: &HashMap<_, usize>| grams.values().sum::<usize>();
            // An order for which the reference is too short says nothing.
            sums[0] += if reference.is_empty() { 0 } else { counted(&text) };
            sums[1] += counted(&reference);
            sums[2] += in_common(&text, &reference);
        }
    }
    let (mut precision, mut recall, mut orders) = (0.0, 0.0, 0.0);
    for [text, reference, common] in sums {
        if text > 0 && reference > 0 {
            precision += common as f64 / text as f64;
            recall += common as f64 / reference as f64;
            orders += 1.0;
        }
    }
    if precision + recall == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (precision / orders, recall / orders);
    100.0 * (1.0 + BETA * BETA) * precision * recall / (BETA * BETA * precision + recall)
}

/// Mean F-measure of the longest common subsequence of words, 0 to 1, as rouge-score computes `rougeL` without
/// stemming (Lin 2004).
pub fn rouge_l(pairs: &[Pair]) -> f64 {
    let words = |text: &str| -> Vec<String> {
        let plain = text.to_lowercase();
        let words = plain.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
        words.map(str::to_owned).collect()
    };
    let f_measure = |(text, reference): &Pair| {
        let (text, reference) = (words(text), words(reference));
        let common = common_subsequence(&text, &reference) as f64;
        if common == 0.0 { 0.0 } else { 2.0 * common / (text.len() + reference.len()) as f64 }
    };
    pairs.iter().map(f_measure).sum::<f64>() / pairs.len().max(1) as f64
}

/// Length of the longest common subsequence.
fn common_subsequence<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for a in a {
        let mut diagonal = 0;
        for (j, b) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if a == b { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

fn grams<T: Eq + Hash>(parts: &[T], n: usize) -> HashMap<&[T], usize> {
    let mut out = HashMap::new();
    for gram in parts.windows(n) {
        *out.entry(gram).or_default() += 1;
    }
    out
}

fn in_common<T: Eq + Hash>(a: &HashMap<&[T], usize>, b: &HashMap<&[T], usize>) -> usize {
    a.iter().map(|(gram, count)| *count.min(b.get(gram).unwrap_or(&0))).sum()
}

/// Words as mteval-v13a takes them.
fn words_13a(text: &str) -> Vec<String> {
    static RULES: LazyLock<[(Regex, &str); 4]> = LazyLock::new(|| {
        let rule = |pattern| Regex::new(pattern).expect("a fixed pattern can be read. This is a bug.");
        [
            (rule(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), " $1 "),
            // A point or comma stays only between digits.
            (rule(r"([^0-9])([\.,])"), "$1 $2 "),
            (rule(r"([\.,])([^0-9])"), " $1 $2"),
            (rule(r"([0-9])(-)"), "$1 $2 "),
        ]
    });
    let mut text = text.replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    for (name, sign) in [("&quot;", "\""), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")] {
        text = text.replace(name, sign);
    }
    text = format!(" {text} ");
    for (pattern, with) in &*RULES {
        text = pattern.replace_all(&text, *with).into_owned();
    }
    text.split_whitespace().map(str::to_owned).collect()
}
