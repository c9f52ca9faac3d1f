//! The input half of a console: a thread that reads a host descriptor while the guest has room.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

use super::InputQueue;
use crate::poll::{wait_fds, Interest};
use crate::sync::lock;
use crate::threads::{Spawner, ThreadKind};

/// How long a descriptor whose other end is gone is left alone. A fifo may find a new writer (`ctr task attach`), and
/// polling cannot wait for one: it reports the hang-up for ever.
const HANG_UP_PAUSE: Duration = Duration::from_millis(250);

struct Shared {
    wake: EventFd,
    stop: AtomicBool,
}

/// Feeds an [`InputQueue`] from a host descriptor: pipe, fifo, pty, terminal or file.
pub struct Reader {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Reader {
    /// Starts the thread. It ends at the end of a file; a fifo or terminal that hung up is looked at again now and
    /// then.
    ///
    /// # Errors
    /// The system has no thread or no eventfd to give.
    pub fn spawn(fd: OwnedFd, queue: Arc<InputQueue>, spawner: &Spawner) -> io::Result<Self> {
        let shared = Arc::new(Shared { wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, stop: AtomicBool::new(false) });
        let waker = Arc::clone(&shared);
        queue.on_room(move || {
            let _ = waker.wake.write(1);
        });
        let own = Arc::clone(&shared);
        let thread = spawner.spawn(ThreadKind::ConsoleReader, "console-in", move || own.run(File::from(fd), &queue))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Ends the thread and closes the descriptor.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        let _ = self.shared.wake.write(1);
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn run(&self, mut input: File, queue: &InputQueue) {
        let mut buf = [0u8; 1024];
        let mut hung_up = false;
        while !self.stop.load(Ordering::Acquire) {
            let room = queue.room().min(buf.len());
            if room == 0 || hung_up {
                // Without room only a pop wakes us; after a hang-up, the time does.
                let timeout = (room > 0).then_some(HANG_UP_PAUSE);
                if wait_fds(&[(&self.wake, Interest::Read)], timeout).is_err() {
                    return;
                }
                hung_up = false;
                let _ = self.wake.read();
                continue;
            }
            let ready = match wait_fds(&[(&input.as_fd(), Interest::Read), (&self.wake, Interest::Read)], None) {
                Ok(ready) => ready,
                Err(_) => return,
            };
            if ready.get(1) == Some(&true) {
                let _ = self.wake.read();
            }
            if ready.first() != Some(&true) {
                continue;
            }
            let Some(space) = buf.get_mut(..room) else { return };
            match input.read(space) {
                Ok(0) if is_regular(&input) => return,
                Ok(0) => hung_up = true,
                Ok(count) => {
                    if let Some(bytes) = space.get(..count) {
                        queue_all(queue, bytes);
                    }
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                // A pty whose other side is closed says EIO.
                Err(_) => hung_up = true,
            }
        }
    }
}

/// Queues what was read. The reader is the only one who pushes, so the room it saw is still there, unless the queue
/// was held meanwhile: what was read already goes in front of what comes next.
fn queue_all(queue: &InputQueue, bytes: &[u8]) {
    let taken = queue.push(bytes);
    if let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty()) {
        queue.append_held(rest);
    }
}

fn is_regular(file: &File) -> bool {
    file.metadata().map(|m| m.is_file()).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{pipe, Seek, Write};
    use std::time::Instant;

    fn drain(queue: &InputQueue, wanted: usize) -> Vec<u8> {
        let start = Instant::now();
        let mut got = Vec::new();
        while got.len() < wanted && start.elapsed() < Duration::from_secs(30) {
            let bytes = queue.pop(1000);
            if bytes.is_empty() {
                std::thread::sleep(Duration::from_micros(200));
            }
            got.extend(bytes);
        }
        got
    }

    #[test]
    fn input_longer_than_the_queue_arrives_whole() {
        let (reader, mut writer) = pipe().unwrap();
        let queue = Arc::new(InputQueue::new());
        let _reader = Reader::spawn(reader.into(), queue.clone(), &Spawner::default()).unwrap();
        let text: Vec<u8> = (0..50_000u32).map(|i| i as u8).collect();
        writer.write_all(&text).unwrap();
        let got = drain(&queue, text.len());
        assert!(got == text, "{} of {} bytes", got.len(), text.len());
    }

    #[test]
    fn held_queue_leaves_input_in_the_pipe() {
        let (reader, mut writer) = pipe().unwrap();
        let queue = Arc::new(InputQueue::new());
        queue.hold();
        let _reader = Reader::spawn(reader.into(), queue.clone(), &Spawner::default()).unwrap();
        writer.write_all(b"abc").unwrap();
        std::thread::sleep(Duration::from_millis(30));
        assert!(queue.is_empty());
        queue.release();
        assert_eq!(drain(&queue, 3), b"abc");
    }

    #[test]
    fn fifo_that_hung_up_is_read_again_when_a_writer_comes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stdin");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let open_writer = || std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
        let fd = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
        let queue = Arc::new(InputQueue::new());
        let _reader = Reader::spawn(fd, queue.clone(), &Spawner::default()).unwrap();
        for text in [b"one", b"two"] {
            open_writer().write_all(text).unwrap();
            assert_eq!(drain(&queue, 3), text);
        }
    }

    #[test]
    fn file_ends_and_stop_ends_the_thread_at_once() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"script").unwrap();
        file.rewind().unwrap();
        let queue = Arc::new(InputQueue::new());
        let reader = Reader::spawn(file.into(), queue.clone(), &Spawner::default()).unwrap();
        assert_eq!(drain(&queue, 6), b"script");
        let (idle, _writer) = pipe().unwrap();
        let waiting = Reader::spawn(idle.into(), Arc::new(InputQueue::new()), &Spawner::default()).unwrap();
        let start = Instant::now();
        reader.stop();
        waiting.stop();
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
