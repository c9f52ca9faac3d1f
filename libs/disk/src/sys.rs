//! Everything of this crate that needs `unsafe`: the mapped table, and vectored I/O on memory that Rust does not own.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    marker::PhantomData,
    os::fd::AsRawFd,
    ptr,
};

use libc::{c_void, iovec};

use crate::{Result, Stack};

/// A read-only mapping of a file of 64-bit words.
#[derive(Debug)]
pub(crate) struct MappedWords {
    addr: ptr::NonNull<c_void>,
    count: usize,
}

// SAFETY: the mapping is only read, through `&self`, and unmapped once, on drop.
unsafe impl Send for MappedWords {}
// SAFETY: as above; shared reads of memory that nobody writes.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// Maps the first `count` words. The file must be that long and never change: the table file's owner (snapshotter
    /// or engine) writes it once, then renames it into place, and it is opened read-only everywhere else.
    pub fn map(file: &File, count: usize) -> io::Result<MappedWords> {
        let len = count.checked_mul(8).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing of ours.
        let addr = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let addr = ptr::NonNull::new(addr).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(MappedWords { addr, count })
    }

    pub fn words(&self) -> &[u64] {
        // SAFETY: `map` mapped `count` words, page-aligned, and they stay until drop; the file never changes (see `map`).
        unsafe { std::slice::from_raw_parts(self.addr.as_ptr().cast::<u64>(), self.count) }
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, has this length, and no reference into it can outlive `self`.
        unsafe { libc::munmap(self.addr.as_ptr(), self.count * 8) };
    }
}

/// Buffers that may be written to. Its invariant, upheld by the constructors: each points to memory that stays valid
/// and writable for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct BufsMut<'a> {
    list: &'a [iovec],
    memory: PhantomData<&'a mut [u8]>,
}

/// Buffers that may be read from. Its invariant, upheld by the constructors: each points to memory that stays valid
/// and readable for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Bufs<'a> {
    list: &'a [iovec],
    memory: PhantomData<&'a [u8]>,
}

/// How many buffers go into one system call.
const BATCH: usize = 64;

impl<'a> BufsMut<'a> {
    pub fn new(bufs: &'a mut [IoSliceMut<'_>]) -> BufsMut<'a> {
        // SAFETY: `IoSliceMut` is documented to have the layout of `iovec`; the exclusive borrow upholds the invariant.
        let list = unsafe { std::slice::from_raw_parts(bufs.as_ptr().cast::<iovec>(), bufs.len()) };
        BufsMut { list, memory: PhantomData }
    }

    /// The sum of the lengths.
    pub fn len(self) -> u64 {
        self.list.iter().fold(0_u64, |sum, v| sum.saturating_add(v.iov_len as u64))
    }

    /// Fills `len` bytes, `skip` bytes into the buffers, from the file at `offset`; the file's end is an error.
    pub fn read_from(self, skip: u64, len: u64, file: &File, offset: u64) -> io::Result<()> {
        transfer(self.list, skip, len, offset, |vecs, at| {
            // SAFETY: the vectors lie inside those of `self`, which are writable; the kernel keeps to their lengths.
            unsafe { libc::preadv(file.as_raw_fd(), vecs.as_ptr(), vecs.len() as i32, at) }
        })
    }

    /// Fills `len` bytes, `skip` bytes into the buffers, with zeros.
    pub fn fill_zero(self, skip: u64, len: u64) {
        for_each(self.list, skip, len, |part, _| {
            // SAFETY: the part lies inside a vector of `self`, which is writable.
            unsafe { ptr::write_bytes(part.iov_base.cast::<u8>(), 0, part.iov_len) };
        });
    }
}

impl<'a> Bufs<'a> {
    pub fn new(bufs: &'a [IoSlice<'_>]) -> Bufs<'a> {
        // SAFETY: `IoSlice` is documented to have the layout of `iovec`; the shared borrow upholds the invariant.
        let list = unsafe { std::slice::from_raw_parts(bufs.as_ptr().cast::<iovec>(), bufs.len()) };
        Bufs { list, memory: PhantomData }
    }

    /// The sum of the lengths.
    pub fn len(self) -> u64 {
        self.list.iter().fold(0_u64, |sum, v| sum.saturating_add(v.iov_len as u64))
    }

    /// Writes all the buffers to the file at `offset`.
    pub fn write_to(self, file: &File, offset: u64) -> io::Result<()> {
        transfer(self.list, 0, self.len(), offset, |vecs, at| {
            // SAFETY: the vectors lie inside those of `self`, which are readable; the kernel keeps to their lengths.
            unsafe { libc::pwritev(file.as_raw_fd(), vecs.as_ptr(), vecs.len() as i32, at) }
        })
    }
}

impl Stack {
    /// As [`Stack::readv_at`], into raw memory such as a guest's.
    ///
    /// # Errors
    /// As [`Stack::read_at`].
    ///
    /// # Safety
    /// Every `iovec` must point to memory that stays mapped and writable during the call and to which this process
    /// holds no Rust reference. Others, the guest too, may change it at any time.
    pub unsafe fn readv_raw(&self, offset: u64, bufs: &[iovec]) -> Result<()> {
        self.read_bufs(offset, BufsMut { list: bufs, memory: PhantomData })
    }

    /// As [`Stack::writev_at`], from raw memory such as a guest's.
    ///
    /// # Errors
    /// As [`Stack::write_at`].
    ///
    /// # Safety
    /// Every `iovec` must point to memory that stays mapped and readable during the call. Others, the guest too, may
    /// change it at any time.
    pub unsafe fn writev_raw(&self, offset: u64, bufs: &[iovec]) -> Result<()> {
        self.write_bufs(offset, Bufs { list: bufs, memory: PhantomData })
    }
}

/// Calls `each` with the parts of `list` that make up `len` bytes from `skip` on, until it has seen them all.
fn for_each(list: &[iovec], skip: u64, len: u64, mut each: impl FnMut(iovec, usize)) {
    let (mut skip, mut len, mut count) = (skip, len, 0_usize);
    for v in list {
        let size = v.iov_len as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        if len == 0 {
            return;
        }
        let part = (size - skip).min(len);
        // `skip` and `part` are at most the vector's own length, so they fit, and the sum stays inside it.
        let iov_base = v.iov_base.cast::<u8>().wrapping_add(skip as usize).cast::<c_void>();
        each(iovec { iov_base, iov_len: part as usize }, count);
        (skip, len, count) = (0, len - part, count + 1);
    }
}

/// Moves `len` bytes by as many calls as it takes, `BATCH` vectors at a time.
fn transfer(
    list: &[iovec],
    mut skip: u64,
    mut len: u64,
    mut offset: u64,
    call: impl Fn(&[iovec], i64) -> isize,
) -> io::Result<()> {
    while len > 0 {
        let mut batch = [iovec { iov_base: ptr::null_mut(), iov_len: 0 }; BATCH];
        let mut used = 0_usize;
        for_each(list, skip, len, |part, i| {
            if let Some(slot) = batch.get_mut(i) {
                *slot = part;
                used = i + 1;
            }
        });
        let at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let done = call(batch.get(..used).unwrap_or_default(), at);
        let done = match u64::try_from(done) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => n.min(len),
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => continue,
                e => return Err(e),
            },
        };
        (skip, len, offset) = (skip + done, len - done, offset + done);
    }
    Ok(())
}
