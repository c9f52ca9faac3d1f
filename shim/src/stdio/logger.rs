//! `binary://` loggers: a program with the console's output on descriptor 3, an empty stderr on 4, and 5 to say that
//! it is ready, by closing it or writing to it (containerd's core/runtime/v2/logging).

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{kill_process, Pid, Signal};
use tracing::warn;

use super::fifo::{pipe, readable};
use crate::error::{Error, Kind, Result};

/// How long a logger may take until it is ready.
const READY: Duration = Duration::from_secs(10);
/// How long it may take to end by itself once its pipes are closed, and after SIGTERM.
const END: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(2));

/// A running logger. It is killed when dropped before [`Logger::finish`].
#[derive(Debug)]
pub struct Logger {
    child: Child,
    /// Its stderr stays open until the machine ends, as the program expects.
    stderr: Option<OwnedFd>,
}

impl Logger {
    /// Starts a logger, waits until it is ready, and gives the end that the machine writes to.
    pub(super) fn start(program: &Path, args: &[String], namespace: &str, id: &str) -> Result<(Self, OwnedFd)> {
        let (out_reader, out_writer) = pipe()?;
        let (err_reader, err_writer) = pipe()?;
        let (ready_reader, ready_writer) = pipe()?;
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .env("CONTAINER_ID", id)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mappings = [(out_reader, 3), (err_reader, 4), (ready_writer, 5)]
            .map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
        command
            .fd_mappings(mappings.into())
            .map_err(|e| Error::caused("cannot arrange the logger's descriptors", e))?;
        let child = command.spawn().map_err(|e| {
            Error::caused(format!("cannot start the logger {}", program.display()), e).of_kind(Kind::Invalid)
        })?;
        // The command owns this process's copies of the logger's ends: without them the pipes would never end.
        drop(command);
        let logger = Self { child, stderr: Some(err_writer) };
        if !readable(&ready_reader, READY) {
            return Err(Error::new(
                Kind::Internal,
                format!("the logger {} is not ready after {} s", program.display(), READY.as_secs()),
            ));
        }
        Ok((logger, out_writer))
    }

    /// Waits for the end of a logger whose pipes are closed, then insists.
    pub fn finish(mut self) {
        self.stderr = None;
        if self.ended_within(END.0) {
            return;
        }
        warn!(pid = self.child.id(), "the logger does not end by itself: it gets SIGTERM");
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        self.ended_within(END.1);
    }

    fn ended_within(&mut self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
