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

mod engine;
mod error;
mod machine;
mod record;
pub mod sizing;
mod spec;
mod stats;

pub use engine::Engine;
pub use error::{Error, Kind, Result};
pub use machine::{ExitInfo, Machine, MachineEvent, MachineStatus, State};
pub use ovms_proto::control::{ExitReason, Status as VmmStatus};
pub use record::{ProcessId, Record};
pub use sizing::Wishes;
pub use spec::{BootFiles, CreateSpec, DiskFiles, Limits, Stdio};
pub use stats::{CgroupVersion, CpuStats, IoStats, MemoryStats, PidStats, Stats};
