//! Intel's AMX: eight registers of 16 rows by 64 bytes, and one instruction that multiplies two of them.
//!
//! Rust keeps the intrinsics and the feature unstable (rust-lang/rust#126622), but assembles the instructions.

use super::buffer::Block;
use super::product::Start;
use super::tile::{self, Strips, TILE};

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

    /// `out = start + left · right` for up to 32 rows and two strips: `left` holds for each step of 32 values two
    /// tiles, `right` a tile a strip.
    ///
    /// # Panics
    /// When a side is shorter than the depth of `right`.
    pub fn sum(&self, left: &[u32], right: Strips, start: Start, out: &mut Block) {
        let strips = out.width().div_ceil(16);
        assert!(out.rows() <= TILE && (1..=STRIPS).contains(&strips), "more than a tile. This is a bug.");
        if out.rows() == TILE && out.width() == 16 * strips {
            tile::begin(start, out);
            return self.whole(left, right, out);
        }
        // Tiles are written whole: into a place of their own.
        let mut sums = [0f32; 16 * STRIPS * TILE];
        let mut part = Block::new(&mut sums, 16 * STRIPS, out.rows(), out.width());
        tile::begin(start, &mut part);
        if let Start::Target = start {
            (0..out.rows()).for_each(|i| part.row(i).copy_from_slice(out.row(i)));
        }
        self.whole(left, right, &mut Block::new(&mut sums, 16 * STRIPS, TILE, 16 * strips));
        for (i, sums) in sums.chunks(16 * STRIPS).enumerate().take(out.rows()) {
            let out = out.row(i);
            out.copy_from_slice(&sums[..out.len()]);
        }
    }

    /// `out += left · right` for a whole tile.
    #[allow(clippy::too_many_lines, clippy::unused_self)]
    fn whole(&self, left: &[u32], right: Strips, out: &mut Block) {
        let (steps, strips) = (right.depth / 16, out.width() / 16);
        if steps == 0 {
            return;
        }
        assert!(
            left.len() >= steps * 512 && right.lines.len() >= (strips - 1) * right.strip + steps * 16,
            "outside a side of a product. This is a bug."
        );
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `self` says that the tiles are configured. Loads read `steps` tiles of 1 KiB from each side,
        // which are there; sums are read and written at the 32 rows of one or two strips that `out` has.
        #[allow(unsafe_code)]
        unsafe {
            let (a, b, c) = (left.as_ptr(), right.lines.as_ptr(), out.start());
            let (c2, row) = (c.add(16 * out.step()), 4 * out.step());
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
                    c2 = in(reg) c2,
                    row = in(reg) row,
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
                    b2 = inout(reg) b.add(right.strip) => _,
                    c = in(reg) c,
                    c2 = in(reg) c2,
                    row = in(reg) row,
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
