//! Memory for activations that is used again: a layer's buffers are the next layer's.
//!
//! Freshly mapped pages cost more than what is computed in them; a pool of what was dropped costs nothing.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Mutex;

/// A cache line. Tiles and lines of strips want to start at one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line(pub [f32; 16]);

/// `len` floats at the start of a cache line. New ones hold what was there before: numbers, but any.
pub struct Buffer {
    lines: Vec<Line>,
    len: usize,
}

/// Buffers that were dropped, by their size class.
static POOL: Mutex<Pool> = Mutex::new(Pool { free: BTreeMap::new(), lines: 0, most: MOST_LINES });

struct Pool {
    free: BTreeMap<usize, Vec<Vec<Line>>>,
    /// In all of them.
    lines: usize,
    /// What is kept at most.
    most: usize,
}

/// What the pool keeps unless it is told to keep less, in lines: a gigabyte would be missed elsewhere.
const MOST_LINES: usize = (256 << 20) / 64;

impl Buffer {
    /// Room for `len` values that the caller writes before reading.
    pub fn new(len: usize) -> Self {
        let class = class(len.div_ceil(16));
        let found = POOL.lock().ok().and_then(|mut pool| {
            let lines = pool.free.get_mut(&class)?.pop()?;
            pool.lines -= class;
            Some(lines)
        });
        Self { lines: found.unwrap_or_else(|| vec![Line([0.0; 16]); class]), len }
    }

    pub fn of_lines(count: usize) -> Self {
        Self::new(count * 16)
    }

    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::new(len);
        buffer.fill(0.0);
        buffer
    }

    pub fn from_slice(values: &[f32]) -> Self {
        let mut buffer = Self::new(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    /// All of it, in lines.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    pub fn lines_mut(&mut self) -> &mut [Line] {
        &mut self.lines
    }
}

/// Rounded up to an eighth of the next power of two, so that sizes that differ a little share buffers.
fn class(lines: usize) -> usize {
    let step = (lines.next_power_of_two() / 8).max(1);
    lines.div_ceil(step) * step
}

/// Keeps at most so many bytes from now on, and never more than there is use for.
pub fn keep_at_most(bytes: usize) {
    if let Ok(mut pool) = POOL.lock() {
        pool.most = MOST_LINES.min(bytes / size_of::<Line>());
    }
}

/// Gives all kept memory back to the allocator.
pub fn clear() {
    if let Ok(mut pool) = POOL.lock() {
        pool.free.clear();
        pool.lines = 0;
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        if let Ok(mut pool) = POOL.lock()
            && pool.lines + lines.len() <= pool.most
        {
            pool.lines += lines.len();
            pool.free.entry(lines.len()).or_default().push(lines);
        }
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        Self::from_slice(self)
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &floats(&self.lines)[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut floats_mut(&mut self.lines)[..self.len]
    }
}

/// Values that tasks write side by side, each to places of its own.
pub(super) struct Shared {
    start: *mut f32,
    len: usize,
}

// SAFETY: tasks take slices that do not overlap (heads, rows or columns of their own), and the values outlive
// the tasks, which end before the function that made this returns.
#[allow(unsafe_code)]
unsafe impl Sync for Shared {}

impl Shared {
    pub fn new(values: &mut [f32]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len() }
    }

    /// Values `start..start + len`, which no other task may take meanwhile.
    ///
    /// # Panics
    /// When they are outside.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.len, "outside the result. This is a bug.");
        // SAFETY: inside the values by the assertion, and this task's alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// `rows` rows of `width` values, the first at `start` and each `step` behind the one before, which no other
    /// task may take meanwhile.
    ///
    /// # Panics
    /// When they are outside, or overlap.
    #[allow(unsafe_code)]
    pub fn block(&self, start: usize, step: usize, rows: usize, width: usize) -> Block<'_> {
        let len = span(step, rows, width);
        assert!(start + len <= self.len, "outside the result. This is a bug.");
        // SAFETY: inside the values by the assertion.
        Block { start: unsafe { self.start.add(start) }, step, rows, width, values: PhantomData }
    }
}

/// Values from the first to the last of `rows` rows of `width`, `step` apart.
fn span(step: usize, rows: usize, width: usize) -> usize {
    assert!(width <= step || rows <= 1, "rows that overlap. This is a bug.");
    if rows == 0 { 0 } else { (rows - 1) * step + width }
}

/// Rows of values that a kernel writes. Between them lie those of others.
pub(super) struct Block<'a> {
    start: *mut f32,
    step: usize,
    rows: usize,
    width: usize,
    values: PhantomData<&'a mut [f32]>,
}

impl<'a> Block<'a> {
    /// `rows` rows of `width` values, each `step` behind the one before.
    ///
    /// # Panics
    /// When they are outside `values`, or overlap.
    pub fn new(values: &'a mut [f32], step: usize, rows: usize, width: usize) -> Self {
        assert!(span(step, rows, width) <= values.len(), "outside the result. This is a bug.");
        Self { start: values.as_mut_ptr(), step, rows, width, values: PhantomData }
    }

    /// Those of its columns that are in `range`.
    #[allow(unsafe_code)]
    pub fn columns(&mut self, range: Range<usize>) -> Block<'_> {
        let (first, end) = (range.start.min(self.width), range.end.min(self.width));
        // SAFETY: within the first row, or at its end.
        let start = unsafe { self.start.add(first) };
        Block { start, width: end - first, values: PhantomData, ..*self }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// Values between the starts of two rows.
    pub fn step(&self) -> usize {
        self.step
    }

    /// The first value of the first row.
    pub fn start(&mut self) -> *mut f32 {
        self.start
    }

    /// # Panics
    /// When there is no such row.
    #[allow(unsafe_code)]
    pub fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows, "outside the result. This is a bug.");
        // SAFETY: whoever made this had all rows checked, and borrowed; the exclusive borrow of `self` is this
        // row's meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(i * self.step), self.width) }
    }
}

pub fn floats(lines: &[Line]) -> &[f32] {
    // SAFETY: a `Line` is sixteen floats without a gap.
    #[allow(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * 16)
    }
}

pub fn floats_mut(lines: &mut [Line]) -> &mut [f32] {
    // SAFETY: as above, and any bits are floats.
    #[allow(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 16)
    }
}

/// The bits of floats.
pub fn words(floats: &[f32]) -> &[u32] {
    // SAFETY: of one size and alignment, and any bits are words.
    #[allow(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts(floats.as_ptr().cast(), floats.len())
    }
}

/// Floats to be written as bits.
pub fn words_mut(floats: &mut [f32]) -> &mut [u32] {
    // SAFETY: of one size and alignment, and any bits are both.
    #[allow(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), floats.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_starts_at_a_cache_line_and_has_the_length_asked_for() {
        for len in [0, 1, 15, 16, 17, 1000, 99_999] {
            let buffer = Buffer::zeros(len);
            assert_eq!((buffer.len(), buffer.as_ptr() as usize % 64), (len, 0));
            assert!(class(len.div_ceil(16)) * 16 >= len && class(len.div_ceil(16)) * 16 <= len * 5 / 4 + 32);
        }
    }
}
