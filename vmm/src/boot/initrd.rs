//! The initial RAM disk: as high as the kernel can reach, so that it does not stand in the kernel's way.

use std::fs::File;
use std::io::{self, Seek};

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::memory::Ram;

const PAGE: u64 = 4096;

/// An initrd in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initrd {
    pub address: u64,
    pub size: u64,
}

/// Reads `file` to the highest page-aligned address below `limit`; nothing may lie below `kernel_end`.
pub(super) fn load(ram: &Ram, mut file: File, kernel_end: u64, limit: u64) -> Result<Initrd, BootError> {
    let failed = |source| BootError::Read { what: "initrd", source };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::from(io::ErrorKind::InvalidInput)));
    }
    let size = metadata.len();
    let no_fit = || BootError::InitrdFit { initrd: size, kernel: kernel_end, memory: ram.size() };
    let address = limit.checked_sub(size).ok_or_else(no_fit)? / PAGE * PAGE;
    if address < kernel_end {
        return Err(no_fit());
    }
    let length = usize::try_from(size).map_err(|_| no_fit())?;
    file.rewind().map_err(failed)?;
    ram.memory()
        .read_exact_volatile_from(GuestAddress(address), &mut file, length)
        .map_err(|err| failed(io::Error::other(err)))?;
    Ok(Initrd { address, size })
}
