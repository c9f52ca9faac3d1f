//! What a layer's first bytes decide, whatever anybody says of it.

use std::io::{self, Read};

use super::LayerError;
use crate::archive;
use crate::manifest::DiskFormat;
use crate::media;

/// So many zeros and no more are an empty archive: far above what any writer pads one to, far below any disk.
const EMPTY_ARCHIVE: u64 = 1 << 20;

/// Whether a blob that is nothing but this disk is read back as it.
///
/// # Errors
/// What reading fails with.
pub(crate) fn can_be_bare(mut disk: impl Read, format: DiskFormat) -> io::Result<bool> {
    let beginning = Beginning::read(&mut disk)?;
    Ok(beginning.kind != Kind::Tar && beginning.refused_as(format).is_none())
}

/// The first bytes of a decompressed layer.
pub(super) struct Beginning {
    /// As much of them as was read.
    pub bytes: Vec<u8>,
    pub kind: Kind,
}

/// What a layer begins with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A tar header.
    Tar,
    /// Zeros to its end, and not many: the empty archive of an ordinary image.
    Empty,
    /// The magic of qcow2.
    Qcow2,
    /// Anything else.
    Other,
}

impl Beginning {
    /// Reads the first block; of zeros as many as an empty archive may have.
    pub(super) fn read(stream: &mut dyn Read) -> io::Result<Self> {
        let mut bytes = Vec::new();
        stream.take(archive::BLOCK).read_to_end(&mut bytes)?;
        let zeros = |bytes: &[u8]| bytes.iter().all(|b| *b == 0);
        let kind = if archive::is_header(&bytes) {
            Kind::Tar
        } else if bytes.starts_with(media::QCOW2_MAGIC) {
            Kind::Qcow2
        } else if zeros(&bytes) {
            stream.take(EMPTY_ARCHIVE.saturating_add(1)).read_to_end(&mut bytes)?;
            let empty = bytes.len() as u64 <= EMPTY_ARCHIVE && zeros(&bytes);
            if empty {
                Kind::Empty
            } else {
                Kind::Other
            }
        } else {
            Kind::Other
        };
        Ok(Self { bytes, kind })
    }

    /// Why a layer that is annotated so, and no tar, is not the disk that the annotation says.
    pub(super) fn refused_as(&self, annotated: DiskFormat) -> Option<LayerError> {
        match (self.kind, annotated) {
            (Kind::Empty, format) => {
                Some(LayerError::Archived { annotation: format.name(), found: "an empty tar archive".to_owned() })
            }
            (Kind::Qcow2, DiskFormat::Raw) => Some(LayerError::Qcow2),
            _ => None,
        }
    }
}
