//! The owner of a machine: takes commands from the control socket and mail from processors and devices, one at a
//! time, and answers each command once it is done.

mod slow;
mod snapshot;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use ovms_proto::control::{Answer, Command, Event, ExitReason, FromVmm, MachineState, Request, Status};
use ovms_proto::{Channel, ChannelError};
use thiserror::Error;

use crate::machine::Machine;
use crate::mailbox::{Mail, Mailbox};
use crate::report;
use crate::snapshot::Snapshots;
use crate::timeline::Recorder;
use crate::transition::{self, Action, Input, Refused};
use crate::wiring::FreezeError;
use slow::{Slow, TICK};
use snapshot::{Current, SnapshotFailure};

/// How long a guest's last console output may take to be written, when nobody reads it.
const CONSOLE_DEADLINE: Duration = Duration::from_secs(5);

/// Why a command is not done.
#[derive(Debug, Error)]
enum CommandError {
    #[error("the machine cannot do that now")]
    Refused(#[from] Refused),
    #[error("no snapshot is taken")]
    Snapshot(#[source] SnapshotFailure),
    #[error("the disk is as it was")]
    Freeze(#[from] FreezeError),
}

/// Owns a configured machine until it ends.
pub struct Owner {
    channel: Channel,
    mailbox: Mailbox,
    machine: Machine,
    snapshots: Snapshots,
    state: MachineState,
    timeline: Recorder,
    /// The snapshot that is being taken.
    current: Option<Current>,
    /// What waits for a disk.
    slow: Slow,
    /// The guest is gone for this reason, and its snapshot may be completed until then.
    ending: Option<(ExitReason, Instant)>,
}

impl Owner {
    /// Takes over `machine`, whose processors stand.
    pub fn new(channel: Channel, mailbox: Mailbox, machine: Machine, snapshots: Snapshots, timeline: Recorder) -> Self {
        let state = MachineState::Configured;
        let slow = Slow::default();
        Self { channel, mailbox, machine, snapshots, state, timeline, current: None, slow, ending: None }
    }

    /// Serves commands until the guest is gone or the engine is. All that the guest has said is written by then.
    pub fn run(&mut self) -> ExitReason {
        loop {
            let deadline = self.ending.as_ref().map(|(_, deadline)| *deadline);
            let look = self.slow.is_holding().then(|| Instant::now() + TICK);
            let ready = match wait(&self.channel, &self.mailbox, [deadline, look].into_iter().flatten().min()) {
                Ok(ready) => ready,
                Err(err) => return ExitReason::Fault { message: format!("the owner cannot wait: {err}") },
            };
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                if let Some(reason) = self.give_up_completion() {
                    return self.end(reason);
                }
            }
            if ready.mail {
                for mail in self.mailbox.take() {
                    if let Some(reason) = self.open_mail(mail) {
                        return self.end(reason);
                    }
                }
            }
            if ready.command {
                match self.take_command() {
                    Served::Goes => {}
                    Served::Killed => return self.kill(),
                    Served::Alone => return ExitReason::Killed,
                }
            }
            self.look_after_devices();
        }
    }

    fn take_command(&mut self) -> Served {
        match self.channel.recv::<Request>() {
            Ok((request, fds)) => {
                let killed = request.command == Command::Kill;
                self.answer(request, fds);
                if killed {
                    return Served::Killed;
                }
            }
            Err(ChannelError::Decode(err)) => tracing::warn!(%err, "a command cannot be read"),
            Err(_) => return Served::Alone,
        }
        Served::Goes
    }

    /// Gives the reason to end, if there is one.
    fn open_mail(&mut self, mail: Mail) -> Option<ExitReason> {
        match mail {
            Mail::FirstExit => {
                self.say(&FromVmm::Event(Event::FirstExit { micros: self.timeline.micros() }));
                None
            }
            Mail::WorkingSetRecorded => {
                self.say(&FromVmm::Event(Event::WorkingSetRecorded));
                None
            }
            // Only the first counts.
            Mail::Exit(_) if self.ending.is_some() => None,
            Mail::Exit(reason) => self.end_after_snapshot(reason),
            Mail::Snapshot(notice) => self.hear(notice),
        }
    }

    fn answer(&mut self, request: Request, fds: Vec<OwnedFd>) {
        let Request { id, command } = request;
        let result = match self.apply(id, &command, fds) {
            Ok(None) => return,
            Ok(Some(answer)) => Ok(answer),
            Err(err) => Err(report::chain(&err)),
        };
        self.say(&FromVmm::Reply { id, result });
    }

    /// Does what is asked; no answer: it comes later.
    fn apply(&mut self, id: u64, command: &Command, fds: Vec<OwnedFd>) -> Result<Option<Answer>, CommandError> {
        match command {
            Command::Run => self.transit(Input::Run)?,
            Command::Pause => return self.pause(id),
            Command::Resume => {
                self.transit(Input::Resume)?;
                self.give_up_pauses(&Refused::GoesOn);
            }
            Command::PowerButton => {
                self.transit(Input::Tell)?;
                self.machine.devices().pm.press_power_button();
            }
            Command::Balloon { bytes } => {
                self.transit(Input::Tell)?;
                self.machine.devices().balloon.set_target(*bytes);
            }
            Command::ResizeConsole { columns, rows } => {
                self.transit(Input::Set)?;
                self.machine.devices().virtio_console.resize(*columns, *rows);
            }
            Command::FreezeDisk { disk } => {
                self.freeze_disk(id, *disk, fds)?;
                return Ok(None);
            }
            Command::Snapshot(command) => {
                self.begin_snapshot(id, command, fds)?;
                return Ok(None);
            }
            Command::CancelSnapshot => self.cancel_snapshot(),
            Command::Status => return Ok(Some(Answer::Status(self.status()))),
            Command::Kill => {}
        }
        Ok(Some(Answer::Done))
    }

    fn transit(&mut self, input: Input) -> Result<(), Refused> {
        let (next, action) = transition::apply(self.state, input)?;
        match action {
            Action::Nothing => {}
            _ if self.stands_for_copy() => {}
            Action::Open => self.machine.open(),
            // The guest may end while it is being stopped; its mail comes next.
            Action::Close if !self.machine.close() => return Err(Refused::Gone),
            Action::Close => {}
        }
        self.state = next;
        Ok(())
    }

    fn status(&self) -> Status {
        Status {
            state: self.state,
            balloon_bytes: self.machine.devices().balloon.actual(),
            exits: self.machine.exits(),
            owes: self.current.is_some() || self.slow.is_any(),
        }
    }

    /// The guest is gone: what it said is written before the engine hears of it.
    fn end(&mut self, reason: ExitReason) -> ExitReason {
        self.state = MachineState::Exited;
        self.machine.stop();
        if !self.flush_disks() {
            return self.kill();
        }
        self.machine.finish(Instant::now() + CONSOLE_DEADLINE);
        if self.mailbox.take().contains(&Mail::WorkingSetRecorded) {
            self.say(&FromVmm::Event(Event::WorkingSetRecorded));
        }
        self.say(&FromVmm::Event(Event::Exited(reason.clone())));
        reason
    }

    /// Ends at once, whatever the guest does.
    fn kill(&mut self) -> ExitReason {
        self.state = MachineState::Exited;
        self.say(&FromVmm::Event(Event::Exited(ExitReason::Killed)));
        ExitReason::Killed
    }

    /// Tells the engine; if it is gone, its end of file says so next.
    fn say(&self, message: &FromVmm) {
        if let Err(err) = self.channel.send(message, &[]) {
            tracing::debug!(%err, "the engine does not listen");
        }
    }
}

/// What comes of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    /// It is answered or will be.
    Goes,
    /// It ends the machine.
    Killed,
    /// There is none: the engine is gone, and with it whoever wants this machine.
    Alone,
}

struct Ready {
    command: bool,
    mail: bool,
}

/// Waits for a command or mail, until `deadline` if there is one.
fn wait(channel: &Channel, mailbox: &Mailbox, deadline: Option<Instant>) -> io::Result<Ready> {
    let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(channel.as_fd().as_raw_fd()), poll(mailbox.as_raw_fd())];
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()).as_millis());
        // A millisecond more, so that it does not come back just before.
        let millis = left.map_or(-1, |left| i32::try_from(left).unwrap_or(i32::MAX).saturating_add(1));
        // SAFETY: `fds` is an array of two for as long as the call lasts.
        let count = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, millis) };
        if count >= 0 {
            let [command, mail] = fds;
            return Ok(Ready { command: command.revents != 0, mail: mail.revents != 0 });
        }
        let err = io::Error::last_os_error();
        if err.kind() != io::ErrorKind::Interrupted {
            return Err(err);
        }
    }
}
