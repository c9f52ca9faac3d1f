//! A bundle is what a machine starts from: kernel, initial RAM disk, the disk as a block stack, and a writable top.
//!
//! ```text
//!  layer blobs ──worker (sandboxed)──> layer dirs: data + map ─┐
//!  kernel, initrd ──verified copy──────────────────────────────┼─> Record (bundle.json) ──Bundle::open──> files
//!  table (merged maps), top (fresh for each machine) ──────────┘                          top locked
//! ```
//! [`Record`] says where everything is, [`Bundle`] opens and locks it, [`layer`] unpacks one layer through the
//! [`worker`], and [`unpack`] does all of it for an OCI image layout on disk. Where things are kept is the caller's
//! choice: every function takes its paths.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod error;
mod freeze;
pub mod layer;
mod open;
mod publish;
pub mod ram;
mod record;
mod snapshot;
mod snapshot_dir;
pub mod unpack;
pub mod worker;

pub use error::{Error, Result};
pub use freeze::{NewTop, MAX_FROZEN};
pub use open::{create_top, holder, Bundle, DiskFiles, Holder, RamFiles};
/// The Entrypoint of every image that `ovm build` writes, for those who compare a container's arguments with it.
pub use ovms_artifact::image::ENTRYPOINT;
pub use ovms_artifact::manifest::Manifest;
pub use publish::{publish, sync, write_new};
pub use record::{Disk, Ram, Record, TopPaths, RECORD_VERSION};
pub use snapshot::{
    SnapshotDisk, SnapshotRam, SnapshotRecord, SNAPSHOT_DISK, SNAPSHOT_RAM, SNAPSHOT_RECORD, SNAPSHOT_VERSION,
};
pub use snapshot_dir::SnapshotDir;
