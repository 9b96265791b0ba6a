//! The header of a safetensors file, read with suspicion: every number in it is checked against the
//! file before anything is reserved or mapped.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::{Result, wrong};

/// Where a tensor lies and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Place in [`super::Index::files`].
    pub file: usize,
    /// Bytes in the file.
    pub range: Range<u64>,
}

impl TensorInfo {
    pub fn parameters(&self) -> u64 {
        self.shape.iter().map(|n| *n as u64).product()
    }
}

macro_rules! dtypes {
    ($($name:ident $text:literal $bits:literal,)*) => {
        /// The types of the safetensors format.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Dtype { $($name,)* }

        impl Dtype {
            pub const fn bits(self) -> u64 {
                match self { $(Self::$name => $bits,)* }
            }

            /// Its name in a header.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            fn of(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$name),)* _ => None }
            }
        }
    };
}

dtypes! {
    Bool "BOOL" 8, U8 "U8" 8, I8 "I8" 8, F8E4M3 "F8_E4M3" 8, F8E5M2 "F8_E5M2" 8, F8E8M0 "F8_E8M0" 8,
    I16 "I16" 16, U16 "U16" 16, F16 "F16" 16, Bf16 "BF16" 16, I32 "I32" 32, U32 "U32" 32, F32 "F32" 32,
    F64 "F64" 64, I64 "I64" 64, U64 "U64" 64, C64 "C64" 64,
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The bound of the format itself.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const MAX_TENSORS: usize = 500_000;
const MAX_DIMENSIONS: usize = 8;

/// Reads the header of the weight file `path`, which is number `file` of its checkpoint.
///
/// # Errors
/// A model error that names the file and what is wrong with it.
pub fn read(path: &Path, file: usize) -> Result<Vec<(String, TensorInfo)>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let damaged = |what: String| {
        wrong(format!("{name}: {what}; the checkpoint is damaged or cut short, fetch it again"))
    };
    let opened = File::open(path).and_then(|file| Ok((file.metadata()?, file)));
    let (meta, mut reader) = opened.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => damaged("is named by the index, but not there".into()),
        _ => wrong(format!("{name}: cannot be read ({e})")),
    })?;
    if !meta.is_file() {
        return Err(wrong(format!("{name}: is not a file")));
    }
    let mut start = [0; 8];
    reader.read_exact(&mut start).map_err(|_| damaged("is shorter than any header".into()))?;
    if is_pickle(start) {
        return Err(wrong(format!(
            "{name}: is a pickle, not safetensors, whatever its name; it can run code when loaded. Convert it to safetensors"
        )));
    }
    let length = u64::from_le_bytes(start);
    if !(2..=MAX_HEADER_BYTES).contains(&length) {
        return Err(wrong(format!(
            "{name}: is not a safetensors file: it begins with a header of {length} bytes"
        )));
    }
    let data = 8 + length;
    if data > meta.len() {
        return Err(damaged(format!("{} bytes long, but its header alone takes {data}", meta.len())));
    }
    let mut bytes = vec![0; length as usize];
    reader.read_exact(&mut bytes).map_err(|e| damaged(format!("cannot be read ({e})")))?;
    let header: Header =
        serde_json::from_slice(&bytes).map_err(|e| damaged(format!("has no readable header ({e})")))?;
    let mut tensors = Vec::with_capacity(header.0.len());
    for (tensor, entry) in header.0 {
        let info = entry.check(file, data).map_err(|what| damaged(format!("tensor {tensor} {what}")))?;
        tensors.push((tensor, info));
    }
    check_layout(&mut tensors, data, meta.len()).map_err(damaged)?;
    Ok(tensors)
}

/// Pickle protocol 2 and up begins with 0x80 and its number; torch's newer files are zip archives.
fn is_pickle(start: [u8; 8]) -> bool {
    start.starts_with(b"PK\x03\x04") || (start[0] == 0x80 && (2..=5).contains(&start[1]) && start[7] != 0)
}

/// Tensors must lie one behind the other and fill the file: no gap, no overlap, nothing outside.
fn check_layout(
    tensors: &mut [(String, TensorInfo)],
    data: u64,
    file_len: u64,
) -> std::result::Result<(), String> {
    tensors.sort_by_key(|(_, info)| (info.range.start, info.range.end));
    let mut end = data;
    for (name, info) in tensors {
        if info.range.start != end {
            let what =
                if info.range.start < end { "overlaps the one before it" } else { "leaves a gap before it" };
            return Err(format!("tensor {name} {what}"));
        }
        end = info.range.end;
    }
    if end == file_len {
        Ok(())
    } else {
        Err(format!("is {file_len} bytes long, but its header describes {end}"))
    }
}

/// The tensors of a header, each once.
struct Header(BTreeMap<String, Entry>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl Entry {
    fn check(self, file: usize, data: u64) -> std::result::Result<TensorInfo, String> {
        let dtype = Dtype::of(&self.dtype).ok_or_else(|| format!("has the unknown type {:?}", self.dtype))?;
        let size = self.shape.iter().try_fold(1u64, |size, n| size.checked_mul(*n));
        let bytes = size.and_then(|n| n.checked_mul(dtype.bits())).map(|bits| bits / 8);
        let [begin, end] = self.data_offsets;
        if self.shape.len() > MAX_DIMENSIONS || bytes.is_none() || end.checked_sub(begin) != bytes {
            return Err(format!(
                "of shape {:?} as {dtype} does not take the bytes {begin} to {end}",
                self.shape
            ));
        }
        let place = |at: u64| data.checked_add(at).ok_or_else(|| format!("lies at {at}"));
        let shape = self.shape.iter().map(|n| *n as usize).collect();
        Ok(TensorInfo { dtype, shape, file, range: place(begin)?..place(end)? })
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                use serde::de::Error;
                let mut tensors = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                        continue;
                    }
                    if name.is_empty() || name.contains("..") || name.contains(['/', '\\', '\0']) {
                        return Err(A::Error::custom(format!("{name:?} is no name of a tensor")));
                    }
                    if tensors.len() >= MAX_TENSORS {
                        return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    let entry = map.next_value()?;
                    if tensors.insert(name.clone(), entry).is_some() {
                        return Err(A::Error::custom(format!("tensor {name} is there twice")));
                    }
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}
