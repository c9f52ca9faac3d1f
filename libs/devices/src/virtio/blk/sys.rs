//! The block stack as a backend: guest buffers go into its vectored calls as they are.

use std::io;

use ovms_disk::Stack;
use vm_memory::bitmap::Bitmap;
use vm_memory::GuestMemoryBackend;

use super::BlockBackend;
use crate::virtio::Segment;
use crate::GuestMemory;

/// The host addresses of `segments`; a segment over a boundary of memory regions becomes several.
fn iovecs(mem: &GuestMemory, segments: &[Segment]) -> io::Result<Vec<libc::iovec>> {
    let mut list = Vec::with_capacity(segments.len());
    for segment in segments {
        for slice in mem.get_slices(segment.address, segment.len as usize) {
            let slice = slice.map_err(io::Error::other)?;
            list.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
        }
    }
    Ok(list)
}

/// Tells dirty tracking, where memory has it, of what the kernel wrote behind its back.
fn mark_dirty(mem: &GuestMemory, segments: &[Segment]) {
    for segment in segments {
        for slice in mem.get_slices(segment.address, segment.len as usize).flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}

impl BlockBackend for Stack {
    fn size(&self) -> u64 {
        Stack::size(self)
    }

    fn is_read_only(&self) -> bool {
        Stack::is_read_only(self)
    }

    fn read(&self, offset: u64, mem: &GuestMemory, into: &[Segment]) -> io::Result<()> {
        let list = iovecs(mem, into)?;
        // SAFETY: each entry comes from `get_slices` of `mem`, so it lies in a live, writable mapping, which `mem`
        // keeps for longer than this call. Guest memory is only ever reached by raw pointers and volatile slices: no
        // Rust reference to it exists in this process.
        let result = unsafe { self.readv_raw(offset, &list) };
        mark_dirty(mem, into);
        result.map_err(io::Error::other)
    }

    fn write(&self, offset: u64, mem: &GuestMemory, from: &[Segment]) -> io::Result<()> {
        let list = iovecs(mem, from)?;
        // SAFETY: as for `read`; the memory is only read.
        unsafe { self.writev_raw(offset, &list) }.map_err(io::Error::other)
    }

    fn flush(&self) -> io::Result<()> {
        Stack::flush(self).map_err(io::Error::other)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        Stack::discard(self, offset, len).map_err(io::Error::other)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        Stack::write_zeroes(self, offset, len).map_err(io::Error::other)
    }
}
