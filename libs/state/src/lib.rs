//! Saved machine state: what a part of a machine must be able to say about itself so that it can be stopped here
//! and go on elsewhere.
//!
//! Every part (a device, a vCPU, the interrupt routing) saves itself as one [`Section`]: a kind, a version and a
//! payload. The crate knows nothing of the parts; they know only this contract, which is why it lies below them.
//!
//! ```text
//!   part ──save()──> Section{kind, version, payload} ──file/wire──> Section ──restore()──> part
//!                                                        hostile from here ^ until validated
//! ```
//!
//! A section that is read back is hostile: it may come from a registry. [`Persist::restore`] must bound every length
//! and index before it uses one, and leave the part unchanged when it refuses.
//!
//! The file around the sections is the RAM snapshot of `docs/ram-snapshot.md`: sections, the guest's memory in chunks and a
//! [`Head`] that is readable alone.
//!
//! ```text
//!  VMM ──SnapshotWriter──> blob ──registry──> blob(s) ──Unpack──> state file + sparse memory file ──> VMM
//!        put chunks,        one file, each chunk       newest first,       StateFile::read,  mmap
//!        finish sections    compressed on its own      parallel, jailed
//! ```
#![forbid(unsafe_code)]
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

mod blob;
mod error;
mod features;
mod fingerprint;
mod head;
mod index;
mod prefix;
mod section;
mod state_file;
mod unpack;
mod working_set;
mod writer;

pub use blob::Blob;
pub use error::SnapshotError;
pub use fingerprint::{CpuidEntry, DiskPrint, Fingerprint, Incompatible};
pub use head::{Arch, Head, MAX_MEMORY, MAX_SECTIONS};
pub use index::{chunk_count, chunk_len, CHUNK};
pub use prefix::EPOCH;
pub use section::{Persist, Section, StateError, MAX_SECTIONS_BYTES, MAX_SECTION_BYTES};
pub use state_file::StateFile;
pub use unpack::{unpack, Limits, Unpack, Unpacked, MAX_CHAIN};
pub use working_set::{PageRange, WorkingSet, MAX_RANGES};
pub use writer::{SnapshotWriter, Stored, Summary};

/// The result of reading or writing a RAM snapshot.
pub type Result<T> = std::result::Result<T, SnapshotError>;

#[cfg(test)]
mod tests;
