//! The start info of the PVH protocol (Xen public header arch-x86/hvm/start_info.h).

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{GuestAddress, GuestMemoryError};

use super::initrd::Initrd;
use super::{memory_map, BootError};
use crate::layout;
use crate::memory::Ram;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const VERSION: u32 = 1;

pub(super) fn write_start_info(ram: &Ram, initrd: Option<Initrd>, rsdp: u64) -> Result<(), BootError> {
    let map: Vec<hvm_memmap_table_entry> = memory_map(ram)
        .into_iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.size,
            type_: range.kind as u32,
            reserved: 0,
        })
        .collect();
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let module =
        initrd.map(|initrd| hvm_modlist_entry { paddr: initrd.address, size: initrd.size, ..Default::default() });
    if module.is_some() {
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
    }
    let mut params = BootParams::new(&info, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
    if let Some(module) = module {
        params.set_modules(&[module], GuestAddress(layout::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, ram.memory().as_ref()).map_err(|_| BootError::Write {
        what: "PVH start info",
        source: GuestMemoryError::InvalidGuestAddress(GuestAddress(layout::PVH_START_INFO)),
    })
}
