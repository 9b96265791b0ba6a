//! A file mapped for reading, part of which can be asked for in advance and let go of.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use memmap2::{Advice, Mmap, UncheckedAdvice};

/// A mapped file. Cheap to clone.
#[derive(Clone)]
pub struct Map(Arc<Mmap>);

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Map {
    pub fn open(file: &File) -> std::io::Result<Self> {
        // SAFETY: the map is read only as bytes. A file cut short by someone else while it is mapped would
        // end the process with SIGBUS: one attempt of one job, which the worker supervises.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(file) }?;
        Ok(Self(Arc::new(map)))
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Part of the file, not copied.
    pub fn bytes(&self, range: Range<usize>) -> Bytes {
        Bytes::from_owner(self.clone()).slice(range)
    }

    /// Has part of the file read from the disk while other things are done.
    pub fn read_ahead(&self, range: Range<usize>) {
        // A hint: without it the file is read all the same.
        self.0.advise_range(Advice::WillNeed, range.start, range.len()).ok();
    }

    /// Lets go of the memory that part of the file takes; it is read again when it is used again.
    pub fn release(&self, range: Range<usize>) {
        // SAFETY: the map is private, was never written to, and has the file behind it: what is dropped comes
        // back as it was.
        #[allow(unsafe_code)]
        unsafe {
            self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()).ok();
        }
    }
}
