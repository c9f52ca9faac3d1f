//! The block stack: one disk out of layer files, frozen tops and a writable top.

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut},
};

use crate::Result;

/// The two files of a top.
#[derive(Debug)]
pub struct TopFiles {
    /// The sparse data file.
    pub data: File,
    /// The map of its blocks.
    pub map: File,
}

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
/// `fdatasync`, `fallocate`, `ftruncate` (grow, freeze), `futex`, and those of the allocator. Opening one also needs
/// `fstat`, `mmap` and `munmap`.
#[derive(Debug)]
pub struct Stack {}

impl Stack {
    /// Opens a disk; `read_only` refuses writes even if there is a top.
    ///
    /// # Errors
    /// A file is damaged, or they do not fit together.
    pub fn open(files: StackFiles, read_only: bool) -> Result<Stack> {
        let _ = (files, read_only);
        unimplemented!()
    }

    /// The disk's size in bytes, a multiple of 512.
    #[must_use]
    pub fn size(&self) -> u64 {
        0
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        false
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
        let _ = (offset, bufs);
        unimplemented!()
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
        let _ = (offset, bufs);
        unimplemented!()
    }

    /// As [`Stack::readv_at`], into raw memory such as a guest's.
    ///
    /// # Errors
    /// As [`Stack::read_at`].
    ///
    /// # Safety
    /// Every `iovec` must point to memory that stays mapped and writable during the call and to which this process
    /// holds no Rust reference. Others, the guest too, may change it at any time.
    #[allow(unsafe_code, reason = "the contract of raw guest memory; it is upheld in sys.rs")]
    pub unsafe fn readv_raw(&self, offset: u64, bufs: &[libc::iovec]) -> Result<()> {
        let _ = (offset, bufs);
        unimplemented!()
    }

    /// As [`Stack::writev_at`], from raw memory such as a guest's.
    ///
    /// # Errors
    /// As [`Stack::write_at`].
    ///
    /// # Safety
    /// Every `iovec` must point to memory that stays mapped and readable during the call. Others, the guest too, may
    /// change it at any time.
    #[allow(unsafe_code, reason = "the contract of raw guest memory; it is upheld in sys.rs")]
    pub unsafe fn writev_raw(&self, offset: u64, bufs: &[libc::iovec]) -> Result<()> {
        let _ = (offset, bufs);
        unimplemented!()
    }

    /// Makes every write that had completed before the call durable: the data first, then the map.
    ///
    /// # Errors
    /// A file cannot be synced; the disk refuses writes from then on, since the kernel may have dropped what it could
    /// not write.
    pub fn flush(&self) -> Result<()> {
        unimplemented!()
    }

    /// Gives up the content of a range; whole blocks read as zeros afterwards, the rest is kept.
    ///
    /// # Errors
    /// As [`Stack::write_at`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let _ = (offset, len);
        unimplemented!()
    }

    /// Makes a range read as zeros, freeing the host's space.
    ///
    /// # Errors
    /// As [`Stack::write_at`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let _ = (offset, len);
        unimplemented!()
    }

    /// Makes the disk `size` bytes long; what is new reads as zeros. Durable on return.
    ///
    /// # Errors
    /// `size` is smaller than the disk or no multiple of 512, the disk is read-only, or a file cannot be written.
    pub fn grow(&self, size: u64) -> Result<()> {
        let _ = size;
        unimplemented!()
    }

    /// Flushes the top and stacks a new, empty one (see [`crate::Top::create`]; made for this disk's size) on it.
    /// Waits for the requests that are under way; those that follow go to the new top. On return the old top's files
    /// hold exactly what was written before and never change again.
    ///
    /// # Errors
    /// The flush failed, the new top does not fit, or the disk is read-only; the old top then stays in use.
    pub fn freeze(&self, new_top: TopFiles) -> Result<()> {
        let _ = new_top;
        unimplemented!()
    }
}
