//! What the kernel takes its time for and what depends on nothing but the host: begun on a thread before the cgroup is
//! made and the VMM's program starts, and waited for when the VMM is to be told.
//!
//! ```text
//!  Ahead::begin ──> /dev/kvm opened ──thread──> empty network namespace, 0.4 ms ──────────────┐
//!       │                               the first time: KVM_GET_SUPPORTED_CPUID, empty root ──┤
//!       └──> cgroup, VMM's program, machine's files ──────────────── Ahead::wait <────────────┘
//! ```
//! All of it would cost the VMM more than it costs here: its memory slots and doorbells wait for the end of an RCU grace
//! period, and KVM does not let go of its processor while it gathers what processors can do. What every machine of
//! this process gets alike is made for the first of them and kept. One thread, since on a host of two processors a
//! second one would take its time from who begins it.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};

use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use nix::sys::memfd::{memfd_create, MFdFlags};

use crate::error::{Error, Kind, Result};
use crate::{namespaces, sys};

/// Bytes: a thread makes a few system calls, one with a buffer of 10 KiB.
const STACK: usize = 64 << 10;

/// What every machine of this process gets alike.
static HOST: OnceLock<Arc<Host>> = OnceLock::new();

/// The hypervisor, what it says of the host's processors, and a root without anything.
#[derive(Debug)]
struct Host {
    path: PathBuf,
    /// As long as it is open, KVM's module cannot be exchanged for one that gives other answers.
    kvm: File,
    cpuid: File,
    root: File,
}

/// On its way.
#[derive(Debug)]
pub struct Ahead(JoinHandle<Result<Made>>);

/// What comes of it.
#[derive(Debug)]
struct Made {
    host: Arc<Host>,
    netns: File,
}

/// What a VMM gets of its host.
pub struct HostFiles {
    /// `/dev/kvm`.
    pub kvm: File,
    /// What that answers to KVM_GET_SUPPORTED_CPUID, as `ovms_config::vm::VmConfig::cpuid` describes it; sealed.
    pub cpuid: File,
    /// The mount namespace that the VMM joins: an empty read-only directory.
    pub root: File,
    /// The network namespace that the VMM joins.
    pub netns: File,
}

impl Ahead {
    /// Opens the hypervisor's device and the network namespace that `netns` names; none: begins an empty one.
    ///
    /// # Errors
    /// `Unavailable` without the device, `InvalidArgument` without the network namespace, `Internal` if the system has no
    /// thread to give.
    pub fn begin(kvm: &Path, netns: Option<&Path>) -> Result<Self> {
        let host = match HOST.get().filter(|host| host.path == kvm) {
            Some(host) => Known::Host(Arc::clone(host)),
            None => Known::Device(kvm.to_owned(), open_kvm(kvm)?),
        };
        let netns = netns.map(open_netns).transpose()?;
        let make = move || {
            // First, since it needs /proc, which the empty root does not have.
            let netns = match netns {
                Some(named) => named,
                None => namespaces::empty_network().map_err(refused("an empty network namespace cannot be made"))?,
            };
            Ok(Made { host: host.ask()?, netns })
        };
        let thread = Builder::new().name("ovms-ahead".into()).stack_size(STACK).spawn(make);
        let thread = thread.map_err(Error::io("a thread that makes a machine's start shorter cannot be started"))?;
        sys::begin_elsewhere(&thread);
        Ok(Self(thread))
    }

    /// Waits for what was begun.
    ///
    /// # Errors
    /// `Unavailable` if the hypervisor does not answer, `FailedPrecondition` or `Internal` if there is a namespace that
    /// cannot be made.
    pub fn wait(self) -> Result<HostFiles> {
        let panicked = || Error::new(Kind::Internal, "a thread that makes a machine's start shorter panicked");
        let Made { host, netns } = self.0.join().unwrap_or_else(|_| Err(panicked()))?;
        let share = |file: &File| file.try_clone().map_err(Error::io("what every machine gets cannot be shared"));
        let files = HostFiles { kvm: share(&host.kvm)?, cpuid: share(&host.cpuid)?, root: share(&host.root)?, netns };
        // Whoever was first has the same.
        let _ = HOST.set(host);
        Ok(files)
    }
}

/// What is known of the host so far.
enum Known {
    Host(Arc<Host>),
    Device(PathBuf, File),
}

impl Known {
    fn ask(self) -> Result<Arc<Host>> {
        let (path, kvm) = match self {
            Self::Host(host) => return Ok(host),
            Self::Device(path, kvm) => (path, kvm),
        };
        let cpuid = supported_cpuid(&kvm).map_err(|err| {
            Error::new(Kind::Unavailable, "the hypervisor does not say what its processors can do").because(err)
        })?;
        let root = namespaces::empty_root().map_err(refused("an empty root for VMMs cannot be made"))?;
        Ok(Arc::new(Host { path, kvm, cpuid, root }))
    }
}

/// The answer, in a file that whoever holds it can only read.
fn supported_cpuid(kvm: &File) -> io::Result<File> {
    let entries = sys::supported_cpuid(kvm)?;
    let mut file = File::from(memfd_create("ovms-cpuid", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.write_all(&entries)?;
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

fn refused(message: &'static str) -> impl FnOnce(namespaces::StepError) -> Error {
    move |err| {
        let kind = if err.is_permission() { Kind::FailedPrecondition } else { Kind::Internal };
        Error::new(kind, message).because(err)
    }
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
