//! A fifo that a client has made. Opening one end of a fifo waits for the other end; opening both at once does not
//! (fifo(7)), so that is what is held, and the machine's own end is opened beside it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{fstat, open, FileType, Mode, OFlags};
use rustix::io::ioctl_fionread;
use rustix::pipe::fcntl_setpipe_size;

use super::uri;
use crate::error::{Error, Result};

/// How long unread output waits for a client.
pub(super) const LINGER: Duration = Duration::from_secs(5);
/// How often it looks for one.
const LOOK: Duration = Duration::from_millis(20);
/// How much output of a detached machine is kept for the client that attaches later: what an unprivileged process may
/// have (`/proc/sys/fs/pipe-max-size`). Beyond that the guest waits.
const ROOM: usize = 1 << 20;

/// Both ends of a fifo.
#[derive(Debug)]
pub(super) struct Fifo {
    both: OwnedFd,
    path: PathBuf,
}

impl Fifo {
    /// Opens both ends without waiting.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let both = open(path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| Error::caused(format!("cannot open the stream {}", path.display()), e))?;
        let stat = fstat(&both).map_err(|e| Error::caused(format!("cannot inspect {}", path.display()), e))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo {
            return Err(uri::refused(&path.display().to_string(), "it is not a fifo (write file:// for a file)"));
        }
        Ok(Self { both, path: path.to_owned() })
    }

    /// Makes room for the output of a machine that nobody is attached to; only a wish.
    pub(super) fn enlarge(&self) {
        let _ = fcntl_setpipe_size(&self.both, ROOM);
    }

    /// A read end of its own.
    pub(super) fn reader(&self) -> Result<OwnedFd> {
        self.reopen(OFlags::RDONLY)
    }

    /// A write end of its own.
    pub(super) fn writer(&self) -> Result<OwnedFd> {
        self.reopen(OFlags::WRONLY)
    }

    /// The very same fifo, whatever lies at its path by now.
    fn reopen(&self, end: OFlags) -> Result<OwnedFd> {
        open(format!("/proc/self/fd/{}", self.both.as_raw_fd()), end | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| Error::caused(format!("cannot open one end of the stream {}", self.path.display()), e))
    }

    /// Lets go; see [`super::Unread::release`].
    pub(super) fn release(self) {
        let Ok(writer) = self.writer() else { return };
        drop(self);
        let end = Instant::now() + LINGER;
        while unread(&writer) && !has_reader(&writer) && Instant::now() < end {
            thread::sleep(LOOK);
        }
    }
}

fn unread(fifo: &OwnedFd) -> bool {
    ioctl_fionread(fifo).is_ok_and(|bytes| bytes > 0)
}

/// A write end polls with an error exactly when no read end is open (poll(2)).
fn has_reader(writer: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(writer, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().contains(PollFlags::ERR)
}

/// A pipe, both ends close-on-exec.
pub(super) fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| Error::caused("cannot make a pipe", e))
}

/// Waits until `fd` has something to read or its other end is closed.
pub(super) fn readable(fd: impl AsFd, timeout: Duration) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    matches!(poll(&mut fds, Some(&timeout)), Ok(ready) if ready > 0)
}

impl From<Fifo> for File {
    fn from(fifo: Fifo) -> Self {
        fifo.both.into()
    }
}
