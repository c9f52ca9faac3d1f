//! Writing a RAM blob: several threads put chunks, in any order and again, while the machine runs; one finishes.
//!
//! ```text
//!  put ──compress──> claim a place ──pwrite──> note it     (only claiming and noting are under the lock)
//!  finish: drop dead space if it is worth it, then index, sections, head, prefix
//! ```
//! Until `finish` returns, the file has no prefix and is no RAM snapshot.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        atomic::{AtomicU64, Ordering},
        Mutex, PoisonError,
    },
};

use twox_hash::XxHash3_128;

use crate::{
    head::{Extent, HeadDocument},
    index::{chunk_count, chunk_len, is_zero, Entry, Kind, CHUNK},
    prefix::{digest, PREFIX},
    state_file::write_tail,
    Arch, Fingerprint, Head, Result, Section, SnapshotError,
};

/// Dead space is dropped if it is more than this part of the chunks' area.
const WORTH: u64 = 8;
/// A chunk is stored as it is unless lz4 saves this part of it: decoding costs more than reading.
const SAVES: usize = 16;
/// Bytes that are moved at once.
const MOVE: usize = 1 << 20;
/// Entries of the index that are written at once.
const INDEX_PIECE: usize = 4096;

/// How a chunk was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// All zero: no bytes.
    Zero,
    /// As it is: lz4 saves too little.
    Raw,
    /// Compressed.
    Compressed,
}

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Size of the blob in bytes.
    pub bytes: u64,
    /// Bytes of memory that it holds, uncompressed, without zero chunks and those left to the parent.
    pub content: u64,
    /// Chunks that are stored.
    pub chunks: u64,
}

/// Writes a RAM blob. Shared by reference between threads; dropping it without [`SnapshotWriter::finish`] leaves a file
/// that nothing takes for a RAM snapshot.
#[derive(Debug)]
pub struct SnapshotWriter {
    file: File,
    memory: u64,
    parent: Option<String>,
    /// Where the next chunk goes.
    end: AtomicU64,
    slots: Mutex<Slots>,
}

/// By chunk number. A chunk that was never put is all zero, or as in the parent.
#[derive(Debug)]
struct Slots {
    entries: Vec<Option<Entry>>,
    /// Bytes in the chunks' area that no entry needs.
    dead: u64,
}

impl SnapshotWriter {
    /// Begins a blob of `memory` bytes in an empty file that is open for reading and writing. `parent` is the digest of
    /// the blob that it is to be a diff on.
    ///
    /// # Errors
    /// [`SnapshotError::Unwritable`] if the memory's size or the parent cannot be, or the file is not empty;
    /// [`SnapshotError::Io`].
    pub fn create(file: File, memory: u64, parent: Option<String>) -> Result<Self> {
        let length = file.metadata().map_err(SnapshotError::io("read the file's length"))?.len();
        if length != 0 {
            return Err(SnapshotError::Unwritable(format!("its file is not empty, it has {length} bytes")));
        }
        let head = Head { arch: Arch::HOST, vcpus: 1, memory, parent, fingerprint: Fingerprint::default() };
        head.validate()?;
        let count = usize::try_from(chunk_count(memory)).unwrap_or(usize::MAX);
        let mut entries = Vec::new();
        if entries.try_reserve_exact(count).is_err() {
            return Err(SnapshotError::Unwritable(format!("there is no room for the index of {memory} bytes")));
        }
        entries.resize(count, None);
        let slots = Mutex::new(Slots { entries, dead: 0 });
        Ok(Self { file, memory, parent: head.parent, end: AtomicU64::new(PREFIX), slots })
    }

