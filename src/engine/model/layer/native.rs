//! The layer on our own kernels: the processor's engine, with a backward pass written by hand.
//!
//! The same functions as [`super::candle`], which the tests compare it with. What is kept of a forward pass is
//! one layer's [`Trace`]; the gradient for the stream comes out, and those of the adapters.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::{HeadNorm, Layer, Linear, Norm, Pass, missing};
use crate::checkpoint::family::Qkv;
use crate::checkpoint::{Activation, Role};
use crate::engine::model::cache::LayerCache;
use crate::engine::model::kernel::Rounding;
use crate::engine::model::kernel::attention::{Attention, Heads, Sequence, outer};
use crate::engine::model::kernel::buffer::Buffer;
use crate::engine::model::kernel::left::Left;
use crate::engine::model::kernel::matrix::{Matrix, Side};
use crate::engine::model::kernel::product::{Start, Target, Term, product, sum};
use crate::engine::model::kernel::rows::{self, Bend, Scoring};
use crate::engine::model::lora::Adapter;
use crate::engine::model::weight::{Frozen, floats, with};

/// The gradient of one adapter.
pub struct AdapterGradient {
    /// Among the layer's linear layers.
    pub linear: usize,
    /// `[rank, inputs]`.
    pub a: Tensor,
    /// `[outputs, rank]`.
    pub b: Tensor,
}

/// What a forward pass leaves for its backward pass, by rows (tokens).
pub struct Trace {
    attention: AttentionTrace,
    /// The stream between attention and MLP.
    middle: Buffer,
    mlp: MlpTrace,
    /// `scale · A x` of each linear layer with an adapter.
    inside: Vec<Option<Buffer>>,
    leaving: Vec<f32>,
}

struct AttentionTrace {
    /// What attention reads.
    read: Left,
    /// Queries, keys and values before their norms, where they have some.
    raw: Option<Buffer>,
    qkv: Buffer,
    /// What the heads gather, and the logarithms of their sums of exponentials.
    gathered: Buffer,
    log_sums: Buffer,
    /// What was gathered, packed.
    output: Left,
    /// What attention gives, before its norm, where it has one.
    given: Option<Buffer>,
}

struct MlpTrace {
    entering: Left,
    /// Gate, then up, or what stands in for both.
    inner: Buffer,
    hidden: Left,
    /// What the MLP gives, before its norm, where it has one.
    given: Option<Buffer>,
}

/// Widths inside the MLP.
struct Inner {
    /// Of gate and up together, or of the one that stands in for both.
    inner: usize,
    hidden: usize,
    /// There is a gate.
    gated: bool,
}

/// Where queries, keys and values lie in a row of all three.
#[derive(Clone, Copy)]
struct Places {
    width: usize,
    /// Start and step from head to head.
    q: (usize, usize),
    k: (usize, usize),
    v: (usize, usize),
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
    /// Whether [`Self::run`] covers this layer: everything but experts, on the processor.
    pub fn is_native(&self) -> bool {
        self.experts.is_none() && self.linears.iter().all(|linear| linear.weight.frozen().is_some())
    }

    /// The stream `[b, t, h]` leaving the layer, for the stream entering it.
    pub(super) fn forward_native(
        &self,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let trace = with(x, |values| self.run(values, x.dims3()?, pass, cache, false))??;
        Tensor::from_vec(trace.leaving, x.shape(), &Device::Cpu)
    }

    /// The same, with what the backward pass needs of it.
    pub fn forward_traced(&self, x: &Tensor, pass: &Pass) -> Result<(Tensor, Trace)> {
        let mut trace = with(x, |values| self.run(values, x.dims3()?, pass, None, true))??;
        let leaving = Tensor::from_vec(std::mem::take(&mut trace.leaving), x.shape(), &Device::Cpu)?;
        Ok((leaving, trace))
    }

    /// The gradients of all adapters, and that of `x`, if it is wanted, for the gradient `upstream` of what
    /// the layer gives for `x`. Without a trace of that pass it is run again.
    pub fn backward(
        &self,
        x: &Tensor,
        pass: &Pass,
        trace: Option<Trace>,
        upstream: &Tensor,
        wanted: bool,
    ) -> Result<(Option<Tensor>, Vec<AdapterGradient>)> {
        let shape = x.dims3()?;
        let (dx, gradients) = with(x, |x| {
            with(upstream, |upstream| {
                let trace = match trace {
                    Some(trace) => trace,
                    None => self.run(x, shape, pass, None, true)?,
                };
                Back { layer: self, pass, shape, gradients: Vec::new() }.run(x, trace, upstream, wanted)
            })
        })???;
        let dx = dx.map(|dx| Tensor::from_vec(dx.to_vec(), shape, &Device::Cpu)).transpose()?;
        Ok((dx, gradients))
    }

