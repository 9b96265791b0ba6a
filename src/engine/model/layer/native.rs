//! The layer on our own kernels: the processor's engine, with a backward pass written by hand.
//!
//! The same functions as [`super::candle`], which the tests compare it with. What is kept of a forward pass is
//! one layer's [`Trace`]; the gradient for the stream comes out, and those of the adapters.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::{HeadNorm, Layer, Linear, Norm, Pass, missing};
use crate::checkpoint::family::Qkv;
use crate::checkpoint::{Activation, Role};
use crate::engine::model::cache::LayerCache;
use crate::engine::model::kernel::Rounding;
use crate::engine::model::kernel::attention::{Attention, Heads, Sequence};
use crate::engine::model::kernel::buffer::Buffer;
use crate::engine::model::kernel::left::Left;
use crate::engine::model::kernel::matrix::{Matrix, Side};
use crate::engine::model::kernel::product::{Start, Target, Term, product, sum};
use crate::engine::model::kernel::rows::{self, Bend, Scoring};
use crate::engine::model::lora::Adapter;
use crate::engine::model::weight::{Frozen, floats, with};

/// What a forward pass leaves for its backward pass, by rows (tokens).
pub struct Trace {
    pub(super) attention: AttentionTrace,
    /// The stream between attention and MLP.
    pub(super) middle: Buffer,
    pub(super) mlp: MlpTrace,
    /// `scale · A x` of each linear layer with an adapter.
    pub(super) inside: Vec<Option<Buffer>>,
    pub(super) leaving: Vec<f32>,
}

pub(super) struct AttentionTrace {
    /// What attention reads.
    pub(super) read: Arc<Left>,
    /// Queries, keys and values before their norms, where they have some.
    pub(super) raw: Option<Buffer>,
    pub(super) qkv: Buffer,
    /// What the heads gather, and the logarithms of their sums of exponentials.
    pub(super) gathered: Buffer,
    pub(super) log_sums: Buffer,
    /// What was gathered, packed.
    pub(super) output: Left,
    /// What attention gives, before its norm, where it has one.
    pub(super) given: Option<Buffer>,
}

pub(super) struct MlpTrace {
    pub(super) entering: Arc<Left>,
    /// Gate, then up, or what stands in for both.
    pub(super) inner: Buffer,
    pub(super) hidden: Left,
    /// What the MLP gives, before its norm, where it has one.
    pub(super) given: Option<Buffer>,
}

/// Widths inside the MLP.
pub(super) struct Inner {
    /// Of gate and up together, or of the one that stands in for both.
    pub(super) inner: usize,
    pub(super) hidden: usize,
    /// There is a gate.
    pub(super) gated: bool,
}

/// Where queries, keys and values lie in a row of all three.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) width: usize,
    /// Start and step from head to head.
    pub(super) q: (usize, usize),
    pub(super) k: (usize, usize),
    pub(super) v: (usize, usize),
}

/// What is kept of a forward pass beside what leaves the layer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    Nothing,
    /// The stream between attention and MLP.
    Middle,
    /// All that the backward pass needs.
    All,
}

impl Trace {
    /// Memory it takes.
    pub fn bytes(&self) -> usize {
        let (attention, mlp) = (&self.attention, &self.mlp);
        let buffers = [&attention.qkv, &attention.gathered, &attention.log_sums, &self.middle, &mlp.inner];
        let optional = [&attention.raw, &attention.given, &mlp.given].into_iter().chain(&self.inside);
        let lefts = [&attention.read, &attention.output, &mlp.entering, &mlp.hidden];
        let floats: usize = buffers.into_iter().chain(optional.flatten()).map(|buffer| buffer.len()).sum();
        4 * floats + lefts.map(Left::bytes).iter().sum::<usize>()
    }
}

impl Layer {
    /// Whether our own kernels cover this layer: everything but experts, on the processor.
    pub fn is_native(&self) -> bool {
        self.native
    }

    /// The stream `[rows, h]` leaving the layer, for the stream entering it.
    pub(super) fn forward_native(
        &self,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let trace = with(x, |values| self.run(values, x.dim(1)?, pass, cache, Keep::Nothing))??;
        Tensor::from_vec(trace.leaving, x.shape(), &Device::Cpu)
    }

    /// The same, with the stream between attention and MLP.
    pub(super) fn halves_native(&self, x: &Tensor, pass: &Pass) -> Result<(Buffer, Tensor)> {
        let trace = with(x, |values| self.run(values, x.dim(1)?, pass, None, Keep::Middle))??;
        Ok((trace.middle, Tensor::from_vec(trace.leaving, x.shape(), &Device::Cpu)?))
    }

