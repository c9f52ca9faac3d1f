//! The writable top of a stack: a sparse data file, with every block at its own offset, and a map of its 4 KiB blocks.
//!
//! ```text
//!              first write                write zeroes, discard
//!   absent ───────────────────> data <──────────────────────────> zero
//!      └────────────────────────────────────────────────────────────^
//! ```
//! Nothing in the data file counts until the map says so. A block's state changes in memory only after its bytes are in
//! the data file; a flush copies the changed parts of the map, syncs the data, and only then writes and syncs the map.
//! So at any crash every block has the content of its last flush, or of a later write.

mod blocks;
mod from_layer;
mod range_lock;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        Mutex, PoisonError,
    },
};

use blocks::BlockMap;
use range_lock::RangeLock;

use crate::{map::MapBuilder, stack::View, sys::Bufs, Error, LayerMap, ReadAt, Result, State};

/// A top on disk, writable or frozen.
#[derive(Debug)]
pub struct Top {
    pub(crate) data: File,
    map: BlockMap,
    size: AtomicU64,
    /// Held while a range's blocks change state, so that two partial writes of one block cannot lose each other.
    changing: RangeLock,
    /// Counts completed writes.
    written: AtomicU64,
    /// The count that the last flush covered; the lock makes flushes take turns.
    flushed: Mutex<u64>,
    /// A write-back failed: the kernel may have dropped pages, and a second fdatasync would not say so again.
    poisoned: AtomicBool,
}

impl Top {
    /// Bytes in a block, the unit of the map.
    pub const BLOCK: u64 = 4096;
    /// The longest that a data file is made at once: what ext4 holds. Beyond, writes make it longer where they can.
    const MAX_LENGTH: u64 = (16 << 40) - 4096;

    /// Makes a fresh top for a disk of `size` bytes out of two empty files. Both stay tiny on disk. Syncing is the
    /// caller's.
    ///
    /// # Errors
    /// The files cannot be written, or `size` is no multiple of 512.
    pub fn create(data: &File, map: &File, size: u64) -> Result<()> {
        blocks::format(map, size)?;
        data.set_len(size.min(Self::MAX_LENGTH)).map_err(Error::io("size the top's data file"))
    }

