//! The system calls that the standard library does not wrap.

use std::io;

/// poll(2), restarted after signals.
pub(crate) fn poll(fds: &mut [libc::pollfd], timeout_millis: i32) -> io::Result<()> {
    loop {
        // SAFETY: `fds` is an exclusive slice, so the kernel may write its `revents`; its length is passed along.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_millis) };
        if ready >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
