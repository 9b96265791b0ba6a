//! What all layers of one forward pass share: which row is which token of which text, and its angles.

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};

use crate::checkpoint::{Config, Rope};
use crate::engine::model::batch::Batch;
use crate::engine::model::cache::Slot;
use crate::engine::model::kernel::attention::Sequence;

pub struct Pass {
    sequences: Vec<Sequence>,
    /// Where a cache holds the beginning of each text; empty without a cache.
    slots: Vec<Slot>,
    /// For each of the model's rotations.
    angles: Vec<Angles>,
    /// The same as tensors, for layers on candle.
    tables: OnceLock<Vec<(Tensor, Tensor)>>,
    dtype: DType,
    device: Device,
}

/// Cosines and sines by row, `[rows, pairs]`.
pub struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
}

/// Texts of one length, row by row, that attend alike.
pub(super) struct Group {
    pub first: usize,
    pub texts: usize,
    pub len: usize,
    /// Where a cache holds the beginning of the first; those of the others lie behind it, and are as long.
    pub slot: Option<Slot>,
    /// Rows before those, in the order of the text; of a single text only.
    pub past: Vec<Range<usize>>,
}

impl Pass {
    /// For texts that begin here, or of which a cache holds the beginning in `slots`; those of a batch that share
    /// rows share their angles.
    pub fn new(config: &Config, batch: &Batch, slots: Vec<Slot>, dtype: DType, device: &Device) -> Self {
        let sequences = batch.sequences.clone();
        let angles = config.ropes.iter().map(|rope| Angles::of(rope, &sequences, &slots)).collect();
        Self { sequences, slots, angles, tables: OnceLock::new(), dtype, device: device.clone() }
    }

    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// The angles of one of the model's rotations.
    pub fn angles(&self, rope: Option<usize>) -> Option<&Angles> {
        rope.map(|rope| &self.angles[rope])
    }

    /// Cosine and sine of one of the model's rotations, `[rows, pairs]`.
    pub(super) fn table(&self, rope: Option<usize>) -> candle_core::Result<Option<&(Tensor, Tensor)>> {
        let Some(rope) = rope else { return Ok(None) };
        if let Some(tables) = self.tables.get() {
            return Ok(Some(&tables[rope]));
        }
        let tensor = |values: &Vec<f32>, pairs: usize| {
            Tensor::from_slice(values, (values.len() / pairs, pairs), &self.device)?.to_dtype(self.dtype)
        };
        let both =
            |angles: &Angles| Ok((tensor(&angles.cos, angles.pairs)?, tensor(&angles.sin, angles.pairs)?));
        let made = self.angles.iter().map(both).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Some(&self.tables.get_or_init(|| made)[rope]))
    }

    /// The texts in runs of one length, for which one product does.
    pub(super) fn groups(&self) -> Vec<Group> {
        let mut out: Vec<Group> = Vec::new();
        for (i, Sequence { queries, keys }) in self.sequences.iter().enumerate() {
            let past = keys[..keys.len() - 1].to_vec();
            let slot = self.slots.get(i).copied();
            match out.last_mut() {
                Some(group)
                    if group.len == queries.len()
                        && group.past.is_empty()
                        && past.is_empty()
                        && group.next_slot() == slot =>
                {
                    group.texts += 1;
                }
                _ => out.push(Group { first: queries.start, texts: 1, len: queries.len(), slot, past }),
            }
        }
        out
    }
}

impl Group {
    /// Where the text behind its last would lie.
    fn next_slot(&self) -> Option<Slot> {
        self.slot.map(|slot| Slot { index: slot.index + self.texts, ..slot })
    }

    /// Where a cache holds its texts.
    pub fn slots(&self, slot: Slot) -> Range<usize> {
        slot.index..slot.index + self.texts
    }
}

impl Angles {
    fn of(rope: &Rope, sequences: &[Sequence], slots: &[Slot]) -> Self {
        let pairs = rope.pairs();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        let mut table = (0..0, Vec::new(), Vec::new());
        for (i, sequence) in sequences.iter().enumerate() {
            let start = slots.get(i).map_or(0, |slot| slot.read) + sequence.past();
            let wanted = start..start + sequence.queries.len();
            if table.0 != wanted {
                let (cos, sin) = rope.tables(wanted.start, wanted.len());
                table = (wanted, cos, sin);
            }
            cos.extend_from_slice(&table.1);
            sin.extend_from_slice(&table.2);
        }
        Self { cos, sin, pairs }
    }

    /// Those of a row.
    pub fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let at = row * self.pairs..(row + 1) * self.pairs;
        (&self.cos[at.clone()], &self.sin[at])
    }
}

/// What a block of queries may see.
pub(super) struct Attendable {
    pub queries: Range<usize>,
    pub keys: Range<usize>,
    /// Position of the first query, counted from the first key.
    first: usize,
    window: Option<usize>,
}

impl Attendable {
    /// Queries of a text of which `past` tokens stand before the first one.
    pub fn new(queries: Range<usize>, past: usize, window: Option<usize>) -> Self {
        let first_key = window.map_or(0, |w| (past + queries.start + 1).saturating_sub(w));
        let keys = first_key..past + queries.end;
        let first = past + queries.start - first_key;
        Self { queries, keys, first, window }
    }

    /// `[queries, keys]`: 0 or -inf; none when all is visible.
    pub fn mask(&self, dtype: DType, device: &Device) -> candle_core::Result<Option<Tensor>> {
        let (queries, keys) = (self.queries.len(), self.keys.len());
        let mut mask = vec![f32::NEG_INFINITY; queries * keys];
        for (query, row) in mask.chunks_exact_mut(keys).enumerate() {
            let end = self.first + query + 1;
            row[self.window.map_or(0, |window| end.saturating_sub(window))..end].fill(0.0);
        }
        if mask.iter().all(|m| *m == 0.0) {
            return Ok(None);
        }
        Tensor::from_vec(mask, (queries, keys), device)?.to_dtype(dtype).map(Some)
    }
}
