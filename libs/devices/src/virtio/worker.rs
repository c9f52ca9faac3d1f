//! The thread that serves a device's queues.
//!
//! ```text
//!              Activate            Pause
//!   inactive ───────────> serving ────────> paused ──Resume──> serving
//!      ^                     │ broken queue    │
//!      │                     v                 │
//!      └──────Reset─────── stopped <───────────┘  (a stopped worker waits for its reset)
//! ```
//!
//! Started with the device and parked until a driver activates it, so that no thread is ever started from a vCPU
//! thread. A device may be paused while it is inactive; activated, it then waits for the resume. Whether it is paused is
//! a flag beside the commands: only the pause of an active device has anything to wait for, so a machine that is restored
//! or goes on waits for none of its idle threads.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

use super::queue::{QueueError, Turn, VirtQueue};
use super::{ActivateError, ActiveState, QueueProgress, VirtioInterrupt};
use crate::log_limit::LogLimit;
use crate::poll::{wait_fds, Interest};
use crate::sync::lock;
use crate::threads::{Spawner, ThreadKind};

/// A device's way of serving its queues.
pub(crate) trait QueueWorker: Send + 'static {
    /// The driver activated the device with these features.
    fn activated(&mut self, _features: u64) {}

    /// Serves the queue at position `at`. `hurry` is set while a pause or reset waits.
    fn serve(&mut self, queues: &mut [VirtQueue], at: usize, hurry: &AtomicBool) -> Result<Turn, QueueError>;

    /// Another descriptor that wakes the worker, and then calls [`QueueWorker::woken`].
    fn wake_fd(&self) -> Option<Arc<EventFd>> {
        None
    }

    /// The descriptor of [`QueueWorker::wake_fd`] was signalled. Also called when serving begins.
    fn woken(&mut self, _queues: &mut [VirtQueue], _hurry: &AtomicBool) -> Result<Turn, QueueError> {
        Ok(Turn::Idle)
    }

    /// The driver reset the device; its queues are gone.
    fn reset(&mut self) {}
}

enum Command {
    Activate(ActiveState),
    Pause,
    Reset,
    Stop,
}

#[derive(Default)]
struct Slot {
    command: Option<Command>,
    reply: Option<Vec<QueueProgress>>,
    /// Serve nothing.
    paused: bool,
    /// The thread has seen that, and serves nothing.
    still: bool,
    /// A driver has the device, so the thread may be serving.
    active: bool,
    dead: bool,
    /// How to tell the driver that the thread has died under its hands.
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
}

struct Control {
    slot: Mutex<Slot>,
    changed: Condvar,
    wake: EventFd,
    /// A command waits; read by the worker between requests.
    hurry: AtomicBool,
}

/// Frees a worker that waits inside [`QueueWorker::serve`], so that it looks at `hurry`.
type Nudge = Box<dyn Fn() + Send + Sync>;

/// The handle of a worker thread. Dropping it ends the thread.
pub(crate) struct Worker {
    control: Arc<Control>,
    nudge: Option<Nudge>,
    /// Held during a call, so that commands do not overtake each other.
    calls: Mutex<()>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub(crate) fn spawn(spawner: &Spawner, kind: ThreadKind, name: &str, work: impl QueueWorker) -> io::Result<Self> {
        let control = Arc::new(Control {
            slot: Mutex::default(),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            hurry: AtomicBool::new(false),
        });
        let own = Arc::clone(&control);
        let thread = spawner.spawn(kind, name, move || {
            let _end = AtEnd(Arc::clone(&own));
            Thread { control: &own, work, active: None, paused: false, log: LogLimit::new() }.run();
        })?;
        Ok(Self { control, nudge: None, calls: Mutex::new(()), thread: Some(thread) })
    }

