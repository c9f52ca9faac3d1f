//! The root complex: finds functions by slot and BARs by address.

use std::sync::{Arc, Mutex, RwLock};

use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::config::{ConfigSpace, Identity};
use super::{BarListener, BarRange, PciFunction, Slot, BAR_COUNT};
use crate::bus::BusDevice;
use crate::sync::lock;

const KIND: &str = "pci-root";
const VERSION: u32 = 1;

/// Slots on the bus.
const SLOTS: usize = 32;
/// Bytes of the ECAM window: the one bus there is.
pub const ECAM_LEN: u64 = 1 << 20;
/// I/O port of the configuration address. Give it a bus range of **one** port, since 0xcf9 is the reset port: the
/// access is found by its first address.
pub const CONFIG_ADDRESS_PORT: u64 = 0xcf8;
/// I/O ports of the configuration data, four of them.
pub const CONFIG_DATA_PORT: u64 = 0xcfc;

const ADDRESS_ENABLE: u32 = 1 << 31;
/// Enable, bus, device, function and dword.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// Why a function cannot be put on the bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PciError {
    /// The slot does not exist or has a function.
    #[error("PCI slot {0} is taken or does not exist")]
    BadSlot(u8),
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Mapping {
    slot: usize,
    bar: usize,
    range: BarRange,
}

impl Mapping {
    fn last(&self) -> u64 {
        self.range.address.saturating_add(self.range.size.saturating_sub(1))
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.range.address <= other.last() && other.range.address <= self.last()
    }
}

/// Collects the functions of a [`PciRoot`].
pub struct PciRootBuilder {
    functions: [Option<Arc<dyn PciFunction>>; SLOTS],
    windows: Vec<BarRange>,
    listener: Option<Arc<dyn BarListener>>,
}

impl PciRootBuilder {
    /// A bus with a host bridge in slot 0, whose functions may be decoded inside `windows` and nowhere else: memory
    /// and other devices are safe from a guest that places a BAR over them.
    pub fn new(windows: &[BarRange]) -> Self {
        let mut functions: [Option<Arc<dyn PciFunction>>; SLOTS] = Default::default();
        if let Some(first) = functions.first_mut() {
            *first = Some(Arc::new(HostBridge::new()));
        }
        Self { functions, windows: windows.to_vec(), listener: None }
    }

    /// Sets who is told of BARs that move. Those placed at power-on are told as well, in [`PciRootBuilder::build`].
    pub fn listener(&mut self, listener: Arc<dyn BarListener>) {
        self.listener = Some(listener);
    }

    /// Puts a function into `slot`.
    ///
    /// # Errors
    /// [`PciError::BadSlot`] if there is one, or no such slot.
    pub fn add(&mut self, slot: Slot, function: Arc<dyn PciFunction>) -> Result<(), PciError> {
        match self.functions.get_mut(usize::from(slot.0)) {
            Some(free @ None) => {
                *free = Some(function);
                Ok(())
            }
            _ => Err(PciError::BadSlot(slot.0)),
        }
    }

    /// Freezes the functions and decodes their BARs.
    pub fn build(self) -> Arc<PciRoot> {
        let root = Arc::new(PciRoot {
            functions: self.functions,
            windows: self.windows,
            listener: self.listener,
            address: Mutex::new(0),
            mappings: RwLock::default(),
            changing: Mutex::new(()),
        });
        root.sync();
        root
    }
}

/// The root complex.
pub struct PciRoot {
    functions: [Option<Arc<dyn PciFunction>>; SLOTS],
    windows: Vec<BarRange>,
    listener: Option<Arc<dyn BarListener>>,
    /// The configuration address register.
    address: Mutex<u32>,
    /// What is decoded, by ascending address, without overlaps.
    mappings: RwLock<Vec<Mapping>>,
    /// Held while configuration space is written and the mappings follow.
    changing: Mutex<()>,
}

#[derive(Serialize, Deserialize)]
struct RootV1 {
    address: u32,
}

impl PciRoot {
    /// The device for [`CONFIG_ADDRESS_PORT`].
    pub fn config_address(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(ConfigAddress(Arc::clone(self)))
    }

