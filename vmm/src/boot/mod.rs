//! From a kernel file to a guest whose first processor can run: what is loaded where, and what the kernel is told.
//!
//! ```text
//!   kernel ──identify──> bzImage ──> 1 MiB, zero page        ──> Entry::Linux64
//!                    └─> ELF ──PVH note──> start info         ──> Entry::Pvh
//!                          └─────────────> zero page          ──> Entry::Linux64
//!   initrd ──> as high below 4 GiB as the kernel can reach
//! ```
//!
//! Kernel and initrd come from an image and are hostile: every size and address in them is checked against the
//! machine's memory before it is used, and nothing is allocated by what they claim.

mod bzimage;
mod elf;
mod initrd;
mod map;
mod params;
mod pvh;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout;
use crate::memory::Ram;
pub use map::{memory_map, MemoryRange, RangeKind};

/// Where the first processor begins, and in which mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging; EBX points to `hvm_start_info` at [`layout::PVH_START_INFO`].
    Pvh(
        /// Physical address.
        u32,
    ),
    /// 64-bit mode with the first GiB mapped one to one; RSI points to `boot_params` at [`layout::ZERO_PAGE`].
    Linux64(
        /// Physical address.
        u64,
    ),
}

/// Why a kernel cannot be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// Wrong magic numbers.
    #[error("the kernel is neither a bzImage nor an ELF file for x86-64")]
    NotAKernel,
    /// A bzImage without 64-bit entry.
    #[error("the kernel speaks boot protocol {}.{:02} without a 64-bit entry: an x86-64 kernel from Linux 3.8 on has one", version >> 8, version & 0xff)]
    Protocol {
        /// The version in its header.
        version: u16,
    },
    /// The kernel's program headers are nonsense.
    #[error("the kernel's ELF headers are damaged: {0}")]
    DamagedElf(&'static str),
    /// A segment below 1 MiB.
    #[error("the kernel wants to lie at {0:#x}, below 1 MiB, where the machine's tables are")]
    LowSegment(u64),
    /// Not enough memory for the kernel.
    #[error("the kernel needs {} MiB of memory, the machine has {} MiB: raise --memory", mebibytes(*.needed), memory >> 20)]
    KernelFit {
        /// Bytes from address 0 to the kernel's end.
        needed: u64,
        /// The machine's memory in bytes.
        memory: u64,
    },
    /// Not enough memory for the initrd.
    #[error("the initrd ({} MiB) does not fit behind the kernel (to {} MiB) into {} MiB of memory: raise --memory", mebibytes(*.initrd), mebibytes(*.kernel), memory >> 20)]
    InitrdFit {
        /// Size of the initrd in bytes.
        initrd: u64,
        /// End of the kernel in bytes.
        kernel: u64,
        /// The machine's memory in bytes.
        memory: u64,
    },
    /// Longer than this kernel takes.
    #[error("the kernel command line has {length} bytes, this kernel takes {max}")]
    CmdlineLength {
        /// Bytes without the final zero.
        length: usize,
        /// What the kernel's header says.
        max: usize,
    },
    /// The loader refuses.
    #[error("the kernel cannot be loaded")]
    Load(#[source] linux_loader::loader::Error),
    /// A file cannot be read.
    #[error("the {what} cannot be read")]
    Read {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Guest memory cannot be written.
    #[error("the {what} cannot be written to guest memory")]
    Write {
        /// What was written.
        what: &'static str,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
}

/// Bytes in MiB, rounded up.
fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// What is booted.
#[derive(Debug)]
pub struct Payload {
    /// bzImage or ELF.
    pub kernel: File,
    /// Initial RAM disk.
    pub initrd: Option<File>,
    /// Kernel command line.
    pub cmdline: String,
}

/// Loads `payload` into `ram` and writes what its kernel wants to be told, with the ACPI root pointer at `rsdp`.
///
/// # Errors
/// [`BootError`].
pub fn load(ram: &Ram, payload: Payload, rsdp: u64) -> Result<Entry, BootError> {
    let Payload { mut kernel, initrd, cmdline } = payload;
    let mut head = [0u8; 0x206];
    read_at(&kernel, &mut head, 0)?;
    write(ram, "command line", layout::CMDLINE, cmdline.as_bytes())?;
    write(ram, "command line", layout::CMDLINE.saturating_add(cmdline.len() as u64), &[0])?;
    if head.get(0x202..0x206) == Some(b"HdrS") {
        let image = bzimage::load(ram, &mut kernel, cmdline.len())?;
        let initrd = initrd.map(|file| initrd::load(ram, file, image.end, image.initrd_limit)).transpose()?;
        params::write_zero_page(ram, image.header, initrd, rsdp, cmdline.len())?;
        return Ok(Entry::Linux64(image.entry));
    }
    if head.starts_with(b"\x7fELF") {
        let image = elf::load(ram, &mut kernel)?;
        let initrd = initrd.map(|file| initrd::load(ram, file, image.end, ram.low_end())).transpose()?;
        return match image.pvh_entry {
            Some(entry) => {
                pvh::write_start_info(ram, initrd, rsdp)?;
                Ok(Entry::Pvh(entry))
            }
            None => {
                params::write_zero_page(ram, params::header_for_elf(), initrd, rsdp, cmdline.len())?;
                Ok(Entry::Linux64(image.entry))
            }
        };
    }
    Err(BootError::NotAKernel)
}

/// Fills as much of `buffer` as the kernel file has; the rest stays zero.
fn read_at(kernel: &File, buffer: &mut [u8], offset: u64) -> Result<(), BootError> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match kernel.read_at(rest, offset.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(count) => done = done.saturating_add(count),
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(BootError::Read { what: "kernel", source }),
        }
    }
    Ok(())
}

fn write(ram: &Ram, what: &'static str, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    ram.memory().write_slice(bytes, GuestAddress(address)).map_err(|source| BootError::Write { what, source })
}

#[cfg(test)]
mod tests;
