//! The walls that the VMM puts around itself, once it holds every descriptor and before it hears of the guest.
//!
//! The engine gave the process new pid, ipc and uts namespaces, and nothing but a control socket; over that come a network
//! namespace and a mount namespace that holds nothing but an empty read-only directory. [`enter`] does the rest, in an
//! order in which each step still has the privileges it needs and none can be undone by a later one:
//!
//! ```text
//!  setns(net) → host name → setns(mnt): root and working directory are the empty one → rlimits
//!   → bounding set empty → groups, gid, uid → capabilities empty → not dumpable → no_new_privs → (seccomp, per thread)
//! ```
//! Afterwards `/proc/PID/root` is an empty directory: what host tools copy "out of the container" through it is
//! nothing of the host's.

mod sys;

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::sched::{setns, CloneFlags};
use nix::sys::prctl;
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use nix::unistd::{setgroups, sethostname, setresgid, setresuid, Gid, Uid};
use ovms_config::vm::JailConfig;
use thiserror::Error;

/// A wall that cannot be put up; the VMM must not go on.
#[derive(Debug, Error)]
#[error("the jail cannot be closed: {step} failed")]
pub struct JailError {
    /// What was attempted.
    step: &'static str,
    /// What the kernel says.
    #[source]
    source: io::Error,
}

/// Longest host name (`__NEW_UTS_LEN` of the kernel's include/uapi/linux/utsname.h).
const MAX_HOSTNAME: usize = 64;

/// Puts up every wall but seccomp. Must be called while the process has one thread: capabilities and `no_new_privs`
/// belong to threads, and those that exist already would keep theirs.
///
/// Everything that needs root must be done before: opening nothing is left, but locking guest memory beyond
/// `RLIMIT_MEMLOCK` is.
///
/// # Errors
/// [`JailError`] names the first wall that does not stand.
pub fn enter(config: &JailConfig, root: OwnedFd, netns: OwnedFd) -> Result<(), JailError> {
    step("joining the network namespace", setns(netns.as_fd(), CloneFlags::CLONE_NEWNET))?;
    drop(netns);
    let hostname = config.hostname.as_bytes();
    let hostname = OsStr::from_bytes(hostname.get(..MAX_HOSTNAME).unwrap_or(hostname));
    step("setting the host name", sethostname(hostname))?;
    step("joining the empty root", setns(root.as_fd(), CloneFlags::CLONE_NEWNS))?;
    drop(root);
    limits(config)?;
    drop_privileges(config)
}

/// Sets what the process may use of the host's resources. Limits that the host has set lower already stay.
fn limits(config: &JailConfig) -> Result<(), JailError> {
    let limits = [
        ("RLIMIT_FSIZE", Resource::RLIMIT_FSIZE, config.max_file_size),
        ("RLIMIT_NOFILE", Resource::RLIMIT_NOFILE, config.max_open_files),
        ("RLIMIT_CORE", Resource::RLIMIT_CORE, 0),
        ("RLIMIT_MSGQUEUE", Resource::RLIMIT_MSGQUEUE, 0),
        ("RLIMIT_RTPRIO", Resource::RLIMIT_RTPRIO, 0),
    ];
    for (name, resource, wanted) in limits {
        let (_, hard) = step(name, getrlimit(resource))?;
        let limit = wanted.min(hard);
        step(name, setrlimit(resource, limit, limit))?;
    }
    Ok(())
}

/// Becomes a user without any privilege, for good.
fn drop_privileges(config: &JailConfig) -> Result<(), JailError> {
    let (uid, gid) = (Uid::from_raw(config.uid), Gid::from_raw(config.gid));
    step("emptying the bounding set", sys::drop_bounding_set())?;
    step("dropping supplementary groups", setgroups(&[]))?;
    step("becoming the group", setresgid(gid, gid, gid))?;
    step("becoming the user", setresuid(uid, uid, uid))?;
    step("dropping capabilities", sys::drop_capabilities())?;
    step("becoming undumpable", prctl::set_dumpable(false))?;
    step("setting no_new_privs", prctl::set_no_new_privs())
}

fn step<T>(step: &'static str, result: Result<T, Errno>) -> Result<T, JailError> {
    result.map_err(|errno| JailError { step, source: errno.into() })
}

#[cfg(test)]
mod tests;
