//! What an operator sets, where ovms keeps things, and what a machine is made of.
//!
//! ```text
//!  ovms.toml ──> Settings ─┐
//!  OCI spec, annotations ──┼─ engine ──> VmConfig (wire) ──control socket──> VmSpec (validated) ──> machine
//!  image's descriptor ─────┘
//! ```
//! Beside the crate lie the files that an operator installs: `containerd/`, `systemd/`, `schema/`.
#![forbid(unsafe_code)]

pub mod paths;
pub mod programs;
pub mod settings;
pub mod size;
pub mod vm;

pub use settings::Settings;
pub use vm::{VmConfig, VmSpec};
