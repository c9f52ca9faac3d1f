//! A machine: its handle, and what a caller can ask of it. What the VMM and the kernel say about it arrives in
//! [`crate::monitor`].

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::socket::{setsockopt, sockopt::SendTimeout};
use nix::sys::time::TimeVal;
use ovms_config::vm::MEMORY_STEP;
use ovms_proto::control::{Answer, Command, ExitReason, Request, Status as VmmStatus};
use ovms_proto::{Channel, ChannelError};
use serde::{Deserialize, Serialize};

use crate::cgroup::{self, Bounds};
use crate::error::{Error, Kind, Result};
use crate::shared::{Inner, Shared};
use crate::sizing::cgroup_memory;
use crate::spec::Limits;
use crate::stats::Stats;

/// How long the kernel may take to end a killed VMM and give its memory back.
pub(crate) const DEATH: Duration = Duration::from_secs(30);
/// The most requests that may wait for answers at once.
const MAX_PENDING: usize = 64;

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

/// A handle to a machine; clones are handles to the same one. Every method may be called from any thread. Those that
/// wait for the VMM wait as long as it says that a disk or a snapshot keeps it; a VMM that gives no answer is killed after
/// a bounded time. [`Machine::kill`] ends every wait.
#[derive(Clone, Debug)]
pub struct Machine {
    pub(crate) inner: Arc<Inner>,
}

impl Machine {
    pub(crate) fn new(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// The machine's name.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.inner.namespace
    }

