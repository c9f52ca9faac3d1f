//! The threads that serve the devices' queues.
//!
//! ```text
//!              Activate            Pause
//!   inactive ───────────> serving ────────> paused ──Resume──> serving
//!      ^                     │ broken queue    │
//!      │                     v                 │
//!      └──────Reset─────── stopped <───────────┘  (a stopped worker waits for its reset)
//! ```
//!
//! A thread has a [`seat`] for each worker that it serves, and looks after all of them in one wait: what waits for a disk
//! has a thread of its own, the quiet devices share one. A device has a [`Worker`] as its handle and does not know which
//! it is.
//!
//! Started with the devices and parked until a driver activates one, so that no thread is ever started from a vCPU
//! thread. A device may be paused while it is inactive; activated, it then waits for the resume. Whether it is paused is
//! a flag beside the commands: only the pause of an active device has anything to wait for, so a machine that is restored
//! or goes on waits for none of its idle workers.

mod handle;
mod seat;
#[cfg(test)]
mod tests;
mod thread;

use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::queue::{QueueError, Turn, VirtQueue};

pub(crate) use handle::Worker;
pub use thread::WorkerThread;

/// A device's way of serving its queues.
///
/// Each call is a turn, and the others on the thread wait for its end: it takes a bounded number of requests, and one that
/// is not alone there waits for nothing but its own work.
pub(crate) trait QueueWorker: Send + 'static {
    /// The driver activated the device with these features.
    fn activated(&mut self, _features: u64) {}

    /// Serves the queue at position `at`. `hurry` is set while a command waits, for this worker or another on its thread.
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
