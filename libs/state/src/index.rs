//! Where each chunk of memory lies in the file. Only chunks that are stored have an entry; every other one is all zero, or
//! as in the parent if the snapshot is a diff.
//!
//! ```text
//!  entry, 32 bytes:   0  4  chunk number        8  8  offset in the file
//!                     4  3  stored length      16 16  XXH3-128 of the chunk's bytes
//!                     7  1  kind: 0 zero, 1 raw, 2 lz4 block, 3 zstd frame
//! ```

use crate::{
    prefix::{Fields, PREFIX},
    Result, SnapshotError,
};

/// Bytes of memory in a chunk; the last one may have less.
pub const CHUNK: usize = 64 << 10;

/// Bytes of an entry.
pub(crate) const ENTRY: u64 = 32;

/// Number of chunks in so many bytes of memory.
#[must_use]
pub fn chunk_count(memory: u64) -> u64 {
    memory.div_ceil(CHUNK as u64)
}

/// Bytes of the chunk with this number; 0 if the memory has none.
#[must_use]
pub fn chunk_len(memory: u64, chunk: u64) -> usize {
    let start = chunk.saturating_mul(CHUNK as u64);
    usize::try_from(memory.saturating_sub(start).min(CHUNK as u64)).unwrap_or(CHUNK)
}

/// How a chunk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Not at all: every byte is 0.
    #[default]
    Zero = 0,
    /// As it is.
    Raw = 1,
    /// One lz4 block.
    Lz4 = 2,
    /// One zstd frame.
    Zstd = 3,
}

impl Kind {
    fn from_number(number: u8) -> Option<Self> {
        [Self::Zero, Self::Raw, Self::Lz4, Self::Zstd].into_iter().find(|kind| *kind as u8 == number)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Entry {
    pub chunk: u32,
    pub kind: Kind,
    pub length: u32,
    pub offset: u64,
    pub digest: [u8; 16],
}

impl Entry {
    pub fn encode(&self, to: &mut Vec<u8>) {
        to.extend(self.chunk.to_le_bytes());
        to.extend((self.length & 0x00ff_ffff | u32::from(self.kind as u8) << 24).to_le_bytes());
        to.extend(self.offset.to_le_bytes());
        to.extend(self.digest);
    }

    pub fn end(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.length))
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let mut fields = Fields(bytes);
        let chunk = fields.u32();
        let packed = fields.u32();
        let refused = |why: String| SnapshotError::Chunk { chunk: u64::from(chunk), why };
        let number = (packed >> 24) as u8;
        let kind = Kind::from_number(number).ok_or_else(|| refused(format!("its kind {number} is not known")))?;
        Ok(Self { chunk, kind, length: packed & 0x00ff_ffff, offset: fields.u64(), digest: fields.take() })
    }

    /// Checks the entry by itself: it lies in the chunks' area, and is no longer than what it stands for.
    fn check(&self, memory: u64, data_end: u64) -> Result<()> {
        let refused = |why: &str| Err(SnapshotError::Chunk { chunk: u64::from(self.chunk), why: why.into() });
        let whole = chunk_len(memory, u64::from(self.chunk));
        let length = self.length as usize;
        match self.kind {
            _ if whole == 0 => refused("it lies behind the end of the memory"),
            Kind::Zero if (self.length, self.offset, self.digest) == (0, 0, [0; 16]) => Ok(()),
            Kind::Zero => refused("it is all zero and yet stored"),
            Kind::Raw if length != whole => refused("it is stored as it is with another length"),
            Kind::Lz4 | Kind::Zstd if length == 0 || length >= whole => {
                refused("it is not shorter than what it stands for")
            }
            _ if self.offset < PREFIX || self.end() > data_end => refused("it lies outside of the file's chunks"),
            _ => Ok(()),
        }
    }
}

/// Decodes and checks a whole index whose checksum held: ascending chunks, each within the chunks' area, none over
/// another.
pub(crate) fn decode(bytes: &[u8], memory: u64, data_end: u64) -> Result<Vec<Entry>> {
    let mut entries = Vec::with_capacity(bytes.chunks_exact(ENTRY as usize).len());
    let mut next = 0_u64;
    for piece in bytes.chunks_exact(ENTRY as usize) {
        let entry = Entry::decode(piece)?;
        entry.check(memory, data_end)?;
        if u64::from(entry.chunk) < next {
            return Err(SnapshotError::damaged("the entries of its index are not in order"));
        }
        next = u64::from(entry.chunk).saturating_add(1);
        entries.push(entry);
    }
    let mut places: Vec<_> =
        entries.iter().filter(|e| e.kind != Kind::Zero).map(|e| (e.offset, e.end(), e.chunk)).collect();
    places.sort_unstable();
    for pair in places.windows(2) {
        if let [(_, end, _), (start, _, chunk)] = pair {
            if start < end {
                return Err(SnapshotError::Chunk { chunk: u64::from(*chunk), why: "it lies over another".into() });
            }
        }
    }
    Ok(entries)
}

/// Bytes of a page, the unit of holes.
pub(crate) const PAGE: usize = 4096;
static ZEROS: [u8; PAGE] = [0; PAGE];

/// Whether every byte is 0. Compares with a page of zeros, which the C library does by vectors.
pub(crate) fn is_zero(data: &[u8]) -> bool {
    data.chunks(PAGE).all(|piece| Some(piece) == ZEROS.get(..piece.len()))
}
