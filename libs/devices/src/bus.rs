//! Address decoding: a sorted, immutable range map from addresses to devices.
//!
//! A machine has two of them, one for port I/O and one for MMIO. Both are built once, before the first vCPU runs, and
//! are read without a lock ever after. What moves at run time (PCI BARs) lies behind one fixed window each, see
//! [`crate::pci`].

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

/// A device that answers loads and stores at offsets into its own range.
///
/// Accesses are little-endian and of any length that a vCPU can produce (1, 2, 4, 8 bytes, or more for a string
/// instruction that the kernel batched): the device decides which it implements, answers the others with zeroes or
/// ones as hardware does, and never panics. Devices lock inside, and raise interrupts after they have unlocked.
pub trait BusDevice: Send + Sync {
    /// Loads `data.len()` bytes at `offset`. Every byte of `data` must be set; it comes in as all ones.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Stores `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range cannot be put on a bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or runs over the end of the address space.
    #[error("bus range {base:#x}+{len:#x} is empty or wraps around")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Two devices want the same address.
    #[error("bus range {base:#x}+{len:#x} overlaps the one at {other:#x}")]
    Overlap {
        /// First address of the later range.
        base: u64,
        /// Its length in bytes.
        len: u64,
        /// First address of the range already there.
        other: u64,
    },
}

struct Entry {
    base: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// Collects the ranges of a [`Bus`].
#[derive(Default)]
pub struct BusBuilder {
    entries: Vec<Entry>,
}

impl BusBuilder {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + len`.
    ///
    /// # Errors
    /// [`BusError`] if the range is empty, wraps around or overlaps another.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last =
            len.checked_sub(1).and_then(|span| base.checked_add(span)).ok_or(BusError::BadRange { base, len })?;
        let at = self.entries.partition_point(|e| e.base <= base);
        let before = at.checked_sub(1).and_then(|i| self.entries.get(i)).filter(|e| e.last >= base);
        let after = self.entries.get(at).filter(|e| e.base <= last);
        if let Some(other) = before.or(after) {
            return Err(BusError::Overlap { base, len, other: other.base });
        }
        self.entries.insert(at, Entry { base, last, device });
        Ok(())
    }

    /// Freezes the ranges.
    pub fn build(self) -> Bus {
        Bus { entries: self.entries.into() }
    }
}

/// The frozen range map. Clones share it.
#[derive(Clone)]
pub struct Bus {
    entries: Arc<[Entry]>,
}

impl Bus {
    fn find(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        let at = self.entries.partition_point(|e| e.base <= address);
        let entry = self.entries.get(at.checked_sub(1)?)?;
        let offset = address.checked_sub(entry.base)?;
        (address <= entry.last).then(|| (entry.device.as_ref(), offset))
    }

    /// Loads from `address`; an address that no device claims reads as all ones. Returns whether one did.
    ///
    /// An access that starts inside a range and runs over its end is the device's to answer: it sees offsets beyond
    /// its length.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(address) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Stores to `address`; a store that no device claims is dropped. Returns whether one did.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.entries.iter().map(|e| format!("{:#x}..={:#x}", e.base, e.last))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, usize)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
            data.fill(0x5a);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
        }
    }

    #[test]
    fn read_inside_range_reaches_device_at_offset() {
        let device = Arc::new(Recorder::default());
        let mut builder = BusBuilder::new();
        builder.insert(0x3f8, 8, device.clone()).unwrap();
        let bus = builder.build();
        let mut data = [0u8; 2];
        assert!(bus.read(0x3fd, &mut data));
        assert_eq!(data, [0x5a; 2]);
        assert_eq!(*device.0.lock().unwrap(), [(5, 2)]);
    }

    #[test]
    fn read_outside_every_range_gives_ones() {
        let mut builder = BusBuilder::new();
        builder.insert(0x3f8, 8, Arc::new(Recorder::default())).unwrap();
        let bus = builder.build();
        for address in [0, 0x3f7, 0x400, u64::MAX] {
            let mut data = [0u8; 4];
            assert!(!bus.read(address, &mut data));
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(address, &data));
        }
    }

    #[test]
    fn insert_overlapping_range_returns_overlap() {
        let mut builder = BusBuilder::new();
        builder.insert(0x100, 0x10, Arc::new(Recorder::default())).unwrap();
        for (base, len) in [(0x100, 1), (0x10f, 1), (0xff, 2), (0xf0, 0x100)] {
            assert_eq!(
                builder.insert(base, len, Arc::new(Recorder::default())),
                Err(BusError::Overlap { base, len, other: 0x100 })
            );
        }
        builder.insert(0xff, 1, Arc::new(Recorder::default())).unwrap();
        builder.insert(0x110, 1, Arc::new(Recorder::default())).unwrap();
    }

    #[test]
    fn insert_empty_or_wrapping_range_returns_bad_range() {
        let mut builder = BusBuilder::new();
        for (base, len) in [(0, 0), (u64::MAX, 2)] {
            assert_eq!(builder.insert(base, len, Arc::new(Recorder::default())), Err(BusError::BadRange { base, len }));
        }
        builder.insert(u64::MAX, 1, Arc::new(Recorder::default())).unwrap();
        assert!(builder.build().write(u64::MAX, &[0]));
    }
}