    /// Process id of the VMM.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.inner.process.id().pid
    }

    /// Lets the vCPUs go for the first time.
    ///
    /// # Errors
    /// `FailedPrecondition` if it was started before, `NotFound` if it is gone, `Unavailable` if the VMM hangs,
    /// `Internal` if it refuses.
    pub fn start(&self) -> Result<()> {
        self.inner.step("start");
        let state = self.inner.shared().state;
        match state {
            State::Creating | State::Created => (),
            State::Stopped => return Err(gone(&self.inner)),
            State::Running | State::Paused => return Err(wrong_state(&self.inner, "has been started before")),
        }
        self.request(Command::Run)?;
        self.inner.save();
        Ok(())
    }

    /// Stops the vCPUs; returns when the last one stands still. No change if they already do.
    ///
    /// # Errors
    /// As [`Machine::start`]; `FailedPrecondition` if it was never started.
    pub fn pause(&self) -> Result<()> {
        self.started()?;
        self.request(Command::Pause)?;
        self.inner.save();
        Ok(())
    }

    /// Lets the vCPUs go on. No change if they run.
    ///
    /// # Errors
    /// As [`Machine::pause`].
    pub fn resume(&self) -> Result<()> {
        self.started()?;
        self.request(Command::Resume)?;
        self.inner.save();
        Ok(())
    }

    /// Presses the ACPI power button (SIGTERM and SIGINT of a container). A machine that was never started is killed.
    ///
    /// # Errors
    /// `NotFound` if it is gone, `Unavailable` if the VMM hangs.
    pub fn power_button(&self) -> Result<()> {
        // A guard in the match would live through the request, which locks again.
        let state = self.inner.shared().state;
        match state {
            State::Creating | State::Created => self.kill(),
            _ => self.request(Command::PowerButton).map(drop),
        }
    }

    /// Ends the VMM by SIGKILL; does not wait for the end.
    ///
    /// # Errors
    /// `NotFound` if it is gone already.
    pub fn kill(&self) -> Result<()> {
        if self.inner.shared().exit.is_some() {
            return Err(gone(&self.inner));
        }
        self.inner.process.kill().map_err(Error::io("the VMM cannot be killed"))
    }

    /// Waits for the end; any number of threads may wait, before and after it.
    pub fn wait(&self) -> ExitInfo {
        let mut shared = self.inner.shared();
        loop {
            if let Some(exit) = &shared.exit {
                return exit.clone();
            }
            shared = self.inner.changed(shared);
        }
    }

    /// As [`Machine::wait`], but gives up after `timeout`.
    #[must_use]
    pub fn wait_timeout(&self, timeout: Duration) -> Option<ExitInfo> {
        self.inner.wait_for(timeout, |shared| shared.exit.clone())
    }

    /// What the engine knows; asks nobody.
    #[must_use]
    pub fn status(&self) -> MachineStatus {
        let shared = self.inner.shared();
        MachineStatus { state: shared.state, pid: self.pid(), exit: shared.exit.clone() }
    }

    /// What the VMM says: state, balloon, exits.
    ///
    /// # Errors
    /// `NotFound` if it is gone, `Unavailable` if the VMM hangs, `Internal` if it answers something else.
    pub fn vmm_status(&self) -> Result<VmmStatus> {
        match self.request(Command::Status)? {
            Answer::Status(status) => Ok(status),
            _ => Err(Error::new(Kind::Internal, "the VMM answers a question for its status without one")),
        }
    }

    /// Figures of its cgroup.
    ///
    /// # Errors
    /// `Unavailable` if the host has no cgroups.
    pub fn stats(&self) -> Result<Stats> {
        let none = || Error::new(Kind::Unavailable, "the host has no cgroups, so nothing is counted");
        self.inner.cgroup.stats().ok_or_else(none)
    }

    /// Sets new limits. Memory below what the guest has is taken from it by the balloon before the cgroup's limit goes
    /// down; memory above it raises the cgroup's limit alone, since a machine does not grow.
    ///
    /// # Errors
    /// `InvalidArgument` for a limit that the kernel refuses, `FailedPrecondition` if the guest does not give the memory
    /// back in time (it then keeps it, and the old limit stays).
    pub fn update(&self, limits: &Limits) -> Result<()> {
        if self.inner.shared().exit.is_some() {
            return Err(gone(&self.inner));
        }
        let asked = limits.memory.and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0);
        if let Some(limit) = asked {
            self.squeeze(limit)?;
        }
        self.inner.cgroup.apply(&Bounds {
            limits: limits.clone(),
            memory: asked.map(|limit| cgroup_memory(limit, self.inner.overhead)),
            memory_and_swap: limits.memory_swap.map(|limit| with_overhead(limit, self.inner.overhead)),
        })
    }

    /// Sets the balloon so that the guest keeps `limit` bytes, and waits until it has.
    fn squeeze(&self, limit: u64) -> Result<()> {
        let keep = limit - limit % MEMORY_STEP;
        let bytes = self.inner.memory.saturating_sub(keep);
        if self.inner.shared().state == State::Created {
            return if bytes == 0 {
                Ok(())
            } else {
                Err(wrong_state(&self.inner, "was not started, so it cannot give memory back"))
            };
        }
        let before = self.vmm_status()?.balloon_bytes;
        if bytes == before {
            return Ok(());
        }
        self.request(Command::Balloon { bytes })?;
        let deadline = Instant::now() + self.inner.patience.balloon;
        while self.vmm_status()?.balloon_bytes < bytes {
            if Instant::now() > deadline {
                self.request(Command::Balloon { bytes: before })?;
                return Err(wrong_state(
                    &self.inner,
                    "does not give enough memory back: its guest needs it, or has no balloon driver",
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Tells the guest the size of its virtio console, now or when it starts.
    ///
    /// # Errors
    /// `NotFound` if it is gone, `Unavailable` if the VMM hangs.
    pub fn resize_console(&self, columns: u16, rows: u16) -> Result<()> {
        self.request(Command::ResizeConsole { columns, rows }).map(drop)
    }

    /// Calls `listener` for every event from now on, on the machine's own thread: it must not block, nor call a method
    /// of this machine. What has happened already (`Started`, `Exited`, `Deleted`) is told at once, on the caller's
    /// thread.
    pub fn subscribe(&self, listener: impl FnMut(&MachineEvent) + Send + 'static) {
        self.inner.subscribe(Box::new(listener));
    }

    /// Steps of the start: (step, microseconds since [`crate::Engine::create`] began), in order; engine and VMM together.
    #[must_use]
    pub fn timeline(&self) -> Vec<(String, u64)> {
        self.inner.timeline()
    }

    /// Removes what is left: cgroup, uid lease, record. A machine that was created but never started is killed by it.
    /// Idempotent.
    ///
    /// # Errors
    /// `FailedPrecondition` while it runs; `Internal`.
    pub fn delete(&self) -> Result<ExitInfo> {
        let state = self.inner.shared().state;
        if matches!(state, State::Running | State::Paused) {
            return Err(wrong_state(&self.inner, "is running: kill it first"));
        }
        self.destroy()
    }

    /// Ends it, whatever it does, and removes what is left.
    pub(crate) fn destroy(&self) -> Result<ExitInfo> {
        self.inner.process.kill().map_err(Error::io("the VMM cannot be killed"))?;
        let Some(exit) = self.wait_timeout(DEATH) else {
            return Err(Error::new(Kind::Internal, format!("the VMM, process {}, does not die", self.pid())));
        };
        cgroup::remove(&self.inner.cgroup.dirs());
        self.inner.release()?;
        self.inner.tell(&MachineEvent::Deleted);
        Ok(exit)
    }

    pub(crate) fn started(&self) -> Result<()> {
        let state = self.inner.shared().state;
        match state {
            State::Creating | State::Created => Err(wrong_state(&self.inner, "was not started")),
            State::Stopped => Err(gone(&self.inner)),
            State::Running | State::Paused => Ok(()),
        }
    }

    /// Sends one command and waits for its answer. A VMM that does not take it or does not answer is killed.
    pub(crate) fn request(&self, command: Command) -> Result<Answer> {
        self.request_with(command, &[])
    }

    /// As [`Machine::request`], with descriptors beside the command.
    pub(crate) fn request_with(&self, command: Command, fds: &[BorrowedFd<'_>]) -> Result<Answer> {
        self.ask(&command, fds)?.map_err(refusal)
    }

    /// As [`Machine::request_with`], but gives a refusal back as an answer.
    pub(crate) fn ask(&self, command: &Command, fds: &[BorrowedFd<'_>]) -> Result<std::result::Result<Answer, String>> {
        let id = self.send(command, fds)?;
        self.answer(id, command)?.ok_or_else(|| gone(&self.inner))
    }

    /// Waits for the answer to a request; `None`: the machine is gone. A slow disk may hold the answer up for as long as the
    /// VMM says, each time it is asked, that it still owes some. One that does not answer that either, or has forgotten
    /// the request, is killed.
    pub(crate) fn answer(&self, id: u64, command: &Command) -> Result<Option<std::result::Result<Answer, String>>> {
        let inner = &self.inner;
        loop {
            if let Some(answer) = inner.wait_for(inner.patience.answer, |shared| answer_to(shared, id)) {
                return Ok(answer);
            }
            if !self.owes(command)? {
                // The VMM answers in order.
                let answer = inner.wait_for(Duration::ZERO, |shared| answer_to(shared, id));
                return answer.ok_or_else(|| hung(inner, command));
            }
            tracing::warn!(id = inner.id, ?command, "the VMM waits for a disk or a snapshot, and is waited for");
        }
    }

    /// Whether the VMM, from which an answer to `command` is missing, says that it still owes some.
    fn owes(&self, command: &Command) -> Result<bool> {
        let inner = &self.inner;
        let id = self.send(&Command::Status, &[])?;
        match inner.wait_for(inner.patience.answer, |shared| answer_to(shared, id)) {
            Some(Some(Ok(Answer::Status(status)))) => Ok(status.owes),
            Some(_) => Ok(false),
            None => Err(hung(inner, command)),
        }
    }

    /// Sends one command; its answer will be found under the id. A VMM that does not take it is killed.
    pub(crate) fn send(&self, command: &Command, fds: &[BorrowedFd<'_>]) -> Result<u64> {
        let inner = &self.inner;
        let id = {
            let mut shared = inner.shared();
            // Not `gone`, which would wait for the lock held here.
            if let Some(exit) = &shared.exit {
                return Err(ended(inner, Some(exit)));
            }
            if shared.pending.len() >= MAX_PENDING {
                return Err(Error::new(Kind::Unavailable, "too many requests wait for the VMM's answers"));
            }
            shared.next_request += 1;
            let id = shared.next_request;
            shared.pending.insert(id, command.clone());
            id
        };
        match inner.channel.send(&Request { id, command: command.clone() }, fds) {
            Ok(()) | Err(ChannelError::Closed) => Ok(id),
            Err(ChannelError::Io(err)) if err.kind() == std::io::ErrorKind::WouldBlock => Err(hung(inner, command)),
            Err(err) => Err(Error::new(Kind::Internal, "a request cannot be sent to the VMM").because(err)),
        }
    }
}

/// The answer to a request if it is there: `Some(None)` if there will be none, since the machine is gone.
#[allow(clippy::option_option, reason = "not yet, never, this")]
pub(crate) fn answer_to(shared: &mut Shared, id: u64) -> Option<Option<std::result::Result<Answer, String>>> {
    match shared.answers.remove(&id) {
        Some(answer) => Some(Some(answer)),
        None => shared.exit.is_some().then_some(None),
    }
}

pub(crate) fn refusal(message: String) -> Error {
    Error::new(Kind::Internal, "the VMM refuses").because(message)
}

/// Gives the engine's end of a control socket a limit on how long a VMM that reads nothing can hold up a sender.
pub(crate) fn limit_sends(channel: &Channel) -> Result<()> {
    setsockopt(&channel.as_fd(), SendTimeout, &TimeVal::new(5, 0))
        .map_err(|errno| Error::io("the control socket cannot be limited")(errno.into()))
}

pub(crate) fn with_overhead(limit: i64, overhead: u64) -> i64 {
    match limit {
        limit if limit <= 0 => limit,
        limit => limit.saturating_add_unsigned(overhead),
    }
}

pub(crate) fn hung(inner: &Inner, command: &Command) -> Error {
    let message = format!("the VMM did not answer {command:?} in time and was killed");
    inner.fault(&message);
    Error::new(Kind::Unavailable, message)
}

pub(crate) fn gone(inner: &Inner) -> Error {
    ended(inner, inner.shared().exit.as_ref())
}

fn ended(inner: &Inner, exit: Option<&ExitInfo>) -> Error {
    let why = exit.map(|exit| format!("{:?}", exit.reason)).unwrap_or_default();
    Error::new(Kind::NotFound, format!("machine {} has ended already ({why})", inner.id))
}

pub(crate) fn wrong_state(inner: &Inner, why: &str) -> Error {
    Error::new(Kind::FailedPrecondition, format!("machine {} {why}", inner.id))
}

#[cfg(test)]
mod tests;
