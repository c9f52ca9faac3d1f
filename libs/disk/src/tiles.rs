//! The sorted tile list behind layer maps and tables, and its file form.
//!
//! ```text
//!  word:   63 ....... 48 47 ................. 0        file:  header (64 bytes) | words, little endian
//!         [     tag     |  start, in sectors   ]
//! ```
//! A tile lasts until the next one's start, the last one until the end of the disk. The header holds, little endian:
//! magic (8 bytes), version (u32), layers (u32), size in bytes (u64), number of words (u64), CRC-32 of the words (u32),
//! zeros, and at byte 60 the CRC-32 of the bytes before it.

use std::{fs::File, os::unix::fs::FileExt};

use flate2::Crc;

use crate::{Error, ReadAt, Result, SECTOR};

const TAG_SHIFT: u32 = 48;
const START_MASK: u64 = (1 << TAG_SHIFT) - 1;
const VERSION: u32 = 1;
/// Length of a file's header in bytes.
pub(crate) const HEADER: usize = 64;
/// The most tiles in one list: 512 MiB of them.
const MAX_TILES: u64 = 1 << 26;
/// The largest disk, in bytes: what 48 bits of sectors address.
pub(crate) const MAX_SIZE: u64 = (START_MASK + 1) * SECTOR;

/// What a file of tiles is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    pub magic: [u8; 8],
    /// The name of such a file in messages.
    pub file: &'static str,
}

/// The checked header of a file of tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub layers: u32,
    pub size: u64,
    pub count: u64,
}

pub(crate) fn tag(word: u64) -> u16 {
    (word >> TAG_SHIFT) as u16
}

pub(crate) fn start(word: u64) -> u64 {
    (word & START_MASK) * SECTOR
}

/// The tile around `offset` as `(tag, end)`, with its index; `offset` must lie below `size`.
pub(crate) fn find(words: &[u64], size: u64, offset: u64, hint: usize) -> (u16, u64, usize) {
    let sector = offset / SECTOR;
    let begins = |i: usize| words.get(i).is_some_and(|w| u64::from_le(*w) & START_MASK <= sector);
    let index = if begins(hint) && !begins(hint + 1) {
        hint
    } else {
        words.partition_point(|w| u64::from_le(*w) & START_MASK <= sector).saturating_sub(1)
    };
    let tag = words.get(index).map_or(0, |w| tag(u64::from_le(*w)));
    let end = words.get(index + 1).map_or(size, |w| start(u64::from_le(*w)));
    (tag, end, index)
}

/// Each tile as `(start, end, tag)`, in bytes.
pub(crate) fn iter(words: &[u64], size: u64) -> impl Iterator<Item = (u64, u64, u16)> + '_ {
    words.iter().enumerate().map(move |(i, w)| {
        let w = u64::from_le(*w);
        let end = words.get(i + 1).map_or(size, |n| start(u64::from_le(*n)));
        (start(w), end, tag(w))
    })
}

/// Builds a list front to back, joining neighbours of one tag.
#[derive(Debug, Default)]
pub(crate) struct Builder {
    words: Vec<u64>,
    end: u64,
}

impl Builder {
    /// Appends a tile that begins where the last one ended and ends at `end`, a multiple of 512.
    pub fn push_to(&mut self, end: u64, with: u16) -> Result<()> {
        if end <= self.end {
            return Ok(());
        }
        if self.words.last().is_none_or(|w| tag(u64::from_le(*w)) != with) {
            if self.words.len() as u64 >= MAX_TILES || self.end >= MAX_SIZE {
                return Err(Error::Limit {
                    what: "number of extents",
                    value: self.words.len() as u64,
                    limit: MAX_TILES,
                });
            }
            self.words.push((u64::from(with) << TAG_SHIFT | (self.end / SECTOR)).to_le());
        }
        self.end = end;
        Ok(())
    }

    /// Where the next tile will begin.
    pub fn end(&self) -> u64 {
        self.end
    }

    pub fn finish(mut self) -> Vec<u64> {
        self.words.shrink_to_fit();
        self.words
    }
}

