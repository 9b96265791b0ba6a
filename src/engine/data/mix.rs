//! Several texts as one: their windows by turns.

use super::Windows;
use crate::engine::{Cx, Result};
use crate::job::spec::{Corpus, Share};

/// At most `count` windows of a mixture, each text as often as its weight says, evenly spread: any beginning of them is
/// mixed alike. A text that gives fewer than its share leaves the rest out. `windows(text, count)` gives those of one.
pub fn mixed(
    of: &[Share],
    count: usize,
    mut windows: impl FnMut(&Corpus, usize) -> Result<Windows>,
    cx: Cx,
) -> Result<Windows> {
    let turns = turns(&of.iter().map(|share| share.weight).collect::<Vec<_>>(), count);
    let mut texts = Vec::new();
    let mut words = 0;
    for (i, share) in of.iter().enumerate() {
        let wanted = turns.iter().filter(|turn| **turn == i).count();
        let found = if wanted == 0 {
            Windows { ids: Vec::new(), from: Vec::new(), words: 0 }
        } else {
            windows(&share.corpus, wanted)?
        };
        words += found.words;
        texts.push(found.ids.into_iter().zip(found.from));
    }
    let (ids, from): (Vec<_>, Vec<_>) = turns.into_iter().filter_map(|turn| texts[turn].next()).unzip();
    if ids.len() < count {
        cx.note(format!(
            "the mixture gives {} windows of {count}: some of its texts are too short",
            ids.len()
        ));
    }
    Ok(Windows { ids, from, words })
}

/// Whose turn it is, `count` times: always that of the text which has had the least of its share.
fn turns(weights: &[f64], count: usize) -> Vec<usize> {
    let mut given = vec![0u32; weights.len()];
    (0..count)
        .map(|_| {
            let had = |i: &usize| (f64::from(given[*i]) + 1.0) / weights[*i];
            let next = (0..weights.len()).min_by(|a, b| had(a).total_cmp(&had(b))).unwrap_or(0);
            given[next] += 1;
            next
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::turns;

    #[test]
    fn turns_keep_to_the_weights_all_the_way() {
        assert_eq!(turns(&[1.0, 1.0], 4), [0, 1, 0, 1]);
        let all = turns(&[3.0, 1.0, 0.5], 900);
        for end in [9, 90, 900] {
            let of = |i: usize| all[..end].iter().filter(|turn| **turn == i).count();
            assert_eq!([of(0), of(1), of(2)], [end / 9 * 6, end / 9 * 2, end / 9]);
        }
    }
}