    /// Opens a top's two files as they were last flushed.
    ///
    /// # Errors
    /// The map is damaged or of another version, or a file cannot be read.
    pub fn open(data: File, map: File) -> Result<Top> {
        let (map, size) = BlockMap::open(map)?;
        let length = ReadAt::size(&data).map_err(Error::io("read the top's data file"))?;
        if length < size.min(Self::MAX_LENGTH) {
            let what = format!("it has {length} bytes, less than its disk's {size}");
            return Err(Error::BadFile { file: "top's data file", what });
        }
        Ok(Top {
            data,
            map,
            size: AtomicU64::new(size),
            changing: RangeLock::default(),
            written: AtomicU64::new(0),
            flushed: Mutex::new(0),
            poisoned: AtomicBool::new(false),
        })
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The top's map in the form of a layer's, so that its data file can become a layer as it is.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn to_layer_map(&self) -> Result<LayerMap> {
        let size = self.size();
        let mut builder = MapBuilder::default();
        let mut at = 0;
        while at < size {
            let (state, end) = self.run(at, size)?;
            builder.push_to(end, state)?;
            at = end;
        }
        builder.finish(size)
    }

    /// The state at `pos` and the end of the run that shares it, at most `end`. `pos < end <= size`.
    pub(crate) fn run(&self, pos: u64, end: u64) -> Result<(State, u64)> {
        let (state, stop) = self.map.run(pos / Self::BLOCK, end.div_ceil(Self::BLOCK))?;
        Ok((state, stop.saturating_mul(Self::BLOCK).min(end)))
    }

    /// Writes the buffers at `pos`, which must lie inside the disk. `below` is the stack under this top.
    pub(crate) fn write(&self, pos: u64, bufs: Bufs<'_>, below: View<'_>) -> Result<()> {
        self.check_health()?;
        let end = pos.saturating_add(bufs.len());
        if end == pos {
            return Ok(());
        }
        let written = || Error::io("write the disk's top");
        if self.run(pos, end)? == (State::Data, end) {
            bufs.write_to(&self.data, pos).map_err(written())?;
        } else {
            let (first, last) = (pos / Self::BLOCK, end.div_ceil(Self::BLOCK));
            let _changing = self.changing.lock(first, last);
            self.fill_edges(pos, end, below)?;
            bufs.write_to(&self.data, pos).map_err(written())?;
            self.map.set(first, last, State::Data)?;
        }
        self.written.fetch_add(1, Ordering::Release);
        if self.map.is_crowded() {
            self.flush()?;
        }
        Ok(())
    }

    /// Gives the blocks that a write from `pos` to `end` covers only in part their old content, so that they can become
    /// data as a whole.
    fn fill_edges(&self, pos: u64, end: u64, below: View<'_>) -> Result<()> {
        let size = self.size();
        let head = pos - pos % Self::BLOCK;
        let tail = end - end % Self::BLOCK;
        if head < pos {
            self.fill_block(head, size, below)?;
        }
        if tail < end && end < size && (tail != head || head == pos) {
            self.fill_block(tail, size, below)?;
        }
        Ok(())
    }

    fn fill_block(&self, start: u64, size: u64, below: View<'_>) -> Result<()> {
        let end = start.saturating_add(Self::BLOCK).min(size);
        let mut block = vec![0_u8; end.saturating_sub(start) as usize];
        match self.run(start, end)?.0 {
            State::Data => return Ok(()),
            State::Zero => {}
            State::Absent => below.read_slice(start, &mut block)?,
        }
        self.data.write_all_at(&block, start).map_err(Error::io("write the disk's top"))
    }

    /// Makes a range zero: whole blocks by their state, the rest by writing, or not at all if it is only a `discard`.
    pub(crate) fn zero(&self, pos: u64, end: u64, discard: bool, below: View<'_>) -> Result<()> {
        self.check_health()?;
        let size = self.size();
        let first = pos.next_multiple_of(Self::BLOCK);
        let last = if end == size { size } else { end - end % Self::BLOCK };
        if !discard {
            self.write_zeros(pos, first.min(end), below)?;
            self.write_zeros(last.max(first), end, below)?;
        }
        let mut at = first;
        while at < last {
            // One step of this size keeps a discard of a whole disk from holding the range for its whole length.
            let stop = at.saturating_add(1 << 30).min(last);
            self.zero_blocks(at, stop, below)?;
            at = stop;
        }
        self.written.fetch_add(1, Ordering::Release);
        if self.map.is_crowded() {
            self.flush()?;
        }
        Ok(())
    }

    fn write_zeros(&self, pos: u64, end: u64, below: View<'_>) -> Result<()> {
        if pos >= end {
            return Ok(());
        }
        let zeros = vec![0_u8; end.saturating_sub(pos) as usize];
        self.write(pos, Bufs::new(&[std::io::IoSlice::new(&zeros)]), below)
    }

    /// Zeroes whole blocks. Blocks that read as zeros already, from below, stay absent: a guest that discards its whole
    /// fresh disk must not make a diff of it.
    fn zero_blocks(&self, pos: u64, end: u64, below: View<'_>) -> Result<()> {
        let _changing = self.changing.lock(pos / Self::BLOCK, end.div_ceil(Self::BLOCK));
        let mut at = pos;
        while at < end {
            let (state, stop) = self.run(at, end)?;
            match state {
                State::Zero => {}
                State::Data => {
                    self.map.set(at / Self::BLOCK, stop.div_ceil(Self::BLOCK), State::Zero)?;
                    self.punch(at, stop)?;
                }
                State::Absent => {
                    let mut from = at;
                    while from < stop {
                        let (zero, to) = below.run(from, stop)?;
                        if zero == State::Data {
                            self.map.set(from / Self::BLOCK, to.div_ceil(Self::BLOCK), State::Zero)?;
                        }
                        from = to;
                    }
                }
            }
            at = stop;
        }
        Ok(())
    }

    /// Frees the host's space. Only a help: the map alone decides what is read.
    fn punch(&self, pos: u64, end: u64) -> Result<()> {
        use rustix::{fs::FallocateFlags as Flags, io::Errno};
        match rustix::fs::fallocate(&self.data, Flags::PUNCH_HOLE | Flags::KEEP_SIZE, pos, end.saturating_sub(pos)) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INTR) => Ok(()),
            Err(e) => Err(Error::io("free space in the disk's top")(e.into())),
        }
    }

    /// Makes every write that had completed before the call durable.
    pub(crate) fn flush(&self) -> Result<()> {
        let target = self.written.load(Ordering::Acquire);
        let mut flushed = self.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_health()?;
        if *flushed >= target {
            return Ok(());
        }
        let target = self.written.load(Ordering::Acquire);
        let changes = self.map.changes();
        let synced = rustix::fs::fdatasync(&self.data).map_err(|e| Error::io("sync the disk's top")(e.into()));
        if let Err(e) = synced.and_then(|()| self.map.write(&changes)) {
            self.poisoned.store(true, Ordering::Release);
            return Err(e);
        }
        *flushed = target;
        Ok(())
    }

    /// Makes the disk `size` bytes long, durably. No request may be under way.
    pub(crate) fn grow(&self, size: u64) -> Result<()> {
        self.check_health()?;
        let length = ReadAt::size(&self.data).map_err(Error::io("size the top's data file"))?;
        let length = length.max(size.min(Self::MAX_LENGTH));
        self.data.set_len(length).map_err(Error::io("size the top's data file"))?;
        rustix::fs::fsync(&self.data).map_err(|e| Error::io("sync the disk's top")(e.into()))?;
        self.map.grow(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Refuses every change from now on: a top below could not be made durable.
    pub(crate) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    #[cfg(test)]
    pub(crate) fn loaded_chunks(&self) -> usize {
        self.map.loaded()
    }

    fn check_health(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(Error::Poisoned);
        }
        Ok(())
    }
}
