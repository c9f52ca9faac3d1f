//! Disks of a virtual machine: disk layers in, one block stack, disk layers out.
//!
//! An image's disk is a list of layers, base first, each a qcow2 or a raw file that holds only what differs from the
//! layers below. Parsing those formats is dangerous and slow, so it happens once, when a layer arrives:
//!
//! ```text
//!  layer blob ──[layer::convert]──> sparse raw file, same offsets  +  LayerMap (data | zero | absent)
//!                                                                       │ Table::overlay, one per layer
//!                                                                       v
//!  Stack = writable Top (sparse file + block map) ─> frozen tops ─> Table: extent → layer file | zero
//!                                  │
//!                                  └──[qcow2::Plan]──> qcow2 v3 diff layer
//! ```
//!
//! A read is one look-up in the top's map, one in the table, and one `preadv`, however many layers there are. Every
//! offset and length in this crate is in bytes; requests must be whole 512-byte sectors.
//!
//! Everything read from a layer, a map or a table file is taken as hostile: no panic, no allocation that a file's
//! claims alone could drive, and each error names what was wrong. Where offsets were checked against a disk's size once,
//! plain arithmetic follows; the parser of layers denies that too.

#![deny(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod error;
pub mod layer;
mod map;
mod merge;
pub mod qcow2;
mod source;
mod stack;
#[allow(unsafe_code, reason = "a mapped file, and I/O on guest memory")]
mod sys;
mod table;
mod tiles;
mod top;

pub use error::{Error, Result};
pub use map::{Extent, LayerMap, State};
pub use source::ReadAt;
pub use stack::{NextTop, Stack, StackFiles, TopFiles};
pub use table::{Table, TableExtent};
pub use top::Top;

/// Bytes in a sector: the unit in which requests and extents are aligned.
pub const SECTOR: u64 = 512;
