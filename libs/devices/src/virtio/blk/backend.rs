//! What a block device stands on.

use std::io;

use crate::virtio::Segment;
use crate::GuestMemory;

/// A disk. Called by several threads at once; requests that overlap have no order among them.
///
/// Offsets and lengths are whole sectors of 512 bytes inside the disk's size; the device has checked that. Segments lie
/// in guest memory, which the guest may change during the call.
pub trait BlockBackend: Send + Sync {
    /// Bytes, a multiple of 512. Grows at most.
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;

    /// Fills `into` from `offset`.
    ///
    /// # Errors
    /// What the guest is told as an I/O error and the log as it is.
    fn read(&self, offset: u64, mem: &GuestMemory, into: &[Segment]) -> io::Result<()>;

    /// Writes `from` at `offset`.
    ///
    /// # Errors
    /// As [`BlockBackend::read`].
    fn write(&self, offset: u64, mem: &GuestMemory, from: &[Segment]) -> io::Result<()>;

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// As [`BlockBackend::read`].
    fn flush(&self) -> io::Result<()>;

    /// Gives up the content of a range.
    ///
    /// # Errors
    /// As [`BlockBackend::read`].
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// As [`BlockBackend::read`].
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()>;
}
