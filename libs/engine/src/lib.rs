//! Machines for shim and CLI: create, start, pause, resume, power button, kill, wait, stats, update, delete — each once.
//!
//! ```text
//!             Engine::create                     start            pause
//!  CreateSpec ──────────────> Creating ─> Created ────> Running <───────> Paused
//!                                 │          │             │    resume      │
//!                                 └──────────┴──────┬──────┴────────────────┘
//!                                                   v  exit, kill, fault
//!                                                Stopped ──delete──> nothing left
//! ```
//! Everything here blocks; async callers wrap calls in `spawn_blocking` and learn of ends by [`Machine::subscribe`]. The
//! VMM is a child of the calling process and is reaped here by its pidfd: a caller must not `waitpid(-1)`.
#![deny(unsafe_code)]

mod ahead;
mod cgroup;
mod engine;
mod error;
mod launch;
mod log;
mod machine;
mod monitor;
mod namespaces;
mod process;
mod ram_lock;
mod record;
mod remote;
mod reservation;
mod restore;
mod serve;
mod shared;
pub mod sizing;
mod snapshot;
mod spec;
#[cfg(test)]
mod stage;
mod stats;
#[allow(unsafe_code, reason = "clone3, pidfds, locked memory")]
mod sys;
mod uid;

/// How a VMM is born, for benches that time one without a machine around it.
pub mod birth {
    pub use crate::ahead::{Ahead, HostFiles};
    pub use crate::cgroup::Birthplace;
    pub use crate::process::{Cradle, Process};
}

pub use engine::Engine;
pub use error::{Error, Kind, Result};
pub use machine::{ExitInfo, Machine, MachineEvent, MachineStatus, State};
pub use ovms_proto::control::{ExitReason, Status as VmmStatus};
pub use ovms_proto::machine::{Canceller, ToMachine};
pub use record::{ProcessId, Record};
pub use remote::Remote;
pub use reservation::Reservation;
pub use sizing::Wishes;
pub use snapshot::SnapshotOptions;
pub use spec::{BootChoice, CreateSpec, Limits, OnIncompatible, Stdio};
pub use stats::{CgroupVersion, CpuStats, IoStats, MemoryStats, PidStats, Stats};