    /// Number of chunks in the memory.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        chunk_count(self.memory)
    }

    /// Bytes of one chunk: [`CHUNK`], the last one maybe less; 0 if there is no such chunk.
    #[must_use]
    pub fn chunk_len(&self, chunk: u64) -> usize {
        chunk_len(self.memory, chunk)
    }

    /// Stores a chunk in place of what was put for it before. `data` is a copy that nobody changes meanwhile. The same
    /// chunk must not be put by two threads at once.
    ///
    /// # Errors
    /// [`SnapshotError::Unwritable`] if there is no such chunk or `data` is not as long as it;
    /// [`SnapshotError::Io`], after which only giving up is left.
    pub fn put(&self, chunk: u64, data: &[u8]) -> Result<Stored> {
        let number = self.number(chunk)?;
        if data.len() != self.chunk_len(chunk) {
            let (have, need) = (data.len(), self.chunk_len(chunk));
            return Err(SnapshotError::Unwritable(format!("chunk {chunk} has {have} bytes, not {need}")));
        }
        if is_zero(data) {
            // In a diff it must be said, or the parent's content would show through.
            let entry = Entry { chunk: number, ..Entry::default() };
            self.note(number, self.parent.is_some().then_some(entry));
            return Ok(Stored::Zero);
        }
        let packed = lz4_flex::block::compress(data);
        let (kind, bytes) = match packed.len() {
            // Exact: neither is ever more than a chunk and a little.
            length if length < data.len().saturating_sub(data.len() / SAVES) => (Kind::Lz4, packed.as_slice()),
            _ => (Kind::Raw, data),
        };
        let length = bytes.len() as u32;
        let offset = self.end.fetch_add(u64::from(length), Ordering::Relaxed);
        self.file.write_all_at(bytes, offset).map_err(SnapshotError::io("write a chunk of the RAM snapshot"))?;
        self.note(number, Some(Entry { chunk: number, kind, length, offset, digest: digest(data) }));
        Ok(if kind == Kind::Lz4 { Stored::Compressed } else { Stored::Raw })
    }

    /// Leaves a chunk to the parent, whatever was put for it before.
    ///
    /// # Errors
    /// [`SnapshotError::Unwritable`] if there is no such chunk or no parent.
    pub fn same_as_parent(&self, chunk: u64) -> Result<()> {
        if self.parent.is_none() {
            return Err(SnapshotError::Unwritable("it has no parent that a chunk could be left to".into()));
        }
        self.note(self.number(chunk)?, None);
        Ok(())
    }

    fn number(&self, chunk: u64) -> Result<u32> {
        let number = u32::try_from(chunk).ok().filter(|_| chunk < self.chunks());
        number.ok_or_else(|| SnapshotError::Unwritable(format!("it has no chunk {chunk}")))
    }

    fn note(&self, number: u32, entry: Option<Entry>) {
        // Nothing panics under the lock, so what it guards is whole.
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(slot) = slots.entries.get_mut(number as usize) else { return };
        let old = std::mem::replace(slot, entry);
        slots.dead = slots.dead.saturating_add(old.map_or(0, |old| u64::from(old.length)));
    }

    /// Completes the blob: drops dead space where it is worth it, writes index, sections, head and prefix. Whoever
    /// publishes the file syncs it before.
    ///
    /// # Errors
    /// [`SnapshotError::Unwritable`] if a section cannot be stored, [`SnapshotError::Io`].
    pub fn finish(self, vcpus: u32, fingerprint: Fingerprint, sections: &[Section]) -> Result<Summary> {
        let head = Head { arch: Arch::HOST, vcpus, memory: self.memory, parent: self.parent, fingerprint };
        head.validate()?;
        let Slots { mut entries, dead } = self.slots.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut end = self.end.into_inner();
        if dead > end.saturating_sub(PREFIX) / WORTH {
            end = compact(&self.file, &mut entries)?;
        }
        let index = write_index(&self.file, &entries, end)?;
        let tail = end.saturating_add(index.length);
        let mut document = HeadDocument {
            vcpus,
            memory: head.memory,
            parent: head.parent.clone(),
            fingerprint: head.fingerprint.clone(),
            index: Some(index),
            sections: Vec::new(),
        };
        let bytes = write_tail(&self.file, &head, &mut document, tail, sections)?;
        let stored = || entries.iter().flatten().filter(|entry| entry.kind != Kind::Zero);
        let content = stored().map(|entry| chunk_len(head.memory, u64::from(entry.chunk)) as u64).sum();
        Ok(Summary { bytes, content, chunks: stored().count() as u64 })
    }
}

/// Writes the index in pieces, since that of a large machine would not fit beside it into the VMM's share of memory.
fn write_index(file: &File, entries: &[Option<Entry>], offset: u64) -> Result<Extent> {
    let (mut hasher, mut length) = (XxHash3_128::new(), 0_u64);
    let mut piece = Vec::new();
    for some in entries.chunks(INDEX_PIECE) {
        piece.clear();
        some.iter().flatten().for_each(|entry| entry.encode(&mut piece));
        hasher.write(&piece);
        let place = offset.saturating_add(length);
        file.write_all_at(&piece, place).map_err(SnapshotError::io("write the RAM snapshot's index"))?;
        length = length.saturating_add(piece.len() as u64);
    }
    Ok(Extent { offset, length, checksum: hasher.finish_128().to_le_bytes() })
}

/// Moves the chunks that are needed to the front, in the order in which they lie, and returns where they end. Places only
/// move down, so nothing is overwritten that was not moved before.
fn compact(file: &File, entries: &mut [Option<Entry>]) -> Result<u64> {
    let mut order: Vec<&mut Entry> = entries.iter_mut().flatten().filter(|entry| entry.kind != Kind::Zero).collect();
    order.sort_unstable_by_key(|entry| entry.offset);
    let mut mover = Mover { file, buffer: Vec::with_capacity(MOVE + CHUNK), to: PREFIX };
    for entry in order {
        entry.offset = mover.read(entry.offset, entry.length)?;
    }
    mover.flush()?;
    Ok(mover.to)
}

/// Collects chunks and writes them one after the other.
struct Mover<'a> {
    file: &'a File,
    buffer: Vec<u8>,
    /// Where the buffer's first byte goes.
    to: u64,
}

impl Mover<'_> {
    /// Takes over a chunk; returns its new place.
    fn read(&mut self, offset: u64, length: u32) -> Result<u64> {
        let start = self.buffer.len();
        let place = self.to.saturating_add(start as u64);
        self.buffer.resize(start.saturating_add(length as usize), 0);
        let into = self.buffer.get_mut(start..).unwrap_or_default();
        self.file.read_exact_at(into, offset).map_err(SnapshotError::io("read back the RAM snapshot"))?;
        if self.buffer.len() >= MOVE {
            self.flush()?;
        }
        Ok(place)
    }

    fn flush(&mut self) -> Result<()> {
        self.file.write_all_at(&self.buffer, self.to).map_err(SnapshotError::io("write the RAM snapshot"))?;
        self.to = self.to.saturating_add(self.buffer.len() as u64);
        self.buffer.clear();
        Ok(())
    }
}
