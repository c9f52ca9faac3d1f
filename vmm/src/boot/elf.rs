//! ELF kernels: vmlinux, unikernels, the bare-metal test guests.

use std::fs::File;

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::KernelLoader;

use super::{read_at, BootError};
use crate::layout;
use crate::memory::Ram;

/// Length of an ELF64 file header.
const HEADER_BYTES: usize = 64;
/// Length of an ELF64 program header.
const PROGRAM_HEADER_BYTES: usize = 56;
/// More program headers than any kernel has (vmlinux: 5).
const MAX_PROGRAM_HEADERS: u16 = 64;
const CLASS_64: u8 = 2;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;

/// An ELF kernel in guest memory.
pub(super) struct Image {
    pub entry: u64,
    /// The entry of the PVH protocol, if the kernel has its note.
    pub pvh_entry: Option<u32>,
    /// First byte behind its segments.
    pub end: u64,
}

pub(super) fn load(ram: &Ram, kernel: &mut File) -> Result<Image, BootError> {
    let end = check_segments(ram, kernel)?;
    let loaded = Elf::load(ram.memory().as_ref(), None, kernel, None).map_err(BootError::Load)?;
    let pvh_entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => u32::try_from(address.0).ok(),
        _ => None,
    };
    let entry = loaded.kernel_load.0;
    let begins_inside = |address: u64| (layout::HIGH_MEMORY..end).contains(&address);
    if !begins_inside(pvh_entry.map_or(entry, u64::from)) {
        return Err(BootError::DamagedElf("the entry point lies outside of its segments"));
    }
    Ok(Image { entry, pvh_entry, end })
}

/// Checks that every segment fits the memory before the loader touches any; returns the end of the last one.
fn check_segments(ram: &Ram, kernel: &File) -> Result<u64, BootError> {
    let mut header = [0u8; HEADER_BYTES];
    read_at(kernel, &mut header, 0)?;
    if header.get(4) != Some(&CLASS_64) || u16_at(&header, 18) != MACHINE_X86_64 {
        return Err(BootError::NotAKernel);
    }
    let (table, size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(size) != PROGRAM_HEADER_BYTES || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(BootError::DamagedElf("the number or size of its program headers"));
    }
    let mut end = 0;
    for index in 0..u64::from(count) {
        let mut segment = [0u8; PROGRAM_HEADER_BYTES];
        let offset = table.saturating_add(index * PROGRAM_HEADER_BYTES as u64);
        read_at(kernel, &mut segment, offset)?;
        if u32_at(&segment, 0) != PT_LOAD {
            continue;
        }
        let (address, in_file, in_memory) = (u64_at(&segment, 24), u64_at(&segment, 32), u64_at(&segment, 40));
        if in_memory == 0 && in_file == 0 {
            continue;
        }
        if address < layout::HIGH_MEMORY {
            return Err(BootError::LowSegment(address));
        }
        if in_file > in_memory {
            return Err(BootError::DamagedElf("a segment is larger in the file than in memory"));
        }
        let needed = address.saturating_add(in_memory);
        if needed > ram.low_end() {
            return Err(BootError::KernelFit { needed, memory: ram.size() });
        }
        end = needed.max(end);
    }
    if end == 0 {
        return Err(BootError::DamagedElf("no segment is to be loaded"));
    }
    Ok(end)
}

fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, offset))
}
