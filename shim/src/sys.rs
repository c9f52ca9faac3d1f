//! System calls that neither std nor rustix offers.

use std::io;

/// Marks every descriptor from `first` on close-on-exec.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: the call takes no pointers and closes nothing now: it only sets a flag on descriptors.
    let rc = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Keeps the allocator to one arena: with an arena for each thread an idle server would hold several times its need.
pub(crate) fn limit_allocator_arenas() {
    // SAFETY: called before any other thread exists, as mallopt(3) asks.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
