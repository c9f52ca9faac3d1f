//! Birth of a VMM by `clone3`, its pidfd, what KVM supports: calls for which neither the standard library nor nix has a wrapper.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread::JoinHandle;

use libc::{c_char, c_int, c_long};
use nix::sys::wait::{waitid, Id, WaitPidFlag};

/// Lowest descriptor that the caller's own may have, so that none of them is overwritten when they are put in place.
pub(crate) const FIRST_FREE_FD: RawFd = 10;
/// Where the VMM finds its control socket.
const CONTROL_FD: RawFd = 3;

/// `CLONE_CLEAR_SIGHAND` and `CLONE_INTO_CGROUP` of the kernel's include/uapi/linux/sched.h (libc's do not fit their type).
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
const CLONE_INTO_CGROUP: u64 = 1 << 33;
/// The namespaces that a VMM is born in. It joins its root and its network itself, once they are made (`ahead.rs`).
const NAMESPACES: c_int = libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// The child uses the memory of its parent, whose calling thread stands until the child executes its program: to copy the
/// page tables, and every page that either writes afterwards, would cost 0.2 ms and more, the more the larger the parent.
const SHARED: c_int = libc::CLONE_VM | libc::CLONE_VFORK;
/// Bytes of the child's stack: it makes system calls.
const CHILD_STACK: usize = 16 << 10;

/// `struct clone_args` of include/uapi/linux/sched.h, as of its second version (88 bytes).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Everything that the child needs between `clone3` and `execve`; made before, since nothing may be allocated there.
/// All descriptors must be [`FIRST_FREE_FD`] or above.
pub(crate) struct Birth<'a> {
    /// The program.
    pub(crate) program: &'a CStr,
    /// Its arguments, a null pointer last.
    pub(crate) argv: &'a [*const c_char],
    /// Its environment, a null pointer last.
    pub(crate) envp: &'a [*const c_char],
    /// Becomes 0 and 1.
    pub(crate) null: BorrowedFd<'a>,
    /// Becomes 2.
    pub(crate) log: BorrowedFd<'a>,
    /// Becomes 3.
    pub(crate) control: BorrowedFd<'a>,
    /// cgroup v2 directory that the child is born in.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
    /// `tasks` files of cgroups v1 into which the child writes itself.
    pub(crate) tasks: &'a [OwnedFd],
}

/// Why there is no child that executes the program.
#[derive(Debug)]
pub(crate) enum SpawnError {
    /// There was none.
    Clone(io::Error),
    /// It could not join a cgroup.
    Cgroup(io::Error),
    /// It could not execute the program.
    Exec(io::Error),
}

/// What the child says of itself: 0, the number of the error of its `execve`, or the negative of that of its cgroup.
type Failure = AtomicI32;

/// Has a thread that was just started begin on another processor than the caller's, if it may use one: where that was busy
/// for the instant of the start, the kernel lets it wait behind its maker. Only a wish.
pub(crate) fn begin_elsewhere<T>(thread: &JoinHandle<T>) {
    const SIZE: usize = size_of::<libc::cpu_set_t>();
    // SAFETY: `set` is a cpu_set_t of the size given, for which zeroes are valid, and the processor's number is within it;
    // the handle keeps the thread's number its own.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let here = usize::try_from(libc::sched_getcpu()).unwrap_or(usize::MAX);
        if libc::sched_getaffinity(0, SIZE, &raw mut set) != 0 || libc::CPU_COUNT(&set) < 2 || here >= SIZE * 8 {
            return;
        }
        libc::CPU_CLR(here, &mut set);
        libc::pthread_setaffinity_np(thread.as_pthread_t(), SIZE, &raw const set);
    }
}

/// Makes a child in its own namespaces and cgroup that executes the program; returns its pid and its pidfd when it does.
pub(crate) fn spawn(birth: &Birth<'_>) -> Result<(u32, OwnedFd), SpawnError> {
    let failure = Failure::new(0);
    let mut pidfd: c_int = -1;
    // Of units that are aligned as a stack is.
    let mut stack = vec![MaybeUninit::<u128>::uninit(); CHILD_STACK / size_of::<u128>()];
    let mut args = CloneArgs {
        flags: NAMESPACES as u64 | SHARED as u64 | libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND,
        pidfd: ptr::from_mut(&mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: CHILD_STACK as u64,
        ..CloneArgs::default()
    };
    if let Some(dir) = birth.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = dir.as_raw_fd() as u64;
    }
    let result: c_long;
    // SAFETY: `args` is a live CloneArgs of the size given; `pidfd`, `stack`, `birth` and `failure` outlive the child's use
    // of them, since the call returns here only when the child has executed its program or has ended (CLONE_VFORK). The
    // child does not return here: it begins on its own stack, whose end is aligned for a call, with all registers of ours,
    // and calls `child`. Other threads may hold locks of the allocator, so it must make async-signal-safe calls
    // only, which `child` upholds. The kernel changes rax, rcx and r11 (x86-64 ABI, A.2.1).
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, {birth}",
            "mov rsi, {failure}",
            "call {child}",
            "ud2",
            "2:",
            birth = in(reg) ptr::from_ref(birth),
            failure = in(reg) ptr::from_ref(&failure),
            child = sym child,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw const args,
            in("rsi") size_of::<CloneArgs>(),
            out("rcx") _,
            out("r11") _,
        );
    }
    if result < 0 {
        return Err(SpawnError::Clone(io::Error::from_raw_os_error((-result) as i32)));
    }
    // SAFETY: the kernel has put a new descriptor there that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let errno = failure.into_inner();
    if errno == 0 {
        return Ok((result as u32, pidfd));
    }
    // Nobody else knows of it.
    let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
    let error = io::Error::from_raw_os_error(errno.saturating_abs());
    Err(if errno < 0 { SpawnError::Cgroup(error) } else { SpawnError::Exec(error) })
}

