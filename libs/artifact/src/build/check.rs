//! A first look at the files that go into an image, so that what cannot boot is refused when it is built.
//!
//! These are peeks at headers, not parsers: the kernel loader and the disk library judge again when they run.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::BuildError;
use crate::layer;
use crate::manifest::DiskFormat;
use crate::media::QCOW2_MAGIC;

/// Offset of the boot sector's signature 0xAA55 (Linux, Documentation/arch/x86/boot.rst).
const BOOT_FLAG: usize = 0x1fe;
/// Offset of the boot protocol's magic "HdrS" (the same).
const HDRS: usize = 0x202;
/// Offset of the ELF header's `e_machine` (ELF-64 object file format).
const ELF_MACHINE: usize = 18;
/// `e_machine` of x86-64.
const EM_X86_64: [u8; 2] = [62, 0];
/// Offset of the magic "ARMd" of an arm64 Image (Linux, Documentation/arch/arm64/booting.rst).
const ARM64_MAGIC: usize = 56;
/// Incompatible feature bit 2 of qcow2: the data is in another file (QEMU, docs/interop/qcow2.txt).
const QCOW2_EXTERNAL_DATA: u64 = 1 << 2;

/// Refuses a file that is neither a bzImage nor an x86-64 ELF file.
pub(super) fn kernel(path: &Path) -> Result<(), BuildError> {
    let head = head(path).map_err(|source| BuildError::Read { path: path.to_owned(), source })?;
    let at = |offset: usize, wanted: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(wanted));
    let problem = if at(BOOT_FLAG, &[0x55, 0xaa]) && at(HDRS, b"HdrS") {
        return Ok(());
    } else if at(0, b"\x7fELF") {
        if at(4, &[2, 1]) && at(ELF_MACHINE, &EM_X86_64) {
            return Ok(());
        }
        "it is an ELF file, but not for 64-bit x86"
    } else if at(ARM64_MAGIC, b"ARMd") {
        "it is a kernel for arm64"
    } else if at(0, &[0x1f, 0x8b]) {
        "it is compressed by gzip: unpack it first"
    } else {
        "it is neither a bzImage nor an ELF file"
    };
    Err(BuildError::Kernel { path: path.to_owned(), problem })
}

/// Refuses a disk file that is not of the format it is said to be, or that leans on another file.
pub(super) fn disk(path: &Path, format: DiskFormat) -> Result<(), BuildError> {
    let head = head(path).map_err(|source| BuildError::Read { path: path.to_owned(), source })?;
    let refused = |problem: String| Err(BuildError::Disk { path: path.to_owned(), problem });
    let is_qcow2 = head.starts_with(QCOW2_MAGIC);
    match format {
        DiskFormat::Ovfms => refused("the format ovfms is not supported, use qcow2 or raw".to_owned()),
        DiskFormat::Raw if is_qcow2 => refused("it is given as raw, but it is a qcow2 file".to_owned()),
        DiskFormat::Raw if head.is_empty() => refused("it is empty".to_owned()),
        DiskFormat::Raw => Ok(()),
        DiskFormat::Qcow2 if !is_qcow2 => refused("it is given as qcow2, but it is no qcow2 file".to_owned()),
        DiskFormat::Qcow2 => qcow2(&head).map_or(Ok(()), refused),
    }
}

/// Refuses a disk file that nobody would take for a disk if a layer's blob were nothing else.
pub(super) fn bare(path: &Path, format: DiskFormat) -> Result<(), BuildError> {
    let read = |source| BuildError::Read { path: path.to_owned(), source };
    if layer::can_be_bare(File::open(path).map_err(read)?, format).map_err(read)? {
        return Ok(());
    }
    let problem =
        "it begins like a tar archive, and as a bare layer would be taken for one: build it without --raw-layers";
    Err(BuildError::Disk { path: path.to_owned(), problem: problem.to_owned() })
}

/// What a qcow2 header says that an image's disk must not; offsets from QEMU, docs/interop/qcow2.txt.
fn qcow2(head: &[u8]) -> Option<String> {
    let u32_at = |at: usize| head.get(at..)?.first_chunk().copied().map(u32::from_be_bytes);
    let u64_at = |at: usize| head.get(at..)?.first_chunk().copied().map(u64::from_be_bytes);
    let version = u32_at(4).unwrap_or_default();
    if !matches!(version, 2 | 3) {
        return Some(format!("its qcow2 version is {version}, 2 and 3 are supported"));
    }
    if u64_at(8)? != 0 && u32_at(16)? != 0 {
        return Some(
            "it names a backing file; layers are stacked in the order they are given, so clear the name: \
             qemu-img rebase -u -b \"\" FILE"
                .to_owned(),
        );
    }
    if u32_at(32)? != 0 {
        return Some("it is encrypted, which is not supported".to_owned());
    }
    if version == 3 && u64_at(72)? & QCOW2_EXTERNAL_DATA != 0 {
        return Some("its data is in another file: qemu-img convert makes it one file".to_owned());
    }
    None
}

fn head(path: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    File::open(path)?.take(4096).read_to_end(&mut head)?;
    Ok(head)
}
