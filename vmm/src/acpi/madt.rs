//! MADT: processors and interrupt controllers (ACPI 6.5, 5.2.12). Its header comes from `acpi_tables`, which lacks
//! the override and NMI structures.

use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;
use ovms_devices::legacy::pm;

use super::{bytes, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout;

/// Header, local APIC address, flags.
const LENGTH: u32 = 44;
const LOCAL_APIC_ADDRESS: usize = 36;
const REVISION: u8 = 5;
/// Interrupt source override, 10 bytes (ACPI 6.5, 5.2.12.5).
const TYPE_OVERRIDE: u8 = 2;
/// Polarity active high (1), trigger level (3 << 2).
const LEVEL_ACTIVE_HIGH: u16 = 0x0d;
/// Local APIC NMI, 6 bytes (ACPI 6.5, 5.2.12.7): all processors, conforming, LINT1.
const TYPE_LOCAL_NMI: u8 = 4;
const ALL_PROCESSORS: u8 = 0xff;

pub(super) fn build(vcpus: u8) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", LENGTH, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(LOCAL_APIC_ADDRESS, layout::LOCAL_APIC_START as u32);
    for index in 0..vcpus {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(index, index, EnabledStatus::Enabled)));
    }
    madt.append_slice(&bytes(&IoApic::new(vcpus, layout::IOAPIC_START as u32, 0)));
    let sci = pm::SCI_IRQ;
    let mut source = vec![TYPE_OVERRIDE, 10, 0, sci];
    source.extend(u32::from(sci).to_le_bytes());
    source.extend(LEVEL_ACTIVE_HIGH.to_le_bytes());
    madt.append_slice(&source);
    madt.append_slice(&[TYPE_LOCAL_NMI, 6, ALL_PROCESSORS, 0, 0, 1]);
    madt.as_slice().to_vec()
}
