//! The block stack: one disk out of layer files, frozen tops and a writable top.
//!
//! ```text
//!   request ─> top ─absent─> frozen tops, newest first ─absent─> table ─> layer file | zeros
//!               └─data─> its data file       └─ ...
//! ```
//! A request is cut into runs that lie in one file; each run is one vectored system call at the request's own offset,
//! straight from or to the caller's buffers.

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut},
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use crate::{
    sys::{Bufs, BufsMut},
    Error, ReadAt, Result, State, Table, Top, SECTOR,
};

/// The two files of a top.
#[derive(Debug)]
pub struct TopFiles {
    /// The sparse data file.
    pub data: File,
    /// The map of its blocks.
    pub map: File,
}

/// A top that is ready to be stacked on a disk, see [`Stack::next_top`].
#[derive(Debug)]
pub struct NextTop(Top);

/// The files of a stack, as they are passed into the VMM's jail.
#[derive(Debug)]
pub struct StackFiles {
    /// The merged table of the layers (see [`crate::Table`]); opened read-only, never changed again.
    pub table: File,
    /// The layers' data files, base first, opened read-only. The table says how many there must be.
    pub layers: Vec<File>,
    /// Tops that were written once and are frozen now, oldest first.
    pub frozen: Vec<TopFiles>,
    /// The writable top; `None` opens the disk read-only.
    pub top: Option<TopFiles>,
}

/// A virtual disk. Every method takes `&self` and may be called from many threads at once; requests that overlap in
/// time and range have no order among them, as on a real disk.
///
/// System calls of a running stack (for the VMM's seccomp filter): `preadv`, `pwritev`, `pread64`, `pwrite64`,
/// `fdatasync`, `fallocate`, `fsync` and `ftruncate` (grow), `statx` (freeze), `futex`, and those of the allocator.
/// Opening one also needs `mmap` and `munmap`.
#[derive(Debug)]
pub struct Stack {
    base: Base,
    writable: bool,
    /// Oldest first. Requests hold it shared, which is what freezing and growing wait for.
    tops: RwLock<Vec<Top>>,
}

/// The layers and their table.
#[derive(Debug)]
struct Base {
    table: Table,
    layers: Vec<File>,
}

/// A stack from some top downwards.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    base: &'a Base,
    tops: &'a [Top],
}

impl View<'_> {
    fn split(&self) -> Option<(&Top, View<'_>)> {
        let (top, below) = self.tops.split_last()?;
        Some((top, View { base: self.base, tops: below }))
    }

    /// Fills `len` bytes, `skip` bytes into the buffers, from `pos`. What lies past the end of this part is zeros.
    fn read(&self, pos: u64, bufs: BufsMut<'_>, skip: u64, len: u64) -> Result<()> {
        let Some((top, below)) = self.split() else {
            return self.read_base(pos, bufs, skip, len);
        };
        let end = pos.saturating_add(len);
        let within = end.min(top.size());
        let mut at = pos;
        while at < within {
            let (state, stop) = top.run(at, within)?;
            let (skip, len) = (skip.saturating_add(at - pos), stop - at);
            match state {
                State::Data => bufs.read_from(skip, len, &top.data, at).map_err(Error::io("read the disk's top"))?,
                State::Zero => bufs.fill_zero(skip, len),
                State::Absent => below.read(at, bufs, skip, len)?,
            }
            at = stop;
        }
        bufs.fill_zero(skip.saturating_add(at - pos), end - at);
        Ok(())
    }

    fn read_base(&self, pos: u64, bufs: BufsMut<'_>, skip: u64, len: u64) -> Result<()> {
        let end = pos.saturating_add(len);
        let mut at = pos;
        while at < end {
            let (layer, stop) = self.base.table.find(at);
            let stop = stop.min(end);
            let (skip, len) = (skip.saturating_add(at - pos), stop - at);
            match layer.and_then(|n| self.base.layers.get(usize::from(n))) {
                Some(file) => bufs.read_from(skip, len, file, at).map_err(Error::io("read a disk layer"))?,
                None => bufs.fill_zero(skip, len),
            }
            at = stop;
        }
        Ok(())
    }

    /// Fills a slice from `pos`.
    pub fn read_slice(&self, pos: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        self.read(pos, BufsMut::new(&mut [IoSliceMut::new(buf)]), 0, len)
    }

    /// Whether `pos` reads as zeros or from some file (data), and the end of the run, at most `end`.
    pub fn run(&self, pos: u64, end: u64) -> Result<(State, u64)> {
        let Some((top, below)) = self.split() else {
            let (layer, stop) = self.base.table.find(pos);
            return Ok((if layer.is_some() { State::Data } else { State::Zero }, stop.min(end)));
        };
        if pos >= top.size() {
            return Ok((State::Zero, end));
        }
        match top.run(pos, end.min(top.size()))? {
            (State::Absent, stop) => below.run(pos, stop),
            decided => Ok(decided),
        }
    }

    #[cfg(test)]
    pub fn loaded_chunks(&self) -> usize {
        self.tops.iter().map(Top::loaded_chunks).sum()
    }

    /// What the tops alone say of `pos`: absent where the layers decide, or nothing does.
    pub fn top_run(&self, pos: u64, end: u64) -> Result<(State, u64)> {
        let Some((top, below)) = self.split() else {
            return Ok((State::Absent, end));
        };
        if pos >= top.size() {
            // A disk only grows, so nothing below reaches here, unless the layers were cut off by a smaller top.
            let cut_off = pos < self.base.table.virtual_size();
            return Ok((if cut_off { State::Zero } else { State::Absent }, end));
        }
        match top.run(pos, end.min(top.size()))? {
            (State::Absent, stop) => below.top_run(pos, stop),
            decided => Ok(decided),
        }
    }
}

