//! Recording implementations of the traits that the machine monitor implements.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use ovms_state::{Persist, Section, StateError};

use crate::bus::BusDevice;
use crate::console::{ByteSink, Callback};
use crate::irq::{IrqLine, MsiMessage, MsiSink};
use crate::machine::{MachineEvent, MachineEvents};
use crate::pci::PciFunction;
use crate::sync::lock;

/// A wire that remembers its level and counts its rising edges.
#[derive(Debug, Default)]
pub struct CountingIrq {
    level: AtomicBool,
    edges: AtomicUsize,
}

impl CountingIrq {
    /// Whether the wire is asserted.
    pub fn level(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }

    /// Rising edges so far.
    pub fn edges(&self) -> usize {
        self.edges.load(Ordering::SeqCst)
    }
}

impl IrqLine for CountingIrq {
    fn assert(&self) {
        if !self.level.swap(true, Ordering::SeqCst) {
            self.edges.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn deassert(&self) {
        self.level.store(false, Ordering::SeqCst);
    }
}

/// Remembers the messages sent.
#[derive(Debug, Default)]
pub struct MsiLog(Mutex<Vec<MsiMessage>>);

impl MsiLog {
    /// The messages since the last call.
    pub fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl MsiSink for MsiLog {
    fn signal(&self, message: MsiMessage) {
        lock(&self.0).push(message);
    }
}

/// Remembers what a guest did to its machine.
#[derive(Debug, Default)]
pub struct EventLog(Mutex<Vec<MachineEvent>>);

impl EventLog {
    /// The events since the last call.
    pub fn take(&self) -> Vec<MachineEvent> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl MachineEvents for EventLog {
    fn report(&self, event: MachineEvent) {
        lock(&self.0).push(event);
    }
}

/// A sink that keeps the last mebibyte.
#[derive(Debug, Default)]
pub struct RecordingSink(Mutex<Vec<u8>>);

impl RecordingSink {
    /// What was pushed so far.
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.0).clone()
    }
}

impl ByteSink for RecordingSink {
    fn push(&self, bytes: &[u8]) {
        let mut kept = lock(&self.0);
        if kept.len() > 1 << 20 {
            kept.clear();
        }
        kept.extend_from_slice(bytes);
    }
    fn is_full(&self) -> bool {
        false
    }
    fn wait_room(&self, _stop: &dyn Fn() -> bool) {}
    fn kick(&self) {}
    fn on_room(&self, _callback: Callback) {}
}

/// A PCI function as one range: configuration space, then BAR 0.
pub struct FunctionBus<F>(
    /// The function.
    pub Arc<F>,
);

impl<F> FunctionBus<F> {
    /// Where BAR 0 starts in the range.
    pub const BAR: u64 = 0x100;
    /// Bytes of the range: as much of the BAR as a 32 KiB one has.
    pub const LEN: u64 = Self::BAR + 0x8000;
}

impl<F: PciFunction> BusDevice for FunctionBus<F> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(Self::BAR) {
            Some(at) => self.0.bar_read(0, at, data),
            None if is_config_access(offset, data.len()) => self.0.config_read(offset as u16, data),
            None => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset.checked_sub(Self::BAR) {
            Some(at) => self.0.bar_write(0, at, data),
            None if is_config_access(offset, data.len()) => self.0.config_write(offset as u16, data),
            None => {}
        }
    }
}

impl<F: Persist> Persist for FunctionBus<F> {
    fn save(&self) -> Result<Section, StateError> {
        self.0.save()
    }

    fn restore(&self, section: &Section) -> Result<(), StateError> {
        self.0.restore(section)
    }
}

/// What the root complex passes on.
fn is_config_access(offset: u64, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len as u64)
}

/// A sink that is full until it is told otherwise.
#[derive(Default)]
pub struct GatedSink {
    bytes: Mutex<Vec<u8>>,
    open: AtomicBool,
    on_room: OnceLock<Callback>,
}

impl GatedSink {
    /// What was pushed so far.
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }

    /// Makes room for ever.
    pub fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
        if let Some(tell) = self.on_room.get() {
            tell();
        }
    }
}

impl ByteSink for GatedSink {
    fn push(&self, bytes: &[u8]) {
        lock(&self.bytes).extend_from_slice(bytes);
    }

    fn is_full(&self) -> bool {
        !self.open.load(Ordering::SeqCst)
    }

    fn wait_room(&self, _stop: &dyn Fn() -> bool) {}
    fn kick(&self) {}

    fn on_room(&self, callback: Callback) {
        let _ = self.on_room.set(callback);
    }
}
