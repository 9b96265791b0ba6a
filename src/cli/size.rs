//! Sizes of memory as people write them.

/// Reads a size such as `512MiB`, `12GB` or `4096`.
///
/// # Errors
/// What is wrong with it.
pub fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).trim_end();
    let number: f64 = digits.parse().map_err(|_| format!("{text}: give a size such as 800MiB or 12GB"))?;
    let unit = match text[digits.len()..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        unit => {
            return Err(format!("{text}: {unit} is no unit of memory known here; use MiB, GiB, MB or GB"));
        }
    };
    let bytes = number * unit;
    if bytes.is_finite() && bytes >= 1.0 {
        Ok(bytes as u64)
    } else {
        Err(format!("{text}: give a size above 0"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_units_of_either_kind() {
        for (text, size) in [
            ("4096", 4096),
            ("512MiB", 512 << 20),
            ("1.5 GiB", 3 << 29),
            ("12GB", 12_000_000_000),
            ("2k", 2048),
        ] {
            assert_eq!(bytes(text), Ok(size), "{text}");
        }
        for text in ["", "GiB", "-1MB", "0", "1PB", "nanGB", "1e400"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
