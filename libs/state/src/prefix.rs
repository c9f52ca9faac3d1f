//! The first 64 bytes of a RAM snapshot: enough to find the head, and to know a file that is cut short.
//!
//! ```text
//!   0  8  magic "OVMSRAM\0"        16  8  offset of the head      40 16  checksum of the head (XXH3-128)
//!   8  4  format epoch             24  8  length of the head      56  8  checksum of bytes 0 to 55 (XXH3-64)
//!  12  4  architecture             32  8  length of the file
//! ```
//! All numbers are little-endian.

use std::{fs::File, os::unix::fs::FileExt};

use twox_hash::{XxHash3_128, XxHash3_64};

use crate::{head::Arch, Result, SnapshotError};

/// The format epoch that this build writes and the only one that it reads.
pub const EPOCH: u32 = 1;

/// Length of the prefix in bytes.
pub(crate) const PREFIX: u64 = 64;
const MAGIC: [u8; 8] = *b"OVMSRAM\0";
/// Bytes that the prefix's own checksum covers.
const COVERED: usize = 56;

/// The largest head in bytes: CPUID of a large host and [`crate::MAX_SECTIONS`] sections take a few hundred KiB.
pub(crate) const MAX_HEAD: u64 = 2 << 20;

/// Checksum of anything longer than the prefix, as it stands in the file.
pub(crate) fn digest(bytes: &[u8]) -> [u8; 16] {
    XxHash3_128::oneshot(bytes).to_le_bytes()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Prefix {
    pub arch: Arch,
    pub head_offset: u64,
    pub head_length: u64,
    pub file_length: u64,
    pub head_digest: [u8; 16],
}

impl Prefix {
    pub fn encode(&self) -> [u8; PREFIX as usize] {
        let mut bytes = Vec::with_capacity(PREFIX as usize);
        bytes.extend(MAGIC);
        bytes.extend(EPOCH.to_le_bytes());
        bytes.extend(self.arch.number().to_le_bytes());
        bytes.extend(self.head_offset.to_le_bytes());
        bytes.extend(self.head_length.to_le_bytes());
        bytes.extend(self.file_length.to_le_bytes());
        bytes.extend(self.head_digest);
        bytes.extend(XxHash3_64::oneshot(&bytes).to_le_bytes());
        let mut out = [0; PREFIX as usize];
        out.copy_from_slice(&bytes);
        out
    }

    /// Reads the prefix of a file and checks it against the file's length.
    pub fn read(file: &File) -> Result<Self> {
        let length = file.metadata().map_err(SnapshotError::io("read the RAM snapshot's length"))?.len();
        let mut bytes = [0; PREFIX as usize];
        let have = usize::try_from(length.min(PREFIX)).unwrap_or_default();
        let part = bytes.get_mut(..have).unwrap_or_default();
        file.read_exact_at(part, 0).map_err(SnapshotError::io("read the RAM snapshot's prefix"))?;
        let prefix = Self::decode(&bytes)?;
        if prefix.file_length != length {
            let expected = prefix.file_length;
            return Err(SnapshotError::damaged(format!("it has {length} bytes, its prefix says {expected}")));
        }
        Ok(prefix)
    }

    fn decode(bytes: &[u8; PREFIX as usize]) -> Result<Self> {
        let mut rest = Fields(bytes);
        if rest.take::<8>() != MAGIC {
            return Err(SnapshotError::NotOne);
        }
        let sum = XxHash3_64::oneshot(bytes.get(..COVERED).unwrap_or_default());
        let epoch = rest.u32();
        if bytes.get(COVERED..) != Some(&sum.to_le_bytes()[..]) {
            return Err(SnapshotError::Checksum("the prefix".into()));
        }
        if epoch != EPOCH {
            return Err(SnapshotError::Epoch(epoch));
        }
        let arch = rest.u32();
        let arch = Arch::from_number(arch)
            .ok_or_else(|| SnapshotError::damaged(format!("its architecture {arch} is not known")))?;
        let prefix = Self {
            arch,
            head_offset: rest.u64(),
            head_length: rest.u64(),
            file_length: rest.u64(),
            head_digest: rest.take(),
        };
        if prefix.head_length > MAX_HEAD {
            return Err(SnapshotError::TooLarge { what: "head", bytes: prefix.head_length, limit: MAX_HEAD });
        }
        let end = prefix.head_offset.checked_add(prefix.head_length);
        if prefix.head_offset < PREFIX || end != Some(prefix.file_length) {
            return Err(SnapshotError::damaged("its head is not the end of the file"));
        }
        Ok(prefix)
    }
}

/// Little-endian fields one after the other; what lies behind the end reads as 0.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    pub fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}
