//! Output into a file of the host's. The VMM may not write it: how large its files grow is limited (`RLIMIT_FSIZE`), by
//! what its disks need, and the log of a machine has no such bound. So it writes into a pipe, and a thread of the shim
//! appends what comes to the file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{channel, Receiver};
use std::thread;
use std::time::Duration;

use tracing::warn;

use crate::error::{Error, Result};

/// Bytes that are read at once.
const CHUNK: usize = 16 << 10;
/// Stack of the thread in bytes.
const STACK: usize = 64 << 10;
/// How long the last output may take to be written.
const LAST: Duration = Duration::from_secs(5);

/// The thread.
#[derive(Debug)]
pub struct Relay {
    ended: Receiver<()>,
}

impl Relay {
    /// Appends to `file` whatever is written to the other end, until nobody holds that any more.
    ///
    /// # Errors
    /// When there is no pipe or no thread to be had.
    pub(super) fn start(file: File) -> Result<(Self, OwnedFd)> {
        let failed = |e| Error::caused("cannot start the thread that writes the log file", e);
        let (input, output) = io::pipe().map_err(failed)?;
        let (end, ended) = channel();
        thread::Builder::new()
            .name("console-file".into())
            .stack_size(STACK)
            .spawn(move || {
                copy(input, file);
                // Nobody need be waiting.
                let _ = end.send(());
            })
            .map_err(failed)?;
        Ok((Self { ended }, output.into()))
    }

    /// Waits until all is written, once the machine has ended.
    pub(super) fn finish(self) {
        if self.ended.recv_timeout(LAST).is_err() {
            warn!("the machine's last output is still being written to its file after {} s", LAST.as_secs());
        }
    }
}

/// What cannot be written is lost: a guest does not stand still because the log's disk is full.
fn copy(mut from: impl Read, mut to: impl Write) {
    let mut chunk = [0; CHUNK];
    let mut failing = false;
    loop {
        let count = match from.read(&mut chunk) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                warn!(%error, "the machine's output cannot be read any more");
                return;
            }
        };
        match to.write_all(chunk.get(..count).unwrap_or_default()) {
            Ok(()) => failing = false,
            // Once for each time that it begins.
            Err(error) if !std::mem::replace(&mut failing, true) => {
                warn!(%error, "the machine's output cannot be written to its file and is lost");
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that is full for a while.
    #[derive(Default)]
    struct Disk {
        written: Vec<u8>,
        writes: usize,
    }

    impl Write for &mut Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.writes += 1;
            if self.writes == 2 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.written.extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_costs_what_it_cannot_take_and_no_more() {
        let text = [vec![b'a'; CHUNK], vec![b'b'; CHUNK], vec![b'c'; CHUNK]].concat();
        let mut disk = Disk::default();
        copy(text.as_slice(), &mut disk);
        assert_eq!(disk.written, [vec![b'a'; CHUNK], vec![b'c'; CHUNK]].concat());
    }
}
