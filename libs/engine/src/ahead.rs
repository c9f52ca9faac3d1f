//! What the kernel takes its time for and what depends on nothing but the host: begun on threads before the cgroup is
//! made and the VMM's program starts, and waited for when the VMM is to be told.
//!
//! ```text
//!  Ahead::begin ──> /dev/kvm opened ──thread──> KVM_GET_SUPPORTED_CPUID, 0.3 ms ──┐
//!       │                      └──────thread──> empty network namespace, 0.3 ms ──┤
//!       └──> cgroup, VMM's program, machine's files ────────── Ahead::wait <──────┘
//! ```
//! Both would cost the VMM more than they cost here: its memory slots and doorbells wait for the end of an RCU grace
//! period, and KVM does not let go of its processor while it gathers what processors can do.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::thread::{Builder, JoinHandle};

use nix::sched::{unshare, CloneFlags};
use nix::sys::memfd::{memfd_create, MFdFlags};

use crate::error::{Error, Kind, Result};
use crate::sys;

/// Bytes: a thread makes a few system calls, one with a buffer of 10 KiB.
const STACK: usize = 64 << 10;
/// The caller's own, of the thread that reads it; namespaces(7).
const OWN_NETNS: &str = "/proc/thread-self/ns/net";

/// On its way.
pub struct Ahead {
    kvm: File,
    cpuid: Thread,
    netns: Netns,
}

/// What a VMM gets of its host.
pub struct HostFiles {
    /// `/dev/kvm`.
    pub kvm: File,
    /// What that answers to KVM_GET_SUPPORTED_CPUID, as `ovms_config::vm::VmConfig::cpuid` describes it.
    pub cpuid: File,
    /// The network namespace that the VMM joins.
    pub netns: File,
}

/// A network namespace: one that the caller names, or an empty one.
enum Netns {
    Named(File),
    Empty(Thread),
}

type Thread = JoinHandle<io::Result<File>>;

impl Ahead {
    /// Opens the hypervisor's device and the network namespace that `netns` names; none: begins an empty one.
    ///
    /// # Errors
    /// `Unavailable` without the device, `InvalidArgument` without the network namespace, `Internal` if the system has no
    /// thread to give.
    pub fn begin(kvm: &Path, netns: Option<&Path>) -> Result<Self> {
        let kvm = open_kvm(kvm)?;
        let netns = match netns {
            Some(path) => Netns::Named(open_netns(path)?),
            None => Netns::Empty(begin("ovms-netns", empty_netns)?),
        };
        let device = kvm.try_clone().map_err(Error::io("the hypervisor device cannot be shared with a thread"))?;
        let cpuid = begin("ovms-cpuid", move || supported_cpuid(&device))?;
        Ok(Self { kvm, cpuid, netns })
    }

    /// Waits for what was begun.
    ///
    /// # Errors
    /// `Unavailable` if the hypervisor does not answer, `FailedPrecondition` or `Internal` if there is no namespace.
    pub fn wait(self) -> Result<HostFiles> {
        let cpuid = end(self.cpuid).map_err(|err| {
            Error::new(Kind::Unavailable, "the hypervisor does not say what its processors can do").because(err)
        })?;
        let netns = match self.netns {
            Netns::Named(file) => file,
            Netns::Empty(thread) => end(thread).map_err(|err| {
                let kind = match err.kind() {
                    io::ErrorKind::PermissionDenied => Kind::FailedPrecondition,
                    _ => Kind::Internal,
                };
                Error::new(kind, "an empty network namespace cannot be made").because(err)
            })?,
        };
        Ok(HostFiles { kvm: self.kvm, cpuid, netns })
    }
}

fn begin(name: &str, make: impl FnOnce() -> io::Result<File> + Send + 'static) -> Result<Thread> {
    let thread = Builder::new().name(name.into()).stack_size(STACK).spawn(make);
    thread.map_err(Error::io("a thread that makes a machine's start shorter cannot be started"))
}

fn end(thread: Thread) -> io::Result<File> {
    thread.join().unwrap_or_else(|_| Err(io::Error::other("its thread panicked")))
}

fn supported_cpuid(kvm: &File) -> io::Result<File> {
    let entries = sys::supported_cpuid(kvm)?;
    let mut file = File::from(memfd_create("ovms-cpuid", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&entries)?;
    Ok(file)
}

fn empty_netns() -> io::Result<File> {
    // Of this thread alone; the descriptor keeps it when the thread is gone.
    unshare(CloneFlags::CLONE_NEWNET)?;
    File::open(OWN_NETNS)
}

fn open_netns(path: &Path) -> Result<File> {
    File::open(path).map_err(|err| {
        let message = format!("the network namespace {} cannot be opened", path.display());
        Error::new(Kind::InvalidArgument, message).because(err)
    })
}

fn open_kvm(path: &Path) -> Result<File> {
    File::options().read(true).write(true).open(path).map_err(|err| {
        let help = match err.kind() {
            io::ErrorKind::NotFound => {
                "is missing: switch virtualization on in the firmware and load kvm_intel or kvm_amd; in a virtual machine, \
                 ask for nested virtualization"
            }
            io::ErrorKind::PermissionDenied => "may not be opened: run as root; in a container, allow it the device",
            _ => "cannot be opened",
        };
        Error::new(Kind::Unavailable, format!("the hypervisor device {} {help}", path.display())).because(err)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begin_without_the_device_returns_what_to_do() {
        let err = Ahead::begin(Path::new("/no/such/kvm"), None).err().unwrap();
        assert_eq!(err.kind(), Kind::Unavailable);
        assert!(err.to_string().contains("load kvm_intel or kvm_amd"), "{err}");
    }

    #[test]
    fn begin_with_a_namespace_that_is_missing_returns_its_path() {
        let err = Ahead::begin(Path::new("/dev/null"), Some(Path::new("/run/netns/none"))).err().unwrap();
        assert!(err.to_string().contains("/run/netns/none"), "{err}");
    }

    #[test]
    fn wait_for_a_device_that_is_no_hypervisor_returns_unavailable() {
        let null = Path::new("/dev/null");
        let err = Ahead::begin(null, Some(null)).unwrap().wait().err().unwrap();
        assert_eq!(err.kind(), Kind::Unavailable);
        assert!(err.to_string().contains("what its processors can do"), "{err}");
    }
}
