//! The PCI bus: which function is in which slot, where its BAR lies, and how its queues are kicked.
//!
//! ```text
//!   kick, first time:  MMIO exit ─> Window ─> function ─> eventfd      and the address is registered as an ioeventfd
//!   kick, afterwards:  KVM writes the eventfd by itself, no exit
//!   BAR moved:         its ioeventfds are taken back; the next kick registers them at the new place
//! ```
//!
//! Registering at the first kick rather than at boot costs one exit a queue and saves what ioeventfds cost a machine
//! that never uses its queues: each leaves the kernel a grace period to wait for when the machine is closed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ovms_devices::bus::{BusBuilder, BusDevice};
use ovms_devices::irq::MsiSink;
use ovms_devices::machine::EventSink;
use ovms_devices::pci::{
    BarListener, BarRange, MsiNotifier, PciFunction, PciRoot, PciRootBuilder, PvPanic, Slot, CONFIG_ADDRESS_PORT,
    CONFIG_DATA_PORT, ECAM_LEN,
};
use ovms_devices::virtio::pci::{VirtioPci, BAR_LEN};
use ovms_devices::virtio::VirtioDevice;
use vmm_sys_util::eventfd::EventFd;

use super::{Hypervisor, WiringError};
use crate::layout;
use crate::memory::Ram;

/// BAR of the pvpanic function: a page at the window's start, so that virtio BARs behind it are aligned.
const PANIC_BAR: u64 = layout::BAR_WINDOW_START;
/// The window for BARs.
const WINDOW: BarRange = BarRange { address: layout::BAR_WINDOW_START, size: layout::BAR_WINDOW_SIZE };

/// Collects the functions of the bus.
pub(super) struct PciBuilder<'a> {
    root: PciRootBuilder,
    hypervisor: &'a Arc<dyn Hypervisor>,
    ram: &'a Ram,
    messages: Arc<dyn MsiSink>,
    next_slot: u8,
    next_bar: u64,
    kicks: BTreeMap<u8, Vec<(u64, Arc<EventFd>)>>,
    panic: Arc<PvPanic>,
}

impl<'a> PciBuilder<'a> {
    /// A bus with host bridge and pvpanic.
    pub(super) fn new(
        hypervisor: &'a Arc<dyn Hypervisor>,
        ram: &'a Ram,
        messages: Arc<dyn MsiSink>,
        events: &EventSink,
    ) -> Result<Self, WiringError> {
        let panic = PvPanic::new(PANIC_BAR, Arc::clone(events)).ok_or(WiringError::Bar("pvpanic"))?;
        let mut builder = Self {
            root: PciRootBuilder::new(&[WINDOW]),
            hypervisor,
            ram,
            messages,
            next_slot: 1,
            next_bar: PANIC_BAR + BAR_LEN,
            kicks: BTreeMap::new(),
            panic: Arc::clone(&panic),
        };
        builder.add(panic)?;
        Ok(builder)
    }

    fn add(&mut self, function: Arc<dyn PciFunction>) -> Result<Slot, WiringError> {
        let slot = Slot(self.next_slot);
        self.root.add(slot, function)?;
        self.next_slot = self.next_slot.saturating_add(1);
        Ok(slot)
    }

    /// Puts a virtio device into the next slot. `name` is unique in the machine.
    pub(super) fn add_virtio(
        &mut self,
        name: String,
        device: Arc<dyn VirtioDevice>,
    ) -> Result<Arc<VirtioPci>, WiringError> {
        let notifier = Arc::new(MsiNotifier::new(Arc::clone(&self.messages)));
        let memory = Arc::clone(self.ram.memory());
        let function = VirtioPci::new(name, device, memory, self.next_bar, notifier)?;
        self.next_bar = self.next_bar.saturating_add(BAR_LEN);
        let slot = self.add(function.clone())?;
        self.kicks.insert(slot.0, function.notifiers());
        Ok(function)
    }

    /// Freezes the bus and puts its registers on the machine's buses. Gives what a snapshot keeps of it.
    pub(super) fn insert(
        mut self,
        ports: &mut BusBuilder,
        mmio: &mut BusBuilder,
    ) -> Result<(Arc<PciRoot>, Arc<PvPanic>), WiringError> {
        let kicks =
            Arc::new(Kicks { hypervisor: Arc::clone(self.hypervisor), queues: self.kicks, places: Mutex::default() });
        self.root.listener(kicks.clone());
        let root = self.root.build();
        // One port only: 0xcf9 behind it is the reset register.
        ports.insert(CONFIG_ADDRESS_PORT, 1, root.config_address())?;
        ports.insert(CONFIG_DATA_PORT, 4, root.config_data())?;
        mmio.insert(layout::ECAM_START, ECAM_LEN, root.ecam())?;
        for (range, device) in root.windows() {
            let window = Window { base: range.address, device, kicks: Arc::clone(&kicks) };
            mmio.insert(range.address, range.size, Arc::new(window))?;
        }
        Ok((root, self.panic))
    }
}

/// A queue's doorbell in the address space.
struct Place {
    slot: u8,
    kick: Arc<EventFd>,
    registered: bool,
}

/// Where the doorbells of all queues lie now.
struct Kicks {
    hypervisor: Arc<dyn Hypervisor>,
    /// By slot: offset into BAR 0, eventfd.
    queues: BTreeMap<u8, Vec<(u64, Arc<EventFd>)>>,
    places: Mutex<BTreeMap<u64, Place>>,
}

impl Kicks {
    fn places(&self) -> MutexGuard<'_, BTreeMap<u64, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A store to `address` came by an exit: if it is a doorbell, the next one shall not.
    fn stored(&self, address: u64) {
        let mut places = self.places();
        let Some(place) = places.get_mut(&address).filter(|place| !place.registered) else { return };
        // Tried once: a kernel that cannot do it goes on with exits.
        place.registered = true;
        if let Err(err) = self.hypervisor.add_doorbell(address, &place.kick) {
            tracing::debug!(address, %err, "a doorbell stays an exit");
        }
    }

    fn forget(&self, slot: u8) {
        self.places().retain(|address, place| {
            if place.slot == slot && place.registered {
                if let Err(err) = self.hypervisor.remove_doorbell(*address, &place.kick) {
                    tracing::debug!(address, %err, "a doorbell was not registered");
                }
            }
            place.slot != slot
        });
    }
}

impl BarListener for Kicks {
    fn bar_moved(&self, slot: Slot, bar: usize, old: Option<BarRange>, new: Option<BarRange>) {
        if bar != 0 {
            return;
        }
        if old.is_some() {
            self.forget(slot.0);
        }
        let (Some(new), Some(queues)) = (new, self.queues.get(&slot.0)) else { return };
        let mut places = self.places();
        for (offset, kick) in queues {
            let place = Place { slot: slot.0, kick: Arc::clone(kick), registered: false };
            places.insert(new.address.saturating_add(*offset), place);
        }
    }
}

/// The BAR window with an eye on doorbells.
struct Window {
    base: u64,
    device: Arc<dyn BusDevice>,
    kicks: Arc<Kicks>,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.device.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.device.write(offset, data);
        self.kicks.stored(self.base.saturating_add(offset));
    }
}
