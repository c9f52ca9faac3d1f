//! How a device interrupts the guest: a pin of the IOAPIC, or a message.
//!
//! The traits are implemented by the machine monitor (`KVM_SIGNAL_MSI`) and by recording fakes in tests.
//! They are called from vCPU threads and device workers alike, never with a device's lock held for longer than the
//! call, and must not block.

/// One wire into the interrupt controller.
///
/// A level-triggered device asserts while it wants service and deasserts when it does not; an edge-triggered one
/// calls [`IrqLine::pulse`].
pub trait IrqLine: Send + Sync {
    /// Drives the wire active. Asserting an asserted wire does nothing.
    fn assert(&self);

    /// Drives the wire inactive. Deasserting an inactive wire does nothing.
    fn deassert(&self);

    /// One rising and one falling edge.
    fn pulse(&self) {
        self.assert();
        self.deassert();
    }
}

/// A message-signalled interrupt: a 32-bit write that the guest chose, to an address that the guest chose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Where the message is written; `0xfeexxxxx` on x86 (Intel SDM vol. 3, 12.11.1).
    pub address: u64,
    /// What is written: vector, delivery mode, trigger mode (Intel SDM vol. 3, 12.11.2).
    pub data: u32,
}

/// Delivers messages to the local APICs.
pub trait MsiSink: Send + Sync {
    /// Sends one message. A message that names no APIC is lost, as on hardware.
    fn signal(&self, message: MsiMessage);
}

/// A wire that leads nowhere, for devices whose interrupt nobody wants.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoIrq;

impl IrqLine for NoIrq {
    fn assert(&self) {}
    fn deassert(&self) {}
}