    fn run(
        &self,
        x: &[f32],
        shape: (usize, usize, usize),
        pass: &Pass,
        cache: Option<&mut LayerCache>,
        keep: bool,
    ) -> Result<Trace> {
        let mut inside: Vec<Option<Buffer>> = self.linears.iter().map(|_| None).collect();
        let mut middle = Buffer::from_slice(x);
        let attention = self.attention_onto(&mut middle, x, shape, pass, cache, keep, &mut inside)?;
        let mut leaving = middle.to_vec();
        let mlp = self.mlp_onto(&mut leaving, if self.shape.parallel { x } else { &middle }, &mut inside)?;
        Ok(Trace { attention, middle, mlp, inside, leaving })
    }

    /// Adds attention's branch to the stream.
    #[allow(clippy::too_many_arguments)]
    fn attention_onto(
        &self,
        stream: &mut [f32],
        x: &[f32],
        (b, t, h): (usize, usize, usize),
        pass: &Pass,
        cache: Option<&mut LayerCache>,
        keep: bool,
        inside: &mut [Option<Buffer>],
    ) -> Result<AttentionTrace> {
        let s = self.shape;
        let read = normed(self.attention_in.as_ref(), x, h, self.rounding())?;
        let places = self.places();
        let mut qkv = Buffer::new(b * t * places.width);
        let roles = [Role::Query, Role::Key, Role::Value, Role::QueryKeyValue];
        self.side_by_side(&roles, &read, &mut qkv, places.width, inside)?;
        let norms = self.head_norms()?;
        let raw = (keep && norms.iter().any(Option::is_some)).then(|| qkv.clone());
        let angles = pass.angles(s.layer.rope)?;
        qkv.par_chunks_mut(places.width).enumerate().for_each(|(i, row)| {
            for (norm, place) in norms.iter().zip([places.q, places.k]) {
                if let Some(norm) = norm {
                    norm.row(row, place);
                }
            }
            if let Some(angles) = &angles {
                self.rotate(row, places, angles.of(i % t), 1.0);
            }
        });
        let mut gathered = Buffer::new(b * t * s.heads * s.head_dim);
        let mut log_sums = Buffer::new(b * t * s.heads);
        let out = (&mut gathered[..], &mut log_sums[..]);
        match cache {
            None => self.attention(&qkv, places, &sequences(b, t)).forward(out.0, out.1),
            Some(cache) => self.attend_with_past(&qkv, places, (b, t), pass.start(), cache, out)?,
        }
        let output = Left::new(&gathered, s.heads * s.head_dim, self.rounding());
        if !keep {
            // The MLP may use the memory.
            (qkv, gathered) = (Buffer::new(0), Buffer::new(0));
        }
        let given = self.onto(stream, Role::Output, &output, self.attention_out.as_ref(), inside)?;
        Ok(AttentionTrace { read, raw, qkv, gathered, log_sums, output, given })
    }

