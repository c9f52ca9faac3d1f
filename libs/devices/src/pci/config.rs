//! Configuration space of a type 0 function (PCI Local Bus 3.0, section 6): bytes, and which bits of them a guest may
//! change.

use ovms_state::StateError;
use serde::{Deserialize, Serialize};

use super::{BarRange, BAR_COUNT};

/// Bytes of the part that is implemented; the extended space behind it reads as zero: no extended capabilities.
const BYTES: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE: usize = 0x0c;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// High byte of the command register: INTx off.
const COMMAND_INTX_OFF: u8 = 1 << 2;
const STATUS_CAPABILITIES: u8 = 1 << 4;

const BAR_64BIT: u64 = 0b100;
const BAR_PREFETCHABLE: u64 = 0b1000;

/// Who a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class, subclass, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A memory BAR to be made.
#[derive(Clone, Copy, Debug)]
pub struct BarSpec {
    /// Its first register, 0 to 5; a 64-bit BAR takes the next one too.
    pub index: usize,
    /// Where it is placed at power-on; a multiple of `size`.
    pub address: u64,
    /// Bytes, a power of two of at least 16 (4096 if anything maps it).
    pub size: u64,
    /// Whether it may lie above 4 GiB.
    pub wide: bool,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    size: u64,
    wide: bool,
}

/// One function's configuration space.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: [u8; BYTES],
    writable: [u8; BYTES],
    power_on: [u8; BYTES],
    bars: [Option<Bar>; BAR_COUNT],
    next_capability: usize,
    last_link: usize,
}

/// What a guest can have changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConfigV1 {
    bytes: Vec<u8>,
}

impl ConfigSpace {
    /// The space of a function without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; BYTES],
            writable: [0; BYTES],
            power_on: [0; BYTES],
            bars: [None; BAR_COUNT],
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
        };
        let [interface, subclass, base] = [identity.class[2], identity.class[1], identity.class[0]];
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision, interface, subclass, base]);
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &[COMMAND_MEMORY | COMMAND_BUS_MASTER, COMMAND_INTX_OFF]);
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space.power_on = space.bytes;
        space
    }

    /// Adds a memory BAR. Returns whether the specification makes sense: index and size in range and free.
    #[must_use]
    pub fn add_bar(&mut self, spec: BarSpec) -> bool {
        let registers = if spec.wide { 2 } else { 1 };
        let free = (spec.index..spec.index.saturating_add(registers))
            .all(|i| self.bars.get(i).is_some_and(Option::is_none) && !self.is_high_half(i));
        let end = spec.address.checked_add(spec.size);
        let fits = end.is_some_and(|end| spec.wide || end <= 1 << 32);
        if !free || !fits || !spec.size.is_power_of_two() || spec.size < 16 || !spec.address.is_multiple_of(spec.size) {
            return false;
        }
        let mask = !spec.size.wrapping_sub(1);
        let kind = if spec.wide { BAR_64BIT } else { 0 } | if spec.prefetchable { BAR_PREFETCHABLE } else { 0 };
        let width = registers.saturating_mul(4);
        let at = bar_register(spec.index);
        if let (Some(value), Some(writable)) =
            ((spec.address | kind).to_le_bytes().get(..width), mask.to_le_bytes().get(..width))
        {
            self.set(at, value);
            self.allow(at, writable);
        }
        if let Some(bar) = self.bars.get_mut(spec.index) {
            *bar = Some(Bar { size: spec.size, wide: spec.wide });
        }
        // As firmware would leave it: decoding, so that a guest without firmware can use it at once.
        self.set(COMMAND, &[COMMAND_MEMORY]);
        self.power_on = self.bytes;
        true
    }

    fn is_high_half(&self, index: usize) -> bool {
        let below = index.checked_sub(1).and_then(|i| self.bars.get(i));
        matches!(below, Some(Some(Bar { wide: true, .. })))
    }

    /// Adds a capability: its ID, its bytes behind the link, and the bits of them that a guest may change. Returns the
    /// offset of the capability, or `None` if the space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<usize> {
        let at = self.next_capability;
        let end = at.checked_add(2)?.checked_add(body.len())?;
        if end > BYTES {
            return None;
        }
        self.set(self.last_link, &[u8::try_from(at).ok()?]);
        self.set(at, &[id, 0]);
        self.set(at.checked_add(2)?, body);
        self.allow(at.checked_add(2)?, writable);
        self.set(STATUS, &[STATUS_CAPABILITIES]);
        self.last_link = at.checked_add(1)?;
        self.next_capability = end.checked_next_multiple_of(4)?;
        self.power_on = self.bytes;
        Some(at)
    }

    /// Loads; bytes beyond the space read as zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let from = self.bytes.get(usize::from(offset)..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    /// Stores the bits that may change.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        let cells = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((cell, writable), new) in cells.zip(data) {
            *cell = (*cell & !writable) | (new & writable);
        }
    }

    /// The BARs that are decoded now.
    pub fn bars(&self) -> [Option<BarRange>; BAR_COUNT] {
        let decodes = self.bytes.get(COMMAND).is_some_and(|command| command & COMMAND_MEMORY != 0);
        std::array::from_fn(|index| {
            let bar = self.bars.get(index).copied().flatten().filter(|_| decodes)?;
            let low = u64::from(self.read_u32(bar_register(index)) & !0xf);
            let high = if bar.wide { u64::from(self.read_u32(bar_register(index.saturating_add(1)))) } else { 0 };
            Some(BarRange { address: low | (high << 32), size: bar.size })
        })
    }

    /// Back to the bytes after power-on, with the BARs where they were placed first.
    pub fn reset(&mut self) {
        self.bytes = self.power_on;
    }

    /// The four bytes at `at`.
    pub(crate) fn read_u32(&self, at: usize) -> u32 {
        let mut data = [0; 4];
        self.read(u16::try_from(at).unwrap_or(u16::MAX), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        for (cell, byte) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *cell = *byte;
        }
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        for (cell, bits) in self.writable.iter_mut().skip(at).zip(bits) {
            *cell = *bits;
        }
    }

    pub(crate) fn save(&self) -> ConfigV1 {
        ConfigV1 { bytes: self.bytes.to_vec() }
    }

    /// Checks that `saved` differs from the power-on bytes only where a guest may write.
    pub(crate) fn check(&self, kind: &'static str, saved: &ConfigV1) -> Result<[u8; BYTES], StateError> {
        let invalid = |what: String| StateError::Invalid { kind, what };
        let bytes: [u8; BYTES] =
            saved.bytes.as_slice().try_into().map_err(|_| {
                invalid(format!("{} bytes of configuration space instead of {BYTES}", saved.bytes.len()))
            })?;
        let wrong = bytes.iter().zip(&self.power_on).zip(&self.writable).position(|((b, p), w)| (b ^ p) & !w != 0);
        match wrong {
            Some(at) => Err(invalid(format!("read-only byte {at:#x} of configuration space"))),
            None => Ok(bytes),
        }
    }

    /// Takes over bytes that [`ConfigSpace::check`] has passed.
    pub(crate) fn load(&mut self, bytes: [u8; BYTES]) {
        self.bytes = bytes;
    }
}

