//! Frozen matrices of a model: on the processor as they are stored, for our own kernels; dense tensors elsewhere.

use std::sync::Arc;

use bytes::Bytes;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Shape, Storage, Tensor};

use super::Compute;
use super::checkpoint::Checkpoint;
use super::kernel::left::Left;
use super::kernel::matrix::{Matrix, Side, Stored};
use super::kernel::product::product;
use super::kernel::{self, Rounding};
use crate::checkpoint::Dtype;
use crate::engine::{Error, Result};
use crate::job::spec::{BaseFormat, FourBits};

/// A frozen matrix `[outputs, inputs]`. Cheap to clone.
#[derive(Clone)]
pub enum Weight {
    Dense(Tensor),
    Frozen(Arc<Frozen>),
}

/// A matrix as it is stored.
pub struct Frozen {
    pub matrix: Matrix,
    /// It is stored as `[inputs, outputs]`.
    pub turned: bool,
    /// How what it is multiplied with is rounded.
    pub rounding: Option<Rounding>,
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

    /// Reads the embedding or the head `name`, which are never turned, as they may be one.
    pub fn load_vocabulary(checkpoint: &Checkpoint, name: &str, compute: &Compute) -> Result<Self> {
        let config = checkpoint.config();
        Self::read(checkpoint, name, (config.vocab_size, config.hidden_size), false, compute)
    }

    /// Of `[outputs, inputs]` values in float32, which are copied for our own kernels.
    pub fn of(values: &Tensor, compute: &Compute) -> candle_core::Result<Self> {
        if !compute.native() {
            return Ok(Self::Dense(values.detach().to_dtype(compute.dtype)?));
        }
        let (rows, columns) = values.dims2()?;
        let matrix = with(values, |values| Matrix::floats(values, rows, columns))?;
        let rounding = compute.rounding.filter(|r| *r == Rounding::Once);
        Ok(Self::Frozen(Arc::new(Frozen { matrix, turned: false, rounding })))
    }

    fn read(
        checkpoint: &Checkpoint,
        name: &str,
        shape: (usize, usize),
        turned: bool,
        compute: &Compute,
    ) -> Result<Self> {
        if !compute.native() {
            let weight = checkpoint.tensor(name, compute.dtype, &compute.device)?;
            return Ok(Self::Dense(if turned { weight.t()?.contiguous()? } else { weight }));
        }
        let (bytes, dtype) = checkpoint.mapped(name)?;
        let stored = match dtype {
            Dtype::Bf16 => Stored::Bf16,
            Dtype::F16 => Stored::F16,
            Dtype::F32 => Stored::F32,
            other => {
                return Err(Error::model(format!(
                    "tensor {name} is {other}; only BF16, F16 and F32 can be used"
                )));
            }
        };
        let (rows, columns) = if turned { (shape.1, shape.0) } else { shape };
        let matrix = Matrix::stored(bytes, stored, rows, columns);
        // Two halves of the left side only help when the right side has no more digits than one.
        let rounding = compute.rounding.filter(|r| *r == Rounding::Once || stored == Stored::Bf16);
        Ok(Self::Frozen(Arc::new(Frozen { matrix, turned, rounding })))
    }

    /// The same matrix, `[outputs, inputs]`, with the values that `format` leaves it.
    pub fn quantised(&self, format: BaseFormat, compute: &Compute) -> Result<Self> {
        let copied;
        let (matrix, turned) = match self {
            Self::Frozen(frozen) => (&frozen.matrix, frozen.turned),
            Self::Dense(weight) => {
                let (rows, columns) = weight.dims2()?;
                copied = Matrix::floats(
                    &floats(&weight.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)?,
                    rows,
                    columns,
                );
                (&copied, false)
            }
        };
        let matrix = match format {
            BaseFormat::Four(FourBits::Nf4) => matrix.nf4(turned),
            BaseFormat::Four(FourBits::Q4) => matrix.q4(turned),
            BaseFormat::Int8 => matrix.int8(turned),
            BaseFormat::Sixteen => return Ok(self.clone()),
        };
        let rounding = compute.rounding.filter(|r| *r == Rounding::Once);
        Ok(Self::Frozen(Arc::new(Frozen { matrix, turned: false, rounding })))
    }

