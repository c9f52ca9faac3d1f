//! Client → engine: what may be asked of a machine that another process runs (a shim, `ovm run`). Each machine's engine
//! listens at [`SOCKET`] in the machine's directory, `<runtime>/machines/<namespace>/<id>/`, which only root may enter.
//! One request line, any number of [`FromMachine::Progress`] lines, one line that answers; then the engine closes.
//! A client that hangs up cancels a snapshot that it asked for.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use crate::bundle::{read_line, write_line, RefusalKind};

/// The socket's name in the machine's directory.
pub const SOCKET: &str = "machine.sock";

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToMachine {
    /// Press the ACPI power button.
    PowerButton,
    /// End the machine.
    Kill,
    /// Stop the vCPUs.
    Pause,
    /// Let the vCPUs go on.
    Resume,
    /// Freeze the disk's top, so that what was written until now can be read from plain files that never change again.
    FreezeDisk,
    /// Take a RAM snapshot into `dir`, an existing empty directory: see `ovms_bundle::SnapshotRecord` for what is there
    /// afterwards.
    Snapshot {
        /// Absolute path of the directory.
        dir: PathBuf,
        /// Write all of the memory even if the machine was restored from a RAM snapshot.
        full: bool,
        /// Leave the vCPUs standing after the instant.
        stop: bool,
    },
}

/// What the engine answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromMachine {
    /// Work goes on; a sentence for the user.
    Progress(String),
    /// Done. After [`ToMachine::FreezeDisk`] the bundle's record lists the frozen tops; after [`ToMachine::Snapshot`] the
    /// directory is complete.
    Done {
        /// Microseconds for which the guest stood still; 0 for what does not stop it.
        stood_micros: u64,
    },
    /// It cannot be; the machine goes on as it was.
    Refused {
        /// What the client should make of it.
        kind: RefusalKind,
        /// The whole error chain in one line.
        message: String,
    },
}
