//! The thread that listens to one machine: control socket, pidfd, OOM notifications, log, and the clients of its socket,
//! each of which it hands to a thread of their own.
//!
//! What comes over the socket is taken as hostile. Every message must have been waited for (one `Configured`, one
//! answer to each request, one `FirstExit`, one `Exited`), so a VMM that floods breaks the protocol with its second
//! message and is killed; no machine but its own is touched.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use ovms_proto::control::{Answer, Command, Event, ExitReason, FromVmm};
use ovms_proto::ChannelError;

use crate::cgroup::OomWatch;
use crate::error::{Error, Result};
use crate::log::{clean, LogPipe};
use crate::machine::{ExitInfo, MachineEvent, State};
use crate::restore;
use crate::serve::Server;
use crate::shared::Inner;

/// Stack of a monitor; JSON of a hostile depth needs less (serde_json stops at 128 levels).
const STACK: usize = 256 << 10;
/// The most bytes of a VMM's message that are shown.
const MAX_MESSAGE: usize = 4 << 10;
/// The most steps of a VMM's time line that are kept, and the longest name of one.
const MAX_STEPS: usize = 64;
const MAX_STEP_NAME: usize = 64;

/// Starts listening to a machine, until its VMM was reaped.
pub(crate) fn start(inner: Arc<Inner>, oom: Option<OomWatch>, log: LogPipe, server: Option<Server>) -> Result<()> {
    let monitor = Monitor { kills: 0, inner, oom, log, server, open: true, deadline: None };
    thread::Builder::new()
        .name("ovms-machine".into())
        .stack_size(STACK)
        .spawn(move || monitor.run())
        .map(drop)
        .map_err(Error::io("the machine's thread cannot be started"))
}

struct Monitor {
    inner: Arc<Inner>,
    oom: Option<OomWatch>,
    log: LogPipe,
    /// Other processes that want something of the machine.
    server: Option<Server>,
    /// OOM kills that were told.
    kills: u64,
    /// The control socket has not ended.
    open: bool,
    /// When a VMM that has taken its leave is ended by force.
    deadline: Option<Instant>,
}

/// What has something to say.
#[derive(Default)]
struct Ready {
    message: bool,
    death: bool,
    oom: bool,
    log: bool,
    client: bool,
}

impl Monitor {
    fn run(mut self) {
        loop {
            let ready = match self.poll(self.deadline.map(|at| at.saturating_duration_since(Instant::now()))) {
                Ok(ready) => ready,
                Err(errno) => {
                    self.inner.fault(&format!("the machine cannot be watched any more: {errno}"));
                    break;
                }
            };
            if ready.log {
                self.log.read();
            }
            if ready.oom {
                self.check_oom();
            }
            if ready.message {
                self.receive();
            }
            if ready.client {
                if let Some(server) = &self.server {
                    server.accept(&self.inner);
                }
            }
            if ready.death {
                break;
            }
            self.hasten();
        }
        self.server = None;
        self.drain();
        let status = self.inner.process.reap();
        self.check_oom();
        self.end(status);
    }

    /// Waits; with a timeout only so long.
    fn poll(&mut self, timeout: Option<Duration>) -> nix::Result<Ready> {
        let (log, again) = self.log.poll();
        let mut fds = vec![PollFd::new(self.inner.process.pidfd(), PollFlags::POLLIN)];
        let places = [
            self.open.then(|| PollFd::new(self.inner.channel.as_fd(), PollFlags::POLLIN)),
            self.oom.as_ref().map(|oom| PollFd::new(oom.fd(), oom.events())),
            log.map(|log| PollFd::new(log, PollFlags::POLLIN)),
            self.server.as_ref().map(|server| PollFd::new(server.fd(), PollFlags::POLLIN)),
        ];
        let indices = places.map(|place| {
            place.map(|fd| {
                fds.push(fd);
                fds.len() - 1
            })
        });
        let timeout = [timeout, again].into_iter().flatten().min().map_or(PollTimeout::NONE, |time| {
            // One more millisecond, or a fraction of one would be a busy loop.
            PollTimeout::try_from(time + Duration::from_millis(u64::from(!time.is_zero()))).unwrap_or(PollTimeout::MAX)
        });
        loop {
            match poll(&mut fds, timeout) {
                Ok(_) => break,
                Err(Errno::EINTR) => (),
                Err(errno) => return Err(errno),
            }
        }
        let is_ready = |index: Option<usize>| {
            index.and_then(|index| fds.get(index)?.revents()).is_some_and(|events| !events.is_empty())
        };
        let [message, oom, log, client] = indices;
        Ok(Ready {
            death: is_ready(Some(0)),
            message: is_ready(message),
            oom: is_ready(oom),
            log: is_ready(log),
            client: is_ready(client),
        })
    }

