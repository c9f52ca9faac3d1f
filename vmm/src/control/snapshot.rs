//! The owner's part of a snapshot: begins it, performs its instant, tells what came of it.
//!
//! ```text
//!   Command::Snapshot ─> Copying ──Ready──> instant ─┬─> Copied ──Done──> reply
//!                           │                        └─> Standing ──Copied──┘
//!                           └── cancelled, failed, guest gone ──Done──> reply
//! ```
//! Meanwhile commands are served. Pause and Resume work as always; while the guest stands for the copy they only decide
//! whether it goes on afterwards. A second snapshot and the freezing of a disk are refused. A guest that ends before the
//! instant ends its snapshot; one that ends after it is kept for as long as [`COMPLETION`], so that the blob is completed.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ovms_disk::{NextTop, Stack};
use ovms_proto::control::{Answer, Event, ExitReason, FromVmm, MachineState, SnapshotCommand};
use thiserror::Error;

use super::{CommandError, Owner};
use crate::report;
use crate::saved::SaveError;
use crate::snapshot::{Held, Notice, Order, TakeError, Taking};
use crate::transition::Input;
use crate::wiring::FreezeError;

/// How long a guest that is gone may keep its VMM, while its snapshot is completed.
const COMPLETION: Duration = Duration::from_secs(20);

