//! Rows of numbers in the types of GGUF, and back.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};

use crate::checkpoint::gguf::Part;
use crate::checkpoint::{Dtype, Role};
use crate::engine::export::safetensors::encode;
use crate::engine::{Error, Result};
use crate::job::spec::GgufType;

/// The type of a tensor with rows of `columns` values in a file of type `kind`: what llama.cpp's own quantiser takes
/// without a measured importance of weights. `head` says that it is the head, or the embedding that serves as such.
pub fn dtype(kind: GgufType, part: Part, head: bool, columns: usize, layer_count: usize) -> GgmlDType {
    let (most, finer) = match kind {
        GgufType::F16 => (GgmlDType::F16, GgmlDType::F16),
        GgufType::Bf16 => (GgmlDType::BF16, GgmlDType::BF16),
        GgufType::Q8 => (GgmlDType::Q8_0, GgmlDType::Q8_0),
        GgufType::Q6K => (GgmlDType::Q6K, GgmlDType::Q6K),
        GgufType::Q5K => (GgmlDType::Q5K, GgmlDType::Q6K),
        GgufType::Q4K => (GgmlDType::Q4K, GgmlDType::Q6K),
        GgufType::Q4 => (GgmlDType::Q4_0, GgmlDType::Q4_0),
    };
    let wanted = match part {
        Part::Vector => return GgmlDType::F32,
        Part::Embedding | Part::Head if head => match kind {
            GgufType::F16 | GgufType::Bf16 | GgufType::Q8 => most,
            GgufType::Q6K | GgufType::Q5K | GgufType::Q4K | GgufType::Q4 => GgmlDType::Q6K,
        },
        Part::Embedding | Part::Head => most,
        Part::Matrix { layer, role: Role::Value | Role::Down } if tells_most(layer, layer_count) => finer,
        Part::Matrix { .. } => most,
    };
    filled(wanted, columns)
}

/// The layers at both ends and every third between, as llama.cpp has it (`use_more_bits`).
fn tells_most(layer: usize, layer_count: usize) -> bool {
    let eighth = layer_count / 8;
    layer < eighth || layer >= 7 * layer_count / 8 || (layer - eighth) % 3 == 2
}

/// The type itself where its blocks fill the rows, else the next larger one whose blocks do.
fn filled(wanted: GgmlDType, columns: usize) -> GgmlDType {
    if columns.is_multiple_of(wanted.block_size()) {
        return wanted;
    }
    let smaller = match wanted {
        GgmlDType::Q4K => GgmlDType::Q5_0,
        GgmlDType::Q5K => GgmlDType::Q5_1,
        GgmlDType::Q6K => GgmlDType::Q8_0,
        _ => GgmlDType::F16,
    };
    filled(smaller, columns)
}

/// Its number in the file (`enum ggml_type`).
pub const fn code(dtype: GgmlDType) -> u32 {
    match dtype {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q8_1 => 9,
        GgmlDType::Q2K => 10,
        GgmlDType::Q3K => 11,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::Q8K => 15,
        GgmlDType::BF16 => 30,
    }
}

/// Bytes of `count` values.
pub fn size_bytes(dtype: GgmlDType, count: usize) -> usize {
    count / dtype.block_size() * dtype.type_size()
}

/// Whole rows of `columns` values of tensor `name` as bytes.
pub fn pack(name: &str, values: Vec<f32>, columns: usize, dtype: GgmlDType) -> Result<Vec<u8>> {
    match dtype {
        GgmlDType::F32 => encode(name, &values, Dtype::F32),
        GgmlDType::F16 => encode(name, &values, Dtype::F16),
        GgmlDType::BF16 => encode(name, &values, Dtype::Bf16),
        blocks => {
            let rows = values.len() / columns;
            let values = Tensor::from_vec(values, (rows, columns), &Device::Cpu)?;
            Ok(QTensor::quantize(&values, blocks)?.data()?.into_owned())
        }
    }
}

/// What [`pack`] packed.
pub fn unpack(bytes: Vec<u8>, columns: usize, dtype: GgmlDType) -> Result<Vec<f32>> {
    let count = bytes.len() / dtype.type_size() * dtype.block_size();
    if count == 0 || !count.is_multiple_of(columns) {
        return Err(Error::bug(format!("{} bytes are no rows of {columns} values", bytes.len())));
    }
    let storage = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, dtype)?;
    let values = QTensor::new(storage, (count / columns, columns))?.dequantize(&Device::Cpu)?;
    Ok(values.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_take_the_next_larger_type_that_they_fill() {
        assert_eq!(filled(GgmlDType::Q4K, 1536), GgmlDType::Q4K);
        assert_eq!(filled(GgmlDType::Q4K, 576), GgmlDType::Q5_0);
        assert_eq!(filled(GgmlDType::Q6K, 576), GgmlDType::Q8_0);
        assert_eq!(filled(GgmlDType::Q4_0, 80), GgmlDType::F16);
    }

    #[test]
    fn what_tells_most_lies_at_both_ends_and_every_third_between() {
        let finer: Vec<usize> = (0..24).filter(|layer| tells_most(*layer, 24)).collect();
        assert_eq!(finer, [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]);
    }
}
