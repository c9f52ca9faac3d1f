//! What goes over the socket between parent and worker: JSON, one value a line; the first line carries descriptors.

use std::io::{self, BufRead, Write};

use ovms_artifact::manifest::DiskFormat;
use serde::{de::DeserializeOwned, Deserialize, Serialize};

use super::{Limits, Progress, Source};

/// The longest line, in bytes: a descriptor of 4 MiB, escaped.
const MAX_LINE: u64 = 32 << 20;

/// The most descriptors beside a request: the memory, the state and the longest chain of blobs.
pub(super) const MAX_FILES: usize = 2 + ovms_state::MAX_CHAIN;

/// Parent → worker.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub task: Task,
    /// User and group id to become; `None`: stay.
    pub ids: Option<(u32, u32)>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Task {
    /// Beside it the descriptors input, data, map, scratch.
    Layer {
        source: Source,
        /// Digest and size of the blob.
        expect: Option<(String, u64)>,
        limits: Limits,
    },
    /// Beside it the descriptor input.
    Look { source: Source, limits: Limits },
    /// Beside it the descriptors memory, state, then the blobs in the order of `blobs`, newest first.
    Ram {
        blobs: Vec<RamBlobTask>,
        /// The most bytes of memory.
        max_memory: u64,
        threads: usize,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RamBlobTask {
    pub digest: String,
    /// Whether the file is yet to be compared with the digest.
    pub verify: bool,
}

/// Worker → parent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Reply {
    Progress(Progress),
    Done(Done),
    /// A RAM snapshot is unpacked.
    Ram,
    Ordinary {
        first: String,
    },
    /// To [`Task::Look`]: a layer with nothing in it.
    Empty,
    Refused {
        why: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Done {
    pub diff_id: Option<String>,
    pub size: u64,
    pub disk: Option<DoneDisk>,
    pub descriptor: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DoneDisk {
    pub format: DiskFormat,
    pub file_size: u64,
    pub file_digest: Option<String>,
    pub bare: bool,
}

pub(super) fn write<T: Serialize>(to: &mut impl Write, value: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// `None` at the end of the stream.
pub(super) fn read<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    io::Read::take(&mut *from, MAX_LINE).read_until(b'\n', &mut line)?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(serde_json::from_slice(&line)?)),
        Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "an unfinished line")),
    }
}
