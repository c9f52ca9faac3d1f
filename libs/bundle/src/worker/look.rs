//! Looking into a layer without unpacking it: which descriptor it holds, and what its content's digest is.
//!
//! ```text
//!  parent: reads and hashes the blob ──pipe──> worker: decompress ─> tar ─> descriptor, figures of the disk
//!          <──one line: Done | Ordinary | Empty | Refused──────────────┘
//! ```
//! Only decoders are kept out of the parent: a layer that is not compressed is walked by it as it is, which is safe code
//! that holds a header and at most one descriptor.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use ovms_artifact::layer::{self, DiskSummary, Encoding, LayerError, LayerSummary, ReadLayer};
use ovms_artifact::manifest::{ManifestError, MAX_MANIFEST};
use ovms_artifact::media::{self, Compression};
use ovms_proto::chain;

use super::{
    parent::printable,
    wire::{Done, Reply, Request, Task},
    Launcher, Limits, Source,
};

/// Bytes that are handed on at once.
const PIECE: usize = 64 << 10;

/// Reads layers: compressed ones in a worker.
#[derive(Debug, Clone)]
pub struct LayerReader {
    /// Starts the workers.
    pub launcher: Launcher,
    /// Caps on each layer.
    pub limits: Limits,
}

impl ReadLayer for LayerReader {
    fn read_layer(&self, blob: &mut dyn Read, encoding: Encoding) -> Result<LayerSummary, LayerError> {
        if encoding.compression == Compression::None {
            let limits = layer::Limits { disk: self.limits.layer_data, ratio: self.limits.layer_ratio };
            return limits.read_layer(blob, encoding);
        }
        let source = Source::Layer {
            media_type: media::layer_type(encoding.compression).into(),
            format: encoding.annotated.map(|format| format.name().into()),
        };
        let request = Request { task: Task::Look { source, limits: self.limits }, ids: self.launcher.ids() };
        let (theirs, ours) = io::pipe().map_err(LayerError::Io)?;
        let theirs = File::from(OwnedFd::from(theirs));
        let worker = self.launcher.begin(&request, &[theirs.as_fd()]).map_err(|e| LayerError::Refused(chain(&e)))?;
        // Or a worker that dies would never be noticed.
        drop(theirs);
        feed(blob, ours)?;
        match worker.end(&mut |_| true) {
            Ok(Reply::Done(done)) => accept(done),
            Ok(Reply::Ordinary { first }) => Err(LayerError::Ordinary(printable(&first))),
            Ok(Reply::Empty) => Err(LayerError::Empty),
            Ok(_) => Err(broken("it answered what it was not asked")),
            Err(crate::Error::Refused { why, .. }) => Err(LayerError::Refused(why)),
            Err(crate::Error::Worker { why, .. }) => Err(broken(&why)),
            Err(other) => Err(LayerError::Refused(chain(&other))),
        }
    }
}

/// Hands the blob on, to its end or as far as the worker wants to know it.
fn feed(blob: &mut dyn Read, mut to: io::PipeWriter) -> Result<(), LayerError> {
    let mut buffer = vec![0; PIECE];
    loop {
        let n = match blob.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(LayerError::Io(e)),
        };
        match to.write_all(buffer.get(..n).unwrap_or_default()) {
            // What it has seen it says itself.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.map_err(LayerError::Io)?,
        }
    }
}

/// The worker may have been taken over by what it read: what it says must make sense, no more is known.
fn accept(done: Done) -> Result<LayerSummary, LayerError> {
    let digest = |text: String| text.parse().map_err(|_| broken("its digest is none"));
    let diff_id = done.diff_id.map(digest).transpose()?.ok_or_else(|| broken("it gave no digest"))?;
    let disk = match done.disk {
        None => None,
        Some(disk) => Some(DiskSummary {
            format: disk.format,
            size: disk.file_size,
            digest: disk.file_digest.map(digest).transpose()?,
            bare: disk.bare,
        }),
    };
    let descriptor = done.descriptor.map(String::into_bytes);
    if let Some(length) = descriptor.as_ref().map(|text| text.len() as u64).filter(|length| *length > MAX_MANIFEST) {
        return Err(LayerError::Descriptor(ManifestError::TooLarge(length)));
    }
    Ok(LayerSummary { diff_id, size: done.size, disk, descriptor })
}

fn broken(why: &str) -> LayerError {
    LayerError::Refused(format!("its worker failed: {why}"))
}
