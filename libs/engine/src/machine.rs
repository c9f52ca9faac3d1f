//! A machine: handle, states, events.

use std::time::{Duration, SystemTime};

use ovms_proto::control::{ExitReason, Status as VmmStatus};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::spec::Limits;
use crate::stats::Stats;

/// The states of a machine as the engine knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Being built; not yet handed to a caller.
    Creating,
    /// Built; its vCPUs have never run.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// It is gone; its exit status is known.
    Stopped,
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitInfo {
    /// The exit status that the user sees.
    pub status: u32,
    /// When.
    pub at: SystemTime,
    /// Why.
    pub reason: ExitReason,
    /// The kernel's OOM killer ended it.
    pub oom_killed: bool,
}

/// What happens to a machine. The engine tells it in this order: `Started` before anything else, `Oom` before the
/// `Exited` that it leads to, `Exited` last but for `Deleted`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The vCPUs were let go for the first time.
    Started,
    /// First exit of the guest: it lives. Microseconds since [`crate::Engine::create`] began.
    FirstExit {
        /// Microseconds.
        micros: u64,
    },
    /// The vCPUs stand still.
    Paused,
    /// The vCPUs go on.
    Resumed,
    /// The kernel's OOM killer met the machine's cgroup.
    Oom,
    /// The machine is gone and everything it wrote to its console has been written.
    Exited(ExitInfo),
    /// Nothing of it is left on the host.
    Deleted,
}

/// What [`Machine::status`] says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineStatus {
    /// The state.
    pub state: State,
    /// Process id of the VMM in the caller's pid namespace.
    pub pid: u32,
    /// How it ended, once it has.
    pub exit: Option<ExitInfo>,
}

/// A handle to a machine; clones are handles to the same one. Every method may be called from any thread; those that
/// wait for the VMM give up after a bounded time, and a VMM that does not answer is killed.
#[derive(Clone, Debug)]
pub struct Machine {}

#[allow(unused_variables, missing_docs, clippy::unused_self, clippy::missing_errors_doc)]
impl Machine {
    /// The machine's name.
    pub fn id(&self) -> &str {
        ""
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        ""
    }

    /// Process id of the VMM.
    pub fn pid(&self) -> u32 {
        0
    }

    /// Lets the vCPUs go for the first time.
    pub fn start(&self) -> Result<()> {
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }

    /// Stops the vCPUs; returns when the last one stands still. No change if they already do.
    pub fn pause(&self) -> Result<()> {
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }

    /// Lets the vCPUs go on. No change if they run.
    pub fn resume(&self) -> Result<()> {
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }

    /// Presses the ACPI power button (SIGTERM and SIGINT of a container).
    pub fn power_button(&self) -> Result<()> {
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }

    /// Ends the VMM by SIGKILL. `FailedPrecondition` never; `NotFound` if the machine is gone already.
    pub fn kill(&self) -> Result<()> {
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }

    /// Waits for the end; any number of threads may wait, before and after it. Async callers use [`Machine::subscribe`].
    pub fn wait(&self) -> ExitInfo {
        ExitInfo { status: 0, at: SystemTime::now(), reason: ExitReason::PowerOff, oom_killed: false }
    }

    /// As [`Machine::wait`], but gives up after `timeout`.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<ExitInfo> {
        None
    }

    /// What the engine knows; asks nobody.
    pub fn status(&self) -> MachineStatus {
        MachineStatus { state: State::Created, pid: 0, exit: None }
    }

    /// What the VMM says: state, balloon, exits.
    pub fn vmm_status(&self) -> Result<VmmStatus> {
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }

    /// Figures of its cgroup.
    pub fn stats(&self) -> Result<Stats> {
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }

    /// Sets new limits: the cgroup's at once; memory below what the guest has is taken from it by the balloon first.
    pub fn update(&self, limits: &Limits) -> Result<()> {
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }

    /// Tells the guest the size of its virtio console; no error if it has none.
    pub fn resize_console(&self, columns: u16, rows: u16) -> Result<()> {
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }

    /// Calls `listener` for every event from now on, on the machine's own thread: it must not block, nor call a method
    /// of this machine. What has happened already (`Started`, `Exited`) is told at once, on the caller's thread.
    pub fn subscribe(&self, listener: impl FnMut(&MachineEvent) + Send + 'static) {}

    /// Steps of the start: (step, microseconds since [`crate::Engine::create`] began), in order; engine and VMM together.
    pub fn timeline(&self) -> Vec<(String, u64)> {
        Vec::new()
    }

    /// Removes what is left: cgroup, uid lease, record. Idempotent.
    ///
    /// # Errors
    /// `FailedPrecondition` while it runs (kill it first; a machine that was only created is killed by this).
    pub fn delete(&self) -> Result<ExitInfo> {
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }
}
