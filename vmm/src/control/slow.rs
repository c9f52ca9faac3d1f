//! The owner's part of what a slow disk holds up: it waits for none, so that commands are answered meanwhile.
//!
//! ```text
//!   Pause, instant of a snapshot ──devices stand at once──────────────────────> done
//!                                └─not yet─> Holding ──asked every TICK──────> done
//!   FreezeDisk, end of the guest ─> thread that takes snapshots ──its notice─> reply
//! ```
//! While devices are waited for the guest runs on. Resume gives a pause up. The engine learns from
//! [`Status::owes`](ovms_proto::control::Status::owes) that its request is still being worked on.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use ovms_proto::control::{Answer, FromVmm, MachineState};

use super::{wait, CommandError, Owner, Served};
use crate::report;
use crate::snapshot::TakeError;
use crate::transition::{self, Action, Input, Refused};

/// How long the owner waits for its devices before it turns to others meanwhile: a disk that is not slow has answered.
const AT_ONCE: Duration = Duration::from_millis(50);
/// How often it looks afterwards whether they stand.
pub(super) const TICK: Duration = Duration::from_millis(10);

/// What waits for a disk.
#[derive(Default)]
pub(super) struct Slow {
    /// Requests to pause.
    pauses: Vec<u64>,
    /// The instant of the snapshot that is being taken has come.
    instant: bool,
    /// The request to freeze a disk.
    freeze: Option<u64>,
    /// The guest is gone, and its disks are being flushed.
    flushing: bool,
}

impl Slow {
    /// Devices are being held.
    pub(super) fn is_holding(&self) -> bool {
        self.instant || !self.pauses.is_empty()
    }

    /// Somebody waits.
    pub(super) fn is_any(&self) -> bool {
        self.is_holding() || self.is_freezing() || self.flushing
    }

    /// A disk is being frozen.
    pub(super) fn is_freezing(&self) -> bool {
        self.freeze.is_some()
    }
}

impl Owner {
    /// Pauses the machine; no answer: it comes when the devices stand.
    pub(super) fn pause(&mut self, request: u64) -> Result<Option<Answer>, CommandError> {
        let (_, action) = transition::apply(self.state, Input::Pause)?;
        if action == Action::Close && !self.stands_for_copy() && !self.machine.hold_devices(Instant::now() + AT_ONCE) {
            tracing::debug!("the pause waits for a device");
            self.slow.pauses.push(request);
            return Ok(None);
        }
        self.transit(Input::Pause)?;
        Ok(Some(Answer::Done))
    }

    /// The machine is to go on, so nobody's pause comes about.
    pub(super) fn give_up_pauses(&mut self, why: &Refused) {
        for id in std::mem::take(&mut self.slow.pauses) {
            self.say(&FromVmm::Reply { id, result: Err(report::chain(why)) });
        }
        self.release();
    }

    /// Whether the instant may come now; otherwise it comes as soon as the devices stand.
    pub(super) fn hold_for_instant(&mut self) -> bool {
        self.slow.instant = !self.machine.hold_devices(Instant::now() + AT_ONCE);
        !self.slow.instant
    }

    /// No snapshot is being taken any more, or nobody wants it.
    pub(super) fn forget_instant(&mut self) {
        self.slow.instant = false;
        self.release();
    }

    /// Lets devices go on that nobody holds any more.
    fn release(&self) {
        if !self.slow.is_holding() && self.state == MachineState::Running && !self.stands_for_copy() {
            self.machine.release_devices();
        }
    }

    /// Does what waits for the devices, if they stand.
    pub(super) fn look_after_devices(&mut self) {
        if !self.slow.is_holding() || !self.machine.hold_devices(Instant::now()) {
            return;
        }
        for id in std::mem::take(&mut self.slow.pauses) {
            let result = self.transit(Input::Pause).map(|()| Answer::Done).map_err(|err| report::chain(&err));
            self.say(&FromVmm::Reply { id, result });
        }
        if std::mem::take(&mut self.slow.instant) {
            self.instant();
        }
    }

    /// Freezes a disk beside all else; its reply comes later.
    pub(super) fn freeze_disk(&mut self, request: u64, disk: u32, fds: Vec<OwnedFd>) -> Result<(), CommandError> {
        self.transit(Input::Tell)?;
        self.refuse_during_snapshot()?;
        let (disk, top) = self.machine.devices().disk_to_freeze(disk, fds)?;
        self.slow.freeze = Some(request);
        if !self.snapshots.freeze(disk, top) {
            self.frozen(Err(report::chain(&TakeError::Panicked)));
        }
        Ok(())
    }

    /// A disk is frozen, or is not.
    pub(super) fn frozen(&mut self, result: Result<(), String>) {
        if let Some(id) = self.slow.freeze.take() {
            let result = result.map(|()| Answer::Done).map_err(|why| format!("the disk is as it was: {why}"));
            self.say(&FromVmm::Reply { id, result });
        }
    }

    /// The guest is gone: makes durable what it wrote, and answers meanwhile. `false`: somebody cannot wait for that.
    pub(super) fn flush_disks(&mut self) -> bool {
        self.give_up_pauses(&Refused::Gone);
        self.forget_instant();
        self.slow.flushing = self.snapshots.flush(self.machine.devices().disks.clone());
        while self.slow.flushing || self.slow.is_freezing() {
            let Ok(ready) = wait(&self.channel, &self.mailbox, None) else { return true };
            if ready.mail {
                for mail in self.mailbox.take() {
                    self.open_mail(mail);
                }
            }
            if ready.command && self.take_command() != Served::Goes {
                return false;
            }
        }
        true
    }

    /// The disks are flushed.
    pub(super) fn flushed(&mut self) {
        self.slow.flushing = false;
    }
}