    /// The same, with what the backward pass needs of it.
    pub fn forward_traced(&self, x: &Tensor, pass: &Pass) -> Result<(Tensor, Trace)> {
        let mut trace = with(x, |values| self.run(values, x.dim(1)?, pass, None, Keep::All))??;
        let leaving = Tensor::from_vec(std::mem::take(&mut trace.leaving), x.shape(), &Device::Cpu)?;
        Ok((leaving, trace))
    }

    pub(super) fn run(
        &self,
        x: &[f32],
        h: usize,
        pass: &Pass,
        cache: Option<&mut LayerCache>,
        keep: Keep,
    ) -> Result<Trace> {
        let mut inside: Vec<Option<Buffer>> = self.linears.iter().map(|_| None).collect();
        let mut leaving = x.to_vec();
        let attention =
            self.attention_onto(&mut leaving, x, h, pass, cache, keep == Keep::All, &mut inside)?;
        let middle = Buffer::from_slice(if keep == Keep::Nothing { &[] } else { &leaving });
        let entering = match (self.shape.parallel, &self.mlp_in) {
            (true, None) => Arc::clone(&attention.read),
            (parallel, norm) => {
                let read = if parallel { x } else { &leaving };
                Arc::new(normed(norm.as_ref(), read, h, self.rounding())?)
            }
        };
        let mlp = self.mlp_onto(&mut leaving, entering, &mut inside)?;
        Ok(Trace { attention, middle, mlp, inside, leaving })
    }

    /// Adds attention's branch to the stream.
    #[allow(clippy::too_many_arguments)]
    fn attention_onto(
        &self,
        stream: &mut [f32],
        x: &[f32],
        h: usize,
        pass: &Pass,
        cache: Option<&mut LayerCache>,
        keep: bool,
        inside: &mut [Option<Buffer>],
    ) -> Result<AttentionTrace> {
        let s = self.shape;
        let read = Arc::new(normed(self.attention_in.as_ref(), x, h, self.rounding())?);
        let places = self.places();
        let rows = read.rows;
        let mut qkv = Buffer::new(rows * places.width);
        let roles = [Role::Query, Role::Key, Role::Value, Role::QueryKeyValue];
        self.side_by_side(&roles, &read, &mut qkv, places.width, inside)?;
        let norms = self.head_norms()?;
        let raw = (keep && norms.iter().any(Option::is_some)).then(|| qkv.clone());
        let angles = pass.angles(s.layer.rope);
        qkv.par_chunks_mut(places.width).enumerate().for_each(|(i, row)| {
            for (norm, place) in norms.iter().zip([places.q, places.k]) {
                if let Some(norm) = norm {
                    norm.row(row, place);
                }
            }
            if let Some(angles) = angles {
                self.rotate(row, places, angles.row(i), 1.0);
            }
        });
        let mut gathered = Buffer::new(rows * s.heads * s.head_dim);
        let mut log_sums = Buffer::new(rows * s.heads);
        let out = (&mut gathered[..], &mut log_sums[..]);
        match cache {
            None => self.attention(&qkv, places, pass.sequences()).forward(out.0, out.1),
            Some(cache) => self.attend_with_cache(&qkv, places, pass, cache, out)?,
        }
        let output = Left::new(&gathered, s.heads * s.head_dim, self.rounding());
        if !keep {
            // The MLP may use the memory.
            (qkv, gathered) = (Buffer::new(0), Buffer::new(0));
        }
        let given = self.onto(stream, Role::Output, &output, self.attention_out.as_ref(), inside)?;
        Ok(AttentionTrace { read, raw, qkv, gathered, log_sums, output, given })
    }

    /// Adds the branch of the MLP, which reads `entering`, to the stream.
    fn mlp_onto(
        &self,
        stream: &mut [f32],
        entering: Arc<Left>,
        inside: &mut [Option<Buffer>],
    ) -> Result<MlpTrace> {
        let Inner { inner: wide, hidden: width, gated } = self.inner()?;
        let rows = entering.rows;
        let mut inner = Buffer::new(rows * wide);
        self.side_by_side(&[Role::Gate, Role::Up, Role::GateUp], &entering, &mut inner, wide, inside)?;
        let bend = bend(self.shape.activation);
        let hidden = Left::from_rows(rows, width, self.rounding(), |i, out| {
            let row = &inner[i * wide..(i + 1) * wide];
            let (gate, up) = if gated { row.split_at(width) } else { (row, &row[..0]) };
            rows::bent(bend, gate, up, out);
        });
        let given = self.onto(stream, Role::Down, &hidden, self.mlp_out.as_ref(), inside)?;
        Ok(MlpTrace { entering, inner, hidden, given })
    }

