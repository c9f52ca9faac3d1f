//! The memory map that the guest is told.

use crate::layout;
use crate::memory::Ram;

/// What a range of the address space is, numbered as both E820 and PVH do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Usable memory.
    Ram = 1,
    /// Not to be used: firmware tables, configuration space.
    Reserved = 2,
}

/// One range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The memory map of a machine with `ram`, in ascending order.
pub fn memory_map(ram: &Ram) -> Vec<MemoryRange> {
    let range = |start, end: u64, kind| MemoryRange { start, size: end.saturating_sub(start), kind };
    let mut map = vec![
        range(0, layout::CONVENTIONAL_END, RangeKind::Ram),
        range(layout::ACPI_START, layout::HIGH_MEMORY, RangeKind::Reserved),
        range(layout::HIGH_MEMORY, ram.low_end(), RangeKind::Ram),
        range(layout::ECAM_START, layout::ECAM_START + layout::ECAM_SIZE, RangeKind::Reserved),
    ];
    map.extend(ram.high_end().map(|end| range(layout::HIGH_RAM_START, end, RangeKind::Ram)));
    map
}
