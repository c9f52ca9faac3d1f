//! Guest RAM, in one or two ranges around the hole below 4 GiB: anonymous private memory without reserve for a machine
//! that boots, a private mapping of the snapshot's memory file for one that is restored.
//!
//! Anonymous rather than a memfd: transparent huge pages work for it on every host (shmem has them off by default),
//! and write-protecting 4 GiB of it for a snapshot takes 1.4 ms when the pages are huge, 90 ms for a memfd's small
//! ones. A restored machine maps its memory file instead; nobody else maps a booted machine's memory, so nothing needs
//! it as a file. Without reserve, since the machine's cgroup is what limits it.
//!
//! The private mapping of a file costs the same whatever its size: pages come from the page cache, which all clones of a
//! snapshot share, and a page that the guest writes becomes this machine's own. Locked, it is locked on fault: what the
//! guest has never touched is neither read nor copied.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use ovms_devices::dirty::DirtyLog;
use ovms_devices::virtio::MemoryDiscard;
use ovms_devices::GuestMemory;
use thiserror::Error;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::layout;

/// Size of a huge page; ranges are aligned to it in the host so that they can be backed by huge pages.
const HUGE_PAGE: usize = 2 << 20;
const PAGE: u64 = 4096;
/// As MADV_DONTNEED, of locked memory (include/uapi/asm-generic/mman-common.h).
const MADV_DONTNEED_LOCKED: libc::c_int = 24;

/// Why guest memory cannot be made.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The kernel refused the mapping.
    #[error("cannot map {} MiB of guest memory", bytes >> 20)]
    Map {
        /// Size of the range in bytes.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is not the guest's memory.
    #[error("the memory file of the snapshot has {found} bytes, the machine's memory {needed}")]
    File {
        /// Its size; 0 if it is no regular file.
        found: u64,
        /// The size of the memory.
        needed: u64,
    },
    /// The kernel does not say what the file is.
    #[error("the memory file of the snapshot cannot be examined")]
    Examine(#[source] io::Error),
    /// Memory may not be locked.
    #[error(
        "{} MiB of guest memory cannot be locked: raise RLIMIT_MEMLOCK of the engine or do without mlock_required",
        bytes >> 20
    )]
    Lock {
        /// Size of the range in bytes.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The ranges do not make a memory map.
    #[error("{0} bytes of guest memory cannot be laid out")]
    Layout(u64),
}

/// All of a machine's RAM. Clones share it; it is never unmapped, since KVM and the device threads use it as long as
/// the process lives.
#[derive(Clone, Debug)]
pub struct Ram {
    memory: Arc<GuestMemory>,
    size: u64,
    keep_discarded: Arc<AtomicBool>,
}

