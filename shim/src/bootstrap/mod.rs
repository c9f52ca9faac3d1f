//! What containerd runs this program for, apart from serving: `start`, `delete` and `-info`.
//!
//! ```text
//!  containerd ── start ──> binds the socket ── spawns ──> serve (own session, none of containerd's descriptors)
//!      ▲                        │                            ▲
//!      └── address on stdout ───┘                            │ ttrpc over the socket
//!      └────────────────────────────────────────────────────┘
//! ```
//! Standard output carries the answer and nothing else; containerd reads standard error into the same buffer for
//! `start`, so an error is all that is ever written there. Both containerds before 2.3 (task options on standard
//! input) and after (`BootstrapParams`) take the plain address, which announces version 2 of the task API: it is what
//! keeps `delete` and the synthetic exit events of a dead shim for every container.
mod delete;
mod info;
mod note;
mod params;
mod socket;
mod start;

pub use delete::delete;
pub use info::info;
pub use note::Note;
pub use start::start;
