//! qcow2, the format (QEMU's docs/interop/qcow2.txt), versions 2 and 3.
//!
//! [`read`](crate::layer::convert) takes a layer apart in one pass over its tables; [`Plan`] writes one front to back.
//! Nothing here ever opens a file that an image names, and no image is ever changed in place.

mod header;
mod inflate;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub(crate) use header::Header;
pub(crate) use read::convert;
pub use write::Plan;

/// "QFI\xfb".
const MAGIC: u32 = 0x5146_49fb;
/// An entry of an L1 or L2 table: bits 9–55, the host offset of an L2 table or a cluster.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The table or cluster has one user, so it may be written in place.
const COPIED: u64 = 1 << 63;
/// The L2 entry describes a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros (version 3, without extended L2 entries).
const ZERO: u64 = 1;
/// Subclusters in a cluster of an image with extended L2 entries.
const SUBCLUSTERS: u64 = 32;

fn be_u32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_be_bytes(*b))
}

fn be_u64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_be_bytes(*b))
}
