//! What goes over the socket between parent and worker: JSON, one value a line; the first line carries descriptors.

use std::io::{self, BufRead, Write};

use ovms_artifact::manifest::DiskFormat;
use serde::{de::DeserializeOwned, Deserialize, Serialize};

use super::{Limits, Progress, Source};

/// The longest line, in bytes: a descriptor of 4 MiB, escaped.
const MAX_LINE: u64 = 32 << 20;

/// Parent → worker, beside the descriptors input, data, map, scratch.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub source: Source,
    /// Digest and size of the blob.
    pub expect: Option<(String, u64)>,
    pub limits: Limits,
    /// User and group id to become; `None`: stay.
    pub ids: Option<(u32, u32)>,
}

/// Worker → parent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Reply {
    Progress(Progress),
    Done(Done),
    Ordinary { first: String },
    Refused { why: String },
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
