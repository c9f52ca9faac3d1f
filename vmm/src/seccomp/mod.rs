//! System calls that each kind of thread may make; any other ends the process at once (SIGSYS).
//!
//! A thread's filter is the last wall to go up and stays for its life:
//!
//! ```text
//!  build script: rules.rs ──compile.rs──> a program for each kind
//!   ├─ thread starts ──> install(ThreadKind::Vcpu)      first thing it does
//!   └─ main, after the last thread was spawned ──> install(ThreadKind::Main)
//! ```
//! A new thread inherits its creator's filter and can only narrow it, so the main thread goes last; no filter allows
//! `clone`, `execve`, `open*`, `socket`, or a mapping that can be executed. `ioctl` is allowed by request number.

mod kind;
#[cfg(test)]
mod rules;

use seccompiler::{apply_filter, sock_filter};
use thiserror::Error;

pub use kind::ThreadKind;

/// By the number of the kind.
const FILTERS: [&[sock_filter]; ThreadKind::ALL.len()] = include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// The kernel refuses a thread's filter; the thread must not live.
#[derive(Debug, Error)]
#[error("the seccomp filter of a {kind:?} thread cannot be installed")]
pub struct SeccompError {
    /// For which kind of thread.
    kind: ThreadKind,
    /// What the kernel says.
    #[source]
    source: seccompiler::Error,
}

/// Puts the calling thread behind the filter of its kind, for good. Sets `no_new_privs` if the jail has not.
///
/// # Errors
/// [`SeccompError`].
pub fn install(kind: ThreadKind) -> Result<(), SeccompError> {
    let filter = FILTERS.get(kind as usize).copied().unwrap_or_default();
    apply_filter(filter).map_err(|source| SeccompError { kind, source })
}

#[cfg(test)]
mod tests;
