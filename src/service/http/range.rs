//! `Range` of RFC 9110: which bytes of a file are asked for.

use std::ops::Range;

/// What a request's `Range` header asks of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// No range, one that is not understood, or several: the whole file.
    Whole,
    Part(Range<u64>),
    /// No byte of the file is asked for: 416.
    Nothing,
}

/// Reads a `Range` header for a file of `size_bytes`. RFC 9110 lets a server
/// ignore what it does not understand; several ranges at once are answered by
/// the whole file.
pub fn asked(header: Option<&str>, size_bytes: u64) -> Asked {
    let Some(ranges) = header.and_then(units) else { return Asked::Whole };
    let Some((first, last)) = ranges.trim().split_once('-') else { return Asked::Whole };
    let (first, last) = (first.trim(), last.trim());
    match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => part(first, last.saturating_add(1).min(size_bytes)),
        (Some(first), None) if last.is_empty() => part(first, size_bytes),
        // The last so many bytes.
        (None, Some(0)) if first.is_empty() => Asked::Nothing,
        (None, Some(length)) if first.is_empty() => part(size_bytes.saturating_sub(length), size_bytes),
        _ => Asked::Whole,
    }
}

fn units(header: &str) -> Option<&str> {
    let (unit, ranges) = header.split_once('=')?;
    (unit.trim().eq_ignore_ascii_case("bytes") && !ranges.contains(',')).then_some(ranges)
}

fn number(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // Beyond u64 is beyond the end of every file.
    Some(text.parse().unwrap_or(u64::MAX))
}

fn part(first: u64, end: u64) -> Asked {
    if first < end { Asked::Part(first..end) } else { Asked::Nothing }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_rfc_9110_says() {
        for (header, expected) in [
            ("bytes=0-0", Asked::Part(0..1)),
            ("bytes=2-4", Asked::Part(2..5)),
            ("bytes=2-", Asked::Part(2..10)),
            ("bytes=-3", Asked::Part(7..10)),
            ("bytes=-30", Asked::Part(0..10)),
            ("bytes=5-99999999999999999999999", Asked::Part(5..10)),
            ("Bytes = 5-6", Asked::Part(5..7)),
            ("bytes=10-", Asked::Nothing),
            ("bytes=99999999999999999999999-", Asked::Nothing),
            ("bytes=-0", Asked::Nothing),
            ("bytes=4-2", Asked::Whole),
            ("bytes=1-2,4-5", Asked::Whole),
            ("bytes=a-b", Asked::Whole),
            ("bytes=-", Asked::Whole),
            ("bytes=+1-2", Asked::Whole),
            ("lines=1-2", Asked::Whole),
            ("nonsense", Asked::Whole),
        ] {
            assert_eq!(asked(Some(header), 10), expected, "{header}");
        }
        assert_eq!(asked(None, 10), Asked::Whole);
        assert_eq!(asked(Some("bytes=0-"), 0), Asked::Nothing);
        assert_eq!(asked(Some("bytes=-5"), 0), Asked::Nothing);
    }
}
