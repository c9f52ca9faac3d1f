//! The pages that a restored machine touched first, so that later restores can have them read ahead. Only advice: a wrong
//! one costs time and nothing else. It is written by a VMM that its guest may have taken over, so it is hostile.
//!
//! ```text
//!   0  8  magic "OVMSWSET"   8  4  version 1   12  4  number of ranges   16  8  XXH3-64 of the ranges
//!  24 ..  ranges, ascending: first page (8 bytes), number of pages (8 bytes)
//! ```
//! All numbers are little-endian; a page has 4096 bytes.

use std::{fs::File, os::unix::fs::FileExt};

use twox_hash::XxHash3_64;

use crate::{prefix::Fields, Result, SnapshotError};

const MAGIC: [u8; 8] = *b"OVMSWSET";
const VERSION: u32 = 1;
const HEADER: usize = 24;
const RANGE: usize = 16;
/// The most ranges in a file; 1 MiB of them.
pub const MAX_RANGES: usize = 64 << 10;

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRange {
    /// The first page's number in the memory without holes.
    pub first: u64,
    /// How many; at least 1.
    pub count: u64,
}

/// What a restored machine touched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Ascending, without overlap.
    pub ranges: Vec<PageRange>,
}

impl WorkingSet {
    /// Pages in all ranges.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.ranges.iter().fold(0, |sum, range| sum.saturating_add(range.count))
    }

    /// The file's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let ranges = self.ranges.get(..MAX_RANGES).unwrap_or(&self.ranges);
        let body: Vec<u8> =
            ranges.iter().flat_map(|range| [range.first, range.count]).flat_map(u64::to_le_bytes).collect();
        let mut bytes = Vec::with_capacity(HEADER.saturating_add(body.len()));
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((ranges.len() as u32).to_le_bytes());
        bytes.extend(XxHash3_64::oneshot(&body).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    /// Reads a file, at most a little over 1 MiB, for a machine with `memory` bytes.
    ///
    /// # Errors
    /// [`SnapshotError`] if it is no working set of such a machine; going on without one is then right.
    pub fn read(file: &File, memory: u64) -> Result<Self> {
        let length = file.metadata().map_err(SnapshotError::io("read the working set"))?.len();
        let most = (HEADER + MAX_RANGES * RANGE) as u64;
        if length > most {
            return Err(SnapshotError::TooLarge { what: "working set", bytes: length, limit: most });
        }
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        file.read_exact_at(&mut bytes, 0).map_err(SnapshotError::io("read the working set"))?;
        Self::decode(&bytes, memory)
    }

    /// Decodes the file's bytes for a machine with `memory` bytes.
    ///
    /// # Errors
    /// As [`WorkingSet::read`].
    pub fn decode(bytes: &[u8], memory: u64) -> Result<Self> {
        let bad = |why: &str| SnapshotError::damaged(format!("its working set {why}"));
        let (header, body) = bytes.split_at_checked(HEADER).ok_or_else(|| bad("is too short"))?;
        let mut fields = Fields(header);
        if fields.take() != MAGIC || fields.u32() != VERSION {
            return Err(bad("has another format"));
        }
        let count = fields.u32() as usize;
        if count > MAX_RANGES || body.len() != count.saturating_mul(RANGE) {
            return Err(bad("has another length than it says"));
        }
        if fields.u64() != XxHash3_64::oneshot(body) {
            return Err(SnapshotError::Checksum("the working set".into()));
        }
        let (mut ranges, mut next) = (Vec::with_capacity(count), 0_u64);
        for piece in body.chunks_exact(RANGE) {
            let mut fields = Fields(piece);
            let range = PageRange { first: fields.u64(), count: fields.u64() };
            let end = range.first.checked_add(range.count).filter(|end| *end <= memory / 4096);
            next = match end {
                Some(end) if range.count > 0 && range.first >= next => end,
                _ => return Err(bad("names pages that are not there, or twice")),
            };
            ranges.push(range);
        }
        Ok(Self { ranges })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: u64 = 1 << 20;

    fn set(ranges: &[(u64, u64)]) -> WorkingSet {
        WorkingSet { ranges: ranges.iter().map(|(first, count)| PageRange { first: *first, count: *count }).collect() }
    }

    #[test]
    fn decode_of_encoded_ranges_gives_them_back() {
        let ranges = set(&[(1, 3), (9, 1), (255, 1)]);
        assert_eq!((WorkingSet::decode(&ranges.encode(), MEMORY).unwrap(), ranges.pages()), (ranges.clone(), 5));
    }

    #[test]
    fn encode_of_too_many_ranges_leaves_out_the_rest() {
        let many = |count| set(&(0..count).map(|n| (2 * n, 1)).collect::<Vec<_>>());
        let most = MAX_RANGES as u64;
        assert_eq!(WorkingSet::decode(&many(most + 5).encode(), u64::MAX).unwrap(), many(most));
    }

    #[test]
    fn decode_of_impossible_ranges_returns_damaged() {
        for ranges in [&[(256, 1)][..], &[(0, 257)], &[(0, 0)], &[(5, 2), (6, 1)], &[(6, 1), (5, 1)], &[(9, u64::MAX)]]
        {
            let err = WorkingSet::decode(&set(ranges).encode(), MEMORY).unwrap_err();
            assert!(err.to_string().contains("pages that are not there"), "{ranges:?}: {err}");
        }
    }

    #[test]
    fn every_flipped_byte_and_every_truncation_is_refused() {
        let good = set(&[(1, 3), (9, 1)]).encode();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(WorkingSet::decode(&bad, MEMORY).is_err(), "byte {at}");
            assert!(WorkingSet::decode(&good[..at], MEMORY).is_err(), "{at} bytes");
        }
    }
}
