//! Virtio devices (OASIS virtio 1.2) and their PCI transport.
//!
//! ```text
//!   guest driver ──registers──> pci::VirtioPci ──activate(ActiveState)──> VirtioDevice ──> worker thread
//!        │                          ^                                                        │
//!        └── kick: ioeventfd or ────┼── VirtioInterrupt::{queue, config, needs_reset} <──────┘
//!            MMIO exit -> EventFd   │
//! ```
//!
//! Registers live in the transport. A device gets a *copy* of each queue's configuration at activation and never
//! looks back: what a driver writes to the registers afterwards changes nothing (writes to a live queue's size or
//! addresses are how CVE-2026-5747 happened). A queue that breaks the rules stops its device and sets
//! DEVICE_NEEDS_RESET; the machine goes on.
//!
//! Every device is a folder of the same files: `mod` says what it is, `device` has features, configuration space and
//! the [`VirtioDevice`] trait, `worker` serves the queues, `persist` saves it. A new one takes those four, a
//! `Worker` per direction or queue that must not wait for another (on a [`WorkerThread`] of its own if it waits for the
//! host), and a test that calls
//! `testkit::virtio::device`, which is the whole contract.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod pci;
mod queue;
pub mod rng;
mod worker;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use ovms_state::Persist;
use thiserror::Error;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::sync::lock;
use crate::GuestMemory;

pub use queue::{Segment, MAX_SEGMENTS};
pub use worker::WorkerThread;

/// How a device tells its driver something. Implemented by the transport; may be called from any thread.
pub trait VirtioInterrupt: Send + Sync {
    /// Used buffers were added to queue `index` and the driver wants to know.
    fn queue(&self, index: u16);

    /// The device's configuration space changed.
    fn config(&self);

    /// The device cannot go on until it is reset: sets DEVICE_NEEDS_RESET (virtio 1.2, 2.1.2).
    fn needs_reset(&self);
}

/// One queue, handed over at activation.
pub struct ActiveQueue {
    /// The queue's number on the device.
    pub index: u16,
    /// The queue itself: a copy that later register writes do not reach.
    pub queue: Queue,
    /// Becomes readable when the driver kicks the queue.
    pub kick: Arc<EventFd>,
}

/// What a device has only while it is active.
pub struct ActiveState {
    /// Guest memory.
    pub mem: Arc<GuestMemory>,
    /// The queues that the driver enabled, in ascending order of index.
    pub queues: Vec<ActiveQueue>,
    /// The feature bits that both sides agreed on.
    pub features: u64,
    /// How to interrupt the driver.
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// How far a device has come in one of its queues; all that a transport cannot know by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueProgress {
    /// The queue's number.
    pub index: u16,
    /// Next entry of the available ring that the device will take.
    pub next_avail: u16,
    /// Next entry of the used ring that the device will fill.
    pub next_used: u16,
}

/// Why a device cannot start.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver enabled fewer queues than the device cannot do without.
    #[error("the driver did not enable queue {0}, which the device needs")]
    MissingQueue(u16),
    /// The device is active already.
    #[error("the device is active")]
    Active,
    /// The device's worker has ended.
    #[error("the worker of the device has ended")]
    WorkerGone,
}

/// The device half of a virtio device; the transport is the other half.
///
/// The transport calls `activate` once, and again only after `reset`. All methods but `activate` may come at any
/// time. [`Persist`] covers what is the device's own (its configuration, what the driver asked of it); features,
/// queues and progress are saved by the transport.
pub trait VirtioDevice: Persist + Send + Sync {
    /// The device type (virtio 1.2, section 5), for instance 2 for a block device.
    fn device_type(&self) -> u32;

    /// The feature bits offered, without those of the transport (`VIRTIO_F_VERSION_1`).
    fn features(&self) -> u64;

    /// The largest size of each queue, each a power of two of at most 32768.
    fn queue_max_sizes(&self) -> &[u16];

    /// Loads from the device's configuration space; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Stores to the device's configuration space; read-only fields ignore it.
    fn write_config(&self, offset: u64, data: &[u8]);

    /// The driver is ready: start serving the queues.
    ///
    /// # Errors
    /// [`ActivateError`]; the transport then sets DEVICE_NEEDS_RESET.
    fn activate(&self, state: ActiveState) -> Result<(), ActivateError>;

    /// Stops serving, completes or drops what is in flight, and lets go of queues and guest memory before it returns.
    /// Back to the state after power-on. Resetting an inactive device does nothing.
    fn reset(&self);

    /// Stops serving until [`VirtioDevice::resume`]: when it returns, no I/O is in flight, everything completed is in
    /// the used rings, and guest memory is not touched any more. Returns the progress of each active queue. A paused
    /// device may be paused again. An inactive one may be paused too: activated, it then waits for the resume.
    fn pause(&self) -> Vec<QueueProgress>;

    /// Begins a pause and waits for it until `until` at most; whether the device stands. To be called again until it does:
    /// what is in flight may take as long as a slow disk likes, and [`VirtioDevice::pause`] waits for that.
    /// [`VirtioDevice::resume`] gives it up.
    fn hold(&self, until: Instant) -> bool;

    /// Goes on after a pause, with a look at every queue, since kicks during the pause may be lost with the machine.
    fn resume(&self);
}

/// Gives memory that the guest does not need back to the host.
///
/// The machine monitor implements it with `MADV_DONTNEED`, `MADV_REMOVE` or `FALLOC_FL_PUNCH_HOLE`, whatever its
/// memory is made of.
pub trait MemoryDiscard: Send + Sync {
    /// Discards `len` bytes from guest physical `address` on; they read as zero (or as anything the guest may
    /// not rely on) afterwards. Both are multiples of 4096 and inside guest memory.
    fn discard(&self, address: u64, len: u64);
}

/// Device type of a block device (virtio 1.2, section 5).
pub const TYPE_BLOCK: u32 = 2;
/// Device type of a console.
pub const TYPE_CONSOLE: u32 = 3;
/// Device type of an entropy source.
pub const TYPE_RNG: u32 = 4;
/// Device type of a memory balloon.
pub const TYPE_BALLOON: u32 = 5;

/// Answers a read of a configuration structure; zero beyond its end.
pub(crate) fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let from = usize::try_from(offset).ok().and_then(|at| config.get(at..)).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(from) {
        *to = *from;
    }
}

/// Tells the driver of a changed configuration while there is one.
#[derive(Default)]
pub(crate) struct ConfigNotifier(Mutex<Option<Arc<dyn VirtioInterrupt>>>);

impl ConfigNotifier {
    pub(crate) fn set(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        *lock(&self.0) = Some(interrupt);
    }

    pub(crate) fn clear(&self) {
        *lock(&self.0) = None;
    }

    pub(crate) fn notify(&self) {
        let interrupt = lock(&self.0).clone();
        if let Some(interrupt) = interrupt {
            interrupt.config();
        }
    }
}
