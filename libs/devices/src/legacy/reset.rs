//! The two one-byte ports by which a PC resets itself: the reset control register and system control port A.

use crate::bus::BusDevice;
use crate::machine::{EventSink, MachineEvent, ResetSource};

/// Reset control register, I/O port 0xcf9 (Intel ICH9, 13.7.5): bit 2 resets the machine. Also the FADT's reset
/// register, with value 6.
pub struct ResetPort {
    events: EventSink,
}

/// Bit 2: reset the CPUs.
const RESET_CPU: u8 = 1 << 2;

impl ResetPort {
    /// The I/O port.
    pub const PORT: u64 = 0xcf9;
    /// What the FADT says to write.
    pub const ACPI_VALUE: u8 = 0x06;

    /// A port that reports to `events`.
    pub fn new(events: EventSink) -> Self {
        Self { events }
    }
}

impl BusDevice for ResetPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 && data.iter().any(|byte| byte & RESET_CPU != 0) {
            self.events.report(MachineEvent::Reset(ResetSource::ResetPort));
        }
    }
}

/// System control port A, I/O port 0x92: bit 0 resets the machine, bit 1 is the A20 gate, which is always open here.
pub struct SystemControl {
    events: EventSink,
}

const FAST_RESET: u8 = 1 << 0;
const A20_OPEN: u8 = 1 << 1;

impl SystemControl {
    /// The I/O port.
    pub const PORT: u64 = 0x92;

    /// A port that reports to `events`.
    pub fn new(events: EventSink) -> Self {
        Self { events }
    }
}

impl BusDevice for SystemControl {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = A20_OPEN;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 && data.first().is_some_and(|byte| byte & FAST_RESET != 0) {
            self.events.report(MachineEvent::Reset(ResetSource::SystemControlPort));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{contract, EventLog};
    use std::sync::Arc;

    #[test]
    fn write_with_reset_bit_reports_reset() {
        let log = Arc::<EventLog>::default();
        let port = ResetPort::new(log.clone());
        port.write(0, &[2]);
        assert!(log.take().is_empty());
        port.write(0, &[ResetPort::ACPI_VALUE]);
        assert_eq!(log.take(), [MachineEvent::Reset(ResetSource::ResetPort)]);
    }

    #[test]
    fn fast_reset_reports_reset_and_a20_reads_open() {
        let log = Arc::<EventLog>::default();
        let port = SystemControl::new(log.clone());
        port.write(0, &[A20_OPEN]);
        assert!(log.take().is_empty());
        port.write(0, &[FAST_RESET]);
        assert_eq!(log.take(), [MachineEvent::Reset(ResetSource::SystemControlPort)]);
        let mut data = [0xff];
        port.read(0, &mut data);
        assert_eq!(data, [A20_OPEN]);
    }

    #[test]
    fn contract_holds() {
        contract::bus_device(|| Arc::new(ResetPort::new(Arc::<EventLog>::default())), 1);
        contract::bus_device(|| Arc::new(SystemControl::new(Arc::<EventLog>::default())), 1);
    }
}
