//! The devices of a PC that a stock kernel still expects at fixed ports and addresses.
//!
//! | range | device |
//! | --- | --- |
//! | I/O 0x3f8, 8 ports | [`Serial`] (COM1, IRQ 4, edge) |
//! | I/O 0x70, 2 ports | [`Rtc`] |
//! | I/O 0x60 and 0x64; 0x92 | [`I8042`]; [`SystemControl`] |
//! | I/O 0x80 | [`DebugPort`] |
//! | I/O 0x505 | [`PvPanicPort`] |
//! | I/O [`pm::IO_BASE`], [`pm::IO_LEN`] ports | [`Pm`] (SCI on IRQ 9, level) |
//! | I/O 0xcf9 | [`ResetPort`] |
//! | MMIO 0xfec00000, 4 KiB | [`Ioapic`] |

mod debug_port;
mod i8042;
mod ioapic;
pub mod pm;
mod pvpanic;
mod reset;
mod rtc;
mod serial;
mod vmgenid;

pub use debug_port::DebugPort;
pub use i8042::I8042;
pub use ioapic::{Ioapic, IoapicPin, IoapicRoutes, IOAPIC_BASE, IOAPIC_LEN, IOAPIC_PINS};
pub use pm::Pm;
pub(crate) use pvpanic::PvPanicRegister;
pub use pvpanic::{PvPanicPort, PVPANIC_PORT};
pub use reset::{ResetPort, SystemControl};
pub use rtc::{Rtc, WallClock};
pub use serial::Serial;
pub use vmgenid::VmGenId;