impl Ram {
    /// Maps `size` bytes. No page is touched.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn map(size: u64) -> Result<Self, MemoryError> {
        Self::with(size, |_, bytes, length| {
            let start = reserve(length).map_err(|source| MemoryError::Map { bytes, source })?;
            advise(start, length);
            Ok(start)
        })
    }

    /// Maps `file`, which holds the `size` bytes of memory of a machine that is restored, without the hole. The file is
    /// never written. With `lock`, every page stays in RAM once it is touched; that takes the privilege to lock memory.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn restore(file: &File, size: u64, lock: bool) -> Result<Self, MemoryError> {
        let metadata = file.metadata().map_err(MemoryError::Examine)?;
        let found = if metadata.is_file() { metadata.len() } else { 0 };
        // Beyond the end of a file there is only SIGBUS.
        if found != size {
            return Err(MemoryError::File { found, needed: size });
        }
        let mut offset = 0;
        Self::with(size, |_, bytes, length| {
            let start = reserve(length).map_err(|source| MemoryError::Map { bytes, source })?;
            map_file(start, length, file, offset).map_err(|source| MemoryError::Map { bytes, source })?;
            offset = offset.saturating_add(bytes);
            if lock {
                lock_on_fault(start, length).map_err(|source| MemoryError::Lock { bytes, source })?;
            }
            Ok(start)
        })
    }

    /// Makes memory of the ranges that `make` maps, given address, size and length.
    fn with(
        size: u64,
        mut make: impl FnMut(u64, u64, usize) -> Result<*mut u8, MemoryError>,
    ) -> Result<Self, MemoryError> {
        let mut regions = Vec::with_capacity(2);
        for (start, bytes) in ranges(size) {
            let length = usize::try_from(bytes).map_err(|_| MemoryError::Layout(size))?;
            let pointer = make(start, bytes, length)?;
            let log = DirtyLog::with_len(length);
            // SAFETY: `make` has just mapped `length` bytes at `pointer` for this process alone, and they are never
            // unmapped.
            let builder = unsafe { MmapRegionBuilder::new_with_bitmap(length, log).with_raw_mmap_pointer(pointer) };
            let region = builder
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .build()
                .map_err(|err| MemoryError::Map { bytes, source: io::Error::other(err) })?;
            regions.push(GuestRegionMmap::new(region, GuestAddress(start)).ok_or(MemoryError::Layout(size))?);
        }
        let memory = GuestMemory::from_regions(regions).map_err(|_| MemoryError::Layout(size))?;
        Ok(Self { memory: Arc::new(memory), size, keep_discarded: Arc::default() })
    }

    /// The memory as devices see it.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether to keep what the guest gives back: a snapshot that is being taken may still have to copy it.
    pub fn keep_discarded(&self, keep: bool) {
        self.keep_discarded.store(keep, Ordering::SeqCst);
    }

    /// The ranges of pages: the first one's number in the memory without the hole, its number in this process's address
    /// space, how many there are.
    pub fn host_pages(&self) -> Vec<(u64, u64, u64)> {
        let mut first = 0u64;
        let ranges = self.memory.iter().map(|region| {
            let pages = region.len() / PAGE;
            let range = (first, region.as_ptr() as u64 / PAGE, pages);
            first = first.saturating_add(pages);
            range
        });
        ranges.collect()
    }

    /// Maps `len` bytes from `offset` of the memory without the hole on, and reads what is missing of its file. Both are
    /// multiples of the page size; what lies beyond memory is left out. Only advice: what fails is read when it is
    /// touched.
    pub fn read_ahead(&self, offset: u64, len: u64) {
        let mut begin = 0u64;
        for region in self.memory.iter() {
            let end = begin.saturating_add(region.len());
            let (from, to) = (offset.max(begin), offset.saturating_add(len).min(end));
            if from < to {
                // SAFETY: the range lies inside the region, whose mapping lives as long as the process; mapping pages of it
                // changes nothing that it holds.
                unsafe {
                    let start = region.as_ptr().add((from - begin) as usize);
                    libc::madvise(start.cast(), (to - from) as usize, libc::MADV_POPULATE_READ);
                }
            }
            begin = end;
        }
    }

    /// End of the RAM below 4 GiB.
    pub fn low_end(&self) -> u64 {
        self.size.min(layout::LOW_RAM_LIMIT)
    }

    /// End of the RAM above 4 GiB; none if there is no such RAM.
    pub fn high_end(&self) -> Option<u64> {
        let beyond = self.size.checked_sub(layout::LOW_RAM_LIMIT).filter(|rest| *rest > 0)?;
        layout::HIGH_RAM_START.checked_add(beyond)
    }
}

impl MemoryDiscard for Ram {
    fn discard(&self, address: u64, len: u64) {
        if self.keep_discarded.load(Ordering::SeqCst) {
            return;
        }
        for region in self.memory.iter() {
            let (start, end) = (region.start_addr().0, region.start_addr().0.saturating_add(region.len()));
            let (from, to) = (address.max(start), address.saturating_add(len).min(end));
            if from >= to {
                continue;
            }
            let offset = (from - start) as usize;
            // SAFETY: the range lies inside the region, whose mapping lives as long as the process. Guest memory is
            // only ever accessed through volatile accesses, for which pages that turn to zeroes, or to what the
            // snapshot's file holds, are no surprise.
            unsafe {
                let (start, length) = (region.as_ptr().add(offset).cast(), (to - from) as usize);
                // Locked memory takes a word of its own, since Linux 5.18.
                if libc::madvise(start, length, libc::MADV_DONTNEED) != 0 {
                    libc::madvise(start, length, MADV_DONTNEED_LOCKED);
                }
            }
        }
    }
}

/// The ranges (start, length) that `size` bytes of RAM occupy.
fn ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(layout::LOW_RAM_LIMIT);
    let high = size.saturating_sub(layout::LOW_RAM_LIMIT);
    [(0, low), (layout::HIGH_RAM_START, high)].into_iter().filter(|(_, length)| *length > 0).collect()
}

