//! Engine ↔ VMM. One request is answered by one reply with the same `id`; events come unasked.
//!
//! ```text
//!  VmConfig+fds ─> Configured ─> Run ─> running ⇄ Pause/Resume ─> Event::Exited ─> end of file
//!               └> Failed, end of file
//! ```

use serde::{Deserialize, Serialize};

/// What the engine asks of a configured VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the engine, repeated in the reply.
    pub id: u64,
    /// The command.
    pub command: Command,
}

/// The commands of a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Start the vCPUs of a machine that was configured.
    Run,
    /// Stop all vCPUs; answered when the last one stands still, which takes as long as a disk needs for what is in flight
    /// there. Other commands are answered meanwhile; [`Command::Resume`] gives it up. No change if they already do.
    Pause,
    /// Let the vCPUs go on. No change if they run.
    Resume,
    /// Press the ACPI power button.
    PowerButton,
    /// Take `bytes` of memory from the guest by its balloon (0 gives all back).
    Balloon {
        /// Target size of the balloon in bytes; rounded down to 4 KiB pages.
        bytes: u64,
    },
    /// Tell the guest the size of its virtio console; before [`Command::Run`] it is what the guest finds when it starts.
    ResizeConsole {
        /// Width in characters.
        columns: u16,
        /// Height in characters.
        rows: u16,
    },
    /// Drain and flush disk `disk`, freeze its top and go on with a fresh one stacked on it. Two file descriptors
    /// come beside the packet: data and map of the new top, both empty. Other commands are answered meanwhile.
    FreezeDisk {
        /// Index into `VmConfig::disks`.
        disk: u32,
    },
    /// Take a RAM snapshot. Beside the packet come: the blob's file, empty and opened for reading and writing, then data and
    /// map of a new top (both empty) for every disk that the guest may write, in the disks' order. At one instant vCPUs and
    /// devices are saved and the tops frozen ([`Event::SnapshotTaken`]); the reply, [`Answer::Snapshot`], comes when the
    /// blob is complete and durable. Other commands are answered meanwhile. On an error, or after
    /// [`Command::CancelSnapshot`], the machine goes on as if nothing had been; a top that was frozen stays so. Tops are
    /// frozen if and only if [`Event::SnapshotTaken`] comes before the reply, and their files hold everything once the reply
    /// has come.
    Snapshot(SnapshotCommand),
    /// Give up the snapshot that is being taken; its own reply says so. No change if none is.
    CancelSnapshot,
    /// Say what the machine does.
    Status,
    /// End the VMM without asking the guest.
    Kill,
}

/// How a RAM snapshot is taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotCommand {
    /// Digest of the RAM blob that this machine was restored from: chunks that are as they are there are left out and the
    /// blob names it as its parent. None: the blob holds everything.
    pub parent: Option<String>,
    /// Leave the vCPUs standing after the instant. Otherwise they go on if they ran before.
    pub stop: bool,
}

/// What the VMM says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromVmm {
    /// The machine of the first packet is built; its vCPUs stand still.
    Configured {
        /// How long each step took.
        timeline: Timeline,
    },
    /// The machine cannot be built, or a fault ends it. The VMM exits after this.
    Failed {
        /// What the engine should make of it.
        #[serde(default)]
        kind: FailureKind,
        /// The whole error chain, outermost first, joined by `: `.
        message: String,
    },
    /// Answer to a request.
    Reply {
        /// The request's id.
        id: u64,
        /// What came of it; the error is a whole chain in one line.
        result: Result<Answer, String>,
    },
    /// Something happened in the machine.
    Event(Event),
}

/// Kinds of [`FromVmm::Failed`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// Any fault.
    #[default]
    Other,
    /// The host lacks what the RAM snapshot was taken with (a feature of the processor, a capability of KVM, a disk of
    /// another size): the same image may still boot here.
    Incompatible,
}