/// Offset of BAR register `index`.
fn bar_register(index: usize) -> usize {
    BAR0.saturating_add(index.saturating_mul(4))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0, 0],
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        assert!(space.add_bar(BarSpec {
            index: 0,
            address: 0xe000_0000,
            size: 0x8000,
            wide: true,
            prefetchable: false
        }));
        space
    }

    #[test]
    fn sizing_a_wide_bar_shows_its_size_and_kind() {
        let mut space = space();
        space.write(0x10, &[0xff; 8]);
        assert_eq!(space.read_u32(0x10), 0xffff_8004);
        assert_eq!(space.read_u32(0x14), 0xffff_ffff);
    }

    #[test]
    fn bars_follow_the_register_and_the_command_bit() {
        let mut space = space();
        assert_eq!(space.bars()[0], Some(BarRange { address: 0xe000_0000, size: 0x8000 }));
        space.write(0x14, &5u32.to_le_bytes());
        assert_eq!(space.bars()[0], Some(BarRange { address: 0x5_e000_0000, size: 0x8000 }));
        space.write(0x04, &[0, 0]);
        assert_eq!(space.bars()[0], None);
        space.reset();
        assert_eq!(space.bars()[0], Some(BarRange { address: 0xe000_0000, size: 0x8000 }));
    }

    #[test]
    fn write_to_identity_and_status_changes_nothing() {
        let mut space = space();
        let before = (space.read_u32(0), space.read_u32(8));
        space.write(0, &[0xff; 4]);
        space.write(8, &[0; 4]);
        space.write(6, &[0xff; 2]);
        assert_eq!((space.read_u32(0), space.read_u32(8)), before);
    }

    #[test]
    fn capabilities_are_linked() {
        let mut space = space();
        let a = space.add_capability(0x09, &[1, 2, 3], &[]).unwrap();
        let b = space.add_capability(0x11, &[4], &[0xff]).unwrap();
        assert_eq!(space.read_u32(0x34) & 0xff, a as u32);
        assert_eq!(space.read_u32(a) & 0xffff, 0x09 | (b as u32) << 8);
        assert_eq!(space.read_u32(b) & 0xffff, 0x11);
        assert!(space.add_capability(0x09, &[0; 300], &[]).is_none());
    }

    #[test]
    fn add_bar_invalid_returns_false() {
        let mut space = space();
        let spec = BarSpec { index: 2, address: 0x1000, size: 0x1000, wide: false, prefetchable: false };
        for bad in [
            BarSpec { index: 1, ..spec },
            BarSpec { index: 6, ..spec },
            BarSpec { index: 5, wide: true, ..spec },
            BarSpec { size: 0x1001, ..spec },
            BarSpec { size: 8, ..spec },
            BarSpec { address: 0x800, ..spec },
            BarSpec { address: 1 << 32, ..spec },
        ] {
            assert!(!space.add_bar(bad), "{bad:?}");
        }
        assert!(space.add_bar(spec));
    }
}
