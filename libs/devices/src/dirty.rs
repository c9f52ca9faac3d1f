//! Which parts of guest memory this process has written by itself.
//!
//! KVM's dirty log sees what processors write; it does not see used rings, what a disk reads into guest buffers, or
//! console input. While a RAM snapshot is being taken these writes are noted here, [`GRAIN`] bytes to a bit, and both
//! are put together. Otherwise the log is off, and costs one load of a flag for each write.
//!
//! Whoever writes marks *after* the write. A reader that takes a mark and then copies has the whole write; one that
//! copies while a write is under way copies again, because the mark comes later.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

/// Bytes of memory that one bit stands for: the chunk of a RAM snapshot, which copies nothing smaller.
pub const GRAIN: usize = ovms_state::CHUNK;
const BITS: usize = u64::BITS as usize;

/// The log of one region of guest memory.
#[derive(Debug, Default)]
pub struct DirtyLog {
    on: AtomicBool,
    /// Made when the log is first switched on; kept, since marks may still be under way when it is switched off.
    words: OnceLock<Box<[AtomicU64]>>,
    /// Length of the region in bytes.
    len: usize,
}

impl DirtyLog {
    /// Notes writes from now on, beginning with none noted. A write that was under way may or may not be noted.
    pub fn start(&self) {
        let count = self.len.div_ceil(GRAIN).div_ceil(BITS);
        let words = self.words.get_or_init(|| (0..count).map(|_| AtomicU64::new(0)).collect());
        for word in words {
            word.store(0, Ordering::SeqCst);
        }
        self.on.store(true, Ordering::SeqCst);
    }

    /// Notes nothing any more.
    pub fn stop(&self) {
        self.on.store(false, Ordering::SeqCst);
    }

    /// Calls `with` for the number of each grain that was written since the log started or was last taken.
    pub fn take(&self, mut with: impl FnMut(usize)) {
        for (index, word) in self.words.get().into_iter().flatten().enumerate() {
            let mut bits = word.swap(0, Ordering::SeqCst);
            while bits != 0 {
                with(index.saturating_mul(BITS).saturating_add(bits.trailing_zeros() as usize));
                bits &= bits.wrapping_sub(1);
            }
        }
    }

    fn word(&self, grain: usize) -> Option<(&AtomicU64, u64)> {
        let word = self.words.get()?.get(grain / BITS)?;
        Some((word, 1 << (grain % BITS)))
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyLog {
    type S = DirtySlice<'a>;
}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 || !self.on.load(Ordering::SeqCst) {
            return;
        }
        let last = offset.saturating_add(len).saturating_sub(1) / GRAIN;
        for grain in offset / GRAIN..=last {
            // What lies outside of the region has no word.
            let Some((word, bit)) = self.word(grain) else { return };
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.word(offset / GRAIN).is_some_and(|(word, bit)| word.load(Ordering::SeqCst) & bit != 0)
    }

    fn slice_at(&self, offset: usize) -> DirtySlice<'_> {
        DirtySlice { log: self, offset }
    }
}

impl NewBitmap for DirtyLog {
    fn with_len(len: usize) -> Self {
        Self { len, ..Self::default() }
    }
}

/// The log of a region from some offset on.
#[derive(Clone, Copy, Debug)]
pub struct DirtySlice<'a> {
    log: &'a DirtyLog,
    offset: usize,
}

impl<'a> DirtySlice<'a> {
    /// The log of the whole region.
    pub fn log(&self) -> &'a DirtyLog {
        self.log
    }
}

impl<'a> WithBitmapSlice<'_> for DirtySlice<'a> {
    type S = DirtySlice<'a>;
}

impl BitmapSlice for DirtySlice<'_> {}

impl<'a> Bitmap for DirtySlice<'a> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark_dirty(self.offset.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.dirty_at(self.offset.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> DirtySlice<'a> {
        DirtySlice { log: self.log, offset: self.offset.saturating_add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestMemory;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

    fn taken(log: &DirtyLog) -> Vec<usize> {
        let mut grains = Vec::new();
        log.take(|grain| grains.push(grain));
        grains
    }

    #[test]
    fn marks_count_only_while_the_log_is_on() {
        let log = DirtyLog::with_len(100 * GRAIN);
        log.mark_dirty(0, 1);
        log.start();
        assert!(taken(&log).is_empty());
        log.mark_dirty(GRAIN - 1, 2);
        log.slice_at(GRAIN).slice_at(98 * GRAIN).mark_dirty(0, 1);
        log.mark_dirty(70 * GRAIN, 0);
        assert!(log.dirty_at(GRAIN) && !log.dirty_at(2 * GRAIN));
        assert_eq!(taken(&log), [0, 1, 99]);
        assert!(taken(&log).is_empty());
        log.stop();
        log.mark_dirty(0, GRAIN);
        assert!(taken(&log).is_empty());
    }

    #[test]
    fn mark_beyond_the_region_is_ignored() {
        let log = DirtyLog::with_len(GRAIN);
        log.start();
        log.mark_dirty(1000 * GRAIN, 1);
        log.mark_dirty(0, usize::MAX);
        assert_eq!(taken(&log).first(), Some(&0));
    }

    #[test]
    fn writes_through_guest_memory_are_noted_in_their_region() {
        let mem =
            GuestMemory::from_ranges(&[(GuestAddress(0), 4 * GRAIN), (GuestAddress(1 << 32), 4 * GRAIN)]).unwrap();
        mem.iter().for_each(|region| region.bitmap().log().start());
        mem.write_obj(1u64, GuestAddress((1 << 32) + 2 * GRAIN as u64)).unwrap();
        mem.write_slice(&[1; 3], GuestAddress(GRAIN as u64 - 1)).unwrap();
        let all: Vec<_> = mem.iter().map(|region| taken(region.bitmap().log())).collect();
        assert_eq!(all, [vec![0, 1], vec![2]]);
    }
}