    /// Ends a VMM that has taken its leave and does not go.
    fn hasten(&mut self) {
        let leaving = {
            let shared = self.inner.shared();
            !self.open || shared.said_exit.is_some() || shared.failed.is_some()
        };
        match self.deadline {
            None if leaving => self.deadline = Some(Instant::now() + self.inner.patience.farewell),
            Some(at) if Instant::now() >= at => {
                tracing::warn!(id = self.inner.id, "the VMM does not leave and is killed");
                if let Err(err) = self.inner.process.kill() {
                    tracing::error!(id = self.inner.id, %err, "the VMM cannot be killed");
                }
                self.deadline = Some(Instant::now() + self.inner.patience.farewell);
            }
            _ => (),
        }
    }

    /// Takes what a VMM that has ended left in socket and pipe. Nobody writes any more, so this ends.
    fn drain(&mut self) {
        while self.open && self.poll(Some(Duration::ZERO)).is_ok_and(|ready| ready.message) {
            self.receive();
        }
        self.log.read();
    }

    /// Takes one message.
    fn receive(&mut self) {
        match self.inner.channel.recv::<FromVmm>() {
            Ok((message, _fds)) => {
                if let Err(broken) = self.take(message) {
                    self.inner.fault(&format!("the VMM broke the control protocol: {broken}"));
                    self.open = false;
                }
            }
            Err(ChannelError::Closed) => self.open = false,
            // It ended with requests unread.
            Err(ChannelError::Io(err)) if err.kind() == ErrorKind::ConnectionReset => self.open = false,
            Err(err) => {
                let source = std::error::Error::source(&err).map(|source| format!(": {source}")).unwrap_or_default();
                self.inner.fault(&format!("the VMM broke the control protocol: {err}{source}"));
                self.open = false;
            }
        }
    }

    fn take(&self, message: FromVmm) -> std::result::Result<(), &'static str> {
        let inner = &self.inner;
        match message {
            FromVmm::Configured { timeline } => {
                if inner.shared().configured {
                    return Err("configured twice");
                }
                let name = |(name, at): (String, u64)| (clean(&name, MAX_STEP_NAME), at);
                inner.vmm_steps(timeline.steps.into_iter().take(MAX_STEPS).map(name).collect());
                inner.change(|shared| {
                    shared.configured = true;
                    if shared.state == State::Creating {
                        shared.state = State::Created;
                    }
                });
                // Here, where nobody waits for it; who waited for the machine may have been given this processor.
                thread::yield_now();
                inner.save();
            }
            FromVmm::Failed { kind, message } => {
                if inner.shared().failed.is_some() {
                    return Err("failed twice");
                }
                inner.change(|shared| shared.failed = Some((kind, clean(&message, MAX_MESSAGE))));
            }
            FromVmm::Reply { id, result } => return self.reply(id, result),
            FromVmm::Event(Event::FirstExit { micros }) => {
                if std::mem::replace(&mut inner.shared().first_exit, true) {
                    return Err("a second first exit");
                }
                inner.vmm_steps(vec![("first exit".into(), micros)]);
                let timeline = inner.timeline();
                let micros = timeline.iter().find(|(name, _)| name == "vmm first exit").map_or(0, |(_, at)| *at);
                tracing::info!(id = inner.id, ?timeline, "the guest lives");
                inner.tell(&MachineEvent::FirstExit { micros });
                if let Some(lock) = &inner.ram_lock {
                    lock.bring_in();
                }
                inner.save();
            }
            FromVmm::Event(Event::SnapshotTaken { stood_micros }) => return self.snapshot_taken(stood_micros),
            FromVmm::Event(Event::WorkingSetRecorded) => {
                let recording = inner.shared().recording.take().ok_or("a working set that nobody waits for")?;
                restore::publish_working_set(inner, recording);
            }
            FromVmm::Event(Event::Exited(reason)) => {
                let reason = match reason {
                    ExitReason::Fault { message } => ExitReason::Fault { message: clean(&message, MAX_MESSAGE) },
                    other => other,
                };
                if inner.shared().said_exit.replace(reason).is_some() {
                    return Err("exited twice");
                }
            }
        }
        Ok(())
    }

    /// The instant of a snapshot: the one that was asked for, once.
    fn snapshot_taken(&self, stood_micros: u64) -> std::result::Result<(), &'static str> {
        let stops = {
            let mut shared = self.inner.shared();
            let asked = shared.pending.values().find_map(|command| match command {
                Command::Snapshot(command) => Some(command.stop),
                _ => None,
            });
            let stop = asked.ok_or("a snapshot that nobody has asked for")?;
            if shared.taken.replace(stood_micros).is_some() {
                return Err("a second instant of one snapshot");
            }
            let stops = stop && shared.state == State::Running;
            if stops {
                shared.state = State::Paused;
            }
            stops
        };
        if stops {
            self.inner.tell(&MachineEvent::Paused);
        }
        self.inner.change(|_| ());
        Ok(())
    }

    fn reply(&self, id: u64, result: std::result::Result<Answer, String>) -> std::result::Result<(), &'static str> {
        let Some(command) = self.inner.shared().pending.remove(&id) else {
            return Err("an answer to no request");
        };
        let result = result.map_err(|message| clean(&message, MAX_MESSAGE));
        let event = match (&result, command) {
            (Ok(_), Command::Run) => Some((State::Running, MachineEvent::Started)),
            (Ok(_), Command::Pause) => Some((State::Paused, MachineEvent::Paused)),
            (Ok(_), Command::Resume) => Some((State::Running, MachineEvent::Resumed)),
            _ => None,
        };
        // Listeners are told before the caller knows, so that what the caller tells comes after.
        if let Some((state, event)) = event {
            let before = std::mem::replace(&mut self.inner.shared().state, state);
            if before != state {
                self.inner.tell(&event);
            }
        }
        self.inner.change(|shared| shared.answers.insert(id, result));
        Ok(())
    }

    fn check_oom(&mut self) {
        let Some(oom) = &self.oom else { return };
        let kills = oom.kills();
        if kills > self.kills {
            self.kills = kills;
            tracing::warn!(id = self.inner.id, kills, "the OOM killer met the machine's cgroup");
            self.inner.tell(&MachineEvent::Oom);
        }
    }

    /// The VMM is gone: the last change of state.
    fn end(mut self, status: Option<WaitStatus>) {
        let last_words = self.log.last_words();
        let inner = &self.inner;
        let oom_killed = self.kills > 0 && !matches!(status, Some(WaitStatus::Exited(..)));
        let reason = {
            let mut shared = inner.shared();
            let said = shared.said_exit.take();
            let failed = shared.failed.as_ref().map(|(_, message)| message.clone());
            exit_reason(said, shared.fault.clone(), failed, status, &last_words)
        };
        let exit = ExitInfo { status: reason.status(), at: SystemTime::now(), reason, oom_killed };
        tracing::info!(id = inner.id, status = exit.status, reason = ?exit.reason, "the machine has ended");
        // The record first: whoever is told may have it read.
        inner.shared().state = State::Stopped;
        inner.shared().exit = Some(exit.clone());
        inner.save();
        inner.tell(&MachineEvent::Exited(exit));
        inner.change(|shared| {
            shared.pending.clear();
        });
    }
}

