//! Texts in one forward pass: their tokens row by row, without padding; what several of them begin with is
//! there once.

use std::ops::Range;

use super::kernel::attention::Sequence;

/// Rows of tokens, and which of them follow one another in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub tokens: Vec<u32>,
    pub sequences: Vec<Sequence>,
}

/// The rows of one text, in its order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows(Vec<Range<usize>>);

/// Fewer tokens in common are computed again: a shared beginning makes the texts behind it many small tasks.
const WORTH_SHARING: usize = 16;

impl Batch {
    /// Whole texts, one after the other.
    pub fn of(texts: &[&[u32]]) -> Self {
        Self::sharing(texts, nothing).0
    }

    /// Texts of which each shares with the one before it what they have in common, and where the rows of each
    /// are. Sorted texts have the most in common.
    pub fn sharing(texts: &[&[u32]], shared: InCommon) -> (Self, Vec<Rows>) {
        let mut batch = Self { tokens: Vec::new(), sequences: Vec::new() };
        let mut rows: Vec<Rows> = Vec::with_capacity(texts.len());
        let mut before: &[u32] = &[];
        for text in texts {
            let shared = shared(before, text);
            let mut keys = rows.last().map_or_else(Rows::default, |last| last.until(shared));
            let first = batch.tokens.len();
            batch.tokens.extend_from_slice(&text[shared..]);
            let queries = first..batch.tokens.len();
            if !queries.is_empty() {
                keys.0.push(queries.clone());
                batch.sequences.push(Sequence { queries, keys: keys.0.clone() });
            }
            rows.push(keys);
            before = text;
        }
        (batch, rows)
    }
}

/// How texts are cut into batches of at most `rows` rows and `most` texts each; a longer text is a batch of its
/// own.
pub fn batches(texts: &[&[u32]], rows: usize, most: usize, shared: InCommon) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    let mut filled = 0;
    for (i, text) in texts.iter().enumerate() {
        let more = text.len() - if i == 0 { 0 } else { shared(texts[i - 1], text) };
        match out.last_mut() {
            Some(batch) if batch.len() < most && filled + more <= rows => {
                batch.end = i + 1;
                filled += more;
            }
            _ => {
                out.push(i..i + 1);
                filled = text.len();
            }
        }
    }
    out
}

/// How many tokens of two texts are to be computed once for both.
pub type InCommon = fn(&[u32], &[u32]) -> usize;

/// What both begin with, where that is worth something.
pub fn beginning(a: &[u32], b: &[u32]) -> usize {
    let shared = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    if shared < WORTH_SHARING { 0 } else { shared }
}

pub fn nothing(_: &[u32], _: &[u32]) -> usize {
    0
}

impl Rows {
    /// The row of a token.
    ///
    /// # Panics
    /// When the text is not so long.
    pub fn at(&self, mut token: usize) -> usize {
        for rows in &self.0 {
            if token < rows.len() {
                return rows.start + token;
            }
            token -= rows.len();
        }
        panic!("a token behind the end of its text. This is a bug.")
    }

    /// The rows of the first `len` tokens.
    fn until(&self, mut len: usize) -> Self {
        let mut out = Vec::new();
        for rows in &self.0 {
            let part = rows.start..rows.start + rows.len().min(len);
            len -= part.len();
            if !part.is_empty() {
                out.push(part);
            }
        }
        Self(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(parts: &[(u32, usize)]) -> Vec<u32> {
        parts.iter().flat_map(|(token, count)| vec![*token; *count]).collect()
    }

    #[test]
    fn every_text_is_found_again_in_the_rows_it_shares() {
        let texts = [
            text(&[(1, 40)]),
            text(&[(1, 40), (2, 5)]),
            text(&[(1, 40), (2, 5), (3, 2)]),
            text(&[(1, 40), (2, 5), (3, 2)]),
            text(&[(1, 30), (4, 3)]),
            text(&[(1, 3), (9, 30)]),
        ];
        let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let (batch, rows) = Batch::sharing(&texts, beginning);
        assert_eq!(batch.tokens.len(), 40 + 5 + 2 + 3 + 33);
        for (text, rows) in texts.iter().zip(&rows) {
            let found: Vec<u32> = (0..text.len()).map(|i| batch.tokens[rows.at(i)]).collect();
            assert_eq!(found, *text);
        }
        for sequence in &batch.sequences {
            let keys: usize = sequence.keys.iter().map(ExactSizeIterator::len).sum();
            assert_eq!(keys, sequence.past() + sequence.queries.len());
            assert_eq!(sequence.keys.last(), Some(&sequence.queries));
        }
        assert_eq!(batches(&texts, 50, 9, beginning), vec![0..5, 5..6]);
        assert_eq!(batches(&texts, 50, 2, beginning), vec![0..2, 2..4, 4..5, 5..6]);
        assert_eq!(batches(&texts, 80, 9, nothing), vec![0..1, 1..2, 2..3, 3..5, 5..6]);
        assert_eq!(batches(&texts, 10, 9, beginning), (0..6).map(|i| i..i + 1).collect::<Vec<_>>());
    }
}
