//! ACPI tables (ACPI 6.5), built by the `acpi_tables` crate and written where a kernel looks for them.
//!
//! ```text
//!   RSDP ─> XSDT ─┬> FADT ─┬> DSDT  root bridge, COM1, clock, pvpanic, VM generation id
//!                 │        └> FACS
//!                 ├> MADT  processors, IOAPIC, overrides
//!                 └> MCFG  PCI Express configuration space
//! ```
//!
//! Full ACPI rather than hardware-reduced: with fixed hardware a stock kernel needs no driver of ours for the power
//! button, S5 and its clock, and takes the SCI as level-triggered active high from an override.

mod dsdt;
mod fadt;
mod madt;

use acpi_tables::facs::FACS;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::Aml;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout;
use crate::memory::Ram;

const OEM_ID: [u8; 6] = *b"OVMS  ";
const OEM_TABLE_ID: [u8; 8] = *b"OVMSVMM ";
const OEM_REVISION: u32 = 1;
/// FACS must lie on 64 bytes (ACPI 6.5, 5.2.10); the others may as well.
const ALIGNMENT: u64 = 64;

/// Why the tables cannot be written.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// They are longer than the area that is kept for them.
    #[error("the ACPI tables do not fit below {:#x}", layout::ACPI_END)]
    Room,
    /// Guest memory cannot be written.
    #[error("the ACPI tables cannot be written to guest memory")]
    Write(#[source] GuestMemoryError),
}

/// What the tables say of one machine.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// Number of processors; their APIC ids count from 0.
    pub vcpus: u8,
}

/// Writes all tables; returns the address of the RSDP.
///
/// # Errors
/// [`AcpiError`].
pub fn write(ram: &Ram, description: Description) -> Result<u64, AcpiError> {
    let rsdp_address = layout::ACPI_START;
    let mut area = Area { ram, next: rsdp_address + ALIGNMENT };
    let facs = area.put(&bytes(&FACS::new()))?;
    let dsdt = area.put(&dsdt::build())?;
    let fadt = area.put(&fadt::build(dsdt, facs))?;
    let madt = area.put(&madt::build(description.vcpus))?;
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM_START, 0, 0, 0);
    let mcfg = area.put(&bytes(&mcfg))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = area.put(&bytes(&xsdt))?;
    area.next = rsdp_address;
    area.put(&bytes(&Rsdp::new(OEM_ID, xsdt)))
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The area that tables are put into, one behind the other.
struct Area<'a> {
    ram: &'a Ram,
    next: u64,
}

impl Area<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let address = self.next;
        let end = address.saturating_add(table.len() as u64);
        if end > layout::ACPI_END {
            return Err(AcpiError::Room);
        }
        self.ram.memory().write_slice(table, GuestAddress(address)).map_err(AcpiError::Write)?;
        self.next = end.next_multiple_of(ALIGNMENT);
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(ram: &Ram, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Reads the table at `address` and checks its checksum.
    fn table(ram: &Ram, address: u64) -> Vec<u8> {
        let length = u32::from_le_bytes(read(ram, address + 4, 4).try_into().unwrap());
        let table = read(ram, address, length as usize);
        assert_eq!(sum(&table), 0, "checksum of {}", String::from_utf8_lossy(&table[..4]));
        table
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_has_a_good_checksum() {
        let ram = Ram::map(32 << 20).unwrap();
        let rsdp = write(&ram, Description { vcpus: 32 }).unwrap();
        let root = read(&ram, rsdp, 36);
        assert_eq!((&root[..8], sum(&root[..20]), sum(&root)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(&ram, u64::from_le_bytes(root[24..32].try_into().unwrap()));
        let mut signatures = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let found = table(&ram, u64::from_le_bytes(entry.try_into().unwrap()));
            if &found[..4] == b"FACP" {
                let dsdt = table(&ram, u64::from_le_bytes(found[140..148].try_into().unwrap()));
                assert_eq!(&dsdt[..4], b"DSDT");
                assert_eq!(&read(&ram, u64::from(u32::from_le_bytes(found[36..40].try_into().unwrap())), 4), b"FACS");
            }
            signatures.push(String::from_utf8(found[..4].to_vec()).unwrap());
        }
        assert_eq!(signatures, ["FACP", "APIC", "MCFG"]);
    }
}
