//! Interrupts into the local APICs.
//!
//! Every interrupt, from an MSI-X vector or a pin of the IOAPIC, is sent by KVM_SIGNAL_MSI. An irqfd would save
//! nothing here, since the sender is always a thread of ours that makes one system call either way, and each would
//! cost a change of the routing table and its grace period whenever a guest programs a vector. The routing table
//! holds the level-triggered pins alone: from it the kernel knows for which vectors an EOI has to come to us.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_msi, KvmIrqRouting,
    KVM_IRQ_ROUTING_MSI,
};
use ovms_devices::irq::{MsiMessage, MsiSink};
use ovms_devices::legacy::{IoapicRoutes, IOAPIC_PINS};

use crate::kvm::Vm;

/// Trigger mode bit of a message's data (Intel SDM vol. 3, 12.11.2).
const LEVEL: u32 = 1 << 15;

/// Sends messages to the local APICs.
pub struct Messages {
    vm: Arc<Vm>,
}

impl Messages {
    /// For the machine `vm`.
    pub fn new(vm: Arc<Vm>) -> Self {
        Self { vm }
    }
}

impl MsiSink for Messages {
    fn signal(&self, message: MsiMessage) {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        if let Err(err) = self.vm.fd().signal_msi(msi) {
            tracing::debug!(?message, %err, "a message reached no processor");
        }
    }
}

/// Tells the kernel which pins are level-triggered.
pub struct Routes {
    vm: Arc<Vm>,
    pins: Mutex<[Option<MsiMessage>; IOAPIC_PINS]>,
}

impl Routes {
    /// For the machine `vm`.
    pub fn new(vm: Arc<Vm>) -> Self {
        Self { vm, pins: Mutex::new([None; IOAPIC_PINS]) }
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
        let entries: Vec<kvm_irq_routing_entry> =
            (0u32..).zip(pins.iter()).filter_map(|(gsi, message)| message.map(|message| entry(gsi, message))).collect();
        let Ok(table) = KvmIrqRouting::from_entries(&entries) else { return };
        if let Err(err) = self.vm.fd().set_gsi_routing(&table) {
            tracing::warn!(pin, %err, "the kernel refuses an interrupt route");
        }
    }
}

fn entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}
