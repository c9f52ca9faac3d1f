//! Fakes and the contract suite for tests of devices: no KVM, no root.

pub mod contract;
pub mod driver;
mod fakes;
pub mod virtio;

use crate::threads::{Spawner, ThreadKind};
use crate::virtio::WorkerThread;

pub use fakes::{CountingIrq, EventLog, FunctionBus, GatedSink, MsiLog, RecordingSink};

/// What `make` adds to a thread, which then runs.
#[allow(clippy::unwrap_used, reason = "a test suite")]
pub fn on_thread<T>(make: impl FnOnce(&mut WorkerThread) -> T) -> T {
    let mut thread = WorkerThread::new().unwrap();
    let made = make(&mut thread);
    thread.spawn(&Spawner::default(), ThreadKind::Device, "virtio").unwrap();
    made
}
