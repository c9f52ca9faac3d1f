//! The devices of a virtual machine: each one a pure register machine that knows neither KVM nor the host's event
//! loop, with a thin adapter to the buses and interrupt traits that the machine monitor implements.
//!
//! ```text
//!   vCPU exit ──> Bus ──> BusDevice (serial, rtc, ioapic, pm, PciRoot …)
//!                             │                     └─> PciFunction ──> VirtioPci ──> VirtioDevice ──> Worker thread
//!                             v                                            │                             │
//!                        IrqLine / MsiSink / MsixNotifier  <───────────────┴──────── VirtioInterrupt <───┘
//!                             └──────── implemented above with KVM_SIGNAL_MSI (ADR 0006)
//! ```
//!
//! A virtio device is a folder after one template ([`virtio`]). What is only registers (all of [`legacy`] but the UART,
//! [`pci::PvPanic`]) has neither worker nor queues, so it is one file: registers, [`bus::BusDevice`] or
//! [`pci::PciFunction`], `Persist`, tests. [`pci::PciRoot`] and the interrupt controller are the buses' own.
//!
//! Everything a guest writes is hostile: no register access and no descriptor chain may panic, loop without bound or
//! make the host allocate what the guest asks for. The shared suite in `testkit::contract` holds every device to it.
#![deny(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod bus;
pub mod console;
pub mod dirty;
pub mod irq;
pub mod legacy;
pub mod log_limit;
pub mod machine;
pub mod pci;
mod poll;
mod sync;
#[allow(unsafe_code, reason = "system calls that the standard library does not wrap")]
mod sys;
#[cfg(any(test, feature = "test-util"))]
pub mod testkit;
pub mod threads;
pub mod virtio;

/// Guest memory as every device sees it. What devices write into it is noted while a snapshot asks for it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<dirty::DirtyLog>;