    /// Sets what frees the worker from a wait of its own; called after `hurry` is set.
    pub(crate) fn with_nudge(mut self, nudge: impl Fn() + Send + Sync + 'static) -> Self {
        self.nudge = Some(Box::new(nudge));
        self
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
            // A thread that nobody activated serves nothing, once it has taken what it was told.
            let idle = !slot.active && slot.command.is_none();
            if slot.still || slot.dead || idle {
                return true;
            }
            self.control.hurry.store(true, Ordering::Release);
            let _ = self.control.wake.write(1);
            if let Some(nudge) = &self.nudge {
                nudge();
            }
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
            self.control.hurry.store(true, Ordering::Release);
            let _ = self.control.wake.write(1);
        }
    }

    /// Waits until the worker has taken the command: at most as long as one request takes. `None` if it has ended.
    fn call(&self, command: Command) -> Option<Vec<QueueProgress>> {
        let _calls = lock(&self.calls);
        let mut slot = lock(&self.control.slot);
        match command {
            Command::Activate(_) => slot.active = true,
            Command::Reset | Command::Stop => slot.active = false,
            Command::Pause => {
                slot.paused = true;
                if !slot.active {
                    return Some(Vec::new());
                }
            }
        }
        slot.command = Some(command);
        slot.reply = None;
        self.control.hurry.store(true, Ordering::Release);
        let _ = self.control.wake.write(1);
        if let Some(nudge) = &self.nudge {
            nudge();
        }
        while slot.reply.is_none() && !slot.dead {
            slot = self.control.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
        slot.reply.take()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.call(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Tells callers that the thread is gone, however it went.
struct AtEnd(Arc<Control>);

impl Drop for AtEnd {
    fn drop(&mut self) {
        let mut slot = lock(&self.0.slot);
        slot.dead = true;
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
    fn all_due(&mut self) {
        let now = Some(Instant::now());
        self.due.fill(now);
        self.woken_due = now;
    }

    /// How long to wait for events before something is due; `None` for ever.
    fn patience(&self) -> Option<Duration> {
        let first = self.due.iter().chain([&self.woken_due]).flatten().min()?;
        Some(first.saturating_duration_since(Instant::now()))
    }

    fn progress(&self) -> Vec<QueueProgress> {
        self.queues.iter().map(VirtQueue::progress).collect()
    }
}

struct Thread<'a, W> {
    control: &'a Control,
    work: W,
    active: Option<Active>,
    paused: bool,
    log: LogLimit,
}

impl<W: QueueWorker> Thread<'_, W> {
    fn run(mut self) {
        let wake_fd = self.work.wake_fd();
        loop {
            if self.control.hurry.load(Ordering::Acquire) && !self.obey() {
                return;
            }
            let serving = !self.paused;
            let active = self.active.as_mut().filter(|active| serving && !active.broken);
            let waited = wait(self.control, active.as_deref(), wake_fd.as_deref());
            let Some(active) = active else {
                if waited.is_err() {
                    return;
                }
                continue;
            };
            let Ok(ready) = waited else { return };
            let now = Instant::now();
            // A queue that waits for its time is not hurried by a kick.
            for (due, _) in active.due.iter_mut().zip(&ready.kicks).filter(|(_, ready)| **ready) {
                due.get_or_insert(now);
            }
            if ready.extra {
                active.woken_due = Some(now);
            }
            if let Err(error) = serve_due(&mut self.work, active, now, &self.control.hurry) {
                if self.log.allows() {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "the driver broke a queue, the device stops");
                }
                active.broken = true;
                active.interrupt.needs_reset();
            }
        }
    }

    /// Takes the command that waits; `false` when it is to stop.
    fn obey(&mut self) -> bool {
        let mut slot = lock(&self.control.slot);
        self.control.hurry.store(false, Ordering::Release);
        let _ = self.control.wake.read();
        if std::mem::replace(&mut self.paused, slot.paused) && !slot.paused {
            if let Some(active) = &mut self.active {
                active.all_due();
            }
        }
        slot.still = slot.paused;
        let Some(command) = slot.command.take() else {
            self.control.changed.notify_all();
            return true;
        };
        let stop = matches!(command, Command::Stop);
        match command {
            Command::Activate(state) => {
                slot.interrupt = Some(Arc::clone(&state.interrupt));
                self.activate(state);
            }
            Command::Pause => {}
            Command::Reset | Command::Stop => {
                slot.interrupt = None;
                self.active = None;
                self.work.reset();
            }
        }
        slot.reply = Some(self.active.as_ref().map(Active::progress).unwrap_or_default());
        self.control.changed.notify_all();
        !stop
    }

    fn activate(&mut self, state: ActiveState) {
        self.work.activated(state.features);
        let queues: Vec<VirtQueue> = state
            .queues
            .into_iter()
            .map(|queue| VirtQueue::new(queue, Arc::clone(&state.mem), Arc::clone(&state.interrupt)))
            .collect();
        let due = vec![None; queues.len()];
        let mut active = Active { queues, interrupt: state.interrupt, due, woken_due: None, broken: false };
        active.all_due();
        self.active = Some(active);
    }
}

#[derive(Default)]
struct Ready {
    kicks: Vec<bool>,
    extra: bool,
}

/// Waits for a command, a kick or the extra descriptor, or until a queue is due.
fn wait(control: &Control, active: Option<&Active>, extra: Option<&EventFd>) -> io::Result<Ready> {
    let mut fds: Vec<(&dyn std::os::fd::AsRawFd, Interest)> = vec![(&control.wake, Interest::Read)];
    let mut timeout = None;
    if let Some(active) = active {
        timeout = active.patience();
        for queue in &active.queues {
            fds.push((queue.kick(), Interest::Read));
        }
        if let Some(extra) = extra {
            fds.push((extra, Interest::Read));
        }
    }
    let ready = wait_fds(&fds, timeout)?;
    let Some(active) = active else { return Ok(Ready::default()) };
    let mut flags = ready.into_iter().skip(1);
    let kicks: Vec<bool> = flags.by_ref().take(active.queues.len()).collect();
    for (queue, _) in active.queues.iter().zip(&kicks).filter(|(_, ready)| **ready) {
        let _ = queue.kick().read();
    }
    let extra_ready = flags.next().unwrap_or(false);
    if let (true, Some(extra)) = (extra_ready, extra) {
        let _ = extra.read();
    }
    Ok(Ready { kicks, extra: extra_ready })
}

fn serve_due<W: QueueWorker>(
    work: &mut W,
    active: &mut Active,
    now: Instant,
    hurry: &AtomicBool,
) -> Result<(), QueueError> {
    if active.woken_due.is_some_and(|at| at <= now) {
        active.woken_due = next_due(work.woken(&mut active.queues, hurry)?, now);
    }
    for at in 0..active.queues.len() {
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
