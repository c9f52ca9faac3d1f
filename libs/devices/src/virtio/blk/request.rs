//! One block request (virtio 1.2, 5.2.6): parse, check, execute, answer with a status byte.

use std::io;

use super::BlockBackend;
use crate::virtio::queue::{copy_from, copy_to, slice, total, QueueError, Request};
use crate::GuestMemory;

/// Bytes of a sector, the unit of every number in a request.
pub(super) const SECTOR: u64 = 512;
/// The largest segment and the number of segments that a driver is told to use; more is tolerated up to
/// [`MAX_REQUEST_BYTES`].
pub(super) const SIZE_MAX: u32 = 128 << 10;
pub(super) const SEG_MAX: u32 = 254;
/// Bytes that one request may move: `SIZE_MAX * SEG_MAX`, rounded up. It bounds how long a pause waits.
pub const MAX_REQUEST_BYTES: u64 = 32 << 20;
/// Sectors that one segment of a discard or write-zeroes request may name: 1 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Segments of such a request.
pub(super) const MAX_RANGES: u32 = 16;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

const STATUS_OK: u8 = 0;
const STATUS_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: usize = 16;
/// Length of the serial number; a shorter one is padded with zeroes.
pub(super) const ID_BYTES: usize = 20;

const RANGE_UNMAP: u32 = 1;

/// Why a request is answered with an error.
#[derive(Debug)]
pub(super) enum Failure {
    /// It asks for something that does not exist here.
    Unsupported,
    /// It breaks a rule: range, alignment, size, a write to a read-only disk.
    Invalid,
    /// The backend could not do it.
    Backend(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Backend(error)
    }
}

/// What requests are executed against.
pub(super) struct Executor<'a> {
    pub(super) backend: &'a dyn BlockBackend,
    pub(super) id: &'a [u8; ID_BYTES],
    /// The driver cannot flush, so every write must be durable when it completes (5.2.6.2).
    pub(super) write_through: bool,
}

impl Executor<'_> {
    /// Executes a request and writes its status. Returns how many bytes were written, and what failed.
    pub(super) fn execute(&self, mem: &GuestMemory, request: &Request) -> Result<(u32, Option<Failure>), QueueError> {
        let room = total(&request.writable);
        let data_room = room.checked_sub(1).ok_or(QueueError::NoRoom("virtio-blk"))?;
        let (status, written, failure) = match self.data(mem, request, data_room) {
            Ok(written) => (STATUS_OK, written, None),
            Err(Failure::Unsupported) => (STATUS_UNSUPPORTED, 0, Some(Failure::Unsupported)),
            Err(failure) => (STATUS_ERROR, 0, Some(failure)),
        };
        copy_to(mem, &request.writable, data_room, &[status]);
        Ok((u32::try_from(written.saturating_add(1)).unwrap_or(u32::MAX), failure))
    }

    /// Moves the data; returns how many bytes went into guest memory.
    fn data(&self, mem: &GuestMemory, request: &Request, room: u64) -> Result<u64, Failure> {
        let mut header = [0; HEADER_BYTES as usize];
        if copy_from(mem, &request.readable, 0, &mut header) < header.len() {
            return Err(Failure::Invalid);
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let given = total(&request.readable).saturating_sub(HEADER_BYTES);
        match u32::from_le_bytes([a, b, c, d]) {
            TYPE_IN => {
                let offset = self.check_range(sector, room)?;
                self.backend.read(offset, mem, &slice(&request.writable, 0, room))?;
                Ok(room)
            }
            TYPE_OUT => {
                self.check_writable()?;
                let offset = self.check_range(sector, given)?;
                self.backend.write(offset, mem, &slice(&request.readable, HEADER_BYTES, given))?;
                self.settle()
            }
            TYPE_FLUSH => {
                self.backend.flush()?;
                Ok(0)
            }
            TYPE_GET_ID => Ok(copy_to(mem, &slice(&request.writable, 0, room), 0, self.id) as u64),
            kind @ (TYPE_DISCARD | TYPE_WRITE_ZEROES) => {
                self.check_writable()?;
                for range in self.ranges(mem, request, given, kind)? {
                    let (offset, len) = range;
                    if kind == TYPE_DISCARD {
                        self.backend.discard(offset, len)?;
                    } else {
                        self.backend.write_zeroes(offset, len)?;
                    }
                }
                self.settle()
            }
            _ => Err(Failure::Unsupported),
        }
    }

    fn settle(&self) -> Result<u64, Failure> {
        if self.write_through {
            self.backend.flush()?;
        }
        Ok(0)
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.backend.is_read_only() {
            Err(Failure::Invalid)
        } else {
            Ok(())
        }
    }

    /// The byte offset of a range of data that lies on the disk.
    fn check_range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        if len > MAX_REQUEST_BYTES {
            return Err(Failure::Invalid);
        }
        self.check_place(sector, len)
    }

    fn check_place(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR).ok_or(Failure::Invalid)?;
        let end = offset.checked_add(len).ok_or(Failure::Invalid)?;
        if len == 0 || !len.is_multiple_of(SECTOR) || end > self.backend.size() {
            return Err(Failure::Invalid);
        }
        Ok(offset)
    }

    /// All ranges of a discard or write-zeroes request, checked before the first is touched.
    fn ranges(&self, mem: &GuestMemory, request: &Request, given: u64, kind: u32) -> Result<Vec<(u64, u64)>, Failure> {
        let limit = u64::from(MAX_RANGES).saturating_mul(RANGE_BYTES as u64);
        if given == 0 || given > limit || !given.is_multiple_of(RANGE_BYTES as u64) {
            return Err(Failure::Invalid);
        }
        let mut bytes = vec![0; usize::try_from(given).map_err(|_| Failure::Invalid)?];
        if copy_from(mem, &request.readable, HEADER_BYTES, &mut bytes) < bytes.len() {
            return Err(Failure::Invalid);
        }
        let (ranges, _) = bytes.as_chunks::<RANGE_BYTES>();
        let allowed = if kind == TYPE_WRITE_ZEROES { RANGE_UNMAP } else { 0 };
        ranges.iter().map(|range| self.range(range, allowed)).collect()
    }

    fn range(&self, range: &[u8; RANGE_BYTES], allowed: u32) -> Result<(u64, u64), Failure> {
        let value = u128::from_le_bytes(*range);
        let (sector, sectors, flags) = (value as u64, (value >> 64) as u32, (value >> 96) as u32);
        if flags & !allowed != 0 {
            return Err(Failure::Unsupported);
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(Failure::Invalid);
        }
        let len = u64::from(sectors).saturating_mul(SECTOR);
        Ok((self.check_place(sector, len)?, len))
    }
}
