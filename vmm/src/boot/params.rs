//! The zero page: what the Linux boot protocol tells a kernel (Documentation/arch/x86/zero-page.rst).

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{GuestAddress, GuestMemoryError};

use super::initrd::Initrd;
use super::{memory_map, BootError};
use crate::layout;
use crate::memory::Ram;

/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// An ELF kernel brings no header: what the kernel reads of one.
const ELF_ALIGNMENT: u32 = 0x0100_0000;

/// The header for a kernel that came without one.
pub(super) fn header_for_elf() -> setup_header {
    setup_header { boot_flag: BOOT_FLAG, header: HEADER_MAGIC, kernel_alignment: ELF_ALIGNMENT, ..Default::default() }
}

pub(super) fn write_zero_page(
    ram: &Ram,
    mut header: setup_header,
    initrd: Option<Initrd>,
    rsdp: u64,
    cmdline_length: usize,
) -> Result<(), BootError> {
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = layout::CMDLINE as u32;
    header.cmdline_size = cmdline_length as u32;
    if let Some(initrd) = initrd {
        // Both lie below 4 GiB: the initrd ends below `low_end`.
        header.ramdisk_image = initrd.address as u32;
        header.ramdisk_size = initrd.size as u32;
    }
    let mut page = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    let map = memory_map(ram);
    page.e820_entries = map.len() as u8;
    let mut table = page.e820_table;
    for (entry, range) in table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: range.start, size: range.size, r#type: range.kind as u32 };
    }
    page.e820_table = table;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&page, GuestAddress(layout::ZERO_PAGE)),
        ram.memory().as_ref(),
    )
    .map_err(|_| BootError::Write {
        what: "zero page",
        source: GuestMemoryError::InvalidGuestAddress(GuestAddress(layout::ZERO_PAGE)),
    })
}
