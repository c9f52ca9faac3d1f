//! What devices need of the hypervisor, and no more: so a machine's devices can be made, and hostile state be restored
//! into them, where there is no /dev/kvm.

use kvm_bindings::{
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_msi, KvmIrqRouting,
    KVM_IRQ_ROUTING_MSI,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use ovms_devices::irq::MsiMessage;
use vmm_sys_util::errno::{Error, Result};
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::Vm;

/// Interrupts into the guest, and stores of the guest that wake a device without an exit.
pub trait Hypervisor: Send + Sync {
    /// Sends a message to the local APICs.
    ///
    /// # Errors
    /// What the kernel says.
    fn signal(&self, message: MsiMessage) -> Result<()>;

    /// Replaces the table of routes: number of the interrupt, its message.
    ///
    /// # Errors
    /// What the kernel says; the old table stays then.
    fn set_routes(&self, routes: &[(u32, MsiMessage)]) -> Result<()>;

    /// From now on a store to `address` writes `kick` and is no exit.
    ///
    /// # Errors
    /// What the kernel says.
    fn add_doorbell(&self, address: u64, kick: &EventFd) -> Result<()>;

    /// Ends a [`Hypervisor::add_doorbell`].
    ///
    /// # Errors
    /// What the kernel says.
    fn remove_doorbell(&self, address: u64, kick: &EventFd) -> Result<()>;
}

impl Hypervisor for Vm {
    fn signal(&self, message: MsiMessage) -> Result<()> {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        self.fd().signal_msi(msi).map(drop)
    }

    fn set_routes(&self, routes: &[(u32, MsiMessage)]) -> Result<()> {
        let entries: Vec<_> = routes.iter().map(|(gsi, message)| route(*gsi, *message)).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| Error::new(libc::E2BIG))?;
        self.fd().set_gsi_routing(&table)
    }

    fn add_doorbell(&self, address: u64, kick: &EventFd) -> Result<()> {
        self.fd().register_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
    }

    fn remove_doorbell(&self, address: u64, kick: &EventFd) -> Result<()> {
        self.fd().unregister_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
    }
}

fn route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
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