    /// The device for [`CONFIG_DATA_PORT`].
    pub fn config_data(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(ConfigData(Arc::clone(self)))
    }

    /// The device for the ECAM window of [`ECAM_LEN`] bytes.
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(Arc::clone(self)))
    }

    /// One device per window, with the window's place, for the MMIO bus.
    pub fn windows(self: &Arc<Self>) -> Vec<(BarRange, Arc<dyn BusDevice>)> {
        let device =
            |w: &BarRange| -> Arc<dyn BusDevice> { Arc::new(Window { root: Arc::clone(self), base: w.address }) };
        self.windows.iter().map(|window| (*window, device(window))).collect()
    }

    /// Resets every function and decodes the BARs where they were placed first.
    pub fn reset(&self) {
        *lock(&self.address) = 0;
        for function in self.functions.iter().flatten() {
            function.reset();
        }
        self.sync();
    }

    /// Looks at every BAR again and tells the listener what changed. To be called after functions were restored.
    pub fn sync(&self) {
        let _changing = lock(&self.changing);
        self.follow_bars();
    }

    /// Decodes what lies wholly inside a window and overlaps nothing in a lower slot.
    fn wanted(&self) -> Vec<Mapping> {
        let mut wanted: Vec<Mapping> = Vec::new();
        for (slot, function) in self.functions.iter().enumerate() {
            let Some(function) = function else { continue };
            for (bar, range) in function.bars().into_iter().enumerate() {
                let Some(range) = range else { continue };
                let mapping = Mapping { slot, bar, range };
                let inside = self.windows.iter().any(|w| {
                    let last = w.address.saturating_add(w.size.saturating_sub(1));
                    range.address >= w.address && mapping.last() <= last && range.address <= mapping.last()
                });
                if inside && !wanted.iter().any(|other| other.overlaps(&mapping)) {
                    wanted.push(mapping);
                }
            }
        }
        wanted.sort_by_key(|m| m.range.address);
        wanted
    }

    fn follow_bars(&self) {
        let new = self.wanted();
        let old = {
            let mut mappings = self.mappings.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            if *mappings == new {
                return;
            }
            std::mem::replace(&mut *mappings, new.clone())
        };
        let Some(listener) = &self.listener else { return };
        let place = |set: &[Mapping], slot, bar| set.iter().find(|m| m.slot == slot && m.bar == bar).map(|m| m.range);
        let slots = (0u8..).zip(&self.functions).filter(|(_, function)| function.is_some());
        let bars = slots.flat_map(|(slot, _)| (0..BAR_COUNT).map(move |bar| (slot, bar)));
        let changes: Vec<_> = bars
            .map(|(slot, bar)| (slot, bar, place(&old, usize::from(slot), bar), place(&new, usize::from(slot), bar)))
            .filter(|(_, _, old, new)| old != new)
            .collect();
        // Old places are given up before new ones are taken: two BARs may swap.
        for (slot, bar, old, _) in changes.iter().filter(|(_, _, old, _)| old.is_some()) {
            listener.bar_moved(Slot(*slot), *bar, *old, None);
        }
        for (slot, bar, _, new) in changes.iter().filter(|(_, _, _, new)| new.is_some()) {
            listener.bar_moved(Slot(*slot), *bar, None, *new);
        }
    }

    fn function(&self, bus: u8, devfn: u8) -> Option<&Arc<dyn PciFunction>> {
        if bus != 0 || devfn & 7 != 0 {
            return None;
        }
        self.functions.get(usize::from(devfn >> 3))?.as_ref()
    }

    fn config_read(&self, bus: u8, devfn: u8, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (true, Some(function)) = (is_config_access(offset, data.len()), self.function(bus, devfn)) {
            function.config_read(offset, data);
        }
    }

    fn config_write(&self, bus: u8, devfn: u8, offset: u16, data: &[u8]) {
        if let (true, Some(function)) = (is_config_access(offset, data.len()), self.function(bus, devfn)) {
            let _changing = lock(&self.changing);
            function.config_write(offset, data);
            self.follow_bars();
        }
    }

    /// The BAR that decodes `address`, and the offset into it.
    fn decode(&self, address: u64) -> Option<(&Arc<dyn PciFunction>, usize, u64)> {
        let mappings = self.mappings.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let at = mappings.partition_point(|m| m.range.address <= address);
        let mapping = mappings.get(at.checked_sub(1)?).filter(|m| address <= m.last())?;
        let function = self.functions.get(mapping.slot)?.as_ref()?;
        Some((function, mapping.bar, address.checked_sub(mapping.range.address)?))
    }
}

