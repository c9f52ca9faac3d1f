//! Waiting for a few descriptors, in safe terms.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::sys;

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interest {
    Read,
    Write,
}

/// Waits until one of `fds` is ready (or hung up, or in error: the following read or write says what is wrong), or the
/// time is over. Returns which are.
pub(crate) fn wait_fds(fds: &[(&dyn AsRawFd, Interest)], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut polled: Vec<libc::pollfd> = fds
        .iter()
        .map(|(fd, interest)| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: match interest {
                Interest::Read => libc::POLLIN,
                Interest::Write => libc::POLLOUT,
            },
            revents: 0,
        })
        .collect();
    // Rounded up, so that a wait of less than a millisecond does not become a loop.
    let millis = timeout.map_or(-1, |t| i32::try_from(t.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
    sys::poll(&mut polled, millis)?;
    Ok(polled.iter().map(|p| p.revents != 0).collect())
}