/// The child's way from `clone3` to `execve`.
///
/// # Safety
/// Must be called in a child whose parent's thread stands still: it has the memory and the `errno` of that. Makes only
/// async-signal-safe calls, writes to nothing but its stack, `errno` and `failure`, and never returns.
unsafe extern "C" fn child(birth: &Birth<'_>, failure: &Failure) -> ! {
    // SAFETY: the arrays in `birth` end in null pointers and its strings in zeroes (the caller built them from
    // CStrings); every call here is async-signal-safe.
    unsafe {
        for tasks in birth.tasks {
            // "0" is whoever writes it.
            if libc::write(tasks.as_raw_fd(), c"0".as_ptr().cast(), 1) != 1 {
                failure.store(-*libc::__errno_location(), Ordering::Relaxed);
                libc::_exit(127)
            }
        }
        libc::setsid();
        let moved = libc::dup2(birth.null.as_raw_fd(), 0) >= 0
            && libc::dup2(birth.null.as_raw_fd(), 1) >= 0
            && libc::dup2(birth.log.as_raw_fd(), 2) >= 0
            && libc::dup2(birth.control.as_raw_fd(), CONTROL_FD) >= 0
            && libc::syscall(libc::SYS_close_range, c_long::from(CONTROL_FD + 1), c_long::from(u32::MAX), 0) == 0;
        if moved {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
            libc::execve(birth.program.as_ptr(), birth.argv.as_ptr(), birth.envp.as_ptr());
        }
        failure.store(*libc::__errno_location(), Ordering::Relaxed);
        libc::_exit(127)
    }
}

/// A descriptor for the process that has this number now.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes two numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, c_long::from(pid), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has made this descriptor for us (it is close-on-exec by itself).
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends a signal to a process that cannot be mistaken for another.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: c_int) -> io::Result<()> {
    // SAFETY: no siginfo is passed, so no memory of ours is read.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            c_long::from(pidfd.as_raw_fd()),
            c_long::from(signal),
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A close-on-exec copy of a descriptor, numbered `floor` or above.
pub(crate) fn duplicate_above(fd: BorrowedFd<'_>, floor: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes three numbers.
    let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, floor) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// `KVM_GET_SUPPORTED_CPUID` of the kernel's include/uapi/linux/kvm.h.
const KVM_GET_SUPPORTED_CPUID: libc::Ioctl = 0xc008_ae05_u32 as libc::Ioctl;
/// `KVM_MAX_CPUID_ENTRIES` of arch/x86/include/asm/kvm_host.h.
const MAX_CPUID_ENTRIES: usize = 256;
/// Bytes of `struct kvm_cpuid_entry2` of arch/x86/include/uapi/asm/kvm.h.
const CPUID_ENTRY: usize = 40;

/// What the host's processors can offer to guests: `struct kvm_cpuid_entry2`, one behind the other.
pub(crate) fn supported_cpuid(kvm: &File) -> io::Result<Vec<u8>> {
    /// `struct kvm_cpuid2`.
    #[repr(C)]
    struct Cpuid {
        count: u32,
        padding: u32,
        entries: [[u8; CPUID_ENTRY]; MAX_CPUID_ENTRIES],
    }
    let mut all = Cpuid { count: MAX_CPUID_ENTRIES as u32, padding: 0, entries: [[0; CPUID_ENTRY]; MAX_CPUID_ENTRIES] };
    // SAFETY: the kernel writes at most as many entries as `count` says there is room for.
    if unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_SUPPORTED_CPUID, &raw mut all) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(all.entries.iter().take(all.count as usize).flatten().copied().collect())
}

/// Begins to write back what of a file is changed in memory, without waiting for the disk unless its queue is full.
pub(crate) fn begin_writeback(file: &File) -> io::Result<()> {
    // SAFETY: takes no pointer; the descriptor is open. Offset and length 0 are the whole file.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `MADV_POPULATE_READ` of the kernel's include/uapi/asm-generic/mman-common.h, since Linux 5.14.
const MADV_POPULATE_READ: c_int = 22;

/// A shared read-only mapping of a file whose pages, once they are in memory, stay there.
#[derive(Debug)]
pub(crate) struct LockedMap {
    address: *mut libc::c_void,
    length: usize,
}

// SAFETY: nothing reads or writes the memory through the address; the calls on it may come from any thread.
unsafe impl Send for LockedMap {}
// SAFETY: as above.
unsafe impl Sync for LockedMap {}

impl LockedMap {
    /// Maps the first `length` bytes. Pages are locked as they come in; the limit of locked memory is asked at once.
    pub(crate) fn new(file: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; the descriptor is open.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let map = Self { address, length };
        // SAFETY: the range is the mapping made above.
        if unsafe { libc::mlock2(map.address, map.length, libc::MLOCK_ONFAULT) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(map)
    }

    /// Brings a range, cut at the mapping's end, into memory. `start` is at a page's begin.
    pub(crate) fn populate(&self, range: std::ops::Range<usize>) -> io::Result<()> {
        let end = range.end.min(self.length);
        let Some(length) = end.checked_sub(range.start) else { return Ok(()) };
        // SAFETY: the range lies within the mapping; reading pages in changes nothing that anybody sees.
        let rc = unsafe { libc::madvise(self.address.byte_add(range.start), length, MADV_POPULATE_READ) };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for LockedMap {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's alone, and nothing refers into it.
        unsafe { libc::munmap(self.address, self.length) };
    }
}
