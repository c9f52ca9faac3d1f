//! The machine on KVM: one process, one virtual machine.
//!
//! ```text
//!   control socket ─> owner thread ──gate, kick──> vCPU threads ──exits──> Bus ──> devices ──> worker threads
//!        ^               │   ^                          │                            │
//!        └── events ─────┘   └────────── mailbox ───────┴────────────────────────────┘
//! ```
//!
//! [`machine::Machine`] is built in one way, whatever then gives it its state: memory first, then the virtual machine
//! and its processors, then devices, then ([`boot`]) a kernel. [`control`] owns it afterwards. What a guest can reach
//! (exits, kernel images) never panics: the lints below forbid it outside of tests.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod acpi;
pub mod boot;
pub mod clock;
pub mod control;
pub mod cpuid;
pub mod fds;
pub mod jail;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod mailbox;
pub mod memory;
pub mod report;
pub mod saved;
pub mod seccomp;
pub mod snapshot;
pub mod timeline;
pub mod transition;
pub mod vcpu;
pub mod wiring;
pub mod working_set;