    /// Writes what the linear layers of `roles`, as far as there are such, make of `left`, one beside the other.
    fn side_by_side(
        &self,
        roles: &[Role],
        left: &Left,
        out: &mut [f32],
        width: usize,
        inside: &mut [Option<Buffer>],
    ) -> Result<()> {
        let mut first = 0;
        for (index, linear) in roles.iter().filter_map(|role| self.indexed(*role)) {
            inside[index] = linear.apply(left, Target { values: out, width, first }, false)?;
            first += linear.outputs()?;
        }
        Ok(())
    }

    /// Norms of queries and of keys.
    pub(super) fn head_norms(&self) -> Result<[Option<HeadNorms>; 2]> {
        let s = self.shape;
        Ok([
            HeadNorms::of(&self.q_norm, s.heads, s.head_dim)?,
            HeadNorms::of(&self.k_norm, s.kv_heads, s.head_dim)?,
        ])
    }

    /// Adds what linear layer `role` makes of `left`, normed and scaled, to the stream. Gives it as it was
    /// before the norm, where there is one.
    fn onto(
        &self,
        stream: &mut [f32],
        role: Role,
        left: &Left,
        norm: Option<&Norm>,
        inside: &mut [Option<Buffer>],
    ) -> Result<Option<Buffer>> {
        let (index, linear) = self.indexed(role).ok_or_else(|| missing(role))?;
        let h = linear.outputs()?;
        let scale = self.shape.residual_scale as f32;
        if norm.is_none() && scale == 1.0 && linear.bias.is_none() {
            inside[index] = linear.apply(left, Target { values: stream, width: h, first: 0 }, true)?;
            return Ok(None);
        }
        let mut y = Buffer::new(stream.len());
        inside[index] = linear.apply(left, Target { values: &mut y, width: h, first: 0 }, false)?;
        let norm = norm.map(Norm::native).transpose()?;
        stream.par_chunks_mut(h).zip(y.par_chunks(h)).for_each(|(stream, y)| match &norm {
            None => rows::add_scaled(stream, scale, y),
            Some(norm) => {
                let mut row = vec![0.0; h];
                norm.row(y, &mut row);
                rows::add_scaled(stream, scale, &row);
            }
        });
        Ok(norm.is_some().then_some(y))
    }

    pub(super) fn indexed(&self, role: Role) -> Option<(usize, &Linear)> {
        self.linears.iter().enumerate().find(|(_, linear)| linear.role == role)
    }

    /// How all of the layer is rounded.
    fn rounding(&self) -> Option<Rounding> {
        // All are stored alike nearly always; one that is to be exact wins.
        let mut each = self.linears.iter().map(|linear| linear.weight.frozen().and_then(|f| f.rounding));
        let first = each.next().flatten();
        each.all(|rounding| rounding == first).then_some(first).flatten()
    }

    pub(super) fn inner(&self) -> Result<Inner> {
        let down = self.linear(Role::Down).ok_or_else(|| missing(Role::Down))?.frozen()?;
        let hidden = down.matrix.depth(down.side(false));
        let gated = self.linear(Role::Gate).is_some() || self.linear(Role::GateUp).is_some();
        Ok(Inner { inner: if gated { 2 * hidden } else { hidden }, hidden, gated })
    }

    pub(super) fn places(&self) -> Places {
        let s = self.shape;
        let d = s.head_dim;
        match s.qkv {
            Qkv::Apart(_) | Qkv::Rows(_) => Places {
                width: (s.heads + 2 * s.kv_heads) * d,
                q: (0, d),
                k: (s.heads * d, d),
                v: ((s.heads + s.kv_heads) * d, d),
            },
            Qkv::Heads(_) => {
                Places { width: 3 * s.heads * d, q: (0, 3 * d), k: (d, 3 * d), v: (2 * d, 3 * d) }
            }
        }
    }

