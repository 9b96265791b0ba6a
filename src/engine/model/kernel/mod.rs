//! Kernels on slices: no candle in this room, and the only `unsafe` arithmetic of the house.
//!
//! Everything rests on one operation, [`product::sum`]: rows times frozen matrices that stay as they are
//! stored (mapped bfloat16, NF4, …) and are unpacked sixteen columns at a time, into the second-level cache,
//! in the order in which the processor's own instruction wants them.
//!
//! What a processor can do is found out when the program runs. `SECATEUR_KERNEL` forces a [`Path`] (one that
//! the processor does not have is not taken), or `candle`: no kernel of ours.

pub mod allocator;
mod amx;
pub mod attention;
pub mod buffer;
mod decode;
mod few;
mod lanes;
pub mod left;
mod logits;
pub mod map;
pub mod matrix;
mod outer;
pub mod product;
mod q4;
pub mod quant;
pub mod rows;
mod scores;
mod tile;
mod unpack;

use std::sync::LazyLock;

/// The instructions that products are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub enum Path {
    /// Plain Rust, float32.
    Plain,
    /// AVX2 with fused products, float32.
    Avx2,
    /// AVX-512, float32.
    Avx512,
    /// AVX512-BF16: two products of bfloat16 added to a float32, sixteen lanes at a time.
    Bf16,
    /// AMX: tiles of 16 × 32 bfloat16.
    Amx,
}

/// How exactly the left side of a product is taken where the processor multiplies bfloat16. The right side
/// is never rounded unless it is stored with more digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// To bfloat16: a relative error of 2⁻⁹ in each value.
    Once,
    /// To the sum of two bfloat16, 2⁻¹⁷: twice the work.
    Twice,
}

/// Whether anything is computed in this room; `SECATEUR_KERNEL=candle` leaves all to candle.
pub fn enabled() -> bool {
    static ENABLED: LazyLock<bool> = LazyLock::new(|| asked() != Some("candle".into()));
    *ENABLED
}

fn asked() -> Option<String> {
    std::env::var("SECATEUR_KERNEL").ok()
}

/// The path of this process.
pub fn path() -> Path {
    static PATH: LazyLock<Path> = LazyLock::new(|| match asked().as_deref() {
        Some("plain") => Path::Plain,
        Some("avx2") if avx2() => Path::Avx2,
        Some("avx512") if avx512() => Path::Avx512,
        Some("bf16") if bf16() => Path::Bf16,
        // The system's permission says that the processor has it: an emulator may answer, too.
        Some("amx") if bf16() && amx::permitted() => Path::Amx,
        _ => best(),
    });
    *PATH
}

fn best() -> Path {
    if bf16() && amx::available() {
        Path::Amx
    } else if bf16() && !intel() {
        // On Intel's processors AVX512-BF16 has half the speed of float32; on AMD's twice.
        Path::Bf16
    } else if avx512() {
        Path::Avx512
    } else if avx2() {
        Path::Avx2
    } else {
        Path::Plain
    }
}

/// Whether rows are worked on with AVX-512.
fn wide() -> bool {
    path() >= Path::Avx512
}

#[cfg(target_arch = "x86_64")]
fn avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn bf16() -> bool {
    avx512() && is_x86_feature_detected!("avx512bf16")
}

#[cfg(target_arch = "x86_64")]
fn intel() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    (vendor.ebx, vendor.edx, vendor.ecx) == (0x756e_6547, 0x4965_6e69, 0x6c65_746e)
}

#[cfg(not(target_arch = "x86_64"))]
mod none {
    pub fn avx512() -> bool {
        false
    }
    pub fn avx2() -> bool {
        false
    }
    pub fn bf16() -> bool {
        false
    }
    pub fn intel() -> bool {
        false
    }
}
#[cfg(not(target_arch = "x86_64"))]
use none::*;

/// Rounds to bfloat16, to nearest even; NaN stays NaN. As two bytes in the low half.
#[inline(always)]
#[allow(clippy::inline_always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { (bits >> 16) | 0x40 } else { rounded }
}

/// The value of a rounded one.
#[inline(always)]
#[allow(clippy::inline_always)]
fn widen(half: u32) -> f32 {
    f32::from_bits(half << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `scripts/test.sh` runs the tests as other processors and says which path theirs is.
    #[test]
    fn the_path_is_that_of_the_processor_this_run_is_about() {
        if let Ok(expected) = std::env::var("SECATEUR_EXPECTED_PATH") {
            assert_eq!(format!("{:?}", path()).to_lowercase(), expected);
        }
        assert_eq!(wide(), matches!(lanes::vectors(), lanes::Vectors::Avx512(_)));
        assert!(asked() != Some("plain".into()) || path() == Path::Plain);
    }

    #[test]
    fn rounding_is_to_nearest_even_and_keeps_what_is_no_number() {
        for x in [0.0, -0.0, 1.0, 1.003_906_3, 1.011_718_8, -3.3e38, 1e-40, f32::INFINITY, f32::NEG_INFINITY]
        {
            assert_eq!(widen(round(x)).to_bits(), half::bf16::from_f32(x).to_f32().to_bits(), "{x}");
        }
        assert!(widen(round(f32::NAN)).is_nan());
        assert!(widen(round(f32::from_bits(0x7fff_ffff))).is_nan());
    }
}
