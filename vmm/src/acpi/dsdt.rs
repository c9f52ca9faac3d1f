//! DSDT: the devices that a kernel cannot find by itself.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, Scope, IO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::Aml;
use ovms_devices::legacy::{pm, PVPANIC_PORT};

use super::{bytes, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout;

const REVISION: u8 = 6;
const HEADER_BYTES: u32 = 36;
/// `_STA`: present, enabled, shown, functioning.
const STATUS_PRESENT: u8 = 0xf;
/// `_STA` without "shown".
const STATUS_HIDDEN: u8 = 0xb;
/// Notification to the VM generation id device: it has changed.
const VMGENID_CHANGED: u8 = 0x80;

pub(super) fn build() -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let zero = 0u8;
    let sleep_type = pm::SLEEP_TYPE_S5;
    let s5 = Name::new("_S5_".into(), &Package::new(vec![&sleep_type, &zero, &zero, &zero]));
    for part in [bytes(&s5), root_bridge(), reserved(), serial(), clock(), panic_port(), generation_id(), events()] {
        dsdt.append_slice(&part);
    }
    dsdt.as_slice().to_vec()
}

/// A device `name` under `\_SB` with these objects.
fn device(name: &str, objects: &[&dyn Aml]) -> Vec<u8> {
    bytes(&Device::new(Path::new(&format!("_SB_.{name}")), objects.to_vec()))
}

fn named(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

fn io(port: u64, length: u8) -> IO {
    IO::new(port as u16, port as u16, 1, length)
}

/// The PCI Express root bridge: bus 0, ports around the configuration ports, the BAR window.
fn root_bridge() -> Vec<u8> {
    let config = io(layout::PORT_PCI_CONFIG, 8);
    let bus = AddressSpace::<u16>::new_bus_number(0, 0);
    let below = AddressSpace::<u16>::new_io(0, layout::PORT_PCI_CONFIG as u16 - 1, None);
    let above = AddressSpace::<u16>::new_io(layout::PORT_PCI_CONFIG as u16 + 8, 0xffff, None);
    let start = layout::BAR_WINDOW_START as u32;
    let last = (layout::BAR_WINDOW_START + layout::BAR_WINDOW_SIZE - 1) as u32;
    let window = AddressSpace::<u32>::new_memory(AddressSpaceCacheable::NotCacheable, true, start, last, None);
    let zero = 0u8;
    device(
        "PCI0",
        &[
            &named("_HID", &EISAName::new("PNP0A08")),
            &named("_CID", &EISAName::new("PNP0A03")),
            &named("_SEG", &zero),
            &named("_BBN", &zero),
            &named("_UID", &zero),
            &named("_CRS", &ResourceTemplate::new(vec![&bus, &config, &below, &above, &window])),
        ],
    )
}

/// Motherboard resources: Linux takes the ECAM only if they reserve it.
fn reserved() -> Vec<u8> {
    let ecam = Memory32Fixed::new(true, layout::ECAM_START as u32, layout::ECAM_SIZE as u32);
    let fixed = io(u64::from(pm::IO_BASE), pm::IO_LEN as u8);
    device(
        "MBRD",
        &[
            &named("_HID", &EISAName::new("PNP0C02")),
            &named("_UID", &1u8),
            &named("_CRS", &ResourceTemplate::new(vec![&ecam, &fixed])),
        ],
    )
}

fn serial() -> Vec<u8> {
    let ports = io(layout::PORT_COM1, 8);
    let interrupt = Interrupt::new(true, true, false, false, layout::IRQ_COM1);
    device(
        "COM1",
        &[
            &named("_HID", &EISAName::new("PNP0501")),
            &named("_UID", &1u8),
            &named("_CRS", &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
}

fn clock() -> Vec<u8> {
    let ports = io(layout::PORT_RTC, 2);
    device("RTC_", &[&named("_HID", &EISAName::new("PNP0B00")), &named("_CRS", &ResourceTemplate::new(vec![&ports]))])
}

fn panic_port() -> Vec<u8> {
    let port = io(PVPANIC_PORT, 1);
    device(
        "PEVT",
        &[
            &named("_HID", &"QEMU0001"),
            &named("_STA", &STATUS_PRESENT),
            &named("_CRS", &ResourceTemplate::new(vec![&port])),
        ],
    )
}

/// "Virtual Machine Generation ID" (Microsoft): ADDR gives the address of the 16 bytes.
fn generation_id() -> Vec<u8> {
    let (low, high) = (layout::VMGENID_PAGE as u32, (layout::VMGENID_PAGE >> 32) as u32);
    device(
        "VGEN",
        &[
            &named("_HID", &"VMGENCTR"),
            &named("_CID", &"VM_Gen_Counter"),
            &named("_DDN", &"VM_Gen_Counter"),
            &named("_STA", &STATUS_HIDDEN),
            &named("ADDR", &Package::new(vec![&low, &high])),
        ],
    )
}

/// General purpose event 0 says that the generation id has changed.
fn events() -> Vec<u8> {
    let target = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&target, &VMGENID_CHANGED);
    let method = Method::new(Path::new(&format!("_E{:02X}", pm::GPE_VMGENID)), 0, false, vec![&notify]);
    bytes(&Scope::new("\\_GPE".into(), vec![&method]))
}
