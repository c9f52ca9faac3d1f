//! The thread's end of a worker: its work and, while a driver has the device, its queues.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::handle::{Command, Control};
use super::QueueWorker;
use crate::log_limit::LogLimit;
use crate::sync::lock;
use crate::virtio::queue::{QueueError, Turn, VirtQueue};
use crate::virtio::{ActiveState, QueueProgress, VirtioInterrupt};

/// Tells the handle and the driver that nobody serves the worker any more, however that came.
struct AtEnd(Arc<Control>);

impl Drop for AtEnd {
    fn drop(&mut self) {
        let mut slot = lock(&self.0.slot);
        slot.gone = true;
        slot.command = None;
        if let Some(interrupt) = slot.interrupt.take() {
            interrupt.needs_reset();
        }
        self.0.changed.notify_all();
    }
}

struct Active {
    queues: Vec<VirtQueue>,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// When each queue is to be served without waiting for a kick.
    due: Vec<Option<Instant>>,
    /// When [`QueueWorker::woken`] is to be called without waiting for its descriptor.
    woken_due: Option<Instant>,
    broken: bool,
}

impl Active {
    fn new(state: ActiveState) -> Self {
        let ActiveState { mem, queues, interrupt, .. } = state;
        let queues: Vec<VirtQueue> =
            queues.into_iter().map(|queue| VirtQueue::new(queue, Arc::clone(&mem), Arc::clone(&interrupt))).collect();
        let due = vec![None; queues.len()];
        let mut active = Self { queues, interrupt, due, woken_due: None, broken: false };
        active.all_due();
        active
    }

    fn all_due(&mut self) {
        let now = Some(Instant::now());
        self.due.fill(now);
        self.woken_due = now;
    }

    fn serves(&self, paused: bool) -> bool {
        !paused && !self.broken
    }

    fn progress(&self) -> Vec<QueueProgress> {
        self.queues.iter().map(VirtQueue::progress).collect()
    }
}

pub(super) struct Seat {
    work: Box<dyn QueueWorker>,
    wake_fd: Option<Arc<EventFd>>,
    active: Option<Active>,
    paused: bool,
    log: LogLimit,
    /// The last to be dropped: who waits for the end finds all else gone.
    end: AtEnd,
}

impl Seat {
    pub(super) fn new(work: impl QueueWorker, control: Arc<Control>) -> Self {
        let wake_fd = work.wake_fd();
        let (log, end) = (LogLimit::new(), AtEnd(control));
        Self { work: Box::new(work), wake_fd, active: None, paused: false, log, end }
    }

    /// A thread will take this seat's commands.
    pub(super) fn begin(&self) {
        lock(&self.end.0.slot).gone = false;
    }

    /// Takes the command that waits; `false` when the worker is to stop.
    pub(super) fn obey(&mut self) -> bool {
        let control = &self.end.0;
        let mut slot = lock(&control.slot);
        if std::mem::replace(&mut self.paused, slot.paused) && !slot.paused {
            if let Some(active) = &mut self.active {
                active.all_due();
            }
        }
        slot.still = slot.paused;
        let command = slot.command.take();
        let answers = command.is_some();
        match command {
            Some(Command::Activate(state)) => {
                slot.interrupt = Some(Arc::clone(&state.interrupt));
                self.work.activated(state.features);
                self.active = Some(Active::new(state));
            }
            Some(Command::Reset) => {
                slot.interrupt = None;
                self.active = None;
                self.work.reset();
            }
            Some(Command::Stop) => {
                // Answered when the seat is gone.
                slot.interrupt = None;
                return false;
            }
            Some(Command::Pause) | None => {}
        }
        if answers {
            slot.reply = Some(self.active.as_ref().map(Active::progress).unwrap_or_default());
        }
        control.changed.notify_all();
        true
    }

    fn serving(&self) -> Option<&Active> {
        self.active.as_ref().filter(|active| active.serves(self.paused))
    }

    /// What wakes the worker: the kicks of its queues, then its own descriptor.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = &dyn AsRawFd> {
        let active = self.serving();
        let kicks = active.into_iter().flat_map(|active| &active.queues).map(|queue| queue.kick() as &dyn AsRawFd);
        let own = self.wake_fd.as_deref().filter(|_| active.is_some());
        kicks.chain(own.map(|fd| fd as &dyn AsRawFd))
    }

    /// How long to wait for events before something is due; `None` for ever.
    pub(super) fn patience(&self) -> Option<Duration> {
        let active = self.serving()?;
        let first = active.due.iter().chain([&active.woken_due]).flatten().min()?;
        Some(first.saturating_duration_since(Instant::now()))
    }

    /// Takes, out of `ready`, what became of each of [`Seat::descriptors`].
    pub(super) fn note(&mut self, ready: &mut impl Iterator<Item = bool>, now: Instant) {
        let paused = self.paused;
        let Some(active) = self.active.as_mut().filter(|active| active.serves(paused)) else { return };
        for (queue, due) in active.queues.iter().zip(&mut active.due) {
            if ready.next() == Some(true) {
                let _ = queue.kick().read();
                // A queue that waits for its time is not hurried by a kick.
                due.get_or_insert(now);
            }
        }
        if let Some(fd) = &self.wake_fd {
            if ready.next() == Some(true) {
                let _ = fd.read();
                active.woken_due = Some(now);
            }
        }
    }

    /// Gives a turn to each queue that is due. What is left when somebody is in a hurry stays due.
    pub(super) fn serve(&mut self, now: Instant, hurry: &AtomicBool) {
        let paused = self.paused;
        let Some(active) = self.active.as_mut().filter(|active| active.serves(paused)) else { return };
        if let Err(error) = serve_due(self.work.as_mut(), active, now, hurry) {
            if self.log.allows() {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the driver broke a queue, the device stops");
            }
            active.broken = true;
            active.interrupt.needs_reset();
        }
    }
}

fn serve_due(
    work: &mut dyn QueueWorker,
    active: &mut Active,
    now: Instant,
    hurry: &AtomicBool,
) -> Result<(), QueueError> {
    if active.woken_due.is_some_and(|at| at <= now) {
        active.woken_due = next_due(work.woken(&mut active.queues, hurry)?, now);
    }
    for at in 0..active.queues.len() {
        if hurry.load(Ordering::Relaxed) {
            break;
        }
        let is_due = |due: &&mut Option<Instant>| due.is_some_and(|at| at <= now);
        let Some(due) = active.due.get_mut(at).filter(is_due) else { continue };
        *due = next_due(work.serve(&mut active.queues, at, hurry)?, now);
    }
    Ok(())
}

fn next_due(turn: Turn, now: Instant) -> Option<Instant> {
    match turn {
        Turn::Idle => None,
        Turn::More => Some(now),
        Turn::Later(wait) => now.checked_add(wait),
    }
}
