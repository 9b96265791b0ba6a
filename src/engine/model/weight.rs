//! Frozen matrices: dense tensors, or halves packed for our own products.

use std::sync::{Arc, OnceLock};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Shape, Tensor};

use super::Compute;
use super::checkpoint::Checkpoint;
use super::kernel::{self, Packed, Path, Rounding, path};
use crate::checkpoint::Dtype;
use crate::engine::Result;

/// A frozen matrix `[outputs, inputs]`. Cheap to clone.
#[derive(Clone)]
pub enum Weight {
    Dense(Tensor),
    Halves(Arc<Halves>),
}

/// A matrix in bfloat16, laid out for `x Wᵀ`, and for `y W` from its first use on.
pub struct Halves {
    forward: Packed,
    backward: OnceLock<Packed>,
    rounding: Rounding,
}

impl Weight {
    /// Reads the matrix `name` (with `.weight`) of a linear layer in the form that `compute` works with.
    pub fn load(
        checkpoint: &Checkpoint,
        name: &str,
        shape: (usize, usize),
        compute: &Compute,
    ) -> Result<Self> {
        Self::read(checkpoint, name, shape, checkpoint.config().family.transposed, compute)
    }

    /// Reads the head `name`, which is never turned, as it may be the embedding.
    pub fn load_head(checkpoint: &Checkpoint, name: &str, compute: &Compute) -> Result<Self> {
        let config = checkpoint.config();
        Self::read(checkpoint, name, (config.vocab_size, config.hidden_size), false, compute)
    }

    fn read(
        checkpoint: &Checkpoint,
        name: &str,
        shape: (usize, usize),
        turned: bool,
        compute: &Compute,
    ) -> Result<Self> {
        // Two halves of the left side only help when the right side has no more digits than one.
        let exact = checkpoint.info(name).is_some_and(|info| info.dtype == Dtype::Bf16);
        if let Some(rounding) = compute.rounding.filter(|r| exact || *r == Rounding::Once) {
            let rows = checkpoint.halves(name)?;
            // A turned matrix is packed from the other side.
            let (outputs, inputs) = if turned { (shape.1, shape.0) } else { shape };
            let packed = Packed::new(&rows, outputs, inputs);
            return Ok(Self::packed(if turned { packed.turned() } else { packed }, rounding));
        }
        let weight = checkpoint.tensor(name, compute.dtype, &compute.device)?;
        Ok(Self::Dense(if turned { weight.t()?.contiguous()? } else { weight }))
    }

    /// A matrix of these values, `[outputs, inputs]`.
    pub fn of(values: Vec<f32>, shape: (usize, usize), compute: &Compute) -> Result<Self> {
        match compute.rounding {
            // Values that were unpacked from a few bits have no digits that bfloat16 would lose.
            Some(rounding) => {
                Ok(Self::packed(Packed::new(&kernel::halves(&values), shape.0, shape.1), rounding))
            }
            None => {
                let weight = Tensor::from_vec(values, shape, &compute.device)?;
                Ok(Self::Dense(weight.to_dtype(compute.dtype)?))
            }
        }
    }

    fn packed(forward: Packed, rounding: Rounding) -> Self {
        Self::Halves(Arc::new(Halves { forward, backward: OnceLock::new(), rounding }))
    }

    /// `x Wᵀ` for `x [m, inputs]`; its backward gives the gradient of `x` only.
    pub fn product(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.apply(x, false)
    }

    /// `y W` for `y [m, outputs]`.
    pub fn back(&self, y: &Tensor) -> candle_core::Result<Tensor> {
        self.apply(y, true)
    }

    fn apply(&self, x: &Tensor, back: bool) -> candle_core::Result<Tensor> {
        let x = x.contiguous()?;
        if !x.track_op() {
            return match self {
                Self::Dense(weight) if back => x.matmul(weight),
                Self::Dense(weight) => x.matmul(&weight.t()?),
                Self::Halves(_) => x.apply_op1_no_bwd(&Product { weight: self.clone(), back }),
            };
        }
        x.apply_op1(Product { weight: self.clone(), back })
    }
}

impl Halves {
    fn product(&self, x: &[f32], back: bool) -> Vec<f32> {
        let packed = if back { self.backward.get_or_init(|| self.forward.turned()) } else { &self.forward };
        // Who packed where the processor cannot multiply halves wants to compare.
        let path = if path() == Path::F32 { Path::Plain } else { path() };
        packed.product(x, self.rounding, path)
    }

    fn shape(&self, back: bool) -> (usize, usize) {
        let (outputs, inputs) = (self.forward.outputs(), self.forward.inputs());
        if back { (inputs, outputs) } else { (outputs, inputs) }
    }
}

/// A product whose backward gives the gradient of `x` only. candle's own would
/// also compute that of the frozen weight, and keep it: a third of all work.
struct Product {
    weight: Weight,
    back: bool,
}

impl Product {
    /// Rows, outputs and inputs of a product with `weight`, and the layout of `x` without gaps.
    fn dims(&self, weight: &Tensor, x: &Layout) -> candle_core::Result<(usize, usize, usize, Layout)> {
        let (n, k) = if self.back { weight.t()?.dims2()? } else { weight.dims2()? };
        let (m, _) = x.shape().dims2()?;
        Ok((m, n, k, Layout::contiguous_with_offset((m, k), x.start_offset())))
    }

    /// The weight's layout as the right side of a product.
    fn right(&self, layout: &Layout) -> candle_core::Result<Layout> {
        if self.back { Ok(layout.clone()) } else { layout.transpose(0, 1) }
    }
}

impl CustomOp1 for Product {
    fn name(&self) -> &'static str {
        "frozen-product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        match &self.weight {
            Weight::Dense(weight) => {
                let (m, n, k, contiguous) = self.dims(weight, layout)?;
                let (weight, weight_layout) = weight.storage_and_layout();
                let candle_core::Storage::Cpu(weight) = &*weight else {
                    candle_core::bail!("weight is on another device")
                };
                let y = x.matmul(weight, (1, m, n, k), &contiguous, &self.right(weight_layout)?)?;
                Ok((y, Shape::from((m, n))))
            }
            Weight::Halves(halves) => {
                let (m, k) = layout.shape().dims2()?;
                let (n, inputs) = halves.shape(self.back);
                let CpuStorage::F32(values) = x else { candle_core::bail!("activations must be float32") };
                if k != inputs {
                    candle_core::bail!("{k} inputs for a matrix of {inputs}")
                }
                let start = layout.start_offset();
                let y = halves.product(&values[start..start + m * k], self.back);
                Ok((CpuStorage::F32(y), Shape::from((m, n))))
            }
        }
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let Weight::Dense(weight) = &self.weight else { candle_core::bail!("packed for the processor") };
        let (m, n, k, contiguous) = self.dims(weight, layout)?;
        let (weight, weight_layout) = weight.storage_and_layout();
        let candle_core::Storage::Cuda(weight) = &*weight else {
            candle_core::bail!("weight is on another device")
        };
        let y = x.matmul(weight, (1, m, n, k), &contiguous, &self.right(weight_layout)?)?;
        Ok((y, Shape::from((m, n))))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.weight.apply(dy, !self.back).map(Some)
    }
}
