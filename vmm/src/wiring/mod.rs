//! The devices of a machine and the buses they are on.

mod hypervisor;
pub mod irq;
mod legacy;
pub mod parts;
mod pci;
mod virtio;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use ovms_config::vm::VmSpec;
use ovms_devices::bus::{Bus, BusBuilder, BusError};
use ovms_devices::console::{ByteSink, InputQueue, NullSink, Reader, Writer};
use ovms_devices::irq::MsiSink;
use ovms_devices::legacy::{pm, Ioapic, Pm, Serial, VmGenId};
use ovms_devices::machine::EventSink;
use ovms_devices::pci::PciError;
use ovms_devices::threads::Spawner;
use ovms_devices::virtio::balloon::Balloon;
use ovms_devices::virtio::console::Console;
use ovms_devices::virtio::pci::{TransportError, VirtioPci};
use ovms_disk::{NextTop, Stack, TopFiles};
use ovms_state::{Section, StateError};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::fds::{FdError, Fds};
use crate::layout;
use crate::memory::Ram;
use crate::saved::Saved;
use parts::{PartError, Parts, Sections};

pub use hypervisor::Hypervisor;
pub use virtio::InputOwner;

/// Why the devices cannot be made.
#[derive(Debug, Error)]
pub enum WiringError {
    /// A descriptor is missing.
    #[error("the configuration and its descriptors do not fit")]
    Fd(#[from] FdError),
    /// Two devices at one address.
    #[error("the devices cannot be put on their bus")]
    Bus(#[from] BusError),
    /// The IOAPIC has no room for another wire.
    #[error("interrupt pin {0} has no room for another device")]
    Pin(usize),
    /// A slot is taken, or there are too many functions.
    #[error("the devices cannot be put on the PCI bus")]
    Pci(#[from] PciError),
    /// A virtio device has no place.
    #[error("a virtio device cannot be put on the PCI bus")]
    Transport(#[from] TransportError),
    /// A register block is not aligned.
    #[error("the registers of {0} have no place")]
    Bar(&'static str),
    /// A disk's files are damaged or do not fit together.
    #[error("disk {0} cannot be opened")]
    Disk(usize, #[source] ovms_disk::Error),
    /// No thread, no eventfd.
    #[error("the {0} cannot be started")]
    Start(&'static str, #[source] io::Error),
    /// Guest memory cannot be written.
    #[error("the VM generation id cannot be written to guest memory")]
    GenerationId(#[source] GuestMemoryError),
}

/// Why a disk cannot be frozen.
#[derive(Debug, Error)]
pub enum FreezeError {
    /// There is no such disk.
    #[error("the machine has no disk {0}")]
    NoDisk(u32),
    /// The command came without the new top.
    #[error("data and map of the new top must come with the command")]
    NoTop,
    /// The command came with more than that.
    #[error("more new tops came with the command than the machine has disks to write to")]
    TooManyTops,
    /// The stack refuses.
    #[error("the disk's top cannot be frozen")]
    Stack(#[from] ovms_disk::Error),
}

/// What the devices need of the rest of the machine.
pub struct Environment<'a> {
    /// Takes interrupts and doorbells.
    pub hypervisor: &'a Arc<dyn Hypervisor>,
    /// The machine's memory.
    pub ram: &'a Ram,
    /// What the machine is made of.
    pub spec: &'a VmSpec,
    /// Starts device threads.
    pub spawner: &'a Spawner,
    /// What the devices are to be restored from afterwards.
    pub saved: Option<&'a Saved>,
    /// Is told what the guest does to its machine.
    pub events: EventSink,
}

/// All devices of a machine.
pub struct Devices {
    /// Devices on I/O ports.
    pub ports: Bus,
    /// Devices in the address space.
    pub mmio: Bus,
    /// The interrupt controller.
    pub ioapic: Arc<Ioapic>,
    /// Power button and S5.
    pub pm: Arc<Pm>,
    /// COM1.
    pub serial: Arc<Serial>,
    /// COM1's output.
    pub console: Arc<dyn ByteSink>,
    /// The VM generation id.
    pub generation_id: Arc<VmGenId>,
    /// The virtio console.
    pub virtio_console: Arc<Console>,
    /// Takes memory back from the guest.
    pub balloon: Arc<Balloon>,
    /// The machine's disks in order.
    pub disks: Vec<Arc<Stack>>,
    /// The console that reads the host's input.
    pub input_owner: InputOwner,
    /// The generation id of a machine that begins here.
    drawn: [u8; 16],
    parts: Parts,
    functions: Vec<Arc<VirtioPci>>,
    writer: Option<Arc<Writer>>,
    input: Arc<InputQueue>,
    _reader: Option<Reader>,
}

impl Devices {
    /// Makes every device of the machine and puts it on its bus.
    ///
    /// # Errors
    /// [`WiringError`].
    pub fn new(environment: &Environment<'_>, fds: &mut Fds) -> Result<Self, WiringError> {
        let Environment { hypervisor, ram, spec, spawner, saved, events } = environment;
        let messages: Arc<dyn MsiSink> = Arc::new(irq::Messages::new(Arc::clone(hypervisor)));
        let ioapic = Ioapic::new(Arc::clone(&messages), Some(Arc::new(irq::Routes::new(Arc::clone(hypervisor)))));
        let ends = &spec.config().console;
        let writer = fds
            .take_optional(ends.output)?
            .map(|fd| Writer::spawn(fd, spawner).map(Arc::new))
            .transpose()
            .map_err(|err| WiringError::Start("console's output", err))?;
        let console: Arc<dyn ByteSink> = match &writer {
            Some(writer) => Arc::clone(writer) as _,
            None => Arc::new(NullSink),
        };
        let input_owner = saved.map_or_else(|| InputOwner::of(spec.cmdline()), Saved::input);
        let input = Arc::new(InputQueue::new());
        if saved.is_some() {
            // What comes from the host now comes after what was there when the machine was saved.
            input.hold();
        }
        let reader = fds
            .take_optional(ends.input)?
            .map(|fd| Reader::spawn(fd, Arc::clone(&input), spawner))
            .transpose()
            .map_err(|err| WiringError::Start("console's input", err))?;
        let mut ports = BusBuilder::new();
        let mut mmio = BusBuilder::new();
        // Two consoles, one host: both write to it, one reads.
        let idle = Arc::new(InputQueue::new());
        let (serial_input, virtio_input) = match input_owner {
            InputOwner::Serial => (Arc::clone(&input), idle),
            InputOwner::Virtio => (idle, Arc::clone(&input)),
        };
        let legacy = legacy::Legacy::insert(&mut ports, &mut mmio, ram, &ioapic, events, &console, &serial_input)?;
        let mut pci = pci::PciBuilder::new(hypervisor, ram, messages, events)?;
        let ends = (virtio_input, Arc::clone(&console));
        let virtio = virtio::Virtio::new(&mut pci, spec.config(), fds, ends, Arc::new(Ram::clone(ram)), spawner)?;
        let bus = pci.insert(&mut ports, &mut mmio)?;
        let drawn = random_guid();
        let generation_id = Arc::new(VmGenId::new(layout::VMGENID_PAGE, drawn));
        ram.memory()
            .write_slice(&generation_id.guid(), GuestAddress(generation_id.address()))
            .map_err(WiringError::GenerationId)?;
        let parts = Parts::new(&virtio.functions, bus, &legacy, &generation_id, &ioapic);
        Ok(Self {
            drawn,
            parts,
            ports: ports.build(),
            mmio: mmio.build(),
            ioapic,
            pm: legacy.pm,
            serial: legacy.serial,
            console,
            generation_id,
            virtio_console: virtio.console,
            balloon: virtio.balloon,
            disks: virtio.disks,
            functions: virtio.functions,
            writer,
            input,
            input_owner,
            _reader: reader,
        })
    }

    /// Begins to stop what devices do by themselves, and waits until `until` for it; whether they stand.
    pub fn hold(&self, until: Instant) -> bool {
        self.input.hold();
        // Every one is asked, whichever keeps the others waiting.
        self.functions.iter().filter(|function| !function.hold(until)).count() == 0
    }

    /// Ends a [`Devices::hold`].
    pub fn resume(&self) {
        for function in &self.functions {
            function.resume();
        }
        self.input.release();
    }

    /// Kinds of the sections that [`Devices::save`] gives.
    pub fn kinds(&self) -> impl Iterator<Item = &str> {
        self.parts.kinds()
    }

    /// Saves every device. They must be paused.
    ///
    /// # Errors
    /// [`StateError`] of the first device that cannot be saved.
    pub fn save(&self) -> Result<Vec<Section>, StateError> {
        self.parts.save()
    }

    /// Gives every device its saved state. They stay paused until [`Devices::resume`]. `sections` are hostile.
    ///
    /// # Errors
    /// [`PartError`] of the first device that refuses; the machine must not run then.
    pub fn restore(&self, sections: &mut Sections<'_>) -> Result<(), PartError> {
        self.parts.restore(sections)
    }

    /// Gives a machine that was cloned or went back in time the generation id that was drawn when it was built, and tells
    /// its guest.
    ///
    /// # Errors
    /// The page of the identifier is not in guest memory.
    pub fn bump_generation(&self, ram: &Ram) -> Result<(), GuestMemoryError> {
        self.generation_id.regenerate(self.drawn);
        ram.memory().write_slice(&self.drawn, GuestAddress(self.generation_id.address()))?;
        self.pm.raise_gpe(pm::GPE_VMGENID);
        Ok(())
    }

    /// Disk `index` and its new top, whose data and map are `fds`, for [`Stack::freeze`].
    ///
    /// # Errors
    /// [`FreezeError`].
    pub fn disk_to_freeze(&self, index: u32, fds: Vec<OwnedFd>) -> Result<(Arc<Stack>, TopFiles), FreezeError> {
        let disk = self.disks.get(index as usize).ok_or(FreezeError::NoDisk(index))?;
        let top = virtio::new_top(fds).ok_or(FreezeError::NoTop)?;
        Ok((Arc::clone(disk), top))
    }

    /// Opens new tops for all disks that the guest may write, in order; `fds` are data and map of each. To be stacked by
    /// [`Stack::push`].
    ///
    /// # Errors
    /// [`FreezeError`].
    pub fn next_tops(&self, fds: Vec<OwnedFd>) -> Result<Vec<(Arc<Stack>, NextTop)>, FreezeError> {
        let mut fds = fds.into_iter();
        let writable = self.disks.iter().filter(|disk| !disk.is_read_only());
        let tops = writable
            .map(|disk| {
                let top = virtio::new_top(fds.by_ref().take(2).collect()).ok_or(FreezeError::NoTop)?;
                Ok((Arc::clone(disk), disk.next_top(top)?))
            })
            .collect::<Result<_, FreezeError>>()?;
        match fds.next() {
            None => Ok(tops),
            Some(_) => Err(FreezeError::TooManyTops),
        }
    }

    /// The guest is gone: writes out what it has said, at the latest until `deadline`.
    pub fn finish(&self, deadline: Instant) {
        if let Some(writer) = &self.writer {
            let lost = writer.flush_and_close(deadline);
            if lost > 0 {
                tracing::warn!(lost, "bytes of console output were not written");
            }
        }
    }
}

/// 16 random bytes as RFC 4122 version 4.
fn random_guid() -> [u8; 16] {
    let mut guid = [0u8; 16];
    // SAFETY: `guid` has room for the bytes asked for. 16 bytes come whole or not at all once the pool is seeded
    // (getrandom(2)); a host that is that young gives zeroes, which are a valid identifier too.
    unsafe { libc::getrandom(guid.as_mut_ptr().cast(), guid.len(), libc::GRND_NONBLOCK) };
    let [.., g6, _, g8, _, _, _, _, _, _, _] = &mut guid;
    *g6 = (*g6 & 0x0f) | 0x40;
    *g8 = (*g8 & 0x3f) | 0x80;
    guid
}
