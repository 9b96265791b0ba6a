//! The kernels of [`super::kernel::rows`] as operations on candle tensors, each with its gradient. Only for
//! float32 on the processor: [`fits`] says when.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Result, Shape, Storage, Tensor};

use super::kernel::rows::{self, Visible};

/// Whether these operations can take `x`.
pub fn fits(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32 && super::kernel::enabled()
}

/// RMS norm over the last dimension.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    x.contiguous()?.apply_op1(RmsNorm { weight: floats(weight)?, eps: eps as f32 })
}

/// `silu(gate) · up`.
pub fn gated_silu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, GatedSilu)
}

/// Softmax of `scale · scores [.., keys]` over what each row sees, zero elsewhere.
pub fn softmax(scores: &Tensor, scale: f64, visible: Visible) -> Result<Tensor> {
    scores.contiguous()?.apply_op1(Softmax { scale: scale as f32, visible })
}

/// Rotates the first dimensions of `x [b, heads, t, d]` by `cos`, `sin` `[t, pairs]`.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let pairs = cos.dim(1)?;
    x.contiguous()?.apply_op1(Rotation { cos: floats(cos)?, sin: floats(sin)?, pairs, sign: 1.0 })
}

struct RmsNorm {
    weight: Vec<f32>,
    eps: f32,
}

struct GatedSilu;

struct Softmax {
    scale: f32,
    visible: Visible,
}

#[derive(Clone)]
struct Rotation {
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
    sign: f32,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = rows::rms_norm(slice(x, layout)?, &self.weight, self.eps);
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dx = with(x, |x| with(dy, |dy| rows::rms_norm_back(x, &self.weight, self.eps, dy)))??;
        Tensor::from_vec(dx, x.shape(), &Device::Cpu).map(Some)
    }
}

impl CustomOp2 for GatedSilu {
    fn name(&self) -> &'static str {
        "gated-silu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        g: &Layout,
        up: &CpuStorage,
        u: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = rows::gated_silu(slice(gate, g)?, slice(up, u)?);
        Ok((CpuStorage::F32(y), g.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_gate, d_up) =
            with(gate, |gate| with(up, |up| with(dy, |dy| rows::gated_silu_back(gate, up, dy))))???;
        let tensor = |values| Tensor::from_vec(values, gate.shape(), &Device::Cpu).map(Some);
        Ok((tensor(d_gate)?, tensor(d_up)?))
    }
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "visible-softmax"
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = rows::softmax(slice(scores, layout)?, self.scale, self.visible);
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, scores: &Tensor, shares: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dx =
            with(shares, |shares| with(dy, |dy| rows::softmax_back(shares, dy, self.scale, self.visible)))??;
        Tensor::from_vec(dx, scores.shape(), &Device::Cpu).map(Some)
    }
}

impl Rotation {
    fn turn(&self, x: &[f32], d: usize) -> Vec<f32> {
        rows::rotate(x, d, &self.cos, &self.sin, self.pairs, self.sign)
    }
}

impl CustomOp1 for Rotation {
    fn name(&self) -> &'static str {
        "rotation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, _, _, d) = layout.shape().dims4()?;
        Ok((CpuStorage::F32(self.turn(slice(x, layout)?, d)), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let back = Self { sign: -self.sign, ..self.clone() };
        let dx = with(dy, |dy| back.turn(dy, x.dim(3).unwrap_or_default()))?;
        Tensor::from_vec(dx, x.shape(), &Device::Cpu).map(Some)
    }
}

/// The values of a layout without gaps.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((from, to))) => Ok(&values[from..to]),
        _ => candle_core::bail!("not float32 in one piece. This is a bug."),
    }
}

/// Calls `f` with the values of a tensor.
fn with<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(f(slice(storage, layout)?)),
        _ => candle_core::bail!("not on the processor. This is a bug."),
    }
}

fn floats(x: &Tensor) -> Result<Vec<f32>> {
    with(x, <[f32]>::to_vec)
}
