//! The network namespace of a machine: one that the caller names, or an empty one of its own.
//!
//! The kernel takes a third of a millisecond to make an empty one, so a thread does it while the cgroup is made and the
//! VMM's program starts; the VMM joins it from its descriptor, as it joins a named one.

use std::fs::File;
use std::io;
use std::path::Path;
use std::thread::{self, JoinHandle};

use nix::sched::{unshare, CloneFlags};

use crate::error::{Error, Kind, Result};

/// Bytes: the thread makes two system calls.
const STACK: usize = 64 << 10;
/// The caller's own, of the thread that reads it; namespaces(7).
const OWN: &str = "/proc/thread-self/ns/net";

/// A namespace that is open, or on its way.
pub(crate) enum Netns {
    Named(File),
    Empty(JoinHandle<io::Result<File>>),
}

impl Netns {
    /// Opens the one at `path`, or begins an empty one.
    pub(crate) fn begin(path: Option<&Path>) -> Result<Self> {
        if let Some(path) = path {
            let file = File::open(path).map_err(|err| {
                let message = format!("the network namespace {} cannot be opened", path.display());
                Error::new(Kind::InvalidArgument, message).because(err)
            })?;
            return Ok(Self::Named(file));
        }
        let make = || {
            // Of this thread alone; the descriptor keeps it when the thread is gone.
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open(OWN)
        };
        let thread = thread::Builder::new().name("ovms-netns".into()).stack_size(STACK).spawn(make);
        Ok(Self::Empty(thread.map_err(failed)?))
    }

    /// Waits for it.
    pub(crate) fn open(self) -> Result<File> {
        match self {
            Self::Named(file) => Ok(file),
            Self::Empty(thread) => {
                thread.join().unwrap_or_else(|_| Err(io::Error::other("its thread panicked"))).map_err(failed)
            }
        }
    }
}

fn failed(err: io::Error) -> Error {
    let kind = if err.kind() == io::ErrorKind::PermissionDenied { Kind::FailedPrecondition } else { Kind::Internal };
    Error::new(kind, "an empty network namespace cannot be made").because(err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begin_with_a_name_that_is_missing_returns_its_path() {
        let err = Netns::begin(Some(Path::new("/run/netns/none"))).err().unwrap();
        assert!(err.to_string().contains("/run/netns/none"), "{err}");
    }
}
