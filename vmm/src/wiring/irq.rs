//! Interrupts into the local APICs.
//!
//! Every interrupt, from an MSI-X vector or a pin of the IOAPIC, is sent by KVM_SIGNAL_MSI. An irqfd would save
//! nothing here, since the sender is always a thread of ours that makes one system call either way, and each would
//! cost a change of the routing table and its grace period whenever a guest programs a vector. The routing table
//! holds the level-triggered pins alone: from it the kernel knows for which vectors an EOI has to come to us.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ovms_devices::irq::{MsiMessage, MsiSink};
use ovms_devices::legacy::{IoapicRoutes, IOAPIC_PINS};

use super::Hypervisor;

/// Trigger mode bit of a message's data (Intel SDM vol. 3, 12.11.2).
const LEVEL: u32 = 1 << 15;

/// Sends messages to the local APICs.
pub struct Messages {
    hypervisor: Arc<dyn Hypervisor>,
}

impl Messages {
    /// For the machine of `hypervisor`.
    pub fn new(hypervisor: Arc<dyn Hypervisor>) -> Self {
        Self { hypervisor }
    }
}

impl MsiSink for Messages {
    fn signal(&self, message: MsiMessage) {
        if let Err(err) = self.hypervisor.signal(message) {
            tracing::debug!(?message, %err, "a message reached no processor");
        }
    }
}

/// Tells the kernel which pins are level-triggered.
pub struct Routes {
    hypervisor: Arc<dyn Hypervisor>,
    pins: Mutex<[Option<MsiMessage>; IOAPIC_PINS]>,
}

impl Routes {
    /// For the machine of `hypervisor`.
    pub fn new(hypervisor: Arc<dyn Hypervisor>) -> Self {
        Self { hypervisor, pins: Mutex::new([None; IOAPIC_PINS]) }
    }
}

impl IoapicRoutes for Routes {
    fn route(&self, pin: usize, message: Option<MsiMessage>) {
        // A masked pin keeps its route: it may be in service, and its EOI has to come.
        let Some(message) = message else { return };
        let level = Some(message).filter(|message| message.data & LEVEL != 0);
        let mut pins: MutexGuard<'_, _> = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        match pins.get_mut(pin) {
            Some(known) if *known != level => *known = level,
            _ => return,
        }
        let routes: Vec<_> =
            (0u32..).zip(pins.iter()).filter_map(|(gsi, message)| message.map(|message| (gsi, message))).collect();
        if let Err(err) = self.hypervisor.set_routes(&routes) {
            tracing::warn!(pin, %err, "the kernel refuses an interrupt route");
        }
    }
}
