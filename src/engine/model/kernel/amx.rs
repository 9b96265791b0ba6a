//! Intel's AMX: eight registers of 16 rows by 64 bytes, and one instruction that multiplies two of them.
//!
//! Rust keeps the intrinsics and the feature unstable (rust-lang/rust#126622), but assembles the instructions.

use super::buffer::Line;
use super::tile::Sums;

/// Whether this processor has tiles of bfloat16, and this process may use them.
pub fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let leaf = std::arch::x86_64::__cpuid_count(7, 0);
        // AMX-BF16 and AMX-TILE.
        leaf.edx & (1 << 22) != 0 && leaf.edx & (1 << 24) != 0 && permitted()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Asks Linux for the tile registers, whose state is so large that each process has to.
pub fn permitted() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        // SAFETY: sets a permission of this process and touches no memory.
        #[allow(unsafe_code)]
        unsafe {
            libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0
        }
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    {
        false
    }
}

/// Strips that a kernel works on at once: four tiles of sums, two of the left side, two of the right.
pub(super) const STRIPS: usize = 2;

/// The shape of all eight tiles: 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPE: Shape = Shape {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Tile registers ready to use on this thread, until it is dropped.
pub(super) struct Tiles(());

impl Tiles {
    /// # Panics
    /// On a path without AMX.
    pub fn new() -> Self {
        assert!(super::path() == super::Path::Amx, "no AMX here. This is a bug.");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the registers and the system gave them to this process.
        #[allow(unsafe_code)]
        unsafe {
            std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const SHAPE, options(nostack, readonly));
        }
        Self(())
    }

    /// `sums += left · right` for 32 rows and one or two strips: `left` holds for each step of 32 values two
    /// tiles, `right` a tile a strip, strips `strip` lines apart.
    ///
    /// # Panics
    /// When a side is shorter than `steps`.
    #[allow(clippy::too_many_lines, clippy::unused_self)]
    pub fn add(
        &self,
        left: &[u32],
        right: &[Line],
        strip: usize,
        steps: usize,
        strips: usize,
        sums: &mut Sums,
    ) {
        if steps == 0 {
            return;
        }
        assert!(
            left.len() >= steps * 512 && right.len() >= (strips - 1) * strip + steps * 16,
            "outside a side of a product. This is a bug."
        );
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `self` says that the tiles are configured. Loads read `steps` tiles of 1 KiB from each side,
        // which are there; sums are read and written at 32 rows of 192 bytes, within `Sums`. A single strip
        // takes the two lower tiles of sums only.
        #[allow(unsafe_code)]
        unsafe {
            let (a, b, c) = (left.as_ptr(), right.as_ptr(), sums.as_mut_ptr());
            if strips == 1 {
                std::arch::asm!(
                    "tileloadd tmm0, [{c} + {row}]",
                    "tileloadd tmm2, [{c2} + {row}]",
                    "2:",
                    "tileloadd tmm6, [{b} + {line}]",
                    "tileloadd tmm4, [{a} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{a} + {line} + 1024]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "add {a}, 2048",
                    "add {b}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c} + {row}], tmm0",
                    "tilestored [{c2} + {row}], tmm2",
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    c = in(reg) c,
                    c2 = in(reg) c.add(16),
                    row = in(reg) 192usize,
                    line = in(reg) 64usize,
                    steps = inout(reg) steps => _,
                    options(nostack)
                );
            } else {
                std::arch::asm!(
                    "tileloadd tmm0, [{c} + {row}]",
                    "tileloadd tmm1, [{c} + {row} + 64]",
                    "tileloadd tmm2, [{c2} + {row}]",
                    "tileloadd tmm3, [{c2} + {row} + 64]",
                    ".p2align 5",
                    "2:",
                    "tileloadd tmm6, [{b} + {line}]",
                    "tileloadd tmm4, [{a} + {line}]",
                    "tileloadd tmm7, [{b2} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{a} + {line} + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a}, 2048",
                    "add {b}, 1024",
                    "add {b2}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c} + {row}], tmm0",
                    "tilestored [{c} + {row} + 64], tmm1",
                    "tilestored [{c2} + {row}], tmm2",
                    "tilestored [{c2} + {row} + 64], tmm3",
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    b2 = inout(reg) b.add(strip) => _,
                    c = in(reg) c,
                    c2 = in(reg) c.add(16),
                    row = in(reg) 192usize,
                    line = in(reg) 64usize,
                    steps = inout(reg) steps => _,
                    options(nostack)
                );
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no AMX here. This is a bug.");
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the tiles hold nothing between two sums.
        #[allow(unsafe_code)]
        unsafe {
            std::arch::asm!("tilerelease", options(nostack, nomem));
        }
    }
}
