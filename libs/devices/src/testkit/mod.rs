//! Fakes and the contract suite for tests of devices: no KVM, no root.

pub mod contract;
pub mod driver;
mod fakes;
pub mod virtio;

pub use fakes::{CountingIrq, EventLog, FunctionBus, GatedSink, MsiLog, RecordingSink};
