//! The backward pass of the layer on our own kernels.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::native::{AttentionTrace, Inner, Keep, MlpTrace, Trace, bend, once};
use super::{Layer, Linear, Norm, Pass, missing};
use crate::checkpoint::Role;
use crate::engine::model::kernel::Rounding;
use crate::engine::model::kernel::buffer::Buffer;
use crate::engine::model::kernel::left::Left;
use crate::engine::model::kernel::matrix::{Matrix, Side};
use crate::engine::model::kernel::product::{Start, Target, Term, outer, product, sum};
use crate::engine::model::kernel::rows;
use crate::engine::model::lora::Adapter;
use crate::engine::model::weight::with;

/// The gradients of what is trained of one linear layer.
pub struct Gradients {
    /// Among the layer's linear layers.
    pub linear: usize,
    /// Of an adapter: `A [rank, inputs]` and `B [outputs, rank]`; of a weight: itself, `[outputs, inputs]`.
    pub tensors: Vec<Tensor>,
}

impl Layer {
    /// The gradients of all that is trained, and that of `x`, if it is wanted, for the gradient `upstream` of what
    /// the layer gives for `x`. Without a trace of that pass it is run again.
    pub fn backward(
        &self,
        x: &Tensor,
        pass: &Pass,
        trace: Option<Trace>,
        upstream: &Tensor,
        wanted: bool,
    ) -> Result<(Option<Tensor>, Vec<Gradients>)> {
        let (rows, h) = x.dims2()?;
        let (dx, gradients) = with(x, |x| {
            with(upstream, |upstream| {
                let trace = match trace {
                    Some(trace) => trace,
                    None => self.run(x, h, pass, None, Keep::All)?,
                };
                Back { layer: self, pass, h, gradients: Vec::new() }.run(x, trace, upstream, wanted)
            })
        })???;
        let dx = dx.map(|dx| Tensor::from_vec(dx.to_vec(), (rows, h), &Device::Cpu)).transpose()?;
        Ok((dx, gradients))
    }
}

/// The backward pass of one layer.
struct Back<'a> {
    layer: &'a Layer,
    pass: &'a Pass,
    h: usize,
    gradients: Vec<Gradients>,
}

/// Rows of gradients: `width` values each, of which those from `first` on are meant.
#[derive(Clone, Copy)]
struct Gradient<'a> {
    values: &'a [f32],
    width: usize,
    first: usize,
}

impl Gradient<'_> {
    /// `rows` rows of `depth`, as a left side.
    fn packed(&self, rows: usize, depth: usize, rounding: Option<Rounding>) -> Left {
        Left::from_rows(rows, depth, rounding, |i, out| self.read(i, 0, out))
    }

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
    ) -> Result<(Option<Buffer>, Vec<Gradients>)> {
        let h = self.h;
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
        let at_attention = if parallel { upstream } else { &dx };
        let Some(mut d_read) = self.attention(&attention, at_attention, &inside, wanted)? else {
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
        let d_given = Gradient { values, width: self.h, first: 0 };
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
        let h = self.h;
        let (layer, s) = (self.layer, self.layer.shape);
        let d_given = self.unscaled(upstream, trace.given.as_ref(), layer.attention_out.as_ref())?;
        let d_given = Gradient { values: d_given.as_deref().unwrap_or(upstream), width: h, first: 0 };
        let d_gathered = self.through(&[(Role::Output, d_given)], &trace.output, inside)?;
        let places = layer.places();
        let mut d_qkv = Buffer::new(trace.qkv.len());
        let attention = layer.attention(&trace.qkv, places, self.pass.sequences());
        attention.backward(&trace.gathered, &trace.log_sums, &d_gathered, &mut d_qkv);
        drop(d_gathered);
        let angles = self.pass.angles(s.layer.rope);
        let norms = layer.head_norms()?;
        d_qkv.par_chunks_mut(places.width).enumerate().for_each(|(i, row)| {
            if let Some(angles) = angles {
                layer.rotate(row, places, angles.row(i), -1.0);
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
            let left = dy.packed(trace.read.rows, linear.outputs()?, linear.frozen()?.rounding);
            self.note(index, linear, (dy, &left), &trace.read, inside)?;
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
        let h = self.h;
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
            let left = dy.packed(rows, linear.outputs()?, linear.frozen()?.rounding);
            let of_adapter = self.note(index, linear, (*dy, &left), input, inside)?;
            lefts.push((linear.frozen()?, left, of_adapter));
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

    /// Notes the gradient of what is trained of one linear layer; of an adapter it gives the one inside it, and the
    /// matrix that brings it to the input.
    fn note<'b>(
        &mut self,
        index: usize,
        linear: &'b Linear,
        (dy, packed): (Gradient, &Left),
        input: &Left,
        inside: &[Option<Buffer>],
    ) -> Result<Option<(Left, Matrix, &'b Adapter)>> {
        if linear.trained.is_some() {
            let outputs = linear.outputs()?;
            let mut of_output = Buffer::new(input.rows * outputs);
            of_output.par_chunks_mut(outputs).enumerate().for_each(|(i, row)| dy.read(i, 0, row));
            let d_w = outer(&of_output, outputs, input.depth, |i, first, out| input.read(i, first, out));
            let d_w = Tensor::from_slice(&d_w, (outputs, input.depth), &Device::Cpu)?;
            self.gradients.push(Gradients { linear: index, tensors: vec![d_w] });
        }
        let (Some(adapter), Some(inside)) = (&linear.adapter, &inside[index]) else { return Ok(None) };
        let (a, b, rank) = adapter.matrices()?;
        let outputs = linear.outputs()?;
        let whole = linear.frozen()?.rounding;
        let rounding = once(whole);
        let mut within = if rounding == whole {
            product(packed, &b, Side::Columns)
        } else {
            product(&dy.packed(input.rows, outputs, rounding), &b, Side::Columns)
        };
        within.iter_mut().for_each(|v| *v *= adapter.scale as f32);
        let d_a = outer(&within, rank, input.depth, |i, first, out| {
            input.read(i, first, out);
            adapter.drop_out(i * input.depth + first, out);
        });
        let d_b = outer(inside, rank, outputs, |i, first, out| dy.read(i, first, out));
        let tensors = vec![
            Tensor::from_slice(&d_a, (rank, input.depth), &Device::Cpu)?,
            Tensor::from_slice(&d_b, (rank, outputs), &Device::Cpu)?.t()?.contiguous()?,
        ];
        self.gradients.push(Gradients { linear: index, tensors });
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