    pub(super) fn attention<'a>(
        &self,
        qkv: &'a [f32],
        places: Places,
        sequences: &'a [Sequence],
    ) -> Attention<'a> {
        let s = self.shape;
        let heads = |(start, head)| Heads { values: qkv, start, row: places.width, head };
        Attention {
            q: heads(places.q),
            k: heads(places.k),
            v: heads(places.v),
            heads: s.heads,
            kv_heads: s.kv_heads,
            dim: s.head_dim,
            scoring: Scoring { scale: s.attention_scale as f32, cap: s.attention_cap.map(|cap| cap as f32) },
            window: s.layer.window,
            sequences,
        }
    }

    /// Attention over the keys and values in `cache`, to which those of this pass are added.
    fn attend_with_cache(
        &self,
        qkv: &[f32],
        places: Places,
        pass: &Pass,
        cache: &mut LayerCache,
        (gathered, log_sums): (&mut [f32], &mut [f32]),
    ) -> Result<()> {
        let (kv, d) = (self.shape.kv_heads, self.shape.head_dim);
        let mut sequences = Vec::with_capacity(pass.sequences().len());
        let capacity = cache.all().0.dim(2)?;
        for group in pass.groups() {
            let (Some(slot), []) = (group.slot, group.past.as_slice()) else {
                candle_core::bail!("a text without a place in the cache. This is a bug.")
            };
            let t = group.len;
            let by_head = |(start, step): (usize, usize)| {
                let mut out = Vec::with_capacity(group.texts * kv * t * d);
                for (text, head) in (0..group.texts).flat_map(|text| (0..kv).map(move |head| (text, head))) {
                    for row in group.first + text * t..group.first + (text + 1) * t {
                        let at = row * places.width + start + head * step;
                        out.extend_from_slice(&qkv[at..at + d]);
                    }
                }
                Tensor::from_vec(out, (group.texts, kv, t, d), &Device::Cpu)
            };
            let slots = group.slots(slot);
            cache.write(&slots, slot.read, &by_head(places.k)?, &by_head(places.v)?)?;
            sequences.extend(slots.enumerate().map(|(text, slot_index)| {
                let (row, key) = (group.first + text * t, slot_index * kv * capacity);
                let keys = key..key + slot.read + t;
                Sequence { queries: row..row + t, keys: std::iter::once(keys).collect() }
            }));
        }
        let (keys, values) = cache.all();
        let lie = Heads { values: &[], start: 0, row: d, head: capacity * d };
        with(keys, |keys| {
            with(values, |values| {
                let attention = Attention {
                    k: Heads { values: keys, ..lie },
                    v: Heads { values, ..lie },
                    ..self.attention(qkv, places, &sequences)
                };
                attention.forward(gathered, log_sums);
            })
        })?
    }

    /// Rotates the queries and keys of a row; back when `sign` is -1.
    pub(super) fn rotate(&self, row: &mut [f32], places: Places, (cos, sin): (&[f32], &[f32]), sign: f32) {
        let d = self.shape.head_dim;
        for ((start, step), heads) in [(places.q, self.shape.heads), (places.k, self.shape.kv_heads)] {
            for head in 0..heads {
                rows::rotate(&mut row[start + head * step..][..d], cos, sin, sign);
            }
        }
    }
}

pub(super) fn bend(activation: Activation) -> Bend {
    match activation {
        Activation::Silu => Bend::Silu,
        Activation::Gelu => Bend::Gelu,
        Activation::GeluTanh => Bend::GeluTanh,
        Activation::Relu => Bend::Relu,
    }
}

/// The rows of `x`, normed where there is a norm, packed.
fn normed(norm: Option<&Norm>, x: &[f32], h: usize, rounding: Option<Rounding>) -> Result<Left> {
    let Some(norm) = norm else { return Ok(Left::new(x, h, rounding)) };
    let norm = norm.native()?;
    Ok(Left::from_rows(x.len() / h, h, rounding, |i, out| norm.row(&x[i * h..(i + 1) * h], out)))
}

impl Norm {
    pub fn native(&self) -> Result<rows::Norm> {
        let bias = self.bias.as_ref().map(floats).transpose()?;
        Ok(rows::Norm { weight: floats(&self.weight)?, bias, eps: self.eps as f32 })
    }
}

/// Norms of the heads of queries or of keys.
pub(super) struct HeadNorms {
    /// One for all parts, or one for each.
    norms: Vec<rows::Norm>,
    /// Heads, or all heads as one.
    parts: usize,
    width: usize,
}

