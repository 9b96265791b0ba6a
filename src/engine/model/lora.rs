//! Low-rank adapters (Hu et al., arXiv 2106.09685): `y += scale · B A dropout(x)`.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::kernel::rows::add_scaled;
use crate::engine::Result;
use crate::engine::chance::{mix, unit};

/// The trained part of one linear layer. Its tensors are plain values, or the
/// tensors of variables when a gradient is wanted.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// `[rank, inputs]`, float32.
    pub a: Tensor,
    /// `[outputs, rank]`, float32.
    pub b: Tensor,
    /// alpha / rank.
    pub scale: f64,
    /// Share of inputs zeroed, and the stream of chance that picks them.
    pub dropout: Option<Dropout>,
}

/// Which inputs to zero: a pure function of `key`, so that the forward pass and
/// its recomputation in the backward pass, or a resumed run, zero the same ones.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    pub rate: f64,
    pub key: u64,
}

impl Adapter {
    /// A new adapter that changes nothing: `A` uniform in ±1/√inputs (kaiming
    /// uniform with a = √5, as PEFT), `B` zero.
    pub fn new(
        rank: usize,
        (outputs, inputs): (usize, usize),
        scale: f64,
        key: u64,
        device: &Device,
    ) -> Result<Self> {
        let bound = 1.0 / (inputs as f64).sqrt();
        let a: Vec<f32> =
            (0..rank * inputs).map(|i| ((unit(key, i as u64) * 2.0 - 1.0) * bound) as f32).collect();
        let a = Tensor::from_vec(a, (rank, inputs), device)?;
        let b = Tensor::zeros((outputs, rank), DType::F32, device)?;
        Ok(Self { a, b, scale, dropout: None })
    }

    /// What the adapter adds to the layer's output, for `x [m, inputs]`.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut x = x.to_dtype(DType::F32)?;
        if let Some(dropout) = self.dropout {
            x = (&x * dropout.mask(x.dims2()?, x.device())?)?;
        }
        // Scaled where it is smallest.
        (x.matmul(&self.a.t()?)? * self.scale)?.matmul(&self.b.t()?)
    }

    /// What is to be added to a weight `[outputs, inputs]`, or `[inputs, outputs]` when it is turned.
    pub fn delta(&self, turned: bool) -> candle_core::Result<Delta> {
        // A row of the product is the sum of the rows of one factor, each times a value of the other.
        let (each, rows) = if turned { (self.a.t()?, self.b.t()?) } else { (self.b.clone(), self.a.clone()) };
        let ((_, rank), (_, width)) = (each.dims2()?, rows.dims2()?);
        let values = |x: &Tensor| x.flatten_all()?.to_vec1();
        Ok(Delta { each: values(&each)?, rows: values(&rows)?, rank, width, scale: self.scale as f32 })
    }

    pub fn parameters(&self) -> usize {
        self.a.elem_count() + self.b.elem_count()
    }
}

/// `scale · B A`, some rows at a time.
pub struct Delta {
    /// `[height, rank]`.
    each: Vec<f32>,
    /// `[rank, width]`.
    rows: Vec<f32>,
    rank: usize,
    width: usize,
    scale: f32,
}

impl Delta {
    /// Adds it to rows `first..` of a weight.
    ///
    /// # Panics
    /// When the weight has no such rows.
    pub fn add(&self, first: usize, weight: &mut [f32]) {
        let count = weight.len() / self.width;
        assert!(
            weight.len().is_multiple_of(self.width) && (first + count) * self.rank <= self.each.len(),
            "weights that do not fit an adapter. This is a bug."
        );
        let each = self.each[first * self.rank..].par_chunks(self.rank);
        weight.par_chunks_mut(self.width).zip(each).for_each(|(weight, each)| {
            let mut delta = vec![0.0; self.width];
            for (factor, row) in each.iter().zip(self.rows.chunks(self.width)) {
                add_scaled(&mut delta, *factor, row);
            }
            add_scaled(weight, self.scale, &delta);
        });
    }
}

impl Dropout {
    /// 0 where dropped, 1/(1-rate) elsewhere.
    fn mask(self, (rows, columns): (usize, usize), device: &Device) -> candle_core::Result<Tensor> {
        let mut mask = vec![1f32; rows * columns];
        mask.par_chunks_mut(4096).enumerate().for_each(|(chunk, out)| self.apply(chunk * 4096, out));
        Tensor::from_vec(mask, (rows, columns), device)
    }

    /// Multiplies inputs `first..`, counted through all rows, by the mask.
    pub fn apply(self, first: usize, values: &mut [f32]) {
        let threshold = (self.rate * f64::from(1 << 16)) as u64;
        let keep = (1.0 / (1.0 - self.rate)) as f32;
        let mut bits = 0;
        for (i, value) in values.iter_mut().enumerate() {
            // Four inputs share 64 bits of chance.
            let at = first + i;
            if at.is_multiple_of(4) || i == 0 {
                bits = mix(self.key ^ mix(at as u64 / 4)) >> (at % 4 * 16);
            }
            *value *= if bits & 0xffff < threshold { 0.0 } else { keep };
            bits >>= 16;
        }
    }
}
