//! Corpus files: plain text, JSON lines or parquet, each also gzip or zstd.
//! They are read piece by piece: a corpus may be far larger than what is used of it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::parquet;
use crate::engine::{Error, Result};
use crate::job::spec::Corpus;

/// Longest line of JSON lines; a longer one is no row but the wrong file.
const MAX_LINE_BYTES: u64 = 64 << 20;
/// Plain text is handed on in parts of this size.
const PART_BYTES: u64 = 1 << 20;

/// A piece of a corpus, in its order.
#[derive(Debug)]
pub enum Piece {
    /// A document, or with `begins` false the next part of one.
    Text { text: String, begins: bool },
    /// Token ids, used as they are; `place` names the row.
    Ids { ids: Vec<u32>, place: String },
}

pub type Pieces = Box<dyn Iterator<Item = Result<Piece>>>;

/// The name a corpus goes by in reports and errors.
pub fn label(corpus: &Corpus) -> String {
    match corpus {
        Corpus::Path { path } => {
            Path::new(path).file_name().map_or_else(|| path.clone(), |n| n.to_string_lossy().into_owned())
        }
        Corpus::Hub { repo, file, .. } => format!("{repo}/{file}"),
        Corpus::Upload { upload_id } => upload_id.to_string(),
        Corpus::Text { .. } => "text".into(),
        Corpus::Model { .. } => "model".into(),
        Corpus::Mix { .. } => corpus.texts().into_iter().map(label).collect::<Vec<_>>().join(" + "),
    }
}

/// sha256 of the corpus's content as it is stored. A text the model writes has
/// none of its own: it follows from the model, the seed and the spec.
pub fn digest(corpus: &Corpus) -> Result<String> {
    let mut hash = Sha256::new();
    match corpus {
        Corpus::Path { path } => {
            let mut file = open_file(path)?;
            std::io::copy(&mut file, &mut hash).map_err(|e| unreadable(path, &e))?;
        }
        Corpus::Text { text } => hash.update(text),
        Corpus::Model { tokens } => hash.update(format!("model {tokens:?}")),
        Corpus::Mix { of } => {
            for share in of {
                hash.update(format!("{} {}\n", digest(&share.corpus)?, share.weight));
            }
        }
        Corpus::Hub { .. } | Corpus::Upload { .. } => return Err(unresolved(corpus)),
    }
    Ok(hex::encode(hash.finalize()))
}

/// The pieces of a text, in their order.
///
/// # Errors
/// Data errors that name file and line.
pub fn pieces(corpus: &Corpus) -> Result<Pieces> {
    match corpus {
        Corpus::Text { text } => {
            Ok(Box::new(std::iter::once(Ok(Piece::Text { text: text.clone(), begins: true }))))
        }
        Corpus::Path { path } => match open(path)? {
            (reader, Format::Text) => Ok(Box::new(Parts::new(path, reader))),
            (reader, Format::JsonLines) => Ok(Box::new(
                Lines::new(path, reader).map(|line| line.and_then(|(place, l)| piece(place, &l))),
            )),
            (reader, Format::Parquet) => Ok(Box::new(parquet::texts(path, reader)?)),
        },
        Corpus::Model { .. } => Err(Error::bug("text the model writes is not read from anywhere")),
        Corpus::Mix { .. } => Err(Error::bug("a mixture is read text by text")),
        Corpus::Hub { .. } | Corpus::Upload { .. } => Err(unresolved(corpus)),
    }
}

/// Records, each with the words that name its place.
pub type Records = Box<dyn Iterator<Item = Result<(String, Value)>>>;

/// The records of a corpus of JSON lines, or the rows of a parquet file.
///
/// # Errors
/// Data errors that name file and line.
pub fn records(corpus: &Corpus) -> Result<Records> {
    let parsed = |line: Result<(String, String)>| {
        let (place, line) = line?;
        let record = serde_json::from_str(&line);
        let record = record.map_err(|e| Error::data(format!("{place}: {}", without_line(&e))))?;
        Ok((place, record))
    };
    match corpus {
        Corpus::Text { text } => {
            let text = Box::new(std::io::Cursor::new(text.clone().into_bytes()));
            Ok(Box::new(Lines::new("text", text).map(parsed)))
        }
        Corpus::Path { path } => match open(path)? {
            (reader, Format::JsonLines) => Ok(Box::new(Lines::new(path, reader).map(parsed))),
            (reader, Format::Parquet) => Ok(Box::new(parquet::records(path, reader)?)),
            (_, Format::Text) => Err(Error::data(format!(
                "{path}: must be JSON lines or parquet, a file named .jsonl or .parquet"
            ))),
        },
        Corpus::Model { .. } => Err(Error::spec("a model cannot write evaluation items; name a .jsonl file")),
        Corpus::Mix { .. } => Err(Error::spec("evaluation items are not mixed; name a .jsonl file")),
        Corpus::Hub { .. } | Corpus::Upload { .. } => Err(unresolved(corpus)),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    JsonLines,
    Parquet,
}

pub(super) type Reader = Box<dyn BufRead>;

pub(super) fn open_file(path: &str) -> Result<File> {
    let file = File::open(path).map_err(|e| unreadable(path, &e))?;
    if file.metadata().map_err(|e| unreadable(path, &e))?.is_dir() {
        return Err(Error::data(format!("{path}: is a directory; name a .txt, .jsonl or .parquet file")));
    }
    Ok(file)
}

/// The uncompressed content and what it is, by name or else by its first bytes.
fn open(path: &str) -> Result<(Reader, Format)> {
    let wrong = |e: &std::io::Error| unreadable(path, e);
    let mut packed = BufReader::with_capacity(1 << 16, open_file(path)?);
    let start = packed.fill_buf().map_err(|e| wrong(&e))?;
    let mut reader: Reader = if start.starts_with(&[0x1f, 0x8b]) {
        Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(packed)))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Box::new(BufReader::new(zstd::Decoder::with_buffer(packed).map_err(|e| wrong(&e))?))
    } else {
        Box::new(packed)
    };
    let start = reader.fill_buf().map_err(|e| wrong(&e))?;
    let format = if start.starts_with(b"PAR1") { Format::Parquet } else { by_name(path, start) };
    Ok((reader, format))
}