/// Maps `length` bytes of anonymous memory, aligned to a huge page.
fn reserve(length: usize) -> io::Result<*mut u8> {
    let padded = length.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::InvalidInput)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let base = unsafe { libc::mmap(ptr::null_mut(), padded, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let base = base.cast::<u8>();
    let skip = base.align_offset(HUGE_PAGE);
    // SAFETY: `skip` is less than HUGE_PAGE, so `skip + length` stays within the `padded` bytes just mapped, and the
    // two ends that are unmapped are referred to by nothing. Both are whole pages.
    unsafe {
        let start = base.add(skip);
        if skip > 0 {
            libc::munmap(base.cast(), skip);
        }
        if skip < HUGE_PAGE {
            libc::munmap(start.add(length).cast(), HUGE_PAGE - skip);
        }
        Ok(start)
    }
}

/// Says how `length` bytes of anonymous memory at `start`, which [`reserve`] gave, will be used.
fn advise(start: *mut u8, length: usize) {
    // SAFETY: advice for a range that is mapped for this process alone, and none that changes what it holds.
    unsafe {
        // Only advice: a host without huge pages, or a kernel that cannot leave the range out of core dumps, is as
        // good. The first huge page stays small ones: it holds tables and a kernel's first steps, and zeroing all of
        // it is 0.1 ms on the way to a guest's first instruction.
        if length > HUGE_PAGE {
            libc::madvise(start.add(HUGE_PAGE).cast(), length - HUGE_PAGE, libc::MADV_HUGEPAGE);
        }
        libc::madvise(start.cast(), length, libc::MADV_DONTDUMP);
    }
}

/// Maps `file` from `offset` on over the `length` bytes at `start`, which [`reserve`] gave.
fn map_file(start: *mut u8, length: usize, file: &File, offset: u64) -> io::Result<()> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: replaces exactly the range that was reserved for this and that nothing refers to yet.
    unsafe {
        let mapped =
            libc::mmap(start.cast(), length, libc::PROT_READ | libc::PROT_WRITE, flags, file.as_raw_fd(), offset);
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        libc::madvise(start.cast(), length, libc::MADV_DONTDUMP);
    }
    Ok(())
}

/// Locks what is touched of the `length` bytes at `start` from now on; nothing is touched by it.
fn lock_on_fault(start: *mut u8, length: usize) -> io::Result<()> {
    // SAFETY: locking changes nothing of what the range holds; the kernel checks that it is mapped.
    match unsafe { libc::mlock2(start.cast(), length, libc::MLOCK_ONFAULT) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use vm_memory::Bytes;

    #[test]
    fn ranges_leave_the_hole_out() {
        assert_eq!(ranges(32 << 20), [(0, 32 << 20)]);
        assert_eq!(ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ranges((3 << 30) + (2 << 20)), [(0, 3 << 30), (4 << 30, 2 << 20)]);
    }

    #[test]
    fn map_gives_aligned_zeroed_memory_on_both_sides_of_the_hole() {
        let ram = Ram::map(5 << 30).unwrap();
        assert_eq!((ram.low_end(), ram.high_end()), (3 << 30, Some(6 << 30)));
        for address in [0, (3 << 30) - 8, 4 << 30, (6 << 30) - 8] {
            assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(address)).unwrap(), 0);
        }
        assert!(ram.memory().read_obj::<u64>(GuestAddress(3 << 30)).is_err());
        assert!(ram.memory().iter().all(|region| (region.as_ptr() as usize).is_multiple_of(HUGE_PAGE)));
    }

    /// A sparse file of `size` bytes with a word at some offsets.
    fn memory_file(size: u64, words: &[(u64, u64)]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (offset, word) in words {
            file.write_all_at(&word.to_le_bytes(), *offset).unwrap();
        }
        file
    }

    #[test]
    fn restore_shows_the_file_on_both_sides_of_the_hole_and_never_writes_it() {
        let size = (3 << 30) + (4 << 20);
        let file = memory_file(size, &[(8, 1), ((3 << 30) - 8, 2), (3 << 30, 3), (size - 8, 4)]);
        let ram = Ram::restore(&file, size, false).unwrap();
        let places = [8, (3 << 30) - 8, 4 << 30, (4 << 30) + (4 << 20) - 8];
        assert_eq!(places.map(|at| ram.memory().read_obj::<u64>(GuestAddress(at)).unwrap()), [1, 2, 3, 4]);
        for at in places {
            ram.memory().write_obj(9u64, GuestAddress(at)).unwrap();
        }
        let mut word = [0; 8];
        file.read_exact_at(&mut word, size - 8).unwrap();
        assert_eq!(word, 4u64.to_le_bytes());
        ram.discard(0, 4096);
        assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(8)).unwrap(), 1, "the file's own again");
    }

    #[test]
    fn restore_of_a_file_of_another_size_returns_file() {
        for found in [0, 32 << 20, (64 << 20) - 1, (64 << 20) + 4096] {
            let restored = Ram::restore(&memory_file(found, &[]), 64 << 20, false);
            assert!(matches!(restored, Err(MemoryError::File { found: f, .. }) if f == found), "{found}");
        }
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(Ram::restore(&null, 64 << 20, false), Err(MemoryError::File { found: 0, .. })));
    }

    #[test]
    fn discard_across_the_hole_zeroes_only_its_range() {
        let ram = Ram::map((3 << 30) + (4 << 20)).unwrap();
        let kept = (3 << 30) - 8192;
        for address in [kept, (3 << 30) - 4096, 4 << 30, (4 << 30) + 4096] {
            ram.memory().write_obj(7u64, GuestAddress(address)).unwrap();
        }
        ram.discard((3 << 30) - 4096, (1 << 30) + 3 * 4096);
        let read = |address| ram.memory().read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!([kept, (3 << 30) - 4096, 4 << 30, (4 << 30) + 4096].map(read), [7, 0, 0, 0]);
    }
}
