//! sha256 digests, and readers and writers that compute or check them while the bytes pass.
//!
//! Nothing is believed before its last byte has been hashed: [`VerifyingReader`] hands bytes on at once but turns the
//! end of the stream into an error when size or digest differ, so a consumer that reads to the end and only then
//! publishes its result never publishes wrong bytes.

use std::fmt;
use std::io::{self, Read, Write};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// A sha256 digest, written `sha256:<64 lower-case hexadecimal digits>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// What can be wrong with a digest or with the bytes it names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// The text is no digest.
    #[error("\"{0}\" is not a digest: \"sha256:\" and 64 lower-case hexadecimal digits are wanted")]
    Syntax(String),
    /// The bytes have another digest.
    #[error("blob {blob} has the wrong digest: expected {expected}, found {found}")]
    Mismatch {
        /// The blob's name, as the caller gave it.
        blob: String,
        /// The digest it should have.
        expected: Digest,
        /// The digest its bytes have.
        found: Digest,
    },
    /// The blob has another size.
    #[error("blob {blob} has the wrong size: expected {expected} bytes, found {}{found}", if *.more { "more than " } else { "" })]
    Size {
        /// The blob's name, as the caller gave it.
        blob: String,
        /// The size it should have, in bytes.
        expected: u64,
        /// The bytes seen.
        found: u64,
        /// Reading stopped at `found`; the blob goes on.
        more: bool,
    },
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digest from its 32 bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits, without `sha256:`.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The chain id of a snapshot: `self` on top of `parent`, as containerd and the OCI image specification compute it.
    pub fn chained_on(&self, parent: Option<&Self>) -> Self {
        match parent {
            None => *self,
            Some(parent) => Self::of(format!("{parent} {self}").as_bytes()),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let syntax = || DigestError::Syntax(text.chars().take(100).collect());
        let digits = text.strip_prefix("sha256:").ok_or_else(syntax)?;
        if digits.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(syntax());
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| syntax())?;
        Ok(Self(bytes))
    }
}

impl TryFrom<&oci_spec::image::Digest> for Digest {
    type Error = DigestError;

    fn try_from(digest: &oci_spec::image::Digest) -> Result<Self, DigestError> {
        digest.as_ref().parse()
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Computes the digest and the length of what is written to it.
#[derive(Default, Clone)]
pub struct Hasher {
    state: Sha256,
    size: u64,
}

impl Hasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.state.update(bytes);
        self.size = self.size.saturating_add(bytes.len() as u64);
    }

    /// The bytes seen so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The digest of all that was seen.
    pub fn finish(self) -> Digest {
        Digest(self.state.finalize().into())
    }
}

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A reader that hashes what passes; used where the digest is to be found out, not checked.
pub struct HashingReader<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> HashingReader<R> {
    /// Hashes what is read from `inner`.
    pub fn new(inner: R) -> Self {
        Self { inner, hasher: Hasher::new() }
    }

    /// The bytes read so far.
    pub fn size(&self) -> u64 {
        self.hasher.size()
    }

    /// The digest of what was read so far.
    pub fn finish(self) -> Digest {
        self.hasher.finish()
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(buffer.get(..n).unwrap_or_default());
        Ok(n)
    }
}

/// A reader that fails at the end of the stream unless size and digest are the expected ones.
///
/// The error is an [`io::Error`] of kind `InvalidData` that holds a [`DigestError`]. It never reads more than one byte
/// beyond the expected size from the inner reader.
pub struct VerifyingReader<R> {
    inner: R,
    hasher: Hasher,
    blob: String,
    expected: Digest,
    size: u64,
    verified: bool,
}

impl<R: Read> VerifyingReader<R> {
    /// Reads a blob of `size` bytes with digest `expected` from `inner`; errors call it by its digest.
    pub fn new(inner: R, expected: Digest, size: u64) -> Self {
        Self { inner, hasher: Hasher::new(), blob: expected.to_string(), expected, size, verified: false }
    }

    /// Calls the blob `name` in errors (`kernel`, a path, …).
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.blob = name.into();
        self
    }

    /// Reads what is left and checks the whole.
    ///
    /// # Errors
    /// Those of the inner reader, and a [`DigestError`] inside an `InvalidData`.
    pub fn finish(mut self) -> io::Result<()> {
        io::copy(&mut self, &mut io::sink()).map(drop)
    }

    fn check(&mut self) -> Result<(), DigestError> {
        if self.hasher.size() < self.size {
            let (blob, found) = (self.blob.clone(), self.hasher.size());
            return Err(DigestError::Size { blob, expected: self.size, found, more: false });
        }
        let found = self.hasher.clone().finish();
        if found != self.expected {
            return Err(DigestError::Mismatch { blob: self.blob.clone(), expected: self.expected, found });
        }
        self.verified = true;
        Ok(())
    }
}

impl<R: Read> Read for VerifyingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || self.verified {
            return Ok(0);
        }
        let left = self.size.saturating_sub(self.hasher.size());
        let cap = usize::try_from(left.saturating_add(1)).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.inner.read(buffer.get_mut(..cap).unwrap_or_default())?;
        if n as u64 > left {
            let blob = self.blob.clone();
            let error = DigestError::Size { blob, expected: self.size, found: self.size, more: true };
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        self.hasher.update(buffer.get(..n).unwrap_or_default());
        if n == 0 {
            self.check().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn digest_of_abc_is_the_published_one() {
        assert_eq!(Digest::of(b"abc").to_string(), ABC);
        assert_eq!(ABC.parse::<Digest>().unwrap(), Digest::of(b"abc"));
    }

    #[test]
    fn parse_invalid_text_returns_syntax_error() {
        for text in ["", "sha256:", "sha256:kernel-digest", "sha512:00", &ABC[..70], &ABC.to_uppercase()] {
            assert!(matches!(text.parse::<Digest>(), Err(DigestError::Syntax(_))), "{text}");
        }
        let upper = format!("sha256:{}", ABC[7..].to_uppercase());
        assert!(upper.parse::<Digest>().is_err());
    }

    #[test]
    fn chained_on_none_is_the_diff_id_itself() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(a.chained_on(None), a);
        assert_eq!(b.chained_on(Some(&a)), Digest::of(format!("{a} {b}").as_bytes()));
    }

    #[test]
    fn verifying_reader_right_bytes_pass() {
        let mut out = Vec::new();
        VerifyingReader::new(&b"abc"[..], Digest::of(b"abc"), 3).read_to_end(&mut out).unwrap();
        assert_eq!(out, b"abc");
    }

    #[test]
    fn verifying_reader_wrong_bytes_names_blob_expected_and_found() {
        let reader = VerifyingReader::new(&b"abd"[..], Digest::of(b"abc"), 3).named("kernel");
        let message = reader.finish().unwrap_err().to_string();
        assert!(message.contains("blob kernel") && message.contains(ABC), "{message}");
        assert!(message.contains(&Digest::of(b"abd").to_string()), "{message}");
    }

    #[test]
    fn verifying_reader_longer_or_shorter_blob_returns_size_error() {
        let long = VerifyingReader::new(&b"abcd"[..], Digest::of(b"abc"), 3).finish().unwrap_err().to_string();
        assert!(long.contains("expected 3 bytes, found more than 3"), "{long}");
        let short = VerifyingReader::new(&b"ab"[..], Digest::of(b"abc"), 3).finish().unwrap_err().to_string();
        assert!(short.contains("expected 3 bytes, found 2"), "{short}");
    }
}
