//! The output half of a console: a bounded ring and a thread that empties it into a host descriptor.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

use super::{ByteSink, Callback};
use crate::poll::{wait_fds, Interest};
use crate::sync::lock;
use crate::threads::{Spawner, ThreadKind};

/// Bytes from which on the ring counts as full.
const SOFT_LIMIT: usize = 64 << 10;
/// Bytes at which the ring starts to forget. Only a pusher that never waits gets here: one push is at most
/// [`super::MAX_PUSH`], and whoever pushes waits for room after it, or pushes no more until there is.
const HARD_LIMIT: usize = 1 << 20;
/// Bytes per write: a pipe that polls writable takes this many without blocking (PIPE_BUF).
const CHUNK: usize = 4096;
/// How long after a write the next bytes may be gathered for one more, unless a line ends first. A UART gives every byte
/// alone: without this each would cost a wake-up and a write, and whoever reads as much again.
const GATHER: Duration = Duration::from_millis(10);

#[derive(Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// Bytes that the thread has taken out and not yet written.
    in_flight: usize,
    closed: bool,
}

impl Ring {
    /// Whether waiting for more would gain nothing.
    fn is_worth_writing(&self) -> bool {
        self.closed || self.bytes.len() >= CHUNK || self.bytes.back() == Some(&b'\n')
    }
}

struct Shared {
    ring: Mutex<Ring>,
    changed: Condvar,
    full: AtomicBool,
    lost: AtomicU64,
    stop: EventFd,
    on_room: OnceLock<Callback>,
}

/// A [`ByteSink`] over a host descriptor: pipe, fifo, pty or file.
///
/// The thread never makes the descriptor non-blocking, since others share its open file; it polls before each write of
/// at most one pipe buffer. When nobody holds the other end any more, output is dropped and counted.
pub struct Writer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread or no eventfd to give.
    pub fn spawn(fd: OwnedFd, spawner: &Spawner) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            ring: Mutex::default(),
            changed: Condvar::new(),
            full: AtomicBool::new(false),
            lost: AtomicU64::new(0),
            stop: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            on_room: OnceLock::new(),
        });
        let own = Arc::clone(&shared);
        let thread = spawner.spawn(ThreadKind::ConsoleWriter, "console-out", move || own.run(File::from(fd)))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Waits until everything pushed so far is written, at most until `deadline`, then ends the thread and closes the
    /// descriptor. Returns how many bytes were never written. Later pushes are dropped.
    pub fn flush_and_close(&self, deadline: Instant) -> u64 {
        let unwritten = {
            let mut ring = lock(&self.shared.ring);
            ring.closed = true;
            self.shared.changed.notify_all();
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                let waiting = ring.bytes.len().saturating_add(ring.in_flight);
                if waiting == 0 || left == Duration::ZERO {
                    break waiting;
                }
                ring = self.shared.changed.wait_timeout(ring, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        };
        let lost = self.lost();
        let _ = self.shared.stop.write(1);
        // A thread that is stuck in a write to a dead terminal is left behind; it holds nothing but its descriptor.
        if unwritten == 0 {
            if let Some(thread) = lock(&self.thread).take() {
                let _ = thread.join();
            }
        }
        lost.saturating_add(unwritten as u64)
    }

    /// Bytes dropped because nobody held the other end or the ring ran over.
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        lock(&self.shared.ring).closed = true;
        self.shared.changed.notify_all();
        let _ = self.shared.stop.write(1);
    }
}

impl ByteSink for Writer {
    fn push(&self, bytes: &[u8]) {
        let mut ring = lock(&self.shared.ring);
        let room = if ring.closed { 0 } else { HARD_LIMIT.saturating_sub(ring.bytes.len()) };
        let taken = bytes.iter().take(room);
        self.shared.lost.fetch_add(bytes.len().saturating_sub(taken.len()) as u64, Ordering::Relaxed);
        let was_empty = ring.bytes.is_empty();
        ring.bytes.extend(taken);
        // Only the thread says that there is room again: whoever found the ring full is told then.
        if ring.bytes.len() >= SOFT_LIMIT {
            self.shared.full.store(true, Ordering::Release);
        }
        if was_empty || ring.is_worth_writing() {
            self.shared.changed.notify_all();
        }
    }

