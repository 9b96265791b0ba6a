//! The residual streams of many batches at one seam: in memory, or in a file when they are too many for it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use candle_core::{DType, Device, Tensor};

use super::{Compute, Memory};
use crate::engine::{Error, Result};

/// Tables of `[rows, width]`, float32, kept one by one.
pub struct Streams {
    /// Rows of each and where it begins, in rows.
    places: Vec<(usize, usize)>,
    width: usize,
    kept: Kept,
    dtype: DType,
    device: Device,
    memory: Memory,
}

enum Kept {
    Memory(Vec<Option<Tensor>>),
    File(File),
}

impl Streams {
    /// Room for tables of so many rows each.
    ///
    /// # Errors
    /// A storage error when they need a file and it cannot be made.
    pub fn new(rows: impl IntoIterator<Item = usize>, width: usize, compute: &Compute) -> Result<Self> {
        let mut places = Vec::new();
        let mut total = 0;
        for rows in rows {
            places.push((rows, total));
            total += rows;
        }
        let kept = if total * width * size_of::<f32>() <= compute.memory.share(1, 4) {
            Kept::Memory(vec![None; places.len()])
        } else {
            Kept::File(compute.memory.spill_file()?)
        };
        let (device, memory) = (compute.device.clone(), compute.memory.clone());
        Ok(Self { places, width, kept, dtype: compute.dtype, device, memory })
    }

    pub fn len(&self) -> usize {
        self.places.len()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The same tables once more.
    pub fn copy(&self) -> Result<Self> {
        let kept = match &self.kept {
            Kept::Memory(tensors) => Kept::Memory(tensors.clone()),
            Kept::File(_) => Kept::File(self.memory.spill_file()?),
        };
        let mut copy = Self {
            places: self.places.clone(),
            kept,
            device: self.device.clone(),
            memory: self.memory.clone(),
            ..*self
        };
        if matches!(copy.kept, Kept::File(_)) {
            for i in 0..self.len() {
                copy.set(i, &self.get(i)?)?;
            }
        }
        Ok(copy)
    }

    /// Keeps a table in place of what was there.
    pub fn set(&mut self, i: usize, x: &Tensor) -> Result<()> {
        match &mut self.kept {
            Kept::Memory(tensors) => tensors[i] = Some(x.clone()),
            Kept::File(file) => {
                let values: Vec<f32> = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                file.write_all_at(&bytes, byte(self.places[i].1, self.width))?;
            }
        }
        Ok(())
    }

    /// A table that was kept before.
    pub fn get(&self, i: usize) -> Result<Tensor> {
        match &self.kept {
            Kept::Memory(tensors) => {
                tensors[i].clone().ok_or_else(|| Error::bug("a stream that was not kept"))
            }
            Kept::File(_) => {
                let values = self.rows(i, 0, self.places[i].0)?;
                let x = Tensor::from_vec(values, (self.places[i].0, self.width), &self.device)?;
                Ok(x.to_dtype(self.dtype)?)
            }
        }
    }

    /// Rows `first..first + count` of a table.
    pub fn rows(&self, i: usize, first: usize, count: usize) -> Result<Vec<f32>> {
        match &self.kept {
            Kept::Memory(_) => {
                let rows = self.get(i)?.narrow(0, first, count)?.to_dtype(DType::F32)?;
                Ok(rows.flatten_all()?.to_vec1()?)
            }
            Kept::File(file) => {
                let mut bytes = vec![0; count * self.width * size_of::<f32>()];
                file.read_exact_at(&mut bytes, byte(self.places[i].1 + first, self.width))?;
                let word = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                Ok(bytes.chunks_exact(4).map(word).collect())
            }
        }
    }
}

/// Where a row begins in the file.
fn byte(row: usize, width: usize) -> u64 {
    (row * width * size_of::<f32>()) as u64
}