impl Stack {
    /// Opens a disk; `read_only` refuses writes even if there is a top.
    ///
    /// # Errors
    /// A file is damaged, or they do not fit together.
    pub fn open(files: StackFiles, read_only: bool) -> Result<Stack> {
        let table = Table::open(&files.table)?;
        let (want, have) = (usize::from(table.layers()), files.layers.len());
        if want != have {
            let what = format!("it was made for {want} layers, but {have} are given");
            return Err(Error::BadFile { file: "disk table", what });
        }
        check_lengths(&table, &files.layers)?;
        let writable = files.top.is_some() && !read_only;
        let mut tops = Vec::with_capacity(files.frozen.len().saturating_add(1));
        for TopFiles { data, map } in files.frozen.into_iter().chain(files.top) {
            tops.push(Top::open(data, map)?);
        }
        Ok(Stack { base: Base { table, layers: files.layers }, writable, tops: RwLock::new(tops) })
    }

    fn shared(&self) -> RwLockReadGuard<'_, Vec<Top>> {
        self.tops.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, Vec<Top>> {
        self.tops.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `with` with the whole stack as it is now; no freeze or grow happens meanwhile.
    pub(crate) fn with_view<T>(&self, with: impl FnOnce(View<'_>) -> T) -> T {
        with(View { base: &self.base, tops: &self.shared() })
    }

    /// The disk's size in bytes, a multiple of 512.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.shared().last().map_or(self.base.table.virtual_size(), Top::size)
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        !self.writable
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// The request is unaligned or out of range, or a file cannot be read.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.readv_at(offset, &mut [IoSliceMut::new(buf)])
    }

    /// Fills the buffers, one after the other, from `offset`.
    ///
    /// # Errors
    /// As [`Stack::read_at`]; alignment is asked of the total, not of each buffer.
    pub fn readv_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.read_bufs(offset, BufsMut::new(bufs))
    }

    pub(crate) fn read_bufs(&self, offset: u64, bufs: BufsMut<'_>) -> Result<()> {
        let tops = self.shared();
        let view = View { base: &self.base, tops: &tops };
        let len = bufs.len();
        self.check(&tops, offset, len)?;
        view.read(offset, bufs, 0, len)
    }

