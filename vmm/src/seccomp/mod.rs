//! System calls that each kind of thread may make; any other ends the process at once (SIGSYS).
//!
//! A thread's filter is the last wall to go up and stays for its life:
//!
//! ```text
//!  Filters::compile()          once, before the jail closes (allocates, reads nothing)
//!   ├─ thread starts ──> filters.install(ThreadKind::Vcpu)      first thing it does
//!   └─ main, after the last thread was spawned ──> filters.install(ThreadKind::Main)
//! ```
//! A new thread inherits its creator's filter and can only narrow it, so the main thread goes last; no filter allows
//! `clone`, `execve`, `open*`, `socket`, or a mapping that can be executed. `ioctl` is allowed by request number.

mod rules;

use std::collections::BTreeMap;

use seccompiler::{apply_filter, BackendError, BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use thiserror::Error;

/// Kinds of threads of a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ThreadKind {
    /// The owner of the machine: parses the kernel, then control socket, state changes, end. One filter for both: a
    /// second, narrower one would take away an `lseek` and three ioctls of the boot processor, and costs 0.1 ms.
    Main,
    /// Runs guest code and answers its exits.
    Vcpu,
    /// Serves a block device's queues.
    Block,
    /// Moves bytes between the host's descriptors and console devices, and serves the remaining queues.
    Console,
    /// Reads ahead and records what a restored guest touches.
    WorkingSet,
    /// Takes snapshots: copies guest memory into a file.
    Snapshot,
}

impl ThreadKind {
    /// Every kind.
    pub const ALL: [Self; 6] = [Self::Main, Self::Vcpu, Self::Block, Self::Console, Self::WorkingSet, Self::Snapshot];
    /// The kinds without which no machine is built; threads of the others compile their filters beside that.
    pub const FIRST: [Self; 4] = [Self::Main, Self::Vcpu, Self::Block, Self::Console];
}

/// Why a filter cannot be had.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// The rules do not compile: a fault of this module.
    #[error("the seccomp filter of a {kind:?} thread does not compile")]
    Compile {
        /// For which kind of thread.
        kind: ThreadKind,
        /// What the compiler says.
        #[source]
        source: BackendError,
    },
    /// The kernel refused.
    #[error("the seccomp filter of a {kind:?} thread cannot be installed")]
    Install {
        /// For which kind of thread.
        kind: ThreadKind,
        /// What the kernel says.
        #[source]
        source: seccompiler::Error,
    },
}

/// The filters of all kinds of threads, compiled.
#[derive(Debug)]
pub struct Filters {
    programs: BTreeMap<ThreadKind, BpfProgram>,
}

impl Filters {
    /// Compiles the filters of `kinds`.
    ///
    /// # Errors
    /// [`SeccompError::Compile`].
    pub fn compile(kinds: &[ThreadKind]) -> Result<Self, SeccompError> {
        let mut programs = BTreeMap::new();
        for kind in kinds.iter().copied() {
            programs.insert(kind, compile(kind).map_err(|source| SeccompError::Compile { kind, source })?);
        }
        Ok(Self { programs })
    }

    /// Puts the calling thread behind its filter, for good. Sets `no_new_privs` if the jail has not.
    ///
    /// # Errors
    /// [`SeccompError::Install`].
    pub fn install(&self, kind: ThreadKind) -> Result<(), SeccompError> {
        match self.programs.get(&kind) {
            Some(program) => apply_filter(program).map_err(|source| SeccompError::Install { kind, source }),
            None => Err(SeccompError::Install { kind, source: seccompiler::Error::EmptyFilter }),
        }
    }
}

fn compile(kind: ThreadKind) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules::of(kind)?, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?
        .try_into()
}

#[cfg(test)]
mod tests;