/// A good answer to a [`Command`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// Answer to [`Command::Status`].
    Status(Status),
    /// Answer to [`Command::Snapshot`].
    Snapshot(SnapshotReport),
}

/// What a RAM snapshot cost, in answer to [`Command::Snapshot`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Microseconds for which the guest stood still.
    pub stood_micros: u64,
    /// The blob's size in bytes.
    pub bytes: u64,
    /// Bytes of guest memory that the blob holds, uncompressed, without zero pages and what the parent has.
    pub content: u64,
    /// Rounds of copying before the instant.
    pub rounds: u32,
    /// Bytes of guest memory that were still to be copied at the instant.
    pub left_at_instant: u64,
    /// Writers were held back by userfaultfd; otherwise what was left was copied while the guest stood.
    pub barrier: bool,
}

/// What a machine does, in answer to [`Command::Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether the vCPUs run, stand still or are gone.
    pub state: MachineState,
    /// Bytes of memory that the guest's balloon holds.
    pub balloon_bytes: u64,
    /// Guest exits to the VMM since start, all vCPUs together.
    pub exits: u64,
    /// Requests that came before have no answer yet, since a disk is waited for or a snapshot is being taken: the VMM has
    /// not forgotten them.
    pub owes: bool,
}

/// The states of a machine within its VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// Built, never run.
    Configured,
    /// vCPUs run.
    Running,
    /// vCPUs stand still.
    Paused,
    /// The guest is gone.
    Exited,
}

/// What a VMM reports unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// First exit of the guest after `Run`: the machine lives.
    FirstExit {
        /// Microseconds since the VMM process began.
        micros: u64,
    },
    /// The instant of a snapshot has passed: the state is saved, the tops are frozen, the guest goes on (or stands, as the
    /// command asked).
    SnapshotTaken {
        /// Microseconds for which the guest stood still.
        stood_micros: u64,
    },
    /// A restored machine has recorded its working set into the file it was given, and will not write there again.
    WorkingSetRecorded,
    /// The guest is gone; all console output has been written. The VMM exits after this.
    Exited(ExitReason),
}

/// Why a machine ended. [`ExitReason::status`] gives the exit status that the user sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitReason {
    /// ACPI S5.
    PowerOff,
    /// The guest asked for a reset (ACPI reset register, keyboard controller).
    Reset,
    /// The guest's kernel panicked and said so through pvpanic.
    Panic,
    /// The guest shut its processor down by a triple fault.
    TripleFault,
    /// The VMM could not go on.
    Fault {
        /// The whole error chain in one line.
        message: String,
    },
    /// [`Command::Kill`], or the engine went away.
    Killed,
}

impl ExitReason {
    /// The exit status of the machine as a container's init would give it: power-off and reset 0, panic 134
    /// (128 + SIGABRT), triple fault and VMM fault 139 (128 + SIGSEGV), killed 137 (128 + SIGKILL).
    pub fn status(&self) -> u32 {
        match self {
            Self::PowerOff | Self::Reset => 0,
            Self::Panic => 134,
            Self::TripleFault | Self::Fault { .. } => 139,
            Self::Killed => 137,
        }
    }
}

/// The time line of a start: (step, microseconds since the VMM process began), in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// The steps that were passed.
    pub steps: Vec<(String, u64)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_are_those_of_the_design() {
        let all = [
            (ExitReason::PowerOff, 0),
            (ExitReason::Reset, 0),
            (ExitReason::Panic, 134),
            (ExitReason::TripleFault, 139),
            (ExitReason::Fault { message: String::new() }, 139),
            (ExitReason::Killed, 137),
        ];
        for (reason, status) in all {
            assert_eq!(reason.status(), status, "{reason:?}");
        }
    }

    #[test]
    fn messages_survive_json() {
        let said = FromVmm::Reply { id: 7, result: Err("no such disk".into()) };
        let json = serde_json::to_vec(&said).unwrap();
        assert_eq!(serde_json::from_slice::<FromVmm>(&json).unwrap(), said);
    }
}