    /// Its rows `ids`, `[n, inputs]`.
    pub fn rows(&self, ids: &[u32], dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        match self {
            Self::Dense(weight) => weight.embedding(&Tensor::new(ids, device)?)?.to_dtype(dtype),
            Self::Frozen(frozen) => {
                let columns = frozen.matrix.columns;
                let mut out = vec![0f32; ids.len() * columns];
                for (id, out) in ids.iter().zip(out.chunks_mut(columns)) {
                    if *id as usize >= frozen.matrix.rows {
                        candle_core::bail!("token {id} is outside the vocabulary of {}", frozen.matrix.rows)
                    }
                    frozen.matrix.row(*id as usize, out);
                }
                Tensor::from_vec(out, (ids.len(), columns), &Device::Cpu)
            }
        }
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
        let native = kernel::enabled() && x.device().is_cpu() && x.dtype() == DType::F32;
        let weight = match self {
            Self::Frozen(frozen) if !native => Self::Dense(frozen.dense(x.dtype(), x.device())?),
            weight => weight.clone(),
        };
        x.contiguous()?.apply_op1(Product { weight, back })
    }

    /// What a quantised matrix mostly is: the codes of its values.
    pub fn codes(&self) -> Option<&Bytes> {
        self.frozen().and_then(|frozen| frozen.matrix.codes())
    }

    /// The same matrix with its codes kept elsewhere.
    #[must_use]
    pub fn with_codes(&self, codes: Bytes) -> Self {
        match self {
            Self::Dense(_) => self.clone(),
            Self::Frozen(frozen) => {
                Self::Frozen(Arc::new(Frozen { matrix: frozen.matrix.with_codes(codes), ..**frozen }))
            }
        }
    }

    /// Where our own kernels can take it.
    pub fn frozen(&self) -> Option<&Frozen> {
        match self {
            Self::Frozen(frozen) => Some(frozen),
            Self::Dense(_) => None,
        }
    }
}

impl Frozen {
    /// The side for `x Wᵀ`, or for `y W`.
    pub fn side(&self, back: bool) -> Side {
        if self.turned == back { Side::Rows } else { Side::Columns }
    }

    fn dense(&self, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let (rows, columns) = (self.matrix.rows, self.matrix.columns);
        let mut values = vec![0f32; rows * columns];
        values.chunks_mut(columns).enumerate().for_each(|(i, out)| self.matrix.row(i, out));
        let weight = Tensor::from_vec(values, (rows, columns), device)?.to_dtype(dtype)?;
        if self.turned { weight.t()?.contiguous() } else { Ok(weight) }
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
                let Storage::Cpu(weight) = &*weight else {
                    candle_core::bail!("weight is on another device")
                };
                let y = x.matmul(weight, (1, m, n, k), &contiguous, &self.right(weight_layout)?)?;
                Ok((y, Shape::from((m, n))))
            }
            Weight::Frozen(frozen) => {
                let (m, k) = layout.shape().dims2()?;
                let side = frozen.side(self.back);
                if k != frozen.matrix.depth(side) {
                    candle_core::bail!("{k} inputs for a matrix of {}", frozen.matrix.depth(side))
                }
                let left = Left::new(slice(x, layout)?, k, frozen.rounding);
                let y = product(&left, &frozen.matrix, side);
                Ok((CpuStorage::F32(y.to_vec()), Shape::from((m, frozen.matrix.results(side)))))
            }
        }
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let Weight::Dense(weight) = &self.weight else { candle_core::bail!("kept for the processor") };
        let (m, n, k, contiguous) = self.dims(weight, layout)?;
        let (weight, weight_layout) = weight.storage_and_layout();
        let Storage::Cuda(weight) = &*weight else { candle_core::bail!("weight is on another device") };
        let y = x.matmul(weight, (1, m, n, k), &contiguous, &self.right(weight_layout)?)?;
        Ok((y, Shape::from((m, n))))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.weight.apply(dy, !self.back).map(Some)
    }
}

/// The values of a layout without gaps.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((from, to))) => Ok(&values[from..to]),
        _ => candle_core::bail!("not float32 in one piece. This is a bug."),
    }
}

/// Calls `f` with the values of a tensor on the processor.
pub fn with<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> candle_core::Result<R> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(f(slice(storage, layout)?)),
        _ => candle_core::bail!("not on the processor. This is a bug."),
    }
}

pub fn floats(x: &Tensor) -> candle_core::Result<Vec<f32>> {
    with(x, <[f32]>::to_vec)
}
