//! Guest memory of the floor program.

use std::io;
use std::ptr;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

/// Maps `bytes` of zeroed private memory, puts `code` at `entry` and makes it slot 0 of `vm` at guest address 0. The
/// mapping lives as long as the process. Returns how long the kernel took to take it as a slot.
pub fn add_memory(vm: &VmFd, bytes: usize, entry: usize, code: &[u8]) -> io::Result<Duration> {
    if entry.checked_add(code.len()).is_none_or(|end| end > bytes) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the memory is too small for the code"));
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory of ours.
    let start = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: entry + code.len() lies within the mapping, as checked above, and nothing else refers to it yet.
    unsafe { ptr::copy_nonoverlapping(code.as_ptr(), start.cast::<u8>().add(entry), code.len()) };
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: bytes as u64,
        userspace_addr: start as u64,
    };
    let began = Instant::now();
    // SAFETY: the region names the whole mapping, which is never unmapped.
    unsafe { vm.set_user_memory_region(region) }.map_err(|err| io::Error::from_raw_os_error(err.errno()))?;
    Ok(began.elapsed())
}
