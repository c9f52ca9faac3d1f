//! The owner of a machine: takes commands from the control socket and mail from processors and devices, one at a
//! time, and answers each command once it is done.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use ovms_proto::control::{Answer, Command, Event, ExitReason, FromVmm, MachineState, Request, Status};
use ovms_proto::{Channel, ChannelError};
use thiserror::Error;

use crate::machine::Machine;
use crate::mailbox::{Mail, Mailbox};
use crate::report;
use crate::timeline::Recorder;
use crate::transition::{self, Action, Input, Refused};
use crate::wiring::FreezeError;

/// How long a guest's last console output may take to be written, when nobody reads it.
const CONSOLE_DEADLINE: Duration = Duration::from_secs(5);

/// Why a command is not done.
#[derive(Debug, Error)]
enum CommandError {
    #[error("the machine cannot do that now")]
    Refused(#[from] Refused),
    #[error("this VMM cannot take a RAM snapshot yet")]
    Snapshot,
    #[error("the disk is as it was")]
    Freeze(#[from] FreezeError),
}

/// Owns a configured machine until it ends.
pub struct Owner {
    channel: Channel,
    mailbox: Mailbox,
    machine: Machine,
    state: MachineState,
    timeline: Recorder,
}

impl Owner {
    /// Takes over `machine`, whose processors stand.
    pub fn new(channel: Channel, mailbox: Mailbox, machine: Machine, timeline: Recorder) -> Self {
        Self { channel, mailbox, machine, state: MachineState::Configured, timeline }
    }

    /// Serves commands until the guest is gone or the engine is. All that the guest has said is written by then.
    pub fn run(&mut self) -> ExitReason {
        loop {
            let ready = match wait(&self.channel, &self.mailbox) {
                Ok(ready) => ready,
                Err(err) => return ExitReason::Fault { message: format!("the owner cannot wait: {err}") },
            };
            if ready.mail {
                for mail in self.mailbox.take() {
                    match mail {
                        Mail::FirstExit => {
                            self.say(&FromVmm::Event(Event::FirstExit { micros: self.timeline.micros() }))
                        }
                        Mail::Exit(reason) => return self.end(reason),
                    }
                }
            }
            if ready.command {
                match self.channel.recv::<Request>() {
                    Ok((request, fds)) => {
                        let killed = request.command == Command::Kill;
                        self.answer(request, fds);
                        if killed {
                            return self.kill();
                        }
                    }
                    Err(ChannelError::Decode(err)) => tracing::warn!(%err, "a command cannot be read"),
                    // The engine is gone, and with it whoever wants this machine.
                    Err(_) => return ExitReason::Killed,
                }
            }
        }
    }

    fn answer(&mut self, request: Request, fds: Vec<OwnedFd>) {
        let result = self.apply(&request.command, fds).map_err(|err| report::chain(&err));
        self.say(&FromVmm::Reply { id: request.id, result });
    }

    fn apply(&mut self, command: &Command, fds: Vec<OwnedFd>) -> Result<Answer, CommandError> {
        match command {
            Command::Run => self.transit(Input::Run)?,
            Command::Pause => self.transit(Input::Pause)?,
            Command::Resume => self.transit(Input::Resume)?,
            Command::PowerButton => {
                self.transit(Input::Tell)?;
                self.machine.devices().pm.press_power_button();
            }
            Command::Balloon { bytes } => {
                self.transit(Input::Tell)?;
                self.machine.devices().balloon.set_target(*bytes);
            }
            Command::ResizeConsole { columns, rows } => {
                self.transit(Input::Tell)?;
                self.machine.devices().virtio_console.resize(*columns, *rows);
            }
            Command::FreezeDisk { disk } => {
                self.transit(Input::Tell)?;
                self.machine.devices().freeze_disk(*disk, fds)?;
            }
            Command::Snapshot(_) | Command::CancelSnapshot => return Err(CommandError::Snapshot),
            Command::Status => return Ok(Answer::Status(self.status())),
            Command::Kill => {}
        }
        Ok(Answer::Done)
    }

    fn transit(&mut self, input: Input) -> Result<(), Refused> {
        let (next, action) = transition::apply(self.state, input)?;
        match action {
            Action::Nothing => {}
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
        }
    }

    /// The guest is gone: what it said is written before the engine hears of it.
    fn end(&mut self, reason: ExitReason) -> ExitReason {
        self.state = MachineState::Exited;
        self.machine.finish(Instant::now() + CONSOLE_DEADLINE);
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

struct Ready {
    command: bool,
    mail: bool,
}

fn wait(channel: &Channel, mailbox: &Mailbox) -> io::Result<Ready> {
    let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(channel.as_fd().as_raw_fd()), poll(mailbox.as_raw_fd())];
    loop {
        // SAFETY: `fds` is an array of two for as long as the call lasts.
        let count = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
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
