//! A layer's bytes out of its blob, with caps on what may come out: a few kilobytes can hold terabytes of zeros.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use flate2::read::MultiGzDecoder;

use crate::media::Compression;

/// Largest zstd window that is allocated: 2^27 bytes, the limit of the zstd command line without `--long`.
const ZSTD_WINDOW_LOG: u32 = 27;
/// A ratio is judged once this many bytes came out: small blobs of zeros compress beyond any sane ratio.
const RATIO_FROM: u64 = 1 << 30;

/// What may come out of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caps {
    bytes: u64,
    ratio: u64,
    ratio_from: u64,
}

impl Caps {
    /// So many bytes, and for each byte in no more than `ratio` out, which is judged from the first GiB on.
    pub fn new(bytes: u64, ratio: u64) -> Self {
        Self { bytes, ratio, ratio_from: RATIO_FROM }
    }

    /// With the ratio judged from another number of bytes on.
    #[cfg(test)]
    pub(crate) fn judged_from(self, ratio_from: u64) -> Self {
        Self { ratio_from, ..self }
    }
}

/// Why a stream was stopped; it comes inside an [`io::Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CapError {
    /// More bytes than allowed.
    #[error("the layer has more than {0} bytes (limits.layer_data)")]
    Bytes(u64),
    /// Compressed beyond what a layer can be.
    #[error("the layer decompresses to more than {0} times its size (limits.layer_ratio)")]
    Ratio(u64),
}

/// The decompressed bytes of a blob. At their end the blob may go on: a decoder stops where its format does.
pub struct Decompressed<'a> {
    decoder: Box<dyn Read + 'a>,
    taken: Rc<Cell<u64>>,
    given: u64,
    caps: Caps,
}

impl<'a> Decompressed<'a> {
    /// Reads `blob`, compressed so.
    ///
    /// # Errors
    /// Those of making a decoder.
    pub fn new(blob: impl Read + 'a, compression: Compression, caps: Caps) -> io::Result<Self> {
        let taken = Rc::new(Cell::new(0));
        let counted = Counted { blob, taken: Rc::clone(&taken) };
        let decoder: Box<dyn Read + 'a> = match compression {
            Compression::None => Box::new(counted),
            Compression::Gzip => Box::new(MultiGzDecoder::new(counted)),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(counted)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Box::new(decoder)
            }
        };
        Ok(Self { decoder, taken, given: 0, caps })
    }
}

impl Read for Decompressed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.decoder.read(buffer)?;
        self.given = self.given.saturating_add(n as u64);
        let Caps { bytes, ratio, ratio_from } = self.caps;
        if self.given > bytes {
            return Err(io::Error::other(CapError::Bytes(bytes)));
        }
        if self.given > ratio_from && self.given > self.taken.get().saturating_mul(ratio) {
            return Err(io::Error::other(CapError::Ratio(ratio)));
        }
        Ok(n)
    }
}

/// Counts what the decoder takes.
struct Counted<R> {
    blob: R,
    taken: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.blob.read(buffer)?;
        self.taken.set(self.taken.get().saturating_add(n as u64));
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn compressed(bytes: &[u8], compression: Compression) -> Vec<u8> {
        match compression {
            Compression::None => bytes.to_vec(),
            Compression::Gzip => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(bytes).unwrap();
                gzip.finish().unwrap()
            }
            Compression::Zstd => zstd::encode_all(bytes, 1).unwrap(),
        }
    }

    const ALL: [Compression; 3] = [Compression::None, Compression::Gzip, Compression::Zstd];

    fn stopped(blob: &[u8], compression: Compression, caps: Caps) -> CapError {
        let mut reader = Decompressed::new(blob, compression, caps).unwrap();
        let error = io::copy(&mut reader, &mut io::sink()).unwrap_err();
        *error.get_ref().and_then(|inner| inner.downcast_ref()).expect("a cap")
    }

    #[test]
    fn every_compression_gives_the_bytes_back_and_leaves_what_follows() {
        let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        for compression in ALL {
            let blob = compressed(&bytes, compression);
            let mut rest = blob.as_slice();
            let mut out = Vec::new();
            let caps = Caps::new(bytes.len() as u64, 2000);
            Decompressed::new(&mut rest, compression, caps).unwrap().read_to_end(&mut out).unwrap();
            assert!(out == bytes && rest.is_empty(), "{compression:?}");
        }
    }

    #[test]
    fn what_has_more_bytes_than_allowed_is_stopped() {
        for compression in ALL {
            let blob = compressed(&[7; 100_000], compression);
            assert_eq!(stopped(&blob, compression, Caps::new(99_999, 2000)), CapError::Bytes(99_999));
        }
    }

    #[test]
    fn a_bomb_is_stopped_at_its_ratio() {
        for compression in [Compression::Gzip, Compression::Zstd] {
            let blob = compressed(&vec![0; 8 << 20], compression);
            let caps = Caps::new(u64::MAX, 100).judged_from(1 << 20);
            assert_eq!(stopped(&blob, compression, caps), CapError::Ratio(100));
        }
    }

    #[test]
    fn a_ratio_of_few_bytes_is_not_judged() {
        let blob = compressed(&vec![0; 8 << 20], Compression::Zstd);
        let mut reader = Decompressed::new(&blob[..], Compression::Zstd, Caps::new(u64::MAX, 100)).unwrap();
        assert_eq!(io::copy(&mut reader, &mut io::sink()).unwrap(), 8 << 20);
    }
}
