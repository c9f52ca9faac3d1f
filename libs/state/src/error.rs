//! What can go wrong between a machine and its RAM snapshot.

use std::io;

use thiserror::Error;

use crate::{prefix::EPOCH, Incompatible};

/// Why a RAM snapshot cannot be written, read or unpacked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The system.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    /// Not our format at all.
    #[error("it is no RAM snapshot of ovms: the file does not begin with the magic of one")]
    NotOne,
    /// Another format.
    #[error(
        "the RAM snapshot has format epoch {0}, this build reads {EPOCH}: take it again with this version of ovms"
    )]
    Epoch(u32),
    /// A checksum does not hold.
    #[error("the RAM snapshot is damaged: the checksum of {0} does not hold")]
    Checksum(String),
    /// The file says what cannot be.
    #[error("the RAM snapshot is damaged: {0}")]
    Damaged(String),
    /// The head is no JSON of ours.
    #[error("the head of the RAM snapshot cannot be read")]
    Head(#[source] serde_json::Error),
    /// Larger than the caller or the format allows.
    #[error("the {what} of the RAM snapshot has {bytes} bytes, at most {limit} are allowed")]
    TooLarge {
        /// What.
        what: &'static str,
        /// Its size in bytes.
        bytes: u64,
        /// The most that is allowed.
        limit: u64,
    },
    /// Blobs that do not belong together.
    #[error("the chain of RAM snapshots does not fit together: {0}")]
    Chain(String),
    /// A chunk of memory.
    #[error("chunk {chunk} of the RAM snapshot's memory is refused: {why}")]
    Chunk {
        /// Its number.
        chunk: u64,
        /// What is wrong.
        why: String,
    },
    /// This host cannot go on with it.
    #[error("this host cannot resume the RAM snapshot")]
    Incompatible(#[from] Incompatible),
    /// The writer was asked for what cannot be written.
    #[error("the RAM snapshot cannot be written: {0}")]
    Unwritable(String),
    /// The caller gave up.
    #[error("the work on the RAM snapshot was cancelled")]
    Cancelled,
}

impl SnapshotError {
    /// Wraps a system error, for `map_err`.
    pub(crate) fn io(verb: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io(verb, source)
    }

    pub(crate) fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged(what.into())
    }
}
