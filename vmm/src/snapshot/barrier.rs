//! Holds writers back from memory that is still to be copied: userfaultfd write-protection.
//!
//! ```text
//!  register ──(instant)──> arm what is left ─> guest goes on ─> write to an armed page: the writer waits, we hear of it
//!                                                                └─> copied, released: the writer goes on
//! ```
//! Writers are processors, device threads and the kernel on their behalf: all fault in the same page table. The barrier is
//! taken down when the value is dropped, and whoever still waits goes on.
//!
//! Kernels that protect only pages that are there (before 6.4) are not enough: a copy takes whole chunks, and a page that
//! appears between the instant and the copy would be in it. On a private mapping of a file it works only if the file lies
//! on tmpfs or hugetlbfs; the kernel refuses to register others.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::view::{HostRange, View};

// Numbers: the kernel's include/uapi/linux/userfaultfd.h.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const UFFD_API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const EVENT_PAGEFAULT: u8 = 0x12;
/// Messages that are read at once: as many as there can be waiting processors and device threads.
const MESSAGES: usize = 64;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

/// `struct uffd_msg`, as far as page faults fill it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// A barrier that is registered for all of a machine's memory.
#[derive(Debug)]
pub(super) struct Barrier {
    fd: OwnedFd,
}

impl Barrier {
    /// Asks `device`, an open /dev/userfaultfd, for a barrier over `view`. Nobody is held back before it is armed.
    ///
    /// # Errors
    /// What the kernel says: this host, or this memory, can have none.
    pub(super) fn register(device: &OwnedFd, view: &View) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes a number and gives a descriptor that nobody else has.
        let fd = check(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) })?;
        // SAFETY: as above.
        let barrier = Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } };
        let features = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED;
        barrier.call(UFFDIO_API, &mut Api { api: UFFD_API, features, ioctls: 0 })?;
        for region in view.regions() {
            let mut register = Register { start: region.host, len: region.len, mode: REGISTER_MODE_WP, ioctls: 0 };
            barrier.call(UFFDIO_REGISTER, &mut register)?;
        }
        Ok(barrier)
    }

    /// Holds back whoever writes to `range` from now on.
    pub(super) fn arm(&self, range: HostRange) -> io::Result<()> {
        self.protect(range, WRITEPROTECT_MODE_WP)
    }

    /// Lets go who waits to write to `range`, and whoever comes.
    pub(super) fn release(&self, range: HostRange) -> io::Result<()> {
        self.protect(range, 0)
    }

    fn protect(&self, range: HostRange, mode: u64) -> io::Result<()> {
        loop {
            match self.call(UFFDIO_WRITEPROTECT, &mut WriteProtect { start: range.start, len: range.len, mode }) {
                // The process's mappings are about to change: the kernel asks to come again.
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                done => return done,
            }
        }
    }

    /// Calls `with` for the address of each write that waits.
    pub(super) fn waiting(&self, mut with: impl FnMut(u64)) -> io::Result<()> {
        let mut messages = [Message::default(); MESSAGES];
        // SAFETY: the array has room for the bytes asked for, and any bytes make valid messages.
        let got = unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages)) };
        let got = match usize::try_from(got) {
            Ok(got) => got / size_of::<Message>(),
            Err(_) => match io::Error::last_os_error() {
                err if matches!(err.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
                err => return Err(err),
            },
        };
        messages.iter().take(got).filter(|message| message.event == EVENT_PAGEFAULT).for_each(|m| with(m.address));
        Ok(())
    }

    fn call<T>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        // SAFETY: each request above goes with the structure of its name, laid out as the kernel's; the ranges in it are
        // guest memory, which is never unmapped, and protecting it changes nothing that it holds.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), request, std::ptr::from_mut(argument)) }).map(drop)
    }
}

impl AsRawFd for Barrier {
    /// Readable while somebody waits.
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn check(done: libc::c_int) -> io::Result<libc::c_int> {
    match done {
        0.. => Ok(done),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Ram;
    use std::fs::File;
    use std::sync::mpsc;
    use std::thread;
    use std::time::{Duration, Instant};
    use vm_memory::{Bytes, GuestAddress};

    fn device() -> OwnedFd {
        File::options().read(true).write(true).open("/dev/userfaultfd").unwrap().into()
    }

    #[test]
    #[ignore = "needs root"]
    fn writer_waits_until_its_page_is_released_whether_or_not_it_was_there() {
        let ram = Ram::map(32 << 20).unwrap();
        let view = View::new(&ram);
        let barrier = Barrier::register(&device(), &view).unwrap();
        let touched = GuestAddress(0x1000);
        ram.memory().write_obj(1u8, touched).unwrap();
        let range = view.host_ranges(0..1).next().unwrap();
        for place in [touched, GuestAddress(0x2000)] {
            barrier.arm(range).unwrap();
            let (done, written) = mpsc::channel();
            let memory = ram.memory().clone();
            let writer = thread::spawn(move || {
                memory.write_obj(2u8, place).unwrap();
                done.send(()).unwrap();
            });
            let mut heard = None;
            let begin = Instant::now();
            while heard.is_none() && begin.elapsed() < Duration::from_secs(5) {
                barrier.waiting(|address| heard = Some(address)).unwrap();
            }
            assert_eq!(heard.map(|address| address & !0xfff), Some(range.start + place.0));
            assert!(written.recv_timeout(Duration::from_millis(20)).is_err());
            assert_ne!(ram.memory().read_obj::<u8>(place).unwrap(), 2);
            barrier.release(range).unwrap();
            written.recv_timeout(Duration::from_secs(5)).unwrap();
            writer.join().unwrap();
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn dropped_barrier_lets_everybody_go() {
        let ram = Ram::map(32 << 20).unwrap();
        let view = View::new(&ram);
        let barrier = Barrier::register(&device(), &view).unwrap();
        barrier.arm(view.host_ranges(0..view.chunks()).next().unwrap()).unwrap();
        let memory = ram.memory().clone();
        let writer = thread::spawn(move || memory.write_obj(2u8, GuestAddress(20 << 20)).unwrap());
        thread::sleep(Duration::from_millis(20));
        assert!(!writer.is_finished());
        drop(barrier);
        writer.join().unwrap();
        ram.memory().write_obj(3u8, GuestAddress(4096)).unwrap();
    }
}