/// Why it ended, by rank of the witnesses: what we did to it, what it said itself, how the kernel saw it end.
fn exit_reason(
    said: Option<ExitReason>,
    fault: Option<String>,
    failed: Option<String>,
    status: Option<WaitStatus>,
    last_words: &str,
) -> ExitReason {
    if let Some(message) = fault {
        return ExitReason::Fault { message };
    }
    if let Some(reason) = said {
        return reason;
    }
    if let Some(message) = failed {
        return ExitReason::Fault { message };
    }
    let message = match status {
        Some(WaitStatus::Signaled(_, Signal::SIGKILL, _)) => return ExitReason::Killed,
        Some(WaitStatus::Signaled(_, Signal::SIGSYS, _)) => {
            "the VMM made a system call that its seccomp filter forbids and was ended".to_owned()
        }
        Some(WaitStatus::Signaled(_, signal, _)) => format!("the VMM was ended by {signal}"),
        Some(WaitStatus::Exited(_, code)) => format!("the VMM ended with status {code} without saying why"),
        _ => "the VMM ended, and how is not known".to_owned(),
    };
    let message = if last_words.is_empty() { message } else { format!("{message}; its last words: {last_words}") };
    ExitReason::Fault { message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::Pid;

    fn signaled(signal: Signal) -> Option<WaitStatus> {
        Some(WaitStatus::Signaled(Pid::from_raw(1), signal, false))
    }

    #[test]
    fn a_sigkill_without_a_word_is_killed_and_137() {
        let reason = exit_reason(None, None, None, signaled(Signal::SIGKILL), "");
        assert_eq!((reason.status(), reason), (137, ExitReason::Killed));
    }

    #[test]
    fn a_forbidden_call_is_a_fault_and_139() {
        let reason = exit_reason(None, None, None, signaled(Signal::SIGSYS), "bad");
        assert_eq!(reason.status(), 139);
        assert!(format!("{reason:?}").contains("seccomp"), "{reason:?}");
        assert!(format!("{reason:?}").contains("last words: bad"), "{reason:?}");
    }

    #[test]
    fn what_the_guest_did_outranks_how_the_vmm_ended() {
        let reason = exit_reason(Some(ExitReason::PowerOff), None, None, signaled(Signal::SIGKILL), "");
        assert_eq!(reason, ExitReason::PowerOff);
    }

    #[test]
    fn our_own_kill_outranks_what_a_broken_vmm_claims() {
        let reason = exit_reason(Some(ExitReason::PowerOff), Some("flood".into()), None, signaled(Signal::SIGKILL), "");
        assert_eq!(reason, ExitReason::Fault { message: "flood".into() });
    }

    #[test]
    fn a_vmm_that_cannot_build_gives_its_own_reason() {
        let exited = Some(WaitStatus::Exited(Pid::from_raw(1), 126));
        let reason = exit_reason(None, None, Some("no such kernel".into()), exited, "");
        assert_eq!(reason, ExitReason::Fault { message: "no such kernel".into() });
    }
}