    /// Writes `buf` at `offset`. It is durable after the next [`Stack::flush`].
    ///
    /// # Errors
    /// The request is unaligned or out of range, the disk read-only, or a file cannot be written.
    pub fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.writev_at(offset, &[IoSlice::new(buf)])
    }

    /// Writes the buffers, one after the other, at `offset`.
    ///
    /// # Errors
    /// As [`Stack::write_at`].
    pub fn writev_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.write_bufs(offset, Bufs::new(bufs))
    }

    pub(crate) fn write_bufs(&self, offset: u64, bufs: Bufs<'_>) -> Result<()> {
        self.change(offset, bufs.len(), |top, below| top.write(offset, bufs, below))
    }

    /// Makes every write that had completed before the call durable: the data first, then the map; in a top that was
    /// frozen since first, then in the one in use.
    ///
    /// # Errors
    /// A file cannot be synced; the disk refuses writes from then on, since the kernel may have dropped what it could
    /// not write.
    pub fn flush(&self) -> Result<()> {
        let tops = self.shared();
        self.flush_frozen_of(&tops)?;
        match tops.last() {
            Some(top) if self.writable => top.flush(),
            _ => Ok(()),
        }
    }

    /// The second half of a freeze that [`Stack::push`] began: makes durable what was written to the frozen tops. A
    /// [`Stack::flush`] does it too.
    ///
    /// # Errors
    /// As [`Stack::flush`].
    pub fn flush_frozen(&self) -> Result<()> {
        self.flush_frozen_of(&self.shared())
    }

    /// Tops that were flushed before they were frozen, or opened frozen, have nothing to flush.
    fn flush_frozen_of(&self, tops: &[Top]) -> Result<()> {
        let (true, Some((top, frozen))) = (self.writable, tops.split_last()) else { return Ok(()) };
        frozen.iter().try_for_each(Top::flush).inspect_err(|_| top.poison())
    }

    /// Gives up the content of a range; whole 4 KiB blocks read as zeros afterwards, the rest is kept.
    ///
    /// # Errors
    /// As [`Stack::write_at`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.saturating_add(len);
        self.change(offset, len, |top, below| top.zero(offset, end, true, below))
    }

    /// Makes a range read as zeros, freeing the host's space.
    ///
    /// # Errors
    /// As [`Stack::write_at`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.saturating_add(len);
        self.change(offset, len, |top, below| top.zero(offset, end, false, below))
    }

    /// Makes the disk `size` bytes long; what is new reads as zeros. Durable on return.
    ///
    /// # Errors
    /// `size` is smaller than the disk or no multiple of 512, the disk is read-only, or a file cannot be written.
    pub fn grow(&self, size: u64) -> Result<()> {
        let tops = self.exclusive();
        let (true, Some(top)) = (self.writable, tops.last()) else {
            return Err(Error::ReadOnly);
        };
        let now = top.size();
        if size < now {
            return Err(Error::OutOfRange { offset: size, len: 0, size: now });
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::Unaligned { offset: size, len: 0 });
        }
        top.flush()?;
        top.grow(size)
    }

    /// Flushes the top and stacks a new, empty one (see [`crate::Top::create`]; made for this disk's size) on it.
    /// Waits for the requests that are under way; those that follow go to the new top. On return the old top's files
    /// hold exactly what was written before and never change again.
    ///
    /// # Errors
    /// The flush failed, the new top does not fit, or the disk is read-only; the old top then stays in use.
    pub fn freeze(&self, new_top: TopFiles) -> Result<()> {
        let new = self.next_top(new_top)?;
        // Most of the data goes out before anyone has to wait.
        self.flush()?;
        let mut tops = self.exclusive();
        self.check_next(&tops, &new)?;
        self.flush_frozen_of(&tops)?;
        if let Some(top) = tops.last() {
            top.flush()?;
        }
        tops.push(new.0);
        Ok(())
    }

    /// Opens a new, empty top for this disk, to be stacked by [`Stack::push`].
    ///
    /// # Errors
    /// The new top does not fit, or the disk is read-only.
    pub fn next_top(&self, files: TopFiles) -> Result<NextTop> {
        let new = NextTop(Top::open(files.data, files.map)?);
        self.check_next(&self.shared(), &new)?;
        Ok(new)
    }

    /// The first half of a freeze, which makes no system call: stacks `new` on the top in use. Waits for the requests
    /// that are under way; those that follow go to the new top, and the old one's content never changes again. Its files
    /// hold it after the next [`Stack::flush_frozen`] or [`Stack::flush`]; a flush that the guest asks for covers both.
    ///
    /// # Errors
    /// The new top does not fit any more, or the disk is read-only; the old top then stays in use.
    pub fn push(&self, new: NextTop) -> Result<()> {
        let mut tops = self.exclusive();
        self.check_next(&tops, &new)?;
        tops.push(new.0);
        Ok(())
    }

    fn check_next(&self, tops: &[Top], NextTop(new): &NextTop) -> Result<()> {
        let (true, Some(top)) = (self.writable, tops.last()) else {
            return Err(Error::ReadOnly);
        };
        if new.size() != top.size() {
            let what = format!("it is for a disk of {} bytes, this one has {}", new.size(), top.size());
            return Err(Error::BadFile { file: "new top", what });
        }
        Ok(())
    }

    fn change(&self, offset: u64, len: u64, with: impl FnOnce(&Top, View<'_>) -> Result<()>) -> Result<()> {
        let tops = self.shared();
        self.check(&tops, offset, len)?;
        let (true, Some((top, below))) = (self.writable, tops.split_last()) else {
            return Err(Error::ReadOnly);
        };
        with(top, View { base: &self.base, tops: below })
    }

    fn check(&self, tops: &[Top], offset: u64, len: u64) -> Result<()> {
        let size = tops.last().map_or(self.base.table.virtual_size(), Top::size);
        if !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
            return Err(Error::Unaligned { offset, len });
        }
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::OutOfRange { offset, len, size });
        }
        Ok(())
    }
}

/// Makes sure at open that no read inside the disk can meet the end of a layer's file.
fn check_lengths(table: &Table, layers: &[File]) -> Result<()> {
    let mut need = vec![0_u64; layers.len()];
    for extent in table.extents() {
        if let Some(end) = extent.layer.and_then(|n| need.get_mut(usize::from(n))) {
            *end = extent.start.saturating_add(extent.len);
        }
    }
    for (i, (file, need)) in layers.iter().zip(need).enumerate() {
        let length = ReadAt::size(file).map_err(Error::io("read a disk layer"))?;
        if length < need {
            let what = format!("number {i} has {length} bytes, the table needs {need}");
            return Err(Error::BadFile { file: "disk layer's data file", what });
        }
    }
    Ok(())
}
