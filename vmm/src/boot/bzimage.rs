//! bzImage: the Linux boot protocol (Documentation/arch/x86/boot.rst), 64-bit entry.

use std::fs::File;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::GuestAddress;

use super::{read_at, BootError};
use crate::layout;
use crate::memory::Ram;

/// Boot protocol 2.12 (Linux 3.8): the first with `xloadflags`.
const MIN_PROTOCOL: u16 = 0x020c;
/// `xloadflags`: the 64-bit entry point at 0x200 is there.
const XLF_KERNEL_64: u16 = 1;
/// Where the 64-bit entry lies behind the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
/// Offsets into the file (boot.rst, "The real-mode kernel header").
const OFFSET_SETUP_SECTORS: usize = 0x1f1;
const OFFSET_VERSION: usize = 0x206;

/// A bzImage in guest memory.
pub(super) struct Image {
    pub header: setup_header,
    pub entry: u64,
    /// First byte behind all that the kernel needs until it manages memory itself.
    pub end: u64,
    /// First byte that an initrd may not occupy.
    pub initrd_limit: u64,
}

pub(super) fn load(ram: &Ram, kernel: &mut File, cmdline_length: usize) -> Result<Image, BootError> {
    check_fit(ram, kernel)?;
    let loaded = BzImage::load(
        ram.memory().as_ref(),
        Some(GuestAddress(layout::HIGH_MEMORY)),
        kernel,
        Some(GuestAddress(layout::HIGH_MEMORY)),
    )
    .map_err(BootError::Load)?;
    let header = loaded.setup_header.ok_or(BootError::NotAKernel)?;
    let (version, flags) = (header.version, header.xloadflags);
    if version < MIN_PROTOCOL || flags & XLF_KERNEL_64 == 0 {
        return Err(BootError::Protocol { version });
    }
    let max = header.cmdline_size as usize;
    if cmdline_length > max {
        return Err(BootError::CmdlineLength { length: cmdline_length, max });
    }
    // The kernel unpacks itself to its preferred address, or where it lies if that is higher.
    let run_start = header.pref_address.max(layout::HIGH_MEMORY);
    let end = run_start.saturating_add(u64::from(header.init_size)).max(loaded.kernel_end);
    if end > ram.low_end() {
        return Err(BootError::KernelFit { needed: end, memory: ram.size() });
    }
    let initrd_limit = u64::from(header.initrd_addr_max).saturating_add(1).min(ram.low_end());
    Ok(Image { header, entry: layout::HIGH_MEMORY + ENTRY_64, end, initrd_limit })
}

/// Says in our words what the loader would only call a failed read: the file is larger than the memory.
fn check_fit(ram: &Ram, kernel: &File) -> Result<(), BootError> {
    let size = kernel.metadata().map_err(|source| BootError::Read { what: "kernel", source })?.len();
    let mut head = [0u8; OFFSET_VERSION + 2];
    read_at(kernel, &mut head, 0)?;
    let sectors = head.get(OFFSET_SETUP_SECTORS).map_or(0, |count| u64::from(*count).max(1));
    let needed = layout::HIGH_MEMORY.saturating_add(size.saturating_sub((sectors + 1) * 512));
    if needed > ram.low_end() {
        return Err(BootError::KernelFit { needed, memory: ram.size() });
    }
    Ok(())
}