impl HeadNorms {
    fn of(norm: &HeadNorm, heads: usize, dim: usize) -> Result<Option<Self>> {
        Ok(match norm {
            HeadNorm::No => None,
            HeadNorm::Head(norm) => Some(Self { norms: vec![norm.native()?], parts: heads, width: dim }),
            HeadNorm::Whole(norm) => Some(Self { norms: vec![norm.native()?], parts: 1, width: heads * dim }),
            HeadNorm::Each(norm, weights) => {
                let weights = floats(weights)?;
                let plain = norm.native()?;
                let each =
                    weights.chunks(dim).map(|weight| rows::Norm { weight: weight.to_vec(), ..plain.clone() });
                Some(Self { norms: each.collect(), parts: heads, width: dim })
            }
        })
    }

    /// Norms what lies at `start`, `step` from part to part, in place.
    pub(super) fn row(&self, row: &mut [f32], (start, step): (usize, usize)) {
        let mut before = vec![0.0; self.width];
        for part in 0..self.parts {
            let values = &mut row[start + part * step..][..self.width];
            before.copy_from_slice(values);
            self.norms[part % self.norms.len()].row(&before, values);
        }
    }

    /// Turns the gradient in `row` into that of what was normed, `raw`.
    pub(super) fn back(&self, raw: &[f32], row: &mut [f32], (start, step): (usize, usize)) {
        let mut dy = vec![0.0; self.width];
        for part in 0..self.parts {
            let at = start + part * step..start + part * step + self.width;
            dy.copy_from_slice(&row[at.clone()]);
            row[at.clone()].fill(0.0);
            self.norms[part % self.norms.len()].back(&raw[at.clone()], &dy, &mut row[at]);
        }
    }
}

impl Linear {
    pub(super) fn frozen(&self) -> Result<&Frozen> {
        self.weight.frozen().ok_or_else(|| missing(self.role))
    }

    pub(super) fn outputs(&self) -> Result<usize> {
        let frozen = self.frozen()?;
        Ok(frozen.matrix.results(frozen.side(false)))
    }

    /// Writes `left Wᵀ + bias` to `target`, or adds it without a bias. With an adapter that is `scale · B A` of
    /// the same more, in one sum; gives `scale · A x` then.
    fn apply(&self, left: &Left, target: Target, add: bool) -> Result<Option<Buffer>> {
        let frozen = self.frozen()?;
        let bias = self.bias.as_ref().map(floats).transpose()?;
        let start = match &bias {
            _ if add => Start::Target,
            None => Start::Zero,
            Some(bias) => Start::Bias(bias),
        };
        let base = Term::new(left, &frozen.matrix, frozen.side(false));
        let Some(adapter) = &self.adapter else {
            sum(&[base], target, start);
            return Ok(None);
        };
        let (a, b, rank) = adapter.matrices()?;
        let mut inside = product(&adapter.input(left, frozen.rounding), &a, Side::Rows);
        inside.iter_mut().for_each(|v| *v *= adapter.scale as f32);
        let packed = Left::new(&inside, rank, once(frozen.rounding));
        sum(&[base, Term::new(&packed, &b, Side::Rows)], target, start);
        Ok(Some(inside))
    }
}

/// Adapters have all digits of float32: only who rounds to bfloat16 anyway rounds them.
pub(super) fn once(rounding: Option<Rounding>) -> Option<Rounding> {
    rounding.filter(|rounding| *rounding == Rounding::Once)
}

impl Adapter {
    /// `A`, `B` and their rank.
    pub(super) fn matrices(&self) -> Result<(Matrix, Matrix, usize)> {
        let ((rank, inputs), (outputs, _)) = (self.a.dims2()?, self.b.dims2()?);
        let a = with(&self.a, |a| Matrix::floats(a, rank, inputs))?;
        let b = with(&self.b, |b| Matrix::floats(b, outputs, rank))?;
        Ok((a, b, rank))
    }

    /// What `A` is multiplied with.
    fn input<'a>(&self, left: &'a Left, rounding: Option<Rounding>) -> std::borrow::Cow<'a, Left> {
        if self.dropout.is_none() && once(rounding) == rounding {
            return std::borrow::Cow::Borrowed(left);
        }
        std::borrow::Cow::Owned(Left::from_rows(left.rows, left.depth, once(rounding), |i, out| {
            left.read(i, 0, out);
            self.drop_out(i * left.depth, out);
        }))
    }

    /// Zeroes what dropout takes of the inputs from `first` on.
    pub(super) fn drop_out(&self, first: usize, values: &mut [f32]) {
        if let Some(dropout) = self.dropout {
            dropout.apply(first, values);
        }
    }
}
