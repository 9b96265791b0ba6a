//! Rows of parquet files, as they are published on the Hub.

use std::io::Read;

use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row, reader::RowIter};
use parquet::schema::types::Type;
use serde_json::{Map, Value, json};

use super::corpus::{Piece, Reader, open_file, unreadable};
use crate::engine::{Error, Result};

/// Largest parquet file that comes compressed as a whole and must be held in memory.
const MAX_PACKED_BYTES: u64 = 2 << 30;

/// The column `text`, row by row.
pub fn texts(path: &str, reader: Reader) -> Result<impl Iterator<Item = Result<Piece>> + use<>> {
    let file = open(path, reader)?;
    let schema = file.metadata().file_metadata().schema();
    let Some(column) = schema.get_fields().iter().find(|f| f.name() == "text").cloned() else {
        let names: Vec<_> = schema.get_fields().iter().map(|f| f.name()).collect();
        return Err(Error::data(format!("{path}: has no column `text`, only {}", names.join(", "))));
    };
    let text_only = Type::group_type_builder(schema.name()).with_fields(vec![column]).build();
    let text_only = text_only.map_err(|e| damaged(path, &e))?;
    let rows = rows(path, file, Some(text_only))?;
    Ok(rows.map(|row| {
        let (place, row) = row?;
        match row.get_column_iter().next().map(|(_, field)| field) {
            Some(Field::Str(text)) => Ok(Piece::Text { text: text.clone(), begins: true }),
            Some(_) | None => Err(Error::data(format!("{place}: `text` is not a string"))),
        }
    }))
}

/// All rows, as JSON lines would have them.
pub fn records(path: &str, reader: Reader) -> Result<impl Iterator<Item = Result<(String, Value)>> + use<>> {
    let rows = rows(path, open(path, reader)?, None)?;
    Ok(rows.map(|row| row.map(|(place, row)| (place, object(&row)))))
}

fn object(row: &Row) -> Value {
    Value::Object(
        row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect::<Map<_, _>>(),
    )
}

/// A field as JSON; what benchmarks have no use for is null.
fn value(field: &Field) -> Value {
    match field {
        Field::Str(text) => json!(text),
        Field::Bool(value) => json!(value),
        Field::Byte(value) => json!(value),
        Field::Short(value) => json!(value),
        Field::Int(value) => json!(value),
        Field::Long(value) => json!(value),
        Field::UByte(value) => json!(value),
        Field::UShort(value) => json!(value),
        Field::UInt(value) => json!(value),
        Field::ULong(value) => json!(value),
        Field::Float(value) => json!(value),
        Field::Double(value) => json!(value),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        _ => Value::Null,
    }
}

fn rows(
    path: &str,
    file: Box<dyn FileReader>,
    columns: Option<Type>,
) -> Result<impl Iterator<Item = Result<(String, Row)>> + use<>> {
    let rows = RowIter::from_file_into(file).project(columns).map_err(|e| damaged(path, &e))?;
    let path = path.to_owned();
    Ok(rows
        .enumerate()
        .map(move |(i, row)| Ok((format!("{path}, row {}", i + 1), row.map_err(|e| damaged(&path, &e))?))))
}

/// The file itself where it is not compressed as a whole, else what `reader` unpacks.
fn open(path: &str, reader: Reader) -> Result<Box<dyn FileReader>> {
    let file = open_file(path)?;
    let mut magic = [0; 4];
    if (&file).read_exact(&mut magic).is_ok() && magic == *b"PAR1" {
        return Ok(Box::new(SerializedFileReader::new(file).map_err(|e| damaged(path, &e))?));
    }
    let mut content = Vec::new();
    let read = reader.take(MAX_PACKED_BYTES + 1).read_to_end(&mut content);
    read.map_err(|e| unreadable(path, &e))?;
    if content.len() as u64 > MAX_PACKED_BYTES {
        return Err(Error::data(format!("{path}: is too large to unpack in memory; store it unpacked")));
    }
    Ok(Box::new(SerializedFileReader::new(Bytes::from(content)).map_err(|e| damaged(path, &e))?))
}

fn damaged(path: &str, e: &ParquetError) -> Error {
    Error::data(format!("{path}: not a readable parquet file ({e})"))
}
