//! What can go wrong between an image's layers and a machine's files.

use std::{io, path::PathBuf};

use ovms_artifact::{digest::Digest, layout::LayoutError, manifest::ManifestError};

/// The result of a bundle operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a bundle cannot be made or opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory.
    #[error("cannot {verb} {}", path.display())]
    Io {
        /// What was being done with it.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// `bundle.json` is not one.
    #[error("the bundle record {} is not usable: {why}", path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file of the disk.
    #[error("the disk file {} is refused", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ovms_disk::Error,
    },
    /// Another machine holds the disk.
    #[error("the disk {} is in use by {holder}", path.display())]
    InUse {
        /// The top's data file.
        path: PathBuf,
        /// Who holds it, as it named itself.
        holder: String,
    },
    /// The bundle has no writable top, so no machine can run on it.
    #[error("the bundle record {} names no writable disk top: make an instance of it first", .0.display())]
    NoTop(PathBuf),
    /// A running machine's disk has as many frozen tops as are possible.
    #[error(
        "the disk {} was frozen {count} times under its machine, and with its layers that is as much as can be: make an image of it \
         (ovm snapshot, nerdctl commit, ctr snapshots diff) and go on from a machine of that",
        path.display()
    )]
    Frozen {
        /// The top's data file.
        path: PathBuf,
        /// How many frozen tops there are.
        count: usize,
    },
    /// Whoever asked for it has cancelled.
    #[error("it was cancelled")]
    Cancelled,
    /// The worker found the layer to be one that is not accepted.
    #[error("layer {name} is refused: {why}")]
    Refused {
        /// The layer, as the caller named it.
        name: String,
        /// The worker's whole error chain.
        why: String,
    },
    /// The worker died or broke its protocol.
    #[error("the worker for layer {name} failed: {why}")]
    Worker {
        /// The layer, as the caller named it.
        name: String,
        /// How.
        why: String,
    },
    /// A RAM snapshot is not accepted, or its worker failed.
    #[error("RAM snapshot {name} cannot be unpacked: {why}")]
    Ram {
        /// Its digest.
        name: String,
        /// The whole error chain of the worker, or what is missing.
        why: String,
    },
    /// A layer has other content than its image's config says.
    #[error("layer {name} has the diff_id {found}, the image's config says {expected}")]
    DiffId {
        /// The layer.
        name: String,
        /// What the config says.
        expected: Digest,
        /// What was found.
        found: Digest,
    },
    /// A layer that the manifest calls a disk holds none.
    #[error("layer {0} holds no disk, but the manifest lists it as one")]
    NoDisk(String),
    /// The image layout.
    #[error("the image layout cannot be used")]
    Layout(#[source] LayoutError),
    /// The manifest in a record or a descriptor.
    #[error("the OVMS manifest of {0} is refused")]
    Manifest(String, #[source] ManifestError),
    /// The image lacks what every machine needs.
    #[error("{0}")]
    Image(String),
}

impl Error {
    /// Wraps a system error about a path, for `map_err`.
    pub(crate) fn io(verb: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { verb, path, source }
    }

    /// Wraps a disk error about a path, for `map_err`.
    pub(crate) fn disk(path: impl Into<PathBuf>) -> impl FnOnce(ovms_disk::Error) -> Error {
        let path = path.into();
        move |source| Error::Disk { path, source }
    }
}
