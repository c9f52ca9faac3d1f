//! Shim → snapshotter: turn a mounted snapshot into a bundle that a machine can start from. One request line, any
//! number of [`FromSnapshotter::Progress`] lines, then one `Resolved` or `Refused` line; then the snapshotter closes.

use std::io::{self, BufRead, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest line that either side reads, in bytes.
pub const MAX_LINE: u64 = 1 << 20;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToSnapshotter {
    /// Make the snapshot whose mount has this source ready to start from, waiting for whatever still runs beside
    /// the pull.
    Resolve {
        /// containerd's namespace.
        namespace: String,
        /// The container's id: its record leads to the image where the snapshots carry no descriptor.
        container: String,
        /// Source directory of the rootfs bind mount, as the snapshotter gave it.
        source: PathBuf,
        /// Directory of a checkpoint to resume from (`ovms_bundle::SnapshotRecord`), which takes the place of what the
        /// image says of RAM; its disk is laid over the snapshot's.
        #[serde(default)]
        checkpoint: Option<PathBuf>,
    },
}

/// What the snapshotter answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromSnapshotter {
    /// Work goes on; a sentence for the log.
    Progress(String),
    /// The bundle record (`ovms_bundle`'s `bundle.json`) of a machine that may start now.
    Resolved {
        /// Absolute path of the record.
        bundle: PathBuf,
        /// Entrypoint and Cmd of the image's config, where the snapshotter had to read it; none: an image with a
        /// descriptor layer, whose Entrypoint is that of every `ovm build`. A container with other arguments was
        /// given them by its user.
        #[serde(default)]
        args: Option<Vec<String>>,
    },
    /// It cannot be.
    Refused {
        /// What the client should make of it.
        kind: RefusalKind,
        /// The whole error chain in one line.
        message: String,
    },
}

/// Kinds of refusal, as containerd's clients know them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalKind {
    /// No such snapshot, image or blob.
    NotFound,
    /// The image, the snapshot or the request is not one that can run.
    Invalid,
    /// Something else holds it, or it is not ready.
    Precondition,
    /// The snapshotter failed.
    Internal,
}

/// Writes one message and its newline.
///
/// # Errors
/// That of the writer.
pub fn write_line<T: Serialize>(to: &mut impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

/// Reads one message; `None` at the end of the stream.
///
/// # Errors
/// That of the reader; `InvalidData` for a line that is too long, unfinished or not such a message.
pub fn read_line<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    let read = io::Read::take(&mut *from, MAX_LINE).read_until(b'\n', &mut line)?;
    if read == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message line ends without a newline"));
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_written_is_read_again() {
        let message = FromSnapshotter::Progress("converting layer 2 of 3".into());
        let mut wire = Vec::new();
        write_line(&mut wire, &message).unwrap();
        let mut reader = wire.as_slice();
        assert_eq!(read_line::<FromSnapshotter>(&mut reader).unwrap(), Some(message));
        assert_eq!(read_line::<FromSnapshotter>(&mut reader).unwrap(), None);
    }

    #[test]
    fn read_unfinished_line_returns_invalid_data() {
        let err = read_line::<FromSnapshotter>(&mut &b"{\"progress\":"[..]).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::InvalidData);
    }
}
