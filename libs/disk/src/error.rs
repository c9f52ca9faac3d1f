//! What can go wrong with a disk.

use std::io;

/// The result of a disk operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a disk layer, a map, a table or a request was refused, or an operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing a file failed; the source says how.
    #[error("cannot {what}")]
    Io {
        /// What was being done, such as "read the layer file".
        what: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The layer is not of the format that it was said to have.
    #[error("the layer is no qcow2 image: it starts with {found:#010x}")]
    NotQcow2 {
        /// The first four bytes, big endian.
        found: u32,
    },
    /// The qcow2 layer needs something that is refused or unknown.
    #[error("the qcow2 layer uses {what}, which is not supported")]
    Unsupported {
        /// The feature, by name where the image gives one.
        what: String,
    },
    /// The qcow2 layer names another file as its base; layers are stacked by their place in the manifest alone.
    #[error("the qcow2 layer names a backing file {name:?}: clear it with `qemu-img rebase -u -b \"\" FILE`")]
    BackingFile {
        /// The name, shortened.
        name: String,
    },
    /// The qcow2 layer keeps its data in another file.
    #[error("the qcow2 layer names an external data file {name:?}: convert it into one file with `qemu-img convert`")]
    DataFile {
        /// The name, shortened; empty if the image has the flag alone.
        name: String,
    },
    /// The layer breaks the rules of its format.
    #[error("the {format} layer is corrupt: {what}")]
    Corrupt {
        /// The format, "qcow2" or "raw".
        format: &'static str,
        /// The broken rule, with the value that breaks it.
        what: String,
    },
    /// The layer is bigger, or would grow bigger, than the limits allow.
    #[error("the layer's {what} of {value} exceeds the limit of {limit}")]
    Limit {
        /// Which figure.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// A file of our own (layer map, table, top map) is damaged or of another version.
    #[error("the {file} is not usable: {what}")]
    BadFile {
        /// Which kind of file.
        file: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// A request is not made of whole sectors.
    #[error("the request at {offset} of {len} bytes is not aligned to 512 bytes")]
    Unaligned {
        /// Its offset in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A request reaches past the end of the disk.
    #[error("the request at {offset} of {len} bytes reaches past the end of the disk at {size}")]
    OutOfRange {
        /// Its offset in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The disk's size in bytes.
        size: u64,
    },
    /// A write to a disk that was opened read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// An earlier write-back failed, so nothing that was written since the last good flush can be promised.
    #[error("the disk lost a write-back earlier and refuses further writes: restart from the last good state")]
    Poisoned,
}

impl Error {
    /// Makes a function that wraps a system error, for `map_err`.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { what, source }
    }

    /// A broken rule of the qcow2 format.
    pub(crate) fn corrupt(what: impl Into<String>) -> Error {
        Error::Corrupt { format: "qcow2", what: what.into() }
    }

    /// The errno that a guest's or client's request should see, such as `ENOSPC` from the host's file system.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Error::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