fn by_name(path: &str, start: &[u8]) -> Format {
    let name = path.to_ascii_lowercase();
    let name = [".gz", ".zst", ".zstd"].iter().find_map(|e| name.strip_suffix(e)).unwrap_or(&name);
    match Path::new(name).extension().and_then(|e| e.to_str()) {
        Some("txt") => Format::Text,
        Some("jsonl" | "json") => Format::JsonLines,
        Some("parquet") => Format::Parquet,
        // Files in a cache or an upload store are named by their digest.
        Some(_) | None if start.trim_ascii_start().starts_with(b"{") => Format::JsonLines,
        Some(_) | None => Format::Text,
    }
}

/// Plain text in parts, cut between characters.
struct Parts {
    path: String,
    reader: Reader,
    /// Bytes of a character that the last part ended in.
    rest: Vec<u8>,
    read_bytes: u64,
}

impl Parts {
    fn new(path: &str, reader: Reader) -> Self {
        Self { path: path.to_owned(), reader, rest: Vec::new(), read_bytes: 0 }
    }

    fn part(&mut self) -> Result<Option<Piece>> {
        let begins = self.read_bytes == 0;
        let mut bytes = std::mem::take(&mut self.rest);
        let held = bytes.len() as u64;
        let n = (&mut self.reader).take(PART_BYTES).read_to_end(&mut bytes);
        let n = n.map_err(|e| unreadable(&self.path, &e))? as u64;
        if bytes.is_empty() {
            return Ok(None);
        }
        let good = match std::str::from_utf8(&bytes) {
            Ok(_) => bytes.len(),
            Err(e) if e.error_len().is_none() && n > 0 => e.valid_up_to(),
            Err(e) => {
                let at = self.read_bytes - held + e.valid_up_to() as u64;
                return Err(Error::data(format!(
                    "{}: byte {at} is not UTF-8; convert the file to UTF-8",
                    self.path
                )));
            }
        };
        self.rest = bytes.split_off(good);
        self.read_bytes += n;
        let text = String::from_utf8(bytes).map_err(Error::bug)?;
        Ok(Some(Piece::Text { text, begins }))
    }
}

impl Iterator for Parts {
    type Item = Result<Piece>;
    fn next(&mut self) -> Option<Self::Item> {
        self.part().transpose()
    }
}

/// Lines that are not blank, with their places.
pub struct Lines {
    name: String,
    reader: Reader,
    number: u64,
}

impl Lines {
    fn new(name: &str, reader: Reader) -> Self {
        Self { name: name.to_owned(), reader, number: 0 }
    }

    fn line(&mut self) -> Result<Option<(String, String)>> {
        loop {
            let mut bytes = Vec::new();
            self.number += 1;
            let place = format!("{}, line {}", self.name, self.number);
            let read = (&mut self.reader).take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut bytes);
            if read.map_err(|e| unreadable(&place, &e))? == 0 {
                return Ok(None);
            }
            if bytes.len() as u64 > MAX_LINE_BYTES {
                let mib = MAX_LINE_BYTES >> 20;
                return Err(Error::data(format!("{place}: is longer than {mib} MiB; put one row on a line")));
            }
            let line = String::from_utf8(bytes)
                .map_err(|_| Error::data(format!("{place}: is not UTF-8; convert the file to UTF-8")))?;
            if !line.trim().is_empty() {
                return Ok(Some((place, line)));
            }
        }
    }
}

impl Iterator for Lines {
    type Item = Result<(String, String)>;
    fn next(&mut self) -> Option<Self::Item> {
        self.line().transpose()
    }
}

/// A row of JSON lines; other fields are ignored.
#[derive(Deserialize)]
struct JsonRow {
    text: Option<String>,
    input_ids: Option<Vec<u32>>,
}

fn piece(place: String, line: &str) -> Result<Piece> {
    let row: JsonRow =
        serde_json::from_str(line).map_err(|e| Error::data(format!("{place}: {}", without_line(&e))))?;
    match (row.input_ids, row.text) {
        (Some(ids), _) => Ok(Piece::Ids { ids, place }),
        (None, Some(text)) => Ok(Piece::Text { text, begins: true }),
        (None, None) => Err(Error::data(format!(
            "{place}: has neither a field `text` nor `input_ids`; write rows like {{\"text\": \"…\"}}"
        ))),
    }
}

/// serde's message; a row is one line, so its own "line 1" would only mislead.
fn without_line(e: &serde_json::Error) -> String {
    e.to_string().replace(" at line 1 column", ", column")
}

pub(super) fn unreadable(path: &str, e: &std::io::Error) -> Error {
    Error::data(format!("{path}: cannot be read: {e}"))
}

fn unresolved(corpus: &Corpus) -> Error {
    Error::bug(format!("{} was not turned into a local file", label(corpus)))
}
