//! PCI as the guest sees it: one bus of type 0 functions behind a host bridge.
//!
//! ```text
//!   0xcf8/0xcfc ─┐
//!                ├─> PciRoot ──> PciFunction (config space) ──bars()──> window map
//!   ECAM window ─┘      │                                                  │
//!   MMIO windows ───────┴──> bar_read/bar_write of the function that decodes the address
//! ```
//!
//! The machine monitor places every BAR before boot ; the guest may place it elsewhere. The root
//! then decodes the new place, and tells a [`BarListener`], so that what hangs on the address outside of this crate
//! (an ioeventfd, a memory slot) moves along.

mod config;
mod msix;
mod pvpanic;
mod root;

use crate::irq::MsiMessage;

pub(crate) use config::ConfigV1;
pub use config::{BarSpec, ConfigSpace, Identity};
pub use msix::{MsiNotifier, Msix, MAX_VECTORS};
pub(crate) use msix::{MsixV1, CAPABILITY_ID as MSIX_CAPABILITY_ID, CONTROL_WRITABLE as MSIX_CONTROL_WRITABLE};
pub use pvpanic::PvPanic;
pub use root::{PciError, PciRoot, PciRootBuilder, CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT, ECAM_LEN};

/// Number of base address registers of a type 0 function.
pub const BAR_COUNT: usize = 6;

/// The address of a function on the one bus there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(
    /// Device number, 0 to 31; the function is always 0.
    pub u8,
);

/// Where a memory BAR is decoded now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRange {
    /// Guest physical address of its first byte.
    pub address: u64,
    /// Length in bytes, a power of two.
    pub size: u64,
}

/// One function on the bus.
///
/// Offsets and lengths of configuration accesses are checked by the caller: `offset + data.len() <= 4096`, at most
/// 4 bytes, naturally aligned. BAR accesses are as they come from the guest.
pub trait PciFunction: Send + Sync {
    /// Loads from configuration space.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Stores to configuration space.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// The BARs that are decoded now: `None` for those that do not exist and for all while memory decoding is off.
    fn bars(&self) -> [Option<BarRange>; BAR_COUNT];

    /// Loads from BAR `bar`.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// Stores to BAR `bar`.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);

    /// Back to the state after power-on, but with the BARs where they were placed first.
    fn reset(&self);
}

/// Is told when the guest turns decoding of a BAR on or off, or moves it. Called on the vCPU thread that wrote the
/// register, with no lock of the function held.
pub trait BarListener: Send + Sync {
    /// BAR `bar` of `slot` was decoded at `old` and is now at `new`; `None` is "not decoded".
    fn bar_moved(&self, slot: Slot, bar: usize, old: Option<BarRange>, new: Option<BarRange>);
}

/// Delivers the MSI-X vectors of one function.
///
/// The machine monitor takes [`MsiNotifier`] over its [`crate::irq::MsiSink`].
pub trait MsixNotifier: Send + Sync {
    /// The guest programmed `vector`: `Some` when it may be delivered now, `None` when it is masked or disabled.
    /// Called on the vCPU thread that wrote the register, and on restore.
    fn configure(&self, vector: u16, message: Option<MsiMessage>);

    /// Delivers `vector`, which is configured.
    fn signal(&self, vector: u16);
}