/// Writes a whole file of tiles.
pub(crate) fn write(file: &File, kind: Kind, layers: u32, size: u64, words: &[u64]) -> Result<()> {
    let failed = || Error::io("write the map file");
    let mut crc = Crc::new();
    let mut offset = HEADER as u64;
    for part in words.chunks(8192) {
        let bytes: Vec<u8> = part.iter().flat_map(|w| w.to_ne_bytes()).collect();
        crc.update(&bytes);
        file.write_all_at(&bytes, offset).map_err(failed())?;
        offset += bytes.len() as u64;
    }
    let mut head = Vec::with_capacity(HEADER);
    head.extend_from_slice(&kind.magic);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&layers.to_le_bytes());
    head.extend_from_slice(&size.to_le_bytes());
    head.extend_from_slice(&(words.len() as u64).to_le_bytes());
    head.extend_from_slice(&crc.sum().to_le_bytes());
    head.resize(HEADER - 4, 0);
    let sum = crc_of(&head);
    head.extend_from_slice(&sum.to_le_bytes());
    file.write_all_at(&head, 0).map_err(failed())
}

/// Reads and checks a whole file of tiles, handing each block of words to `keep`. `tag_ok` judges each tag.
pub(crate) fn check<S: ReadAt + ?Sized>(
    source: &S,
    kind: Kind,
    tag_ok: impl Fn(&Head, u16) -> bool,
    mut keep: impl FnMut(&[u64]),
) -> Result<Head> {
    let bad = |what: String| Error::BadFile { file: kind.file, what };
    let failed = || Error::io("read the map file");
    let mut raw = [0_u8; HEADER];
    if source.read_padded(&mut raw, 0).map_err(failed())? != HEADER {
        return Err(bad("it is shorter than its header".into()));
    }
    let (head, sum) = parse_head(&raw, kind)?;
    let length = source.size().map_err(failed())?;
    if head.count.checked_mul(8).and_then(|n| n.checked_add(HEADER as u64)) != Some(length) {
        return Err(bad(format!("it has {length} bytes, which does not fit {} extents", head.count)));
    }
    let mut crc = Crc::new();
    let mut next_start = 0_u64;
    let mut offset = HEADER as u64;
    let mut bytes = vec![0_u8; 64 << 10];
    let mut words = Vec::with_capacity(bytes.len() / 8);
    while offset < length {
        let n = (length - offset).min(bytes.len() as u64) as usize;
        let part = bytes.get_mut(..n).unwrap_or_default();
        source.read_padded(part, offset).map_err(failed())?;
        crc.update(part);
        words.clear();
        for eight in part.chunks_exact(8) {
            let word = le_u64(eight, 0);
            let begin = start(word);
            let first = offset == HEADER as u64 && words.is_empty();
            if (first && begin != 0) || begin < next_start || begin >= head.size || !tag_ok(&head, tag(word)) {
                return Err(bad(format!("its extent at {begin} is out of order or unknown")));
            }
            next_start = begin.saturating_add(SECTOR);
            words.push(word.to_le());
        }
        keep(&words);
        offset += n as u64;
    }
    if crc.sum() != sum {
        return Err(bad("its checksum is wrong".into()));
    }
    Ok(head)
}

fn parse_head(raw: &[u8; HEADER], kind: Kind) -> Result<(Head, u32)> {
    let bad = |what: String| Error::BadFile { file: kind.file, what };
    if raw.get(..8) != Some(&kind.magic[..]) {
        return Err(bad("it does not begin with its magic number".into()));
    }
    let version = le_u32(raw, 8);
    if version != VERSION {
        return Err(bad(format!("it has format version {version}, this program reads version {VERSION}")));
    }
    if crc_of(raw.get(..HEADER - 4).unwrap_or_default()) != le_u32(raw, HEADER - 4) {
        return Err(bad("its header's checksum is wrong".into()));
    }
    let head = Head { layers: le_u32(raw, 12), size: le_u64(raw, 16), count: le_u64(raw, 24) };
    if !head.size.is_multiple_of(SECTOR)
        || head.size > MAX_SIZE
        || head.count > MAX_TILES
        || (head.count == 0) != (head.size == 0)
    {
        return Err(bad(format!("its size of {} bytes in {} extents cannot be", head.size, head.count)));
    }
    Ok((head, le_u32(raw, 32)))
}

pub(crate) fn crc_of(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

pub(crate) fn le_u32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

pub(crate) fn le_u64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}