/// Why a snapshot is not begun, or fails at its instant.
#[derive(Debug, Error)]
pub(super) enum SnapshotFailure {
    #[error("another snapshot of the machine is being taken")]
    Another,
    #[error("a disk of the machine is being frozen")]
    Freezing,
    #[error("the file for the blob must come with the command")]
    NoFile,
    #[error("the machine was not restored from a RAM snapshot, so there is no parent to be a diff on")]
    NoParent,
    #[error("the disks' new tops cannot be used")]
    Tops(#[source] FreezeError),
    #[error("a disk cannot be frozen")]
    Freeze(#[source] ovms_disk::Error),
    #[error("the machine's state cannot be saved")]
    Save(#[from] SaveError),
    #[error("the machine's memory cannot be held")]
    Memory(#[from] TakeError),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The instant is to come.
    Copying,
    /// The guest stands since then, until it is copied.
    Standing(Instant),
    /// The instant has passed.
    Copied,
}

/// The snapshot that is being taken.
pub(super) struct Current {
    request: u64,
    stop: bool,
    taking: Taking,
    tops: Vec<(Arc<Stack>, NextTop)>,
    phase: Phase,
    stood: Duration,
    failure: Option<String>,
}

impl Current {
    fn stood_micros(&self) -> u64 {
        u64::try_from(self.stood.as_micros()).unwrap_or(u64::MAX)
    }
}

impl Owner {
    /// Begins a snapshot; its reply comes later.
    pub(super) fn begin_snapshot(
        &mut self,
        request: u64,
        command: &SnapshotCommand,
        fds: Vec<OwnedFd>,
    ) -> Result<(), CommandError> {
        self.transit(Input::Tell)?;
        self.begin(request, command, fds).map_err(CommandError::Snapshot)
    }

    fn begin(&mut self, request: u64, command: &SnapshotCommand, fds: Vec<OwnedFd>) -> Result<(), SnapshotFailure> {
        if self.current.is_some() {
            return Err(SnapshotFailure::Another);
        }
        if self.slow.is_freezing() {
            return Err(SnapshotFailure::Freezing);
        }
        if command.parent.is_some() && !self.snapshots.has_parent() {
            return Err(SnapshotFailure::NoParent);
        }
        let mut fds = fds.into_iter();
        let blob = fds.next().map(File::from).ok_or(SnapshotFailure::NoFile)?;
        let tops = self.machine.devices().next_tops(fds.collect()).map_err(SnapshotFailure::Tops)?;
        let taking = self.snapshots.begin(Order {
            blob,
            parent: command.parent.clone(),
            vcpus: self.machine.vcpus(),
            disks: tops.iter().map(|(disk, _)| Arc::clone(disk)).collect(),
            standing: self.state != MachineState::Running,
        });
        let (phase, stood) = (Phase::Copying, Duration::ZERO);
        self.current = Some(Current { request, stop: command.stop, taking, tops, phase, stood, failure: None });
        Ok(())
    }

    /// Gives up the snapshot that is being taken, if one is.
    pub(super) fn cancel_snapshot(&mut self) {
        if let Some(current) = &mut self.current {
            current.taking.cancel();
        }
    }

    /// The guest stands only because its memory is being copied.
    pub(super) fn stands_for_copy(&self) -> bool {
        self.current.as_ref().is_some_and(|current| matches!(current.phase, Phase::Standing(_)))
    }

    /// # Errors
    /// A snapshot is being taken, or a disk is being frozen.
    pub(super) fn refuse_during_snapshot(&self) -> Result<(), CommandError> {
        match self.current {
            Some(_) => Err(CommandError::Snapshot(SnapshotFailure::Another)),
            None if self.slow.is_freezing() => Err(CommandError::Snapshot(SnapshotFailure::Freezing)),
            None => Ok(()),
        }
    }

    /// How a snapshot comes along. Gives the reason to end, when that waited for it.
    pub(super) fn hear(&mut self, notice: Notice) -> Option<ExitReason> {
        match notice {
            Notice::Ready => self.instant(),
            Notice::Copied => self.stand_no_more(),
            Notice::Frozen(result) => self.frozen(result),
            Notice::Flushed => self.flushed(),
            Notice::Done(result) => {
                self.stand_no_more();
                let current = self.current.take()?;
                self.forget_instant();
                let stood_micros = current.stood_micros();
                let result = match current.failure {
                    Some(failure) => Err(failure),
                    None => result,
                };
                let result = result.map(|mut report| {
                    report.stood_micros = stood_micros;
                    Answer::Snapshot(report)
                });
                self.say(&FromVmm::Reply { id: current.request, result });
                return self.ending.take().map(|(reason, _)| reason);
            }
        }
        None
    }

    /// The instant: devices idle, processors stand, memory is held, the state saved, the tops frozen.
    pub(super) fn instant(&mut self) {
        let Some(mut current) = self.current.take() else { return };
        if current.taking.is_cancelled() {
            self.forget_instant();
        // What is in flight is completed while the guest goes on.
        } else if self.hold_for_instant() {
            self.perform(&mut current);
        }
        self.current = Some(current);
    }

    fn perform(&mut self, current: &mut Current) {
        let ran = self.state == MachineState::Running;
        let since = Instant::now();
        if ran && !self.machine.close() {
            // The guest is gone; its mail comes next, and ends the snapshot.
            return;
        }
        let held = match self.hold(current) {
            Ok(held) => held,
            Err(err) => {
                current.failure = Some(report::chain(&err));
                current.taking.cancel();
                if ran {
                    self.machine.open();
                }
                return;
            }
        };
        if current.stop && ran {
            self.state = MachineState::Paused;
        }
        if held == Held::Standing {
            current.phase = Phase::Standing(since);
            return;
        }
        if self.state == MachineState::Running {
            self.machine.open();
        }
        self.passed(current, if ran { since.elapsed() } else { Duration::ZERO });
    }

    fn hold(&self, current: &mut Current) -> Result<Held, SnapshotFailure> {
        let begin = Instant::now();
        let (fingerprint, sections) = self.machine.save()?;
        let saved = begin.elapsed();
        let (held, left) = current.taking.hold_memory()?;
        // Last: where this fails no top was frozen, and the engine takes the new ones back.
        for (disk, top) in current.tops.drain(..) {
            disk.push(top).map_err(SnapshotFailure::Freeze)?;
        }
        tracing::debug!(?held, left, ?saved, all = ?begin.elapsed(), "the instant of the snapshot");
        current.taking.took(fingerprint, sections, (held, left));
        Ok(held)
    }

    /// A guest that stood for its copy goes on, unless it is to be paused.
    fn stand_no_more(&mut self) {
        let Some(mut current) = self.current.take() else { return };
        if let Phase::Standing(since) = current.phase {
            if self.state == MachineState::Running {
                self.machine.open();
            }
            self.passed(&mut current, since.elapsed());
        }
        self.current = Some(current);
    }

    /// The instant has passed, and the guest goes on or is paused.
    fn passed(&self, current: &mut Current, stood: Duration) {
        current.phase = Phase::Copied;
        current.stood = stood;
        self.say(&FromVmm::Event(Event::SnapshotTaken { stood_micros: current.stood_micros() }));
    }

    /// The guest is gone. Gives the reason back if nothing is left to wait for.
    pub(super) fn end_after_snapshot(&mut self, reason: ExitReason) -> Option<ExitReason> {
        match &mut self.current {
            Some(current) if current.phase != Phase::Copying => {
                self.state = MachineState::Exited;
                self.ending = Some((reason, Instant::now() + COMPLETION));
                None
            }
            _ => {
                self.fail_snapshot("the guest ended before the snapshot was taken");
                Some(reason)
            }
        }
    }

    /// The time in which a snapshot had to be completed is over: gives the reason to end.
    pub(super) fn give_up_completion(&mut self) -> Option<ExitReason> {
        let (reason, _) = self.ending.take()?;
        self.fail_snapshot("the guest ended, and its snapshot could not be completed in time");
        Some(reason)
    }

    fn fail_snapshot(&mut self, why: &str) {
        if let Some(mut current) = self.current.take() {
            current.taking.cancel();
            self.say(&FromVmm::Reply { id: current.request, result: Err(why.into()) });
        }
    }
}