    fn is_full(&self) -> bool {
        self.shared.full.load(Ordering::Acquire)
    }

    fn wait_room(&self, stop: &dyn Fn() -> bool) {
        let mut ring = lock(&self.shared.ring);
        while self.is_full() && !ring.closed && !stop() {
            ring = self.shared.changed.wait(ring).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn kick(&self) {
        // Taking the lock orders the kick after a waiter's last look at its `stop`.
        let _ring = lock(&self.shared.ring);
        self.shared.changed.notify_all();
    }

    fn on_room(&self, callback: Callback) {
        let _ = self.shared.on_room.set(callback);
    }
}

impl Shared {
    fn run(&self, mut out: File) {
        let mut chunk = Vec::with_capacity(CHUNK);
        let mut gather_until = Instant::now();
        while self.take(&mut chunk, gather_until) {
            let written = self.write_all(&mut out, &chunk);
            let now = Instant::now();
            gather_until = now.checked_add(GATHER).unwrap_or(now);
            let dropped = chunk.len().saturating_sub(written);
            self.lost.fetch_add(dropped as u64, Ordering::Relaxed);
            lock(&self.ring).in_flight = 0;
            self.changed.notify_all();
        }
    }

    /// Takes the next chunk out of the ring; waits for one, and until the given time for one that is worth a write.
    /// `false` when the ring is closed and empty.
    fn take(&self, chunk: &mut Vec<u8>, gather_until: Instant) -> bool {
        chunk.clear();
        let mut ring = lock(&self.ring);
        while ring.bytes.is_empty() {
            if ring.closed {
                return false;
            }
            ring = self.changed.wait(ring).unwrap_or_else(PoisonError::into_inner);
        }
        while !ring.is_worth_writing() {
            let left = gather_until.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                break;
            }
            ring = self.changed.wait_timeout(ring, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let count = ring.bytes.len().min(CHUNK);
        chunk.extend(ring.bytes.drain(..count));
        ring.in_flight = count;
        if ring.bytes.len() < SOFT_LIMIT / 2 && self.full.swap(false, Ordering::AcqRel) {
            drop(ring);
            self.changed.notify_all();
            if let Some(tell) = self.on_room.get() {
                tell();
            }
        }
        true
    }

    /// Writes what can be written; returns how many bytes that were.
    fn write_all(&self, out: &mut File, chunk: &[u8]) -> usize {
        let mut written = 0usize;
        while let Some(rest) = chunk.get(written..).filter(|rest| !rest.is_empty()) {
            match wait_fds(&[(&*out, Interest::Write), (&self.stop, Interest::Read)], None) {
                Ok(ready) if ready.get(1) == Some(&false) => {}
                _ => return written,
            }
            match out.write(rest) {
                Ok(count) => written = written.saturating_add(count),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(_) => return written,
            }
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{pipe, Read};
    use std::os::unix::net::UnixDatagram;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn everything_pushed_is_written_before_close_returns() {
        let (mut reader, writer) = pipe().unwrap();
        let sink = Writer::spawn(writer.into(), &Spawner::default()).unwrap();
        let text: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
        let expected = text.clone();
        let reading = std::thread::spawn(move || {
            let mut got = Vec::new();
            reader.read_to_end(&mut got).unwrap();
            got
        });
        for chunk in text.chunks(777) {
            sink.wait_room(&|| false);
            sink.push(chunk);
        }
        assert_eq!(sink.flush_and_close(soon()), 0);
        assert_eq!(reading.join().unwrap(), expected);
    }

    #[test]
    fn bytes_that_come_alone_are_gathered_to_lines() {
        // A packet socket keeps the borders of writes.
        let (reader, writer) = UnixDatagram::pair().unwrap();
        let sink = Writer::spawn(OwnedFd::from(writer), &Spawner::default()).unwrap();
        let line = b"the guest speaks\n";
        for byte in line.iter().chain(line).chain(line) {
            sink.push(std::slice::from_ref(byte));
        }
        assert_eq!(sink.flush_and_close(soon()), 0);
        let mut writes = Vec::new();
        reader.set_nonblocking(true).unwrap();
        let mut buffer = [0; CHUNK];
        while let Ok(count) = reader.recv(&mut buffer) {
            writes.push(buffer[..count].to_vec());
        }
        assert_eq!(writes.concat(), line.repeat(3));
        // The first byte goes at once; how the scheduler cuts the rest is its own affair.
        assert!(writes.len() < line.len(), "{writes:?}");
    }

    #[test]
    fn unfinished_line_is_written_without_more() {
        let (mut reader, writer) = pipe().unwrap();
        let sink = Writer::spawn(writer.into(), &Spawner::default()).unwrap();
        sink.push(b"login\r\n");
        sink.push(b"# ");
        let mut got = [0; 9];
        reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"login\r\n# ");
    }

    #[test]
    fn full_ring_gates_until_the_reader_reads_or_the_waiter_is_kicked() {
        let (mut reader, writer) = pipe().unwrap();
        let sink = Arc::new(Writer::spawn(writer.into(), &Spawner::default()).unwrap());
        // More than the pipe and the ring hold together.
        sink.push(&[b'x'; SOFT_LIMIT * 3]);
        let stop = Arc::new(AtomicBool::new(false));
        let (waiting, asked) = (sink.clone(), stop.clone());
        let waiter = std::thread::spawn(move || waiting.wait_room(&|| asked.load(Ordering::SeqCst)));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waiter.is_finished());
        stop.store(true, Ordering::SeqCst);
        sink.kick();
        waiter.join().unwrap();
        let reading = std::thread::spawn(move || {
            let mut got = Vec::new();
            reader.read_to_end(&mut got).unwrap();
            got.len()
        });
        sink.wait_room(&|| false);
        assert!(!sink.is_full());
        assert_eq!(sink.flush_and_close(soon()), 0);
        assert!(reading.join().unwrap() >= SOFT_LIMIT);
    }

    #[test]
    fn room_is_told_of_once_each_time_that_a_full_ring_has_some_again() {
        let (mut reader, writer) = pipe().unwrap();
        let sink = Writer::spawn(writer.into(), &Spawner::default()).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        sink.on_room(Box::new(move || tell.send(()).unwrap()));
        let mut unread = vec![0; SOFT_LIMIT * 3 + 1];
        for _ in 0..3 {
            // More than the pipe and the ring hold together.
            sink.push(&unread[1..]);
            sink.push(b"x");
            assert!(sink.is_full() && told.try_recv().is_err());
            reader.read_exact(&mut unread).unwrap();
            told.recv_timeout(Duration::from_secs(10)).unwrap();
            assert!(!sink.is_full() && told.try_recv().is_err());
        }
    }

    #[test]
    fn close_with_nobody_reading_returns_at_the_deadline_and_says_what_was_lost() {
        let (mut reader, writer) = pipe().unwrap();
        let sink = Writer::spawn(writer.into(), &Spawner::default()).unwrap();
        sink.push(&vec![b'x'; 200_000]);
        let start = Instant::now();
        let lost = sink.flush_and_close(start + Duration::from_millis(100));
        assert!(start.elapsed() < Duration::from_secs(5));
        let mut written = Vec::new();
        reader.read_to_end(&mut written).unwrap();
        // A pipe holds 64 KiB; the chunk that was being written may count twice.
        assert!(lost >= 200_000 - 65_536);
        let sum = lost + written.len() as u64;
        assert!((200_000..=200_000 + CHUNK as u64).contains(&sum), "{lost} lost, {} written", written.len());
    }

    #[test]
    fn push_after_the_other_end_is_gone_is_counted_as_lost() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let sink = Writer::spawn(writer.into(), &Spawner::default()).unwrap();
        sink.push(b"nobody hears");
        assert_eq!(sink.flush_and_close(soon()), 12);
        assert!(!sink.is_full());
    }

    #[test]
    fn push_beyond_the_hard_limit_is_counted_as_lost() {
        let (_reader, writer) = pipe().unwrap();
        let sink = Writer::spawn(writer.into(), &Spawner::default()).unwrap();
        for _ in 0..3 {
            sink.push(&vec![b'x'; HARD_LIMIT]);
        }
        assert!(sink.lost() >= HARD_LIMIT as u64);
    }
}
