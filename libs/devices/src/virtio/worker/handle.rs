//! The device's end of a worker: commands, and waiting for them to be taken.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

use super::{QueueWorker, WorkerThread};
use crate::sync::lock;
use crate::threads::{Spawner, ThreadKind};
use crate::virtio::{ActivateError, ActiveState, QueueProgress, VirtioInterrupt};

pub(super) enum Command {
    Activate(ActiveState),
    Pause,
    Reset,
    Stop,
}

pub(super) struct Slot {
    pub(super) command: Option<Command>,
    pub(super) reply: Option<Vec<QueueProgress>>,
    /// Serve nothing.
    pub(super) paused: bool,
    /// The thread has seen that, and serves nothing.
    pub(super) still: bool,
    /// A driver has the device, so the thread may be serving.
    pub(super) active: bool,
    /// No thread takes commands: it has not begun, has ended, or the work has panicked.
    pub(super) gone: bool,
    /// How to tell the driver that the worker has died under its hands.
    pub(super) interrupt: Option<Arc<dyn VirtioInterrupt>>,
}

/// What a handle and its seat share.
pub(super) struct Control {
    pub(super) slot: Mutex<Slot>,
    pub(super) changed: Condvar,
}

impl Control {
    pub(super) fn new() -> Self {
        let (command, reply, interrupt) = (None, None, None);
        let slot = Slot { command, reply, paused: false, still: false, active: false, gone: true, interrupt };
        Self { slot: Mutex::new(slot), changed: Condvar::new() }
    }
}

/// Calls a thread to look at the slots of its seats.
pub(super) struct Bell {
    pub(super) wake: EventFd,
    /// It was rung; read by workers between requests.
    pub(super) hurry: AtomicBool,
}

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, hurry: AtomicBool::new(false) })
    }

    fn ring(&self) {
        self.hurry.store(true, Ordering::Release);
        let _ = self.wake.write(1);
    }

    /// Whether it was rung. To be asked before the slots are looked at: what comes after that look rings again. Leaves
    /// `wake` to the wait that is woken by it: whoever rings may not have come so far yet.
    pub(super) fn answer(&self) -> bool {
        self.hurry.swap(false, Ordering::AcqRel)
    }
}

/// Waits for a thread's end when the last of its handles goes; each has stopped its seat before.
#[derive(Default)]
pub(super) struct Joined(pub(super) Mutex<Option<JoinHandle<()>>>);

impl Drop for Joined {
    fn drop(&mut self) {
        if let Some(thread) = lock(&self.0).take() {
            let _ = thread.join();
        }
    }
}

/// The handle of a worker. Dropping it ends the worker, and the last one its thread.
pub(crate) struct Worker {
    pub(super) control: Arc<Control>,
    pub(super) bell: Arc<Bell>,
    /// Held during a call, so that commands do not overtake each other.
    pub(super) calls: Mutex<()>,
    pub(super) _thread: Arc<Joined>,
}

impl Worker {
    /// A worker that has its thread for itself.
    pub(crate) fn spawn(spawner: &Spawner, kind: ThreadKind, name: &str, work: impl QueueWorker) -> io::Result<Self> {
        let mut thread = WorkerThread::new()?;
        let worker = thread.add(work);
        thread.spawn(spawner, kind, name)?;
        Ok(worker)
    }

    pub(crate) fn activate(&self, state: ActiveState) -> Result<(), ActivateError> {
        self.call(Command::Activate(state)).map(drop).ok_or(ActivateError::WorkerGone)
    }

    pub(crate) fn reset(&self) {
        let _ = self.call(Command::Reset);
    }

    pub(crate) fn pause(&self) -> Vec<QueueProgress> {
        self.call(Command::Pause).unwrap_or_default()
    }

    /// Begins a pause and waits until `until` for what is in flight; whether it has stopped. Unlike [`Worker::pause`] it
    /// waits for no reset either, so whoever may not wait for a disk can ask again later.
    pub(crate) fn hold(&self, until: Instant) -> bool {
        let mut slot = lock(&self.control.slot);
        slot.paused = true;
        loop {
            // A worker that nobody activated serves nothing, once it has taken what it was told.
            let idle = !slot.active && slot.command.is_none();
            if slot.still || slot.gone || idle {
                return true;
            }
            self.bell.ring();
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            slot = self.control.changed.wait_timeout(slot, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Does not wait: what comes next finds the flag.
    pub(crate) fn resume(&self) {
        let mut slot = lock(&self.control.slot);
        (slot.paused, slot.still) = (false, false);
        if slot.active {
            self.bell.ring();
        }
    }

    /// Waits until the worker has taken the command: at most as long as one request on its thread takes. `None` if nobody
    /// takes it any more, or yet.
    fn call(&self, command: Command) -> Option<Vec<QueueProgress>> {
        let _calls = lock(&self.calls);
        let mut slot = lock(&self.control.slot);
        match command {
            Command::Pause => {
                slot.paused = true;
                if !slot.active {
                    return Some(Vec::new());
                }
            }
            // Left for a thread that begins later: it must serve no seat without a handle.
            Command::Stop => slot.active = false,
            _ if slot.gone => return None,
            Command::Activate(_) => slot.active = true,
            Command::Reset => slot.active = false,
        }
        slot.command = Some(command);
        slot.reply = None;
        self.bell.ring();
        while slot.reply.is_none() && !slot.gone {
            slot = self.control.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
        slot.reply.take()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.call(Command::Stop);
    }
}
