//! What a device tells the owner of its machine: that the guest switched itself off, reset itself, or died.

use std::sync::Arc;

/// Something the guest did to its whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest entered ACPI S5: power off.
    PowerOff,
    /// The guest asked for a reset.
    Reset(ResetSource),
    /// The guest's kernel panicked and said so through pvpanic.
    GuestPanic,
    /// The guest's kernel panicked and a crash kernel takes over; the machine goes on.
    CrashLoaded,
}

/// The register by which a guest reset itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetSource {
    /// Reset control register, I/O port 0xcf9 (also the FADT's reset register).
    ResetPort,
    /// Keyboard controller, command 0xfe on I/O port 0x64.
    KeyboardController,
    /// System control port A (I/O port 0x92), bit 0.
    SystemControlPort,
}

/// Takes a device's report. Called on a vCPU thread while it handles an exit: must not block.
pub trait MachineEvents: Send + Sync {
    /// The guest did `event`.
    fn report(&self, event: MachineEvent);
}

impl<F: Fn(MachineEvent) + Send + Sync> MachineEvents for F {
    fn report(&self, event: MachineEvent) {
        self(event);
    }
}

/// The owner of the machine, shared by its devices.
pub type EventSink = Arc<dyn MachineEvents>;
