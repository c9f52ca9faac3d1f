//! What a machine's callers and its monitor share.
//!
//! Three locks, never held over a call that waits, and never one inside another but `listeners`, which is held while
//! listeners are told (they are bound not to block): `shared` for the state, `remains` for what delete takes away.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ovms_bundle::Holder;
use ovms_proto::control::{Answer, Command, ExitReason, FailureKind};
use ovms_proto::Channel;

use crate::cgroup::Cgroup;
use crate::error::Result;
use crate::machine::{ExitInfo, MachineEvent, State};
use crate::process::Process;
use crate::ram_lock::RamLock;
use crate::record::{Record, Slot};
use crate::uid::UidLease;

/// A machine, as long as anybody has a handle to it or it runs.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) id: String,
    pub(crate) namespace: String,
    pub(crate) process: Process,
    pub(crate) channel: Channel,
    pub(crate) cgroup: Cgroup,
    /// Guest memory in bytes.
    pub(crate) memory: u64,
    /// Bytes that its cgroup allows beyond a memory limit.
    pub(crate) overhead: u64,
    pub(crate) origin: Origin,
    /// When its creation began.
    pub(crate) began: Instant,
    pub(crate) patience: Patience,
    /// The console's unused stderr.
    pub(crate) _stderr: Option<OwnedFd>,
    pub(crate) ram_lock: Option<RamLock>,
    shared: Mutex<Shared>,
    changed: Condvar,
    listeners: Mutex<Listeners>,
    remains: Mutex<Option<Remains>>,
}

/// State that changes.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) state: State,
    /// The VMM has built the machine.
    pub(crate) configured: bool,
    /// The VMM's last word if it could not build the machine or go on.
    pub(crate) failed: Option<(FailureKind, String)>,
    /// Why the guest is gone, as the VMM says.
    pub(crate) said_exit: Option<ExitReason>,
    /// Why we killed it.
    pub(crate) fault: Option<String>,
    pub(crate) first_exit: bool,
    pub(crate) next_request: u64,
    /// Requests without an answer.
    pub(crate) pending: HashMap<u64, Command>,
    /// Answers that nobody has fetched yet.
    pub(crate) answers: BTreeMap<u64, std::result::Result<Answer, String>>,
    pub(crate) exit: Option<ExitInfo>,
    /// Somebody changes the disk's tops.
    pub(crate) freezing: bool,
    /// Somebody takes a RAM snapshot.
    pub(crate) snapshotting: bool,
    /// The instant of the snapshot that is being taken has passed; microseconds for which the guest stood still.
    pub(crate) taken: Option<u64>,
    /// The file that the VMM may record its working set into.
    pub(crate) recording: Option<File>,
    timeline: Vec<(String, u64)>,
    /// When the VMM's program began, in microseconds.
    program: Option<u64>,
}

/// What a machine was made from, and what of it a snapshot must know.
#[derive(Debug, Default)]
pub(crate) struct Origin {
    /// The bundle's record.
    pub(crate) bundle: PathBuf,
    /// How this engine names itself as the holder of a top.
    pub(crate) holder: Holder,
    /// It has a disk that its guest may write.
    pub(crate) writable: bool,
    /// The RAM that it resumed from.
    pub(crate) ram: Option<ovms_bundle::Ram>,
}

/// What a machine has on the host beside its process and its cgroup.
#[derive(Debug)]
pub(crate) struct Remains {
    pub(crate) slot: Slot,
    pub(crate) record: Record,
    /// Held as long as this lives.
    pub(crate) _uid: UidLease,
}

type Listener = Box<dyn FnMut(&MachineEvent) + Send>;

#[derive(Default)]
struct Listeners {
    all: Vec<Listener>,
    /// What a late listener is told first.
    history: Vec<MachineEvent>,
}

impl fmt::Debug for Listeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} listeners", self.all.len())
    }
}

/// How long a machine's VMM may take for what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// To answer a request. Stopping 32 vCPUs takes milliseconds; on an emulated host seconds.
    pub(crate) answer: Duration,
    /// To give memory to the balloon before a lower limit is refused.
    pub(crate) balloon: Duration,
    /// To live on after it has said that it ends, or has closed its control socket: it may still have to hand console
    /// output to a slow reader.
    pub(crate) farewell: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { answer: Duration::from_secs(20), balloon: Duration::from_secs(10), farewell: Duration::from_secs(30) }
    }
}

/// What [`Inner::new`] is made of.
pub(crate) struct Parts {
    pub(crate) patience: Patience,
    pub(crate) process: Process,
    pub(crate) channel: Channel,
    pub(crate) cgroup: Cgroup,
    pub(crate) memory: u64,
    pub(crate) overhead: u64,
    pub(crate) began: Instant,
    pub(crate) timeline: Vec<(String, u64)>,
    pub(crate) stderr: Option<OwnedFd>,
    pub(crate) origin: Origin,
    pub(crate) ram_lock: Option<RamLock>,
    pub(crate) recording: Option<File>,
    pub(crate) remains: Remains,
}

