//! Where everything lies in the guest's physical address space and port space.
//!
//! ```text
//!  0        640K     896K   1M              3G (or less)     3G      3.5G   +1M     4G           top
//!  |-- RAM --|  hole  |ACPI |-- RAM, kernel --|     . . .     |- BARs -|ECAM|  APICs |-- RAM high --|
//! ```
//!
//! RAM beyond 3 GiB continues at 4 GiB. All of it is fixed but the two ends of RAM: a snapshot is restored onto the
//! same map.

/// End of conventional memory; what lies above, up to 1 MiB, is no RAM in the memory map.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// The GDT of the 64-bit boot protocol.
pub const BOOT_GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// Module list of the PVH protocol.
pub const PVH_MODULES: u64 = 0x6040;
/// Memory map of the PVH protocol.
pub const PVH_MEMORY_MAP: u64 = 0x7000;
/// The zero page (`boot_params`) of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of the 64-bit boot protocol: PML4, PDPT, page directory.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub const CMDLINE: u64 = 0x2_0000;

/// ACPI tables: inside the area that an operating system scans for the RSDP (ACPI 6.5, 5.2.5.1).
pub const ACPI_START: u64 = 0xe_0000;
/// Where the ACPI tables must end.
pub const ACPI_END: u64 = 0xf_f000;
/// The page that holds the VM generation id; the last one below 1 MiB.
pub const VMGENID_PAGE: u64 = 0xf_f000;

/// Where high memory begins and kernels are loaded.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_LIMIT: u64 = 3 << 30;
/// RAM above the hole begins here.
pub const HIGH_RAM_START: u64 = 4 << 30;

/// The window for memory BARs.
pub const BAR_WINDOW_START: u64 = 0xc000_0000;
/// Size of [`BAR_WINDOW_START`]'s window in bytes.
pub const BAR_WINDOW_SIZE: u64 = 0x2000_0000;
/// PCI Express configuration space (ECAM) of the one bus.
pub const ECAM_START: u64 = 0xe000_0000;
/// 32 devices × 8 functions × 4 KiB.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// The IOAPIC's registers.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// The local APICs' registers, served by KVM.
pub const LOCAL_APIC_START: u64 = 0xfee0_0000;
/// Page of the identity map that KVM needs on Intel processors without unrestricted guests.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The three pages of the task state segment that KVM needs there.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// COM1.
pub const PORT_COM1: u64 = 0x3f8;
/// Keyboard controller: data; its command port is 0x64.
pub const PORT_I8042: u64 = 0x60;
/// Keyboard controller: command.
pub const PORT_I8042_COMMAND: u64 = 0x64;
/// Real-time clock: index and data.
pub const PORT_RTC: u64 = 0x70;
/// PCI configuration mechanism #1, with the reset control register 0xcf9 in its midst.
pub const PORT_PCI_CONFIG: u64 = 0xcf8;

/// Pins of the IOAPIC.
pub const IOAPIC_PINS: u32 = 24;
/// COM1's pin.
pub const IRQ_COM1: u32 = 4;
