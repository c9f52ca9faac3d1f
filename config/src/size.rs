//! Amounts of memory as people write them.

use thiserror::Error;

/// A text that is no amount of memory.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{text:?} is not a size: write bytes or a number with K, M, G or T (powers of 1024), for instance 512M")]
pub struct SizeError {
    /// The text.
    pub text: String,
}

/// Reads `512M`, `2GiB`, `1048576` as a number of bytes; units are powers of 1024, case does not matter.
///
/// # Errors
/// [`SizeError`] for anything else, for fractions and for more than 2^63 bytes.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let error = || SizeError { text: text.into() };
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let number: u64 = number.parse().map_err(|_| error())?;
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" | "ki" => 10,
        "m" | "mb" | "mib" | "mi" => 20,
        "g" | "gb" | "gib" | "gi" => 30,
        "t" | "tb" | "tib" | "ti" => 40,
        _ => return Err(error()),
    };
    number.checked_mul(1 << shift).filter(|bytes| *bytes <= 1 << 63).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_every_spelling() {
        for (text, bytes) in
            [("512M", 512 << 20), ("2GiB", 2 << 30), ("1048576", 1 << 20), ("64k", 64 << 10), (" 1 Ti ", 1 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn parse_size_of_nonsense_returns_the_text() {
        for text in ["", "M", "1.5G", "-1", "12X", "99999999T"] {
            assert_eq!(parse_size(text).unwrap_err().text, text);
        }
    }
}