impl Inner {
    pub(crate) fn new(parts: Parts) -> Self {
        let shared = Shared {
            state: State::Creating,
            configured: false,
            failed: None,
            said_exit: None,
            fault: None,
            first_exit: false,
            next_request: 0,
            pending: HashMap::new(),
            answers: BTreeMap::new(),
            exit: None,
            freezing: false,
            snapshotting: false,
            taken: None,
            recording: parts.recording,
            timeline: parts.timeline,
            program: None,
        };
        Self {
            id: parts.remains.record.id.clone(),
            namespace: parts.remains.record.namespace.clone(),
            process: parts.process,
            channel: parts.channel,
            cgroup: parts.cgroup,
            memory: parts.memory,
            overhead: parts.overhead,
            origin: parts.origin,
            began: parts.began,
            patience: parts.patience,
            _stderr: parts.stderr,
            ram_lock: parts.ram_lock,
            shared: Mutex::new(shared),
            changed: Condvar::new(),
            listeners: Mutex::default(),
            remains: Mutex::new(Some(parts.remains)),
        }
    }

    pub(crate) fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next change.
    pub(crate) fn changed<'a>(&self, shared: MutexGuard<'a, Shared>) -> MutexGuard<'a, Shared> {
        self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes all who wait for that.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Shared) -> T) -> T {
        let result = change(&mut self.shared());
        self.changed.notify_all();
        result
    }

    /// Waits until `ready` finds something; `None` after `timeout`.
    pub(crate) fn wait_for<T>(&self, timeout: Duration, mut ready: impl FnMut(&mut Shared) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + timeout;
        let mut shared = self.shared();
        loop {
            if let Some(found) = ready(&mut shared) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            shared = self.changed.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends a VMM that does what it must not, and keeps the reason for its exit.
    pub(crate) fn fault(&self, message: &str) {
        tracing::error!(id = self.id, "{message}");
        self.shared().fault.get_or_insert_with(|| message.to_owned());
        if let Err(err) = self.process.kill() {
            tracing::error!(id = self.id, %err, "the VMM cannot be killed");
        }
    }

    /// Notes that a step of the start was reached now.
    pub(crate) fn step(&self, name: &str) {
        let now = micros(self.began.elapsed());
        self.shared().timeline.push((name.to_owned(), now));
    }

    /// Notes the VMM's own steps, which count from the beginning of its program: best known of that is that the last of the
    /// first steps came just now.
    pub(crate) fn vmm_steps(&self, steps: Vec<(String, u64)>) {
        let now = micros(self.began.elapsed());
        let shared = &mut self.shared();
        let last = steps.last().map_or(0, |(_, at)| *at);
        let program = *shared.program.get_or_insert(now.saturating_sub(last));
        shared.timeline.extend(steps.into_iter().map(|(name, at)| (format!("vmm {name}"), program.saturating_add(at))));
    }

    /// The steps in order of time.
    pub(crate) fn timeline(&self) -> Vec<(String, u64)> {
        let mut timeline = self.shared().timeline.clone();
        timeline.sort_by_key(|(_, at)| *at);
        timeline
    }

    /// Writes the record as things are; a failure is told to the log alone, since the machine itself is well.
    pub(crate) fn save(&self) {
        let (state, exit) = {
            let shared = self.shared();
            (shared.state, shared.exit.clone())
        };
        let timeline = self.timeline();
        let mut remains = self.remains.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(remains) = remains.as_mut() else { return };
        if remains.record.state != state {
            tracing::info!(id = self.id, from = ?remains.record.state, to = ?state, "the machine has changed its state");
        }
        // A caller that was held up between its change and here must not undo a later one.
        if remains.record.state != State::Stopped {
            (remains.record.state, remains.record.exit, remains.record.timeline) = (state, exit, timeline);
        }
        if let Err(err) = remains.slot.write(&remains.record) {
            tracing::error!(id = self.id, err = err.chain(), "the machine's record is out of date");
        }
    }

    /// Notes another top that the machine holds, or that it does not hold it.
    pub(crate) fn note_top(&self, data: PathBuf, held: bool) {
        let mut remains = self.remains.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(remains) = remains.as_mut() {
            remains.record.tops.retain(|top| *top != data);
            if held {
                remains.record.tops.push(data);
            }
        }
    }

    /// Gives up uid and name; no change if that was done before.
    pub(crate) fn release(&self) -> Result<()> {
        let mut remains = self.remains.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(remains) = remains.as_ref() {
            remains.slot.remove()?;
        }
        *remains = None;
        Ok(())
    }

    /// Tells every listener.
    pub(crate) fn tell(&self, event: &MachineEvent) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(event, MachineEvent::Started | MachineEvent::Exited(_) | MachineEvent::Deleted) {
            if listeners.history.contains(event) {
                return;
            }
            listeners.history.push(event.clone());
        }
        for listener in &mut listeners.all {
            listener(event);
        }
    }

    pub(crate) fn subscribe(&self, mut listener: Listener) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        for event in &listeners.history {
            listener(event);
        }
        listeners.all.push(listener);
    }
}

/// Whole microseconds.
pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
