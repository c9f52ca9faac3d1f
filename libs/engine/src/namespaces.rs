//! Namespaces that hold nothing, for VMMs to join.
//!
//! A thread leaves its namespace for a new one, opens it and ends; the descriptor keeps the namespace. A VMM that joins
//! the empty root has no mount of the host's in reach, and the namespace holds none back from being unmounted. To make it,
//! the kernel looks at every thread of the host (`pivot_root`), which is why each VMM does not make its own.

use std::fs::File;
use std::io;

use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sched::{unshare, CloneFlags};
use nix::unistd::{chdir, pivot_root};
use thiserror::Error;

/// The caller's own, of the thread that reads them; namespaces(7).
const OWN_NETWORK: &str = "/proc/thread-self/ns/net";
const OWN_MOUNTS: &str = "/proc/thread-self/ns/mnt";
/// Any directory of the host will do to mount the empty root on; procfs is mounted on every host that runs an engine.
const STAGING: &str = "/proc";

/// A namespace that cannot be made.
#[derive(Debug, Error)]
#[error("{step} failed")]
pub(crate) struct StepError {
    step: &'static str,
    source: io::Error,
}

impl StepError {
    /// The caller has too few privileges.
    pub(crate) fn is_permission(&self) -> bool {
        self.source.kind() == io::ErrorKind::PermissionDenied
    }
}

/// A network namespace without interfaces but a loopback that is down. Leaves the calling thread in it.
pub(crate) fn empty_network() -> Result<File, StepError> {
    step("leaving the network namespace", unshare(CloneFlags::CLONE_NEWNET))?;
    step("opening the network namespace", File::open(OWN_NETWORK))
}

/// A mount namespace with one mount, an empty directory that nobody can write to. Leaves the calling thread in it.
pub(crate) fn empty_root() -> Result<File, StepError> {
    const NONE: Option<&str> = None;
    step("leaving the mount namespace", unshare(CloneFlags::CLONE_NEWNS))?;
    let opened = step("opening the mount namespace", File::open(OWN_MOUNTS))?;
    step("making mounts private", mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = Some("size=4k,nr_inodes=2,mode=0555");
    step("mounting an empty root", mount(Some("ovms-empty"), STAGING, Some("tmpfs"), flags, options))?;
    step("entering the empty root", chdir(STAGING))?;
    // With both arguments the same the old root ends up mounted over the new one, where it can be unmounted without
    // a directory to hang it on (pivot_root(2), "pivot_root(".", ".")").
    step("pivoting into the empty root", pivot_root(".", "."))?;
    step("leaving the host's root", umount2(".", MntFlags::MNT_DETACH))?;
    Ok(opened)
}

fn step<T, E: Into<io::Error>>(step: &'static str, result: Result<T, E>) -> Result<T, StepError> {
    result.map_err(|source| StepError { step, source: source.into() })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;
    use std::thread;

    use nix::fcntl::{openat, OFlag};
    use nix::sched::setns;
    use nix::sys::stat::Mode;

    use super::*;

    fn apart<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
        thread::spawn(body).join().unwrap()
    }

    #[test]
    #[ignore = "needs root"]
    fn an_empty_root_has_one_mount_and_takes_no_file() {
        let root = apart(|| empty_root().unwrap());
        apart(move || {
            // Opened before: it is not there afterwards.
            let proc = File::open("/proc").unwrap();
            unshare(CloneFlags::CLONE_FS).unwrap();
            setns(root.as_fd(), CloneFlags::CLONE_NEWNS).unwrap();
            for path in ["/", "..", "."] {
                assert_eq!(fs::read_dir(path).unwrap().count(), 0, "{path}");
            }
            assert_eq!(fs::write("/file", "x").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
            let mounts = openat(&proc, "thread-self/mountinfo", OFlag::O_RDONLY, Mode::empty()).unwrap();
            let mounts = io::read_to_string(File::from(mounts)).unwrap();
            assert_eq!(mounts.lines().count(), 1, "{mounts}");
            assert!(mounts.contains(" / / ro,nosuid,nodev,noexec") && mounts.contains("ovms-empty"), "{mounts}");
        });
    }

    #[test]
    #[ignore = "needs root"]
    fn an_empty_network_has_a_loopback_that_is_down() {
        let (network, own) = apart(|| {
            let network = empty_network().unwrap();
            (network, fs::read_to_string("/proc/thread-self/net/dev").unwrap())
        });
        drop(network);
        let interfaces: Vec<_> = own.lines().skip(2).filter_map(|line| line.split(':').next()).map(str::trim).collect();
        // Modules of the host may add tunnels of their own to every namespace; nothing of the host's is there.
        assert!(interfaces.contains(&"lo"), "{own}");
        let traffic = own.lines().find(|line| line.trim().starts_with("lo:")).unwrap();
        assert!(traffic.split_ascii_whitespace().skip(1).all(|count| count == "0"), "{traffic}");
    }
}
