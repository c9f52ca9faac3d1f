//! The block map of a top: two bits for each 4 KiB of the disk, kept in its own file.
//!
//! ```text
//!  file:   page 0: header          page 1 + n: chunk n = 16,384 blocks = 64 MiB of disk
//!  block:  00 absent · 01 data · 10 zero
//! ```
//! Chunks are loaded when first touched and dropped when many are loaded and this one is unchanged, so memory follows
//! what is in use and not the disk's size. The map has no checksum over its chunks on purpose: each sector of it stands
//! for itself, so a write that a crash tears leaves every block in the state of before or after, and both are right for
//! a block that was not flushed.

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        Arc, PoisonError, RwLock,
    },
};

use super::Top;
use crate::{
    tiles::{crc_of, le_u32, le_u64, MAX_SIZE},
    Error, ReadAt, Result, State, SECTOR,
};

const MAGIC: [u8; 8] = *b"OVMSTOP\0";
const VERSION: u32 = 1;
const PAGE: u64 = 4096;
const HEADER: usize = 64;
const WORDS: usize = 512;
/// Blocks in one 64-bit word.
const PER_WORD: u64 = 32;
/// Blocks in one chunk.
const PER_CHUNK: u64 = PER_WORD * WORDS as u64;
/// The low bit of every block in a word.
const LOW_BITS: u64 = 0x5555_5555_5555_5555;
/// Loaded chunks (4 KiB each) beyond which unchanged ones are dropped; few in tests, so that they meet it.
pub(super) const MAX_LOADED: usize = if cfg!(test) { 8 } else { 256 };

#[derive(Debug)]
struct Chunk {
    words: Box<[AtomicU64]>,
    dirty: AtomicBool,
}

/// The map of a top's blocks.
#[derive(Debug)]
pub(super) struct BlockMap {
    file: File,
    chunks: RwLock<BTreeMap<u64, Arc<Chunk>>>,
    /// Counts the times that chunks were dropped; changes under the write lock alone.
    dropped: AtomicU64,
}

/// The chunks that a flush has to write, as they were at one moment.
pub(super) struct Changes(Vec<(u64, Arc<Chunk>, Vec<u8>)>);

fn bad(what: String) -> Error {
    Error::BadFile { file: "top's block map", what }
}

fn bits(state: State) -> u64 {
    u64::from(state.tag())
}

/// The map file's length for a disk of `size` bytes.
fn file_len(size: u64) -> u64 {
    PAGE + size.div_ceil(Top::BLOCK * PER_CHUNK) * PAGE
}

/// Writes the header and gives the file its length.
pub(super) fn format(file: &File, size: u64) -> Result<()> {
    if size > MAX_SIZE || !size.is_multiple_of(SECTOR) {
        return Err(bad(format!("a disk of {size} bytes cannot be")));
    }
    let mut head = Vec::with_capacity(HEADER);
    head.extend_from_slice(&MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&(Top::BLOCK as u32).to_le_bytes());
    head.extend_from_slice(&size.to_le_bytes());
    head.resize(HEADER - 4, 0);
    let sum = crc_of(&head);
    head.extend_from_slice(&sum.to_le_bytes());
    file.set_len(file_len(size)).map_err(Error::io("size the top's block map"))?;
    // One sector: the old header or the new one, never a mix.
    file.write_all_at(&head, 0).map_err(Error::io("write the top's block map"))
}

impl BlockMap {
    /// Reads the header; returns the map and the disk's size.
    pub fn open(file: File) -> Result<(BlockMap, u64)> {
        let mut head = [0_u8; HEADER];
        let n = file.read_padded(&mut head, 0).map_err(Error::io("read the top's block map"))?;
        if n != HEADER || head.get(..8) != Some(&MAGIC[..]) {
            return Err(bad("it does not begin with its magic number".into()));
        }
        let (version, block, size) = (le_u32(&head, 8), le_u32(&head, 12), le_u64(&head, 16));
        if version != VERSION {
            return Err(bad(format!("it has format version {version}, this program reads version {VERSION}")));
        }
        if crc_of(head.get(..HEADER - 4).unwrap_or_default()) != le_u32(&head, HEADER - 4) {
            return Err(bad("its header's checksum is wrong".into()));
        }
        if u64::from(block) != Top::BLOCK || !size.is_multiple_of(SECTOR) || size > MAX_SIZE {
            return Err(bad(format!("blocks of {block} bytes on a disk of {size} bytes are not supported")));
        }
        Ok((BlockMap { file, chunks: RwLock::default(), dropped: AtomicU64::new(0) }, size))
    }

    fn chunk(&self, index: u64) -> Result<Arc<Chunk>> {
        loop {
            if let Some(chunk) = self.chunks.read().unwrap_or_else(PoisonError::into_inner).get(&index) {
                return Ok(Arc::clone(chunk));
            }
            let dropped = self.dropped.load(Ordering::Acquire);
            let loaded = self.load(index)?;
            #[cfg(test)]
            super::tests::after_load();
            let mut chunks = self.chunks.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(chunk) = chunks.get(&index) {
                // Another thread was faster, and a writer may have changed its copy already.
                return Ok(Arc::clone(chunk));
            }
            if self.dropped.load(Ordering::Acquire) != dropped {
                // This very chunk may have been loaded, changed, written and dropped since we read the file.
                continue;
            }
            if chunks.len() >= MAX_LOADED {
                // Only here can a chunk go; whoever is using one holds a second reference.
                chunks.retain(|_, c| c.dirty.load(Ordering::Acquire) || Arc::strong_count(c) > 1);
                self.dropped.fetch_add(1, Ordering::AcqRel);
            }
            chunks.insert(index, Arc::clone(&loaded));
            return Ok(loaded);
        }
    }

