//! FADT: where the fixed hardware lies (ACPI 6.5, 5.2.9).

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use ovms_devices::legacy::{pm, ResetPort};

use super::{bytes, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// IA-PC boot architecture flags (ACPI 6.5, 5.2.9.3): there are legacy devices (COM1), no VGA, and no keyboard
/// controller to probe: it only resets.
const LEGACY_DEVICES: u16 = 1;
const NO_VGA: u16 = 1 << 2;

pub(super) fn build(dsdt: u64, facs: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .gpe_info(u32::from(port(pm::GPE0)), 0, pm::GPE0.1, 0, 0);
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = u16::from(pm::SCI_IRQ).into();
    fadt.pm1a_evt_blk = u32::from(port(pm::PM1_EVENT)).into();
    fadt.pm1_evt_len = pm::PM1_EVENT.1;
    fadt.pm1a_cnt_blk = u32::from(port(pm::PM1_CONTROL)).into();
    fadt.pm1_cnt_len = pm::PM1_CONTROL.1;
    fadt.pm_tmr_blk = u32::from(port(pm::PM_TIMER)).into();
    fadt.pm_tmr_len = pm::PM_TIMER.1;
    fadt.x_pm1a_evt_blk = register(pm::PM1_EVENT, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = register(pm::PM1_CONTROL, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = register(pm::PM_TIMER, AccessSize::DwordAccess);
    fadt.x_gpe0_blk = register(pm::GPE0, AccessSize::ByteAccess);
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, ResetPort::PORT);
    fadt.reset_value = ResetPort::ACPI_VALUE;
    bytes(&fadt.finalize())
}

fn port((offset, _): (u16, u8)) -> u16 {
    pm::IO_BASE + offset
}

fn register(block: (u16, u8), access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, block.1 * 8, 0, access, u64::from(port(block)))
}
