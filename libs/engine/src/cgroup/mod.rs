//! The cgroup that a VMM lives in: made, limited, read, watched for OOM kills, removed. Versions 1 and 2 of the kernel's
//! interface differ in every file name; the two modules below hide that.
//!
//! The files are written directly, also for systemd's `slice:prefix:name` form: the scope then lies where systemd would
//! have put it, but systemd itself does not list it as a unit.

mod files;
mod path;
mod v1;
mod v2;

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::spec::Limits;
use crate::stats::{CgroupVersion, Stats};

pub(crate) use path::parse as parse_path;

/// How long a cgroup's directory may stay busy after its last process was reaped.
const BUSY: Duration = Duration::from_secs(2);

/// A cgroup, one directory for each hierarchy.
#[derive(Debug)]
pub(crate) enum Cgroup {
    /// Version 1.
    V1(v1::V1),
    /// Version 2.
    V2(v2::V2),
    /// The host has none; nothing is limited or counted.
    None,
}

/// Where a process is born.
#[derive(Debug, Default)]
pub struct Birthplace {
    /// Version 2: the directory that the kernel makes it in.
    pub dir: Option<OwnedFd>,
    /// Version 1: the `tasks` file of each hierarchy, into which the newborn writes itself. A process that moves its one
    /// thread itself waits for nobody (since Linux 5.4); whoever moves another's waits for an RCU grace period, 7 to 14 ms.
    pub tasks: Vec<OwnedFd>,
}

/// What a cgroup should hold a machine to: the spec's limits with the memory limit settled.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bounds {
    /// The limits as they came; their `memory` and `memory_swap` are not used.
    pub(crate) limits: Limits,
    /// Memory limit in bytes.
    pub(crate) memory: Option<u64>,
    /// Memory plus swap in bytes; -1: no limit.
    pub(crate) memory_and_swap: Option<i64>,
}

impl Cgroup {
    /// Where a cgroup lies below each hierarchy's root; `path` is relative. Nothing is made yet.
    pub(crate) fn find(path: &Path) -> Result<Self> {
        let mounts = files::read(Path::new("/proc/self/mountinfo"))?;
        Ok(if let Some(v1) = v1::V1::find(&mounts, path) {
            Self::V1(v1)
        } else if let Some(v2) = v2::V2::find(&mounts, path) {
            Self::V2(v2)
        } else {
            tracing::warn!("the host has no cgroups mounted: the machine is neither limited nor counted");
            Self::None
        })
    }

    /// Makes its directories.
    pub(crate) fn create(&self) -> Result<()> {
        let made = match self {
            Self::V1(v1) => v1.create(),
            Self::V2(v2) => v2.create(),
            Self::None => Ok(()),
        };
        made.inspect_err(|_| remove(&self.dirs()))
    }

    /// Sets limits.
    pub(crate) fn apply(&self, bounds: &Bounds) -> Result<()> {
        match self {
            Self::V1(v1) => v1.apply(bounds),
            Self::V2(v2) => v2.apply(bounds),
            Self::None => Ok(()),
        }
    }

    /// What a process needs to be in it before its program begins.
    pub(crate) fn birthplace(&self) -> Result<Birthplace> {
        Ok(match self {
            Self::V1(v1) => Birthplace { dir: None, tasks: v1.tasks()? },
            Self::V2(v2) => Birthplace { dir: Some(v2.open()?), tasks: Vec::new() },
            Self::None => Birthplace::default(),
        })
    }

    /// Starts watching for OOM kills; `None` where the host cannot tell.
    pub(crate) fn watch_oom(&self) -> Option<OomWatch> {
        let watch = match self {
            Self::V1(v1) => v1.watch_oom(),
            Self::V2(v2) => v2.watch_oom(),
            Self::None => return None,
        };
        watch.inspect_err(|err| tracing::warn!(err = err.chain(), "OOM kills cannot be watched for")).ok()
    }

    /// Figures; `None` if the host has no cgroups.
    pub(crate) fn stats(&self) -> Option<Stats> {
        match self {
            Self::V1(v1) => Some(v1.stats()),
            Self::V2(v2) => Some(v2.stats()),
            Self::None => None,
        }
    }

    /// Every directory of the cgroup.
    pub(crate) fn dirs(&self) -> Vec<PathBuf> {
        match self {
            Self::V1(v1) => v1.dirs(),
            Self::V2(v2) => v2.dirs(),
            Self::None => Vec::new(),
        }
    }
}

/// Removes a cgroup's directories, waiting a moment for those that are still busy. What stays is told to the log alone:
/// it holds somebody else's process.
pub(crate) fn remove(dirs: &[PathBuf]) {
    let deadline = Instant::now() + BUSY;
    for dir in dirs {
        loop {
            match fs::remove_dir(dir) {
                Ok(()) => break,
                Err(err) if err.kind() == io::ErrorKind::NotFound => break,
                Err(err) if err.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(2));
                }
                Err(err) => {
                    tracing::warn!(dir = %dir.display(), %err, "a cgroup cannot be removed");
                    break;
                }
            }
        }
    }
}

/// Something to poll for OOM kills, and the file that counts them.
#[derive(Debug)]
pub(crate) struct OomWatch {
    fd: OwnedFd,
    /// v1: an eventfd, to be read and polled for input; v2: the file itself, polled for exceptional conditions.
    version: CgroupVersion,
    counter: PathBuf,
}

impl OomWatch {
    /// What to poll.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.fd.as_fd()
    }

    /// For which events.
    pub(crate) fn events(&self) -> nix::poll::PollFlags {
        match self.version {
            CgroupVersion::V1 => nix::poll::PollFlags::POLLIN,
            CgroupVersion::V2 => nix::poll::PollFlags::POLLPRI,
        }
    }

    /// Makes the descriptor wait for the next kill, and says how many there were.
    pub(crate) fn kills(&self) -> u64 {
        let mut buffer = [0; 4096];
        if self.version == CgroupVersion::V1 {
            // The eventfd is non-blocking; what it holds does not matter.
            let _ = nix::unistd::read(&self.fd, &mut buffer);
        } else {
            // kernfs counts a notification as taken once the file was read through the polled descriptor.
            let _ = nix::sys::uio::pread(&self.fd, &mut buffer, 0);
        }
        files::read(&self.counter).map_or(0, |text| files::field(&text, "oom_kill"))
    }
}

/// An error of a file that could not be written or opened.
fn file_error(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    Error::io(format!("the cgroup file {} cannot be {what}", path.display()))
}