/// Configuration space is accessed by naturally aligned bytes, words and dwords.
fn is_config_access(offset: u16, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && usize::from(offset).is_multiple_of(len) && offset < 4096
}

impl Persist for PciRoot {
    fn save(&self) -> Result<Section, StateError> {
        Section::encode(KIND, VERSION, &RootV1 { address: *lock(&self.address) })
    }

    /// Restore the functions first: this decodes their BARs.
    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let state: RootV1 = section.decode(KIND, VERSION)?;
        if state.address & !ADDRESS_BITS != 0 {
            return Err(StateError::Invalid { kind: KIND, what: format!("address {:#x}", state.address) });
        }
        *lock(&self.address) = state.address;
        self.sync();
        Ok(())
    }
}

struct ConfigAddress(Arc<PciRoot>);

/// Only a dword access reaches the register (PCI Local Bus 3.0, 3.2.2.3.2).
impl BusDevice for ConfigAddress {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, [_, _, _, _]) = (offset, &data) {
            data.copy_from_slice(&lock(&self.0.address).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, [a, b, c, d]) = (offset, data) {
            *lock(&self.0.address) = u32::from_le_bytes([*a, *b, *c, *d]) & ADDRESS_BITS;
        }
    }
}

struct ConfigData(Arc<PciRoot>);

impl ConfigData {
    /// Bus, device and function, and offset that an access at `offset` of the data ports means.
    fn target(&self, offset: u64) -> Option<(u8, u8, u16)> {
        let address = *lock(&self.0.address);
        if address & ADDRESS_ENABLE == 0 || offset > 3 {
            return None;
        }
        let [dword, devfn, bus, _] = address.to_le_bytes();
        Some((bus, devfn, u16::from(dword) | (offset as u16)))
    }
}

impl BusDevice for ConfigData {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((bus, devfn, register)) = self.target(offset) {
            self.0.config_read(bus, devfn, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bus, devfn, register)) = self.target(offset) {
            self.0.config_write(bus, devfn, register, data);
        }
    }
}

struct Ecam(Arc<PciRoot>);

/// Bus, device and function, and register of an offset into the ECAM window (PCI Express 5.0, 7.2.2).
fn ecam_target(offset: u64) -> Option<(u8, u8, u16)> {
    Some((u8::try_from(offset >> 20).ok()?, (offset >> 12) as u8, (offset & 0xfff) as u16))
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((bus, devfn, register)) = ecam_target(offset) {
            self.0.config_read(bus, devfn, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bus, devfn, register)) = ecam_target(offset) {
            self.0.config_write(bus, devfn, register, data);
        }
    }
}

struct Window {
    root: Arc<PciRoot>,
    base: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((function, bar, at)) = self.base.checked_add(offset).and_then(|a| self.root.decode(a)) {
            function.bar_read(bar, at, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, bar, at)) = self.base.checked_add(offset).and_then(|a| self.root.decode(a)) {
            function.bar_write(bar, at, data);
        }
    }
}

/// Slot 0: what makes a bus a bus for software that looks. 1b36:0008 is QEMU's generic PCIe host bridge, which no
/// driver wants anything of.
struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    fn new() -> Self {
        Self(Mutex::new(ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: [0x06, 0x00, 0x00],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        })))
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.0).read(offset, data);
    }

    /// Its command register does nothing, so nothing is kept.
    fn config_write(&self, _offset: u16, _data: &[u8]) {}

    fn bars(&self) -> [Option<BarRange>; BAR_COUNT] {
        [None; BAR_COUNT]
    }

    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {}
}

#[cfg(test)]
mod tests;
