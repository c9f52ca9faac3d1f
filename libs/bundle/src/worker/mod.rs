//! Parsing one layer in a process of its own, unprivileged and under seccomp.
//!
//! ```text
//!  parent (root)                                    worker (own uid, no privileges, no open, no network, no exec)
//!  creates <dir>/data, <dir>/map ──one packet: ───> takes descriptors, drops everything else
//!  opens the blob                   Request + fds   decompress ─> tar ─> qcow2 | raw ─> data, map
//!  re-reads the map, takes the  <──lines: Progress, Done | Refused──┘
//!  reply as hostile, syncs
//! ```
//! RAM snapshots go the same way, on several threads ([`RamJob`]), and compressed layers of which only the descriptor is
//! wanted ([`LayerReader`]).
//!
//! The worker is the caller's own program started again, so a program that unpacks layers calls [`intercept`] before
//! anything else in its `main`.

mod child;
mod jail;
mod look;
mod parent;
mod ram;
mod wire;

use std::{ffi::OsStr, fs::File, path::Path, process::ExitCode};

use ovms_artifact::{digest::Digest, manifest::DiskFormat};
use ovms_config::settings::LimitSettings;
use serde::{Deserialize, Serialize};

pub use look::LayerReader;
pub use parent::Launcher;
pub use ram::{RamBlob, RamJob};

/// The first argument that makes a program the worker.
pub const ARG: &str = "ovms-layer-worker";

/// Becomes the worker if the program was started as one; `main` then returns the exit code at once.
#[must_use]
pub fn intercept() -> Option<ExitCode> {
    (std::env::args_os().nth(1).as_deref() == Some(OsStr::new(ARG))).then(main)
}

/// The worker itself; the socket to its parent is its standard input.
#[must_use]
pub fn main() -> ExitCode {
    child::main()
}

/// How the input is to be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// A layer blob.
    Layer {
        /// Its media type, which names the compression.
        media_type: String,
        /// Its `ovms.format` annotation.
        format: Option<String>,
    },
    /// A disk file without anything around it, as the walking differ leaves one.
    Disk {
        /// Its format, from its name.
        format: DiskFormat,
    },
}

/// What a layer may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The largest virtual disk in bytes.
    pub disk_virtual: u64,
    /// The most bytes of a disk file, and of data out of it.
    pub layer_data: u64,
    /// The most bytes that one byte of a compressed layer may become.
    pub layer_ratio: u64,
}

impl From<&LimitSettings> for Limits {
    fn from(s: &LimitSettings) -> Limits {
        Limits { disk_virtual: s.disk_virtual, layer_data: s.layer_data, layer_ratio: s.layer_ratio }
    }
}

impl Default for Limits {
    fn default() -> Limits {
        (&LimitSettings::default()).into()
    }
}

/// One layer to unpack.
#[derive(Debug)]
pub struct Job<'a> {
    /// What errors call the layer: its digest.
    pub name: &'a str,
    /// The blob: a file or a pipe, read from where it stands to its end.
    pub input: File,
    /// How to read it.
    pub source: Source,
    /// Digest and size that the blob must have; `None` if the caller has checked them.
    pub expect: Option<(Digest, u64)>,
    /// An existing directory of the caller's, without `data` and `map`, which are made in it (see [`crate::layer`]).
    pub dir: &'a Path,
    /// The caps.
    pub limits: Limits,
}

/// How far the worker is, in bytes of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// All bytes; 0 while that is not known.
    pub total: u64,
}

/// What a job came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A layer of ours; `data` and `map` are in the directory, synced, if it holds a disk.
    Layer(Unpacked),
    /// A layer of an ordinary container image, told by its first file; the directory is as it was.
    Ordinary {
        /// The name of that file.
        first: String,
    },
}

/// What a layer held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    /// Digest of the decompressed stream; `None` for a [`Source::Disk`].
    pub diff_id: Option<Digest>,
    /// Bytes of the decompressed stream.
    pub size: u64,
    /// The disk.
    pub disk: Option<DiskFound>,
    /// The text of its `ovm/manifest.json`, parsed once but not validated.
    pub descriptor: Option<String>,
}

/// A disk that was unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFound {
    /// Its format.
    pub format: DiskFormat,
    /// Size of the disk file in bytes.
    pub file_size: u64,
    /// Digest of the disk file, known where the layer's descriptor came before it.
    pub file_digest: Option<Digest>,
    /// The blob was the disk, without a tar around it.
    pub bare: bool,
    /// The virtual size in bytes.
    pub virtual_size: u64,
    /// Bytes of data in the map.
    pub data_bytes: u64,
}
