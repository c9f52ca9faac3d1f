//! Fakes and the contract suite for tests of devices: no KVM, no root.

pub mod contract;
mod fakes;

pub use fakes::{CountingIrq, EventLog, FunctionBus, MsiLog, RecordingSink};
