//! Guest memory as the array without a hole that a snapshot holds, cut into chunks.
//!
//! ```text
//!  guest address:   0 ──── 3 GiB         4 GiB ──── …
//!  array:           0 ──── 3 GiB ─────────────── …        chunk = 64 KiB
//!  process:         region 0             region 1         both aligned to 2 MiB
//! ```

use std::ops::Range;

use ovms_state::{chunk_count, chunk_len, CHUNK};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::memory::Ram;

/// One region of guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    /// KVM's number of it.
    pub slot: u32,
    /// Where it lies in this process.
    pub host: u64,
    /// Where it lies in the guest.
    pub guest: u64,
    /// Its first chunk.
    pub first: u64,
    /// Its length in bytes.
    pub len: u64,
}

impl Region {
    /// Its chunks.
    pub(super) fn chunks(&self) -> Range<u64> {
        self.first..self.first + chunk_count(self.len)
    }
}

/// A range of addresses in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HostRange {
    pub start: u64,
    pub len: u64,
}

/// The whole memory.
#[derive(Clone, Debug)]
pub(super) struct View {
    ram: Ram,
    regions: Vec<Region>,
}

impl View {
    pub(super) fn new(ram: &Ram) -> Self {
        let mut first = 0;
        let mut regions = Vec::with_capacity(2);
        // The order is that in which the machine gave them to KVM.
        for (slot, region) in (0u32..).zip(ram.memory().iter()) {
            let (host, guest, len) = (region.as_ptr() as u64, region.start_addr().0, region.len());
            regions.push(Region { slot, host, guest, first, len });
            first += chunk_count(len);
        }
        Self { ram: ram.clone(), regions }
    }

    pub(super) fn ram(&self) -> &Ram {
        &self.ram
    }

    pub(super) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Number of chunks.
    pub(super) fn chunks(&self) -> u64 {
        chunk_count(self.ram.size())
    }

    /// Copies `chunk` as it is now to the front of `buffer`, which has room for one; returns how long it is. A guest that
    /// writes meanwhile leaves a mix.
    pub(super) fn copy(&self, chunk: u64, buffer: &mut [u8]) -> Result<usize, GuestMemoryError> {
        let len = chunk_len(self.ram.size(), chunk);
        let region = self.region_of(chunk).ok_or(GuestMemoryError::InvalidGuestAddress(GuestAddress(u64::MAX)))?;
        let address = region.guest + (chunk - region.first) * CHUNK as u64;
        let into = buffer.get_mut(..len).ok_or(GuestMemoryError::PartialBuffer { expected: len, completed: 0 })?;
        self.ram.memory().read_slice(into, GuestAddress(address))?;
        Ok(len)
    }

    fn region_of(&self, chunk: u64) -> Option<&Region> {
        self.regions.iter().find(|region| region.chunks().contains(&chunk))
    }

    /// Where `chunks` lie in this process, one range for each region that they touch.
    pub(super) fn host_ranges(&self, chunks: Range<u64>) -> impl Iterator<Item = HostRange> + '_ {
        self.regions.iter().filter_map(move |region| {
            let own = region.chunks();
            let (start, end) = (chunks.start.max(own.start), chunks.end.min(own.end));
            if start >= end {
                return None;
            }
            let from = (start - region.first) * CHUNK as u64;
            let to = ((end - region.first) * CHUNK as u64).min(region.len);
            Some(HostRange { start: region.host + from, len: to - from })
        })
    }

    /// The chunk at `address` of this process.
    pub(super) fn chunk_at(&self, address: u64) -> Option<u64> {
        let inside = |region: &&Region| address >= region.host && address - region.host < region.len;
        self.regions.iter().find(inside).map(|region| region.first + (address - region.host) / CHUNK as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_on_both_sides_of_the_hole_are_found_and_copied() {
        let ram = Ram::map((3 << 30) + (2 << 20)).unwrap();
        let view = View::new(&ram);
        let first_high = (3 << 30) / CHUNK as u64;
        assert_eq!(view.chunks(), first_high + 32);
        ram.memory().write_obj(7u8, GuestAddress(4 << 30)).unwrap();
        let mut buffer = [1; CHUNK];
        assert_eq!(view.copy(first_high, &mut buffer).unwrap(), CHUNK);
        assert!(buffer[0] == 7 && buffer[1..].iter().all(|byte| *byte == 0));
        assert!(view.copy(view.chunks(), &mut buffer).is_err());
        let ranges: Vec<_> = view.host_ranges(first_high - 1..first_high + 2).collect();
        assert_eq!(ranges.iter().map(|range| range.len).collect::<Vec<_>>(), [CHUNK as u64, 2 * CHUNK as u64]);
        assert_eq!(view.chunk_at(ranges[0].start + CHUNK as u64 - 1), Some(first_high - 1));
        assert_eq!(view.chunk_at(ranges[1].start), Some(first_high));
        assert_eq!(view.chunk_at(0), None);
    }
}
