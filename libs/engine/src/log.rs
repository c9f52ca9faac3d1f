//! What a VMM writes to its stderr: read line by line, bounded, and passed on to this process's log.
//!
//! The VMM may be in a guest's hands, so what it may write is a budget: once it is used up the pipe is not read until
//! the next window begins, and a VMM that goes on writing blocks itself.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

/// Bytes that are read in a window.
const BUDGET: usize = 256 << 10;
/// Its length.
const WINDOW: Duration = Duration::from_secs(10);
/// Longer lines are cut.
const MAX_LINE: usize = 4 << 10;
/// How many of the last lines are kept for the message of a fault.
const KEPT_LINES: usize = 3;

/// The reading end.
#[derive(Debug)]
pub(crate) struct LogPipe {
    id: String,
    pipe: Option<File>,
    line: Vec<u8>,
    last: VecDeque<String>,
    budget: usize,
    window: Instant,
}

/// A pipe: the end to read, and the end that becomes the VMM's stderr.
pub(crate) fn pipe(id: &str) -> io::Result<(LogPipe, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    nix::fcntl::fcntl(&read, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let log = LogPipe {
        id: id.to_owned(),
        pipe: Some(File::from(read)),
        line: Vec::new(),
        last: VecDeque::new(),
        budget: BUDGET,
        window: Instant::now(),
    };
    Ok((log, write))
}

impl LogPipe {
    /// What to poll for input, unless the budget is used up or the pipe is at its end; then when to ask again.
    pub(crate) fn poll(&mut self) -> (Option<BorrowedFd<'_>>, Option<Duration>) {
        let passed = self.window.elapsed();
        if passed >= WINDOW {
            self.budget = BUDGET;
            self.window = Instant::now();
        }
        match &self.pipe {
            None => (None, None),
            Some(_) if self.budget == 0 => (None, Some(WINDOW.saturating_sub(passed))),
            Some(pipe) => (Some(pipe.as_fd()), None),
        }
    }

    /// Reads what is there.
    pub(crate) fn read(&mut self) {
        let mut buffer = [0; 4096];
        while self.budget > 0 {
            let Some(pipe) = &mut self.pipe else { return };
            let room = buffer.len().min(self.budget);
            match pipe.read(&mut buffer[..room]) {
                Ok(0) => self.pipe = None,
                Ok(length) => {
                    self.budget -= length;
                    self.take(&buffer[..length]);
                    if self.budget == 0 {
                        tracing::warn!(id = self.id, "the VMM writes more to its log than is read");
                    }
                }
                Err(err) if err.kind() == io::ErrorKind::Interrupted => (),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.pipe = None,
            }
        }
    }

    /// The last lines, joined, for the message of a fault.
    pub(crate) fn last_words(&mut self) -> String {
        self.end_line();
        self.last.iter().cloned().collect::<Vec<_>>().join("; ")
    }

    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\n' => self.end_line(),
                _ if self.line.len() < MAX_LINE => self.line.push(*byte),
                _ => (),
            }
        }
    }

    fn end_line(&mut self) {
        let line = clean(&String::from_utf8_lossy(&self.line), MAX_LINE);
        self.line.clear();
        if line.is_empty() {
            return;
        }
        let id = self.id.as_str();
        match line {
            _ if line.contains("ERROR") || line.contains("panicked") => tracing::error!(id, vmm = line),
            _ if line.contains("WARN") => tracing::warn!(id, vmm = line),
            _ if line.contains("DEBUG") || line.contains("TRACE") => tracing::debug!(id, vmm = line),
            _ => tracing::info!(id, vmm = line),
        }
        if self.last.len() == KEPT_LINES {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }
}

/// A text from a VMM as it may be shown: one line without control characters, cut at `length` bytes.
pub(crate) fn clean(text: &str, length: usize) -> String {
    let mut clean = String::new();
    for character in text.chars().filter(|character| !character.is_control()) {
        if clean.len() + character.len_utf8() > length {
            break;
        }
        clean.push(character);
    }
    clean
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What `work` logs on this thread.
    pub(crate) fn captured(work: impl FnOnce()) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, work);
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn lines_are_cut_and_control_characters_dropped() {
        let (mut log, write) = pipe("vm1").unwrap();
        let mut write = File::from(write);
        write.write_all(b"one\n\x1b[31mtwo\nthree").unwrap();
        write.write_all(&[b'x'; 5000]).unwrap();
        drop(write);
        log.read();
        let words = log.last_words();
        assert!(words.starts_with("one; [31mtwo; threexxx"), "{words}");
        assert!(words.len() < MAX_LINE + 50);
        assert!(log.poll().0.is_none());
    }

    #[test]
    fn a_flood_is_not_read_beyond_the_budget() {
        let (mut log, write) = pipe("vm1").unwrap();
        let writer = std::thread::spawn(move || {
            let mut write = File::from(write);
            let mut written = 0;
            while written < 1 << 20 && write.write_all(&[b'y'; 4096]).is_ok() {
                written += 4096;
            }
        });
        let start = Instant::now();
        while log.poll().0.is_some() && start.elapsed() < Duration::from_secs(5) {
            log.read();
        }
        let (fd, again) = log.poll();
        assert!(fd.is_none());
        assert!(again.unwrap() <= WINDOW);
        drop(log);
        writer.join().unwrap();
    }
}
