//! Messages between the processes of ovms, and the two framings that carry them.
//!
//! ```text
//!  engine ──control socket (SEQPACKET, fds beside)──> ovms-vmm        one JSON value a packet   [control]
//!     │                                                  │
//!     └<──────────── Reply, Event ───────────────────────┘
//!  shim ──bundle socket (STREAM)──> ovms-snapshotter                  one JSON value a line     [bundle]
//!  ovm, ovms-snapshotter ──machine socket (STREAM)──> engine          one JSON value a line     [machine]
//! ```
//!
//! The first packet that the engine sends is an `ovms_config::VmConfig` with the file descriptors it names; from
//! then on [`control::Request`]s go one way, [`control::FromVmm`] the other. The engine treats what the VMM says as
//! hostile: a guest that breaks out of the machine holds that socket.
#![deny(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod bundle;
mod chain;
pub mod channel;
pub mod control;
pub mod machine;
#[allow(unsafe_code, reason = "the ancillary data of sendmsg and recvmsg")]
mod sys;

pub use chain::chain;
pub use channel::{Channel, ChannelError};
