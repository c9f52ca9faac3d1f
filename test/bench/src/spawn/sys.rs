//! The calls that the standard library does not have.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::thread::{self, JoinHandle};

/// Descriptor of the control socket in the VMM.
const CONTROL: i32 = 3;

/// Starts `command` in new namespaces with `control` as its descriptor 3.
pub(crate) fn jailed(mut command: Command, control: OwnedFd) -> io::Result<Child> {
    let own_pids = File::open("/proc/self/ns/pid")?;
    // SAFETY: changes where the next child of this thread is born.
    check(unsafe { libc::unshare(libc::CLONE_NEWPID) })?;
    let raw = control.as_raw_fd();
    // SAFETY: the closure makes system calls only, which is all that may happen between fork and exec.
    unsafe {
        command.pre_exec(move || {
            check(libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS))?;
            if raw == CONTROL {
                return check(libc::fcntl(raw, libc::F_SETFD, 0));
            }
            check(libc::dup2(raw, CONTROL))
        });
    }
    let child = command.spawn();
    // SAFETY: back to this process's own pid namespace for its next child.
    check(unsafe { libc::setns(own_pids.as_raw_fd(), libc::CLONE_NEWPID) })?;
    child
}

/// Begins an empty network namespace.
pub(crate) fn empty_netns() -> JoinHandle<io::Result<File>> {
    thread::spawn(|| {
        // SAFETY: moves this thread alone.
        check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
        File::open("/proc/thread-self/ns/net")
    })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
