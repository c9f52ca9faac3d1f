//! pvpanic: one register through which a dying kernel says so (QEMU's docs/specs/pvpanic.rst). Here the register and
//! its I/O port; the PCI function that Debian's kernel has a driver for is [`crate::pci::PvPanic`].

use crate::bus::BusDevice;
use crate::machine::{EventSink, MachineEvent};

/// The I/O port of the ISA form, ACPI `_HID` `QEMU0001`.
pub const PVPANIC_PORT: u64 = 0x505;

/// The kernel panicked.
const PANICKED: u8 = 1 << 0;
/// The kernel panicked and its crash kernel will run.
const CRASH_LOADED: u8 = 1 << 1;

/// The register itself: reads tell which events are understood, writes report one.
pub(crate) struct PvPanicRegister {
    events: EventSink,
}

impl PvPanicRegister {
    pub(crate) fn new(events: EventSink) -> Self {
        Self { events }
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let value = match (offset, data.first()) {
            (0, Some(value)) => *value,
            _ => return,
        };
        if value & PANICKED != 0 {
            self.events.report(MachineEvent::GuestPanic);
        } else if value & CRASH_LOADED != 0 {
            self.events.report(MachineEvent::CrashLoaded);
        }
    }
}

/// The ISA form.
pub struct PvPanicPort(PvPanicRegister);

impl PvPanicPort {
    /// A port that reports to `events`.
    pub fn new(events: EventSink) -> Self {
        Self(PvPanicRegister::new(events))
    }
}

impl BusDevice for PvPanicPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{contract, EventLog};
    use std::sync::Arc;

    #[test]
    fn write_reports_what_the_kernel_says() {
        let log = Arc::<EventLog>::default();
        let port = PvPanicPort::new(log.clone());
        let mut data = [0xff];
        port.read(0, &mut data);
        assert_eq!(data, [3]);
        for value in [0, 0xfc, PANICKED, CRASH_LOADED] {
            port.write(0, &[value]);
        }
        assert_eq!(log.take(), [MachineEvent::GuestPanic, MachineEvent::CrashLoaded]);
    }

    #[test]
    fn contract_holds() {
        contract::bus_device(|| Arc::new(PvPanicPort::new(Arc::<EventLog>::default())), 1);
    }
}