    fn load(&self, index: u64) -> Result<Arc<Chunk>> {
        let mut page = vec![0_u8; PAGE as usize];
        let offset = PAGE.saturating_add(index.saturating_mul(PAGE));
        self.file.read_padded(&mut page, offset).map_err(Error::io("read the top's block map"))?;
        let mut words = Vec::with_capacity(WORDS);
        for bytes in page.chunks_exact(8) {
            let word = le_u64(bytes, 0);
            if word & (word >> 1) & LOW_BITS != 0 {
                return Err(bad(format!("chunk {index} holds a block state that does not exist")));
            }
            words.push(AtomicU64::new(word));
        }
        Ok(Arc::new(Chunk { words: words.into(), dirty: AtomicBool::new(false) }))
    }

    /// The state of `block` and the end (a block number, at most `end`) of the run that shares it.
    pub fn run(&self, block: u64, end: u64) -> Result<(State, u64)> {
        let mut state = None;
        let mut at = block;
        while at < end {
            let chunk = self.chunk(at / PER_CHUNK)?;
            let chunk_end = (at / PER_CHUNK + 1).saturating_mul(PER_CHUNK).min(end);
            while at < chunk_end {
                let word = chunk.word(at).load(Ordering::Acquire) >> ((at % PER_WORD) * 2);
                let want = *state.get_or_insert(word & 3);
                // Blocks that differ from the wanted state have a bit set here.
                let differ = word ^ (LOW_BITS * want);
                let same = u64::from(differ.trailing_zeros()) / 2;
                let left = PER_WORD - at % PER_WORD;
                if same < left {
                    return Ok((State::from_tag(want as u16), (at + same).min(end)));
                }
                at += left;
            }
        }
        Ok((State::from_tag(state.unwrap_or(0) as u16), end))
    }

    /// Sets the state of the blocks from `block` up to `end`.
    pub fn set(&self, block: u64, end: u64, state: State) -> Result<()> {
        let mut at = block;
        while at < end {
            let chunk = self.chunk(at / PER_CHUNK)?;
            let chunk_end = (at / PER_CHUNK + 1).saturating_mul(PER_CHUNK).min(end);
            while at < chunk_end {
                let first = at % PER_WORD;
                let count = (PER_WORD - first).min(chunk_end - at);
                let mask = (u64::MAX >> (64 - count * 2)) << (first * 2);
                let fill = (LOW_BITS * bits(state)) & mask;
                let change = |old: u64| Some(old & !mask | fill);
                // The closure never declines, so there is no error to handle.
                let _ = chunk.word(at).fetch_update(Ordering::AcqRel, Ordering::Acquire, change);
                at += count;
            }
            chunk.dirty.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Takes what has changed since the last call.
    pub fn changes(&self) -> Changes {
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        let changed = chunks.iter().filter(|(_, c)| c.dirty.swap(false, Ordering::AcqRel));
        let copy = |c: &Chunk| c.words.iter().flat_map(|w| w.load(Ordering::Acquire).to_le_bytes()).collect();
        Changes(changed.map(|(index, c)| (*index, Arc::clone(c), copy(c))).collect())
    }

    /// Whether so many chunks are changed that they should be written back.
    pub fn is_crowded(&self) -> bool {
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        chunks.len() >= MAX_LOADED && chunks.values().all(|c| c.dirty.load(Ordering::Acquire))
    }

    #[cfg(test)]
    pub fn loaded(&self) -> usize {
        self.chunks.read().unwrap().len()
    }

    /// Writes changes and waits until they are on the medium.
    pub fn write(&self, changes: &Changes) -> Result<()> {
        if changes.0.is_empty() {
            return Ok(());
        }
        for (index, _held, bytes) in &changes.0 {
            let offset = PAGE.saturating_add(index.saturating_mul(PAGE));
            self.file.write_all_at(bytes, offset).map_err(Error::io("write the top's block map"))?;
        }
        self.sync()
    }

    /// Grows the map to a disk of `size` bytes, durably.
    pub fn grow(&self, size: u64) -> Result<()> {
        format(&self.file, size)?;
        self.sync()
    }

    fn sync(&self) -> Result<()> {
        rustix::fs::fdatasync(&self.file).map_err(|e| Error::io("sync the top's block map")(e.into()))
    }
}

impl Chunk {
    fn word(&self, block: u64) -> &AtomicU64 {
        static NONE: AtomicU64 = AtomicU64::new(0);
        // Every chunk has WORDS words, so the fallback is never used; it spares a panic path.
        self.words.get((block % PER_CHUNK / PER_WORD) as usize).unwrap_or(&NONE)
    }
}