    /// Adds the MLP's branch, which reads `x`, to the stream.
    fn mlp_onto(&self, stream: &mut [f32], x: &[f32], inside: &mut [Option<Buffer>]) -> Result<MlpTrace> {
        let Inner { inner: wide, hidden: width, gated } = self.inner()?;
        let h = self.linear(Role::Down).ok_or_else(|| missing(Role::Down))?.outputs()?;
        let rows = x.len() / h;
        let norm = self.mlp_in.as_ref().or(self.attention_in.as_ref().filter(|_| self.shape.parallel));
        let entering = normed(norm, x, h, self.rounding())?;
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
    fn head_norms(&self) -> Result<[Option<HeadNorms>; 2]> {
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

    fn indexed(&self, role: Role) -> Option<(usize, &Linear)> {
        self.linears.iter().enumerate().find(|(_, linear)| linear.role == role)
    }

    /// How all of the layer is rounded.
    fn rounding(&self) -> Option<Rounding> {
        // All are stored alike nearly always; one that is to be exact wins.
        let mut each = self.linears.iter().map(|linear| linear.weight.frozen().and_then(|f| f.rounding));
        let first = each.next().flatten();
        each.all(|rounding| rounding == first).then_some(first).flatten()
    }

    fn inner(&self) -> Result<Inner> {
        let down = self.linear(Role::Down).ok_or_else(|| missing(Role::Down))?.frozen()?;
        let hidden = down.matrix.depth(down.side(false));
        let gated = self.linear(Role::Gate).is_some() || self.linear(Role::GateUp).is_some();
        Ok(Inner { inner: if gated { 2 * hidden } else { hidden }, hidden, gated })
    }

    fn places(&self) -> Places {
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

    fn attention<'a>(&self, qkv: &'a [f32], places: Places, sequences: &'a [Sequence]) -> Attention<'a> {
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
    fn attend_with_past(
        &self,
        qkv: &[f32],
        places: Places,
        (b, t): (usize, usize),
        past: usize,
        cache: &mut LayerCache,
        (gathered, log_sums): (&mut [f32], &mut [f32]),
    ) -> Result<()> {
        let (kv, d) = (self.shape.kv_heads, self.shape.head_dim);
        let by_head = |(start, step): (usize, usize)| {
            let mut out = Vec::with_capacity(b * kv * t * d);
            for (sequence, head) in (0..b).flat_map(|i| (0..kv).map(move |j| (i, j))) {
                for token in 0..t {
                    let at = (sequence * t + token) * places.width + start + head * step;
                    out.extend_from_slice(&qkv[at..at + d]);
                }
            }
            Tensor::from_vec(out, (b, kv, t, d), &Device::Cpu)
        };
        cache.write(past, &by_head(places.k)?, &by_head(places.v)?)?;
        let (keys, values) = cache.all();
        let capacity = keys.dim(2)?;
        let sequence = |i| Sequence { first_query: i * t, queries: t, first_key: i * kv * capacity, past };
        let sequences: Vec<Sequence> = (0..b).map(sequence).collect();
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
    fn rotate(&self, row: &mut [f32], places: Places, (cos, sin): (&[f32], &[f32]), sign: f32) {
        let d = self.shape.head_dim;
        for ((start, step), heads) in [(places.q, self.shape.heads), (places.k, self.shape.kv_heads)] {
            for head in 0..heads {
                rows::rotate(&mut row[start + head * step..][..d], cos, sin, sign);
            }
        }
    }
}

/// Sequences of `t` rows each, without a past.
fn sequences(b: usize, t: usize) -> Vec<Sequence> {
    (0..b).map(|i| Sequence { first_query: i * t, queries: t, first_key: i * t, past: 0 }).collect()
}

fn bend(activation: Activation) -> Bend {
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
struct HeadNorms {
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
    fn row(&self, row: &mut [f32], (start, step): (usize, usize)) {
        let mut before = vec![0.0; self.width];
        for part in 0..self.parts {
            let values = &mut row[start + part * step..][..self.width];
            before.copy_from_slice(values);
            self.norms[part % self.norms.len()].row(&before, values);
        }
    }

    /// Turns the gradient in `row` into that of what was normed, `raw`.
    fn back(&self, raw: &[f32], row: &mut [f32], (start, step): (usize, usize)) {
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
    fn frozen(&self) -> Result<&Frozen> {
        self.weight.frozen().ok_or_else(|| missing(self.role))
    }

    fn outputs(&self) -> Result<usize> {
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
fn once(rounding: Option<Rounding>) -> Option<Rounding> {
    rounding.filter(|rounding| *rounding == Rounding::Once)
}

impl Adapter {
    /// `A`, `B` and their rank.
    fn matrices(&self) -> Result<(Matrix, Matrix, usize)> {
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
    fn drop_out(&self, first: usize, values: &mut [f32]) {
        if let Some(dropout) = self.dropout {
            dropout.apply(first, values);
        }
    }
}

/// The backward pass of one layer.
struct Back<'a> {
    layer: &'a Layer,
    pass: &'a Pass,
    shape: (usize, usize, usize),
    gradients: Vec<AdapterGradient>,
}

/// Rows of gradients: `width` values each, of which those from `first` on are meant.
#[derive(Clone, Copy)]
struct Gradient<'a> {
    values: &'a [f32],
    width: usize,
    first: usize,
}

impl Gradient<'_> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        let at = row * self.width + self.first + first;
        out.copy_from_slice(&self.values[at..at + out.len()]);
    }
}

impl Back<'_> {
    fn run(
        mut self,
        x: &[f32],
        trace: Trace,
        upstream: &[f32],
        wanted: bool,
    ) -> Result<(Option<Buffer>, Vec<AdapterGradient>)> {
        let h = self.shape.2;
        let layer = self.layer;
        let parallel = layer.shape.parallel;
        let Trace { attention, middle, mlp, inside, .. } = trace;
        let mut dx = Buffer::from_slice(upstream);
        let d_entering = self.mlp(mlp, upstream, &inside)?;
        let shares_norm = parallel && layer.mlp_in.is_none();
        if !shares_norm {
            let read = if parallel { x } else { &middle };
            into_stream(layer.mlp_in.as_ref(), read, &d_entering, h, &mut dx)?;
        }
        let at_attention = if parallel { Buffer::from_slice(upstream) } else { dx.clone() };
        let Some(mut d_read) = self.attention(&attention, &at_attention, &inside, wanted)? else {
            return Ok((None, self.gradients));
        };
        if shares_norm {
            rows::add_scaled(&mut d_read, 1.0, &d_entering);
        }
        into_stream(layer.attention_in.as_ref(), x, &d_read, h, &mut dx)?;
        Ok((Some(dx), self.gradients))
    }

    /// The gradient for what the MLP reads.
    fn mlp(&mut self, trace: MlpTrace, upstream: &[f32], inside: &[Option<Buffer>]) -> Result<Buffer> {
        let Inner { inner: wide, hidden: width, gated } = self.layer.inner()?;
        let MlpTrace { entering, mut inner, hidden, given } = trace;
        let d_given = self.unscaled(upstream, given.as_ref(), self.layer.mlp_out.as_ref())?;
        let values = d_given.as_deref().unwrap_or(upstream);
        let d_given = Gradient { values, width: self.shape.2, first: 0 };
        let d_hidden = self.through(&[(Role::Down, d_given)], &hidden, inside)?;
        let bend = bend(self.layer.shape.activation);
        inner.par_chunks_mut(wide).zip(d_hidden.par_chunks(width)).for_each(|(row, dy)| {
            let (gate, up) = row.split_at_mut(width);
            rows::bent_back(bend, gate, up, dy);
        });
        let of = |first| Gradient { values: &inner, width: wide, first };
        let up = if gated { width } else { 0 };
        let parts = [(Role::Gate, of(0)), (Role::Up, of(up)), (Role::GateUp, of(0))];
        self.through(&self.present(&parts), &entering, inside)
    }

    /// The gradient for what attention reads, if it is wanted.
    fn attention(
        &mut self,
        trace: &AttentionTrace,
        upstream: &[f32],
        inside: &[Option<Buffer>],
        wanted: bool,
    ) -> Result<Option<Buffer>> {
        let (b, t, h) = self.shape;
        let (layer, s) = (self.layer, self.layer.shape);
        let d_given = self.unscaled(upstream, trace.given.as_ref(), layer.attention_out.as_ref())?;
        let d_given = Gradient { values: d_given.as_deref().unwrap_or(upstream), width: h, first: 0 };
        let d_gathered = self.through(&[(Role::Output, d_given)], &trace.output, inside)?;
        let places = layer.places();
        let mut d_qkv = Buffer::new(trace.qkv.len());
        let sequences = sequences(b, t);
        let attention = layer.attention(&trace.qkv, places, &sequences);
        attention.backward(&trace.gathered, &trace.log_sums, &d_gathered, &mut d_qkv);
        drop(d_gathered);
        let angles = self.pass.angles(s.layer.rope)?;
        let norms = layer.head_norms()?;
        d_qkv.par_chunks_mut(places.width).enumerate().for_each(|(i, row)| {
            if let Some(angles) = &angles {
                layer.rotate(row, places, angles.of(i % t), -1.0);
            }
            if let Some(raw) = &trace.raw {
                let raw = &raw[i * places.width..(i + 1) * places.width];
                for (norm, place) in norms.iter().zip([places.q, places.k]) {
                    if let Some(norm) = norm {
                        norm.back(raw, row, place);
                    }
                }
            }
        });
        let of = |first| Gradient { values: &d_qkv, width: places.width, first };
        let parts = self.present(&[
            (Role::Query, of(places.q.0)),
            (Role::Key, of(places.k.0)),
            (Role::Value, of(places.v.0)),
            (Role::QueryKeyValue, of(0)),
        ]);
        if wanted {
            return self.through(&parts, &trace.read, inside).map(Some);
        }
        for (role, dy) in parts {
            let (index, linear) = layer.indexed(role).ok_or_else(|| missing(role))?;
            self.of_adapter(index, linear, dy, &trace.read, inside)?;
        }
        Ok(None)
    }

    /// Those parts that this layer has.
    fn present<'b>(&self, parts: &[(Role, Gradient<'b>)]) -> Vec<(Role, Gradient<'b>)> {
        parts.iter().filter(|(role, _)| self.layer.linear(*role).is_some()).copied().collect()
    }

    /// The gradient before a branch was normed and scaled; nothing where it was neither.
    fn unscaled(&self, dy: &[f32], before: Option<&Buffer>, norm: Option<&Norm>) -> Result<Option<Buffer>> {
        let scale = self.layer.shape.residual_scale as f32;
        let h = self.shape.2;
        let Some((before, norm)) = before.zip(norm) else {
            return Ok((scale != 1.0).then(|| {
                let mut out = Buffer::zeros(dy.len());
                rows::add_scaled(&mut out, scale, dy);
                out
            }));
        };
        let norm = norm.native()?;
        let mut out = Buffer::zeros(dy.len());
        out.par_chunks_mut(h).zip(dy.par_chunks(h)).zip(before.par_chunks(h)).for_each(
            |((out, dy), before)| {
                norm.back(before, dy, out);
                out.iter_mut().for_each(|v| *v *= scale);
            },
        );
        Ok(Some(out))
    }

    /// The gradient for the common input of linear layers; notes those of their adapters.
    fn through(
        &mut self,
        parts: &[(Role, Gradient)],
        input: &Left,
        inside: &[Option<Buffer>],
    ) -> Result<Buffer> {
        let rows = input.rows;
        let mut lefts = Vec::new();
        for (role, dy) in parts {
            let (index, linear) = self.layer.indexed(*role).ok_or_else(|| missing(*role))?;
            let frozen = linear.frozen()?;
            let of_adapter = self.of_adapter(index, linear, *dy, input, inside)?;
            let left = Left::from_rows(rows, linear.outputs()?, frozen.rounding, |i, out| dy.read(i, 0, out));
            lefts.push((frozen, left, of_adapter));
        }
        let mut terms = Vec::new();
        for (frozen, left, of_adapter) in &lefts {
            terms.push(Term::new(left, &frozen.matrix, frozen.side(true)));
            if let Some((left, a, adapter)) = of_adapter
                && adapter.dropout.is_none()
            {
                terms.push(Term::new(left, a, Side::Columns));
            }
        }
        let width = input.depth;
        let mut dx = Buffer::new(rows * width);
        sum(&terms, Target { values: &mut dx, width, first: 0 }, Start::Zero);
        for (left, a, adapter) in lefts.iter().filter_map(|(_, _, of_adapter)| of_adapter.as_ref()) {
            if adapter.dropout.is_some() {
                let mut more = product(left, a, Side::Columns);
                dx.par_chunks_mut(width).zip(more.par_chunks_mut(width)).enumerate().for_each(
                    |(i, (dx, more))| {
                        adapter.drop_out(i * width, more);
                        rows::add_scaled(dx, 1.0, more);
                    },
                );
            }
        }
        Ok(dx)
    }

    /// Notes the gradient of one adapter; gives the one inside it, and the matrix that brings it to the input.
    fn of_adapter<'b>(
        &mut self,
        index: usize,
        linear: &'b Linear,
        dy: Gradient,
        input: &Left,
        inside: &[Option<Buffer>],
    ) -> Result<Option<(Left, Matrix, &'b Adapter)>> {
        let (Some(adapter), Some(inside)) = (&linear.adapter, &inside[index]) else { return Ok(None) };
        let (a, b, rank) = adapter.matrices()?;
        let rounding = once(linear.frozen()?.rounding);
        let outputs = linear.outputs()?;
        let left = Left::from_rows(input.rows, outputs, rounding, |i, out| dy.read(i, 0, out));
        let mut within = product(&left, &b, Side::Columns);
        within.iter_mut().for_each(|v| *v *= adapter.scale as f32);
        let d_a = outer(&within, rank, input.depth, |i, first, out| {
            input.read(i, first, out);
            adapter.drop_out(i * input.depth + first, out);
        });
        let d_b = outer(inside, rank, outputs, |i, first, out| dy.read(i, first, out));
        self.gradients.push(AdapterGradient {
            linear: index,
            a: Tensor::from_slice(&d_a, (rank, input.depth), &Device::Cpu)?,
            b: Tensor::from_slice(&d_b, (rank, outputs), &Device::Cpu)?.t()?.contiguous()?,
        });
        Ok(Some((Left::new(&within, rank, rounding), a, adapter)))
    }
}

/// Adds the gradient of what a branch reads to that of the stream.
fn into_stream(norm: Option<&Norm>, x: &[f32], dy: &[f32], h: usize, dx: &mut [f32]) -> Result<()> {
    let norm = norm.map(Norm::native).transpose()?;
    dx.par_chunks_mut(h).zip(x.par_chunks(h)).zip(dy.par_chunks(h)).for_each(|((dx, x), dy)| match &norm {
        Some(norm) => norm.back(x, dy, dx),
        None => rows::add_scaled(dx, 1.0, dy),
    });
    Ok(())
}
