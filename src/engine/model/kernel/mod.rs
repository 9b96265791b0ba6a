//! Kernels on slices: no candle in this room, and the only `unsafe` arithmetic of the house.
//!
//! What a machine can do is found out when the program runs. `SECATEUR_KERNEL` forces a path: `bf16` (the
//! processor's own products of bfloat16), `plain` (the same sums in plain Rust, to compare with) or `f32` (no
//! kernel of ours: everything by candle, in float32).

mod bf16;
mod packed;
pub mod rows;

use std::sync::LazyLock;

use rayon::prelude::*;

pub use packed::{Packed, Rounding};

/// How products with frozen weights are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// AVX512-BF16: two products of bfloat16 added to a float32, sixteen lanes at a time.
    Avx512Bf16,
    /// The same sums, one after the other.
    Plain,
    /// Not here.
    F32,
}

/// Whether anything is computed in this room; `SECATEUR_KERNEL=f32` leaves all to candle.
pub fn enabled() -> bool {
    static ENABLED: LazyLock<bool> =
        LazyLock::new(|| std::env::var("SECATEUR_KERNEL").as_deref() != Ok("f32"));
    *ENABLED
}

/// Whether this processor has the vectors that rows are worked on with. `plain` does without.
#[cfg(target_arch = "x86_64")]
fn wide() -> bool {
    static WIDE: LazyLock<bool> = LazyLock::new(|| {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma")
            && path() != Path::Plain
    });
    *WIDE
}

/// The path of this process.
pub fn path() -> Path {
    static PATH: LazyLock<Path> = LazyLock::new(|| {
        let best = if bf16::available() { Path::Avx512Bf16 } else { Path::F32 };
        match std::env::var("SECATEUR_KERNEL").as_deref() {
            Ok("f32") => Path::F32,
            Ok("plain") => Path::Plain,
            // Forcing what the processor cannot do would end the process.
            Ok("bf16" | _) | Err(_) => best,
        }
    });
    *PATH
}

/// Rounds to bfloat16, to nearest even; NaN stays NaN. As two bytes in the low half.
#[inline]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { (bits >> 16) | 0x40 } else { rounded }
}

/// Rounds many floats to bfloat16.
pub fn halves(values: &[f32]) -> Vec<u16> {
    let mut out = vec![0; values.len()];
    out.par_chunks_mut(1 << 14).zip(values.par_chunks(1 << 14)).for_each(|(out, values)| {
        for (out, value) in out.iter_mut().zip(values) {
            *out = round(*value) as u16;
        }
    });
    out
}

/// The value of a rounded one.
#[inline]
fn widen(half: u32) -> f32 {
    f32::from_bits(half << 16)
}
