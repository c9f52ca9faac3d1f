//! The record of a machine on disk.

use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::machine::{ExitInfo, State};

/// What is known of a machine; all that `cleanup` needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The machine's name.
    pub id: String,
    /// Its namespace.
    pub namespace: String,
    /// The state.
    pub state: State,
    /// When it was created.
    pub created: SystemTime,
    /// The VMM, once it was spawned.
    pub process: Option<ProcessId>,
    /// Directories of its cgroup, one for each hierarchy.
    pub cgroup: Vec<PathBuf>,
    /// User and group id of the VMM.
    pub uid: Option<u32>,
    /// Data files of the disk tops that it holds.
    pub tops: Vec<PathBuf>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// How it ended, once it has.
    pub exit: Option<ExitInfo>,
}

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The number.
    pub pid: u32,
    /// When it began, in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_time: u64,
}
