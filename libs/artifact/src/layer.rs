//! What a layer blob holds, read from a stream of unknown origin.
//!
//! ```text
//! blob ──(media type)──> decompress ──┬─(a tar)──> ovm/disk.qcow2 | ovm/disk.raw, ovm/manifest.json
//!                                     └─(no tar, annotated)──> the disk itself
//! ```
//! Three things are decided here, each from one source: the compression from the media type, the disk's format from the
//! tar member's name (for a blob that is the disk: from its `ovms.format` annotation), and whether the blob is a tar or
//! the disk from whether its first block is a tar header. A disk's format is never guessed from its bytes: a guest that
//! owns a raw disk can write a qcow2 header into it.
//!
//! What is unpacked is shared by its content alone, between images that annotate it as they like. So the annotation never
//! has the choice between two readings of the same bytes: a blob that begins like an archive is one, and a blob that begins
//! like a qcow2 file is no bare raw disk. What contradicts its annotation is refused; in a tar of ours anything fits.
//!
//! Ordinary container layers are told apart at their first file and refused with [`LayerError::Ordinary`], so a caller
//! that serves both knows at once.

mod beginning;

use std::io::{self, Cursor, Read};

use crate::archive::{ArchiveError, MemberKind, Walker};
use crate::decompress::{CapError, Caps, Decompressed};
use crate::digest::{Digest, Hasher, HashingReader};
use crate::manifest::{DiskFormat, Manifest, ManifestError, MAX_MANIFEST};
use crate::media::{self, Compression};

use beginning::{Beginning, Kind};

pub(crate) use beginning::can_be_bare;

/// Why a layer is refused.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The media type is none of a layer.
    #[error("media type \"{0}\" is not that of a layer")]
    MediaType(String),
    /// The annotation names no format we know.
    #[error("annotation ovms.format: \"{0}\" is not supported, use qcow2 or raw")]
    Format(String),
    /// Neither a tar nor annotated.
    #[error(
        "the layer is no tar archive and has no ovms.format annotation that would say which disk it is: build the \
         image with tar-wrapped layers (the default of ovm build), or copy it with skopeo copy --preserve-digests"
    )]
    Unannotated,
    /// A tar of an ordinary container image; nothing of ours came before this member.
    #[error("the layer is one of an ordinary container image (first file \"{0}\")")]
    Ordinary(String),
    /// A tar of ours that holds something else too.
    #[error("member \"{0}\" has no place in an OVMS layer")]
    Foreign(String),
    /// Both disk names.
    #[error("the layer holds both ovm/disk.qcow2 and ovm/disk.raw, it may hold one")]
    TwoDisks,
    /// Nothing at all.
    #[error("the layer holds neither a disk nor a descriptor")]
    Empty,
    /// Annotated as a bare disk, but an archive of something else.
    #[error(
        "annotation ovms.format says that the layer is a {annotation} disk, but it is {found}: a layer of files must not \
         have the annotation, and a disk that begins like an archive must be built tar-wrapped (the default of ovm build)"
    )]
    Archived {
        /// What the annotation says.
        annotation: &'static str,
        /// What was found.
        found: String,
    },
    /// Annotated as a bare raw disk, but it begins like a qcow2 file.
    #[error(
        "annotation ovms.format says that the layer is a raw disk, but it begins like a qcow2 file: set the annotation to \
         qcow2, or build a raw disk that begins so tar-wrapped (the default of ovm build)"
    )]
    Qcow2,
    /// Annotation and member name disagree.
    #[error("annotation ovms.format says {annotation}, but the layer holds ovm/disk.{member}")]
    FormatMismatch {
        /// What the annotation says.
        annotation: &'static str,
        /// What the member's name says.
        member: &'static str,
    },
    /// More bytes than [`Limits`] allow.
    #[error("the {what} has more than the {limit} bytes allowed")]
    TooLarge {
        /// `disk`, `descriptor` or `layer`.
        what: &'static str,
        /// The limit in bytes.
        limit: u64,
    },
    /// Compressed beyond what a disk can be.
    #[error("the layer decompresses to more than {0} times its size (limits.layer_ratio)")]
    Ratio(u64),
    /// The archive is damaged or does what it must not.
    #[error("the layer's archive is refused")]
    Archive(#[source] ArchiveError),
    /// The descriptor is no manifest.
    #[error("the layer's ovm/manifest.json is refused")]
    Descriptor(#[source] ManifestError),
    /// Who was to read the layer refused it, and says why.
    #[error("{0}")]
    Refused(String),
    /// Reading failed; digest errors of a [`crate::digest::VerifyingReader`] come here.
    #[error("the layer cannot be read")]
    Io(#[source] io::Error),
    /// The visitor failed; its own error.
    #[error("the disk cannot be taken")]
    Visitor(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// How to read a layer: what its descriptor says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoding {
    /// The compression, from the media type.
    pub compression: Compression,
    /// The disk's format, from the annotation.
    pub annotated: Option<DiskFormat>,
}

impl Encoding {
    /// Reads a layer's media type and the value of its annotation [`media::ANNOTATION_FORMAT`], if it has one.
    ///
    /// # Errors
    /// [`LayerError::MediaType`] and [`LayerError::Format`].
    pub fn identify(media_type: &str, format: Option<&str>) -> Result<Self, LayerError> {
        let cut = |text: &str| text.chars().take(100).collect::<String>();
        let compression = media::layer_compression(media_type).ok_or_else(|| LayerError::MediaType(cut(media_type)))?;
        let annotated = match format.map(|name| (name, DiskFormat::from_name(name))) {
            None => None,
            Some((_, Some(format @ (DiskFormat::Qcow2 | DiskFormat::Raw)))) => Some(format),
            Some((name, _)) => return Err(LayerError::Format(cut(name))),
        };
        Ok(Self { compression, annotated })
    }
}

/// Caps on what a layer may make us read or hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of a disk file.
    pub disk: u64,
    /// Most bytes out for each byte in, judged from the first GiB on.
    pub ratio: u64,
}

impl Default for Limits {
    /// 2 TiB, and a ratio that gzip cannot reach and zstd reaches with nothing but zeros.
    fn default() -> Self {
        Self { disk: 2 << 40, ratio: 10_000 }
    }
}

/// The disk file of a layer, as handed to the visitor.
pub struct DiskFile<'a> {
    /// Its format.
    pub format: DiskFormat,
    /// Its size in bytes, where a tar header states it; a bare blob's is known at its end.
    pub size: Option<u64>,
    /// Its bytes.
    pub reader: &'a mut dyn Read,
}

/// What a visitor may fail with.
pub type VisitResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// What was found in a disk file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSummary {
    /// Its format.
    pub format: DiskFormat,
    /// Its size in bytes.
    pub size: u64,
    /// The digest of the disk file itself; computed only if the layer's descriptor came before the disk, since such a
    /// descriptor cannot name its own layer and refers to the disk by this digest.
    pub digest: Option<Digest>,
    /// The blob is the disk, without a tar around it.
    pub bare: bool,
}

/// What a layer held.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSummary {
    /// Digest of the decompressed stream, its end included: the diff_id.
    pub diff_id: Digest,
    /// Bytes of the decompressed stream.
    pub size: u64,
    /// The disk, if it held one.
    pub disk: Option<DiskSummary>,
    /// The descriptor as bytes, if it held one; already parsed once, not validated.
    pub descriptor: Option<Vec<u8>>,
}

/// Who reads a layer to its end: this process, or a sandbox where nobody vouches for the layer.
///
/// [`Limits`] read in this process.
pub trait ReadLayer {
    /// Reads the blob to its end and says what it holds; the disk is for somebody else. What is left of a blob after an error
    /// is the caller's to read.
    ///
    /// # Errors
    /// Those of [`read`]; [`LayerError::Refused`] from a sandbox.
    fn read_layer(&self, blob: &mut dyn Read, encoding: Encoding) -> Result<LayerSummary, LayerError>;
}

impl ReadLayer for Limits {
    fn read_layer(&self, blob: &mut dyn Read, encoding: Encoding) -> Result<LayerSummary, LayerError> {
        read(blob, encoding, self, &mut |_| Ok(()))
    }
}

/// Reads a layer to its end: hands the disk file, if there is one, to `visit`, and says what was found.
///
/// What the visitor leaves unread is read and hashed here. Nothing is verified against a digest: wrap `reader` into a
/// [`crate::digest::VerifyingReader`] for the blob, compare [`LayerSummary::diff_id`] for the layer, and publish what the
/// visitor made only after this returned `Ok`.
///
/// # Errors
/// Every [`LayerError`] but [`LayerError::MediaType`] and [`LayerError::Format`].
pub fn read<R: Read>(
    reader: R,
    encoding: Encoding,
    limits: &Limits,
    visit: &mut dyn FnMut(DiskFile<'_>) -> VisitResult,
) -> Result<LayerSummary, LayerError> {
    read_capped(reader, encoding, limits, Caps::new(u64::MAX, limits.ratio), visit)
}

fn read_capped<R: Read>(
    mut reader: R,
    encoding: Encoding,
    limits: &Limits,
    caps: Caps,
    visit: &mut dyn FnMut(DiskFile<'_>) -> VisitResult,
) -> Result<LayerSummary, LayerError> {
    let decompressed = Decompressed::new(&mut reader, encoding.compression, caps).map_err(LayerError::Io)?;
    let summary = read_decompressed(decompressed, encoding, limits, visit)?;
    // A decoder may stop before its input does; a verifying reader judges at the very end.
    io::copy(&mut reader, &mut io::sink()).map_err(LayerError::Io)?;
    Ok(summary)
}

fn read_decompressed(
    stream: Decompressed<'_>,
    encoding: Encoding,
    limits: &Limits,
    visit: &mut dyn FnMut(DiskFile<'_>) -> VisitResult,
) -> Result<LayerSummary, LayerError> {
    let mut stream = HashingReader::new(stream);
    let beginning = Beginning::read(&mut stream).map_err(stream_error)?;
    let refused = encoding.annotated.and_then(|format| beginning.refused_as(format));
    let Beginning { bytes, kind } = beginning;
    let content = Cursor::new(bytes).chain(&mut stream);
    let (disk, descriptor) = match (kind, encoding.annotated) {
        (Kind::Tar, annotated) => {
            let mut walk = TarWalk { walker: Walker::new(content), disk: None, descriptor: None };
            walk.run(limits, visit).map_err(|error| match (error, annotated) {
                (LayerError::Ordinary(first), Some(format)) => {
                    let found = format!("a tar archive (first file \"{first}\")");
                    LayerError::Archived { annotation: format.name(), found }
                }
                (error, _) => error,
            })?;
            walk.finish(annotated)?
        }
        (Kind::Empty, None) => return Err(LayerError::Empty),
        (_, Some(format)) => match refused {
            Some(error) => return Err(error),
            None => (Some(bare_disk(content, format, limits, visit)?), None),
        },
        (_, None) => return Err(LayerError::Unannotated),
    };
    io::copy(&mut stream, &mut io::sink()).map_err(stream_error)?;
    let size = stream.size();
    Ok(LayerSummary { diff_id: stream.finish(), size, disk, descriptor })
}

fn bare_disk(
    mut content: impl Read,
    format: DiskFormat,
    limits: &Limits,
    visit: &mut dyn FnMut(DiskFile<'_>) -> VisitResult,
) -> Result<DiskSummary, LayerError> {
    let mut disk = Member { inner: &mut content, size: 0, limit: limits.disk, hasher: None, failed: false };
    hand_over(&mut disk, format, None, visit)?;
    Ok(DiskSummary { format, size: disk.size, digest: None, bare: true })
}

/// Gives the disk to the visitor and reads what the visitor left.
fn hand_over(
    disk: &mut Member<'_>,
    format: DiskFormat,
    size: Option<u64>,
    visit: &mut dyn FnMut(DiskFile<'_>) -> VisitResult,
) -> Result<(), LayerError> {
    let visited = visit(DiskFile { format, size, reader: disk });
    match (visited, disk.failed) {
        (Ok(()), _) => io::copy(disk, &mut io::sink()).map(drop).map_err(stream_error),
        // The stream's own error comes back through the visitor's reads: give it its own name again.
        (Err(error), true) => Err(match error.downcast::<io::Error>() {
            Ok(error) => stream_error(*error),
            Err(error) => LayerError::Visitor(error),
        }),
        (Err(error), false) => Err(LayerError::Visitor(error)),
    }
}

/// Recognises our own errors inside an [`io::Error`].
fn stream_error(error: io::Error) -> LayerError {
    let error = match error.downcast::<CapError>() {
        Ok(CapError::Ratio(ratio)) => return LayerError::Ratio(ratio),
        Ok(CapError::Bytes(limit)) => return LayerError::TooLarge { what: "layer", limit },
        Err(other) => other,
    };
    match error.downcast::<DiskTooLarge>() {
        Ok(DiskTooLarge(limit)) => LayerError::TooLarge { what: "disk", limit },
        Err(other) => LayerError::Io(other),
    }
}

/// The walk through a layer's tar.
struct TarWalk<R> {
    walker: Walker<R>,
    disk: Option<DiskSummary>,
    descriptor: Option<Vec<u8>>,
}

impl<R: Read> TarWalk<R> {
    fn run(&mut self, limits: &Limits, visit: &mut dyn FnMut(DiskFile<'_>) -> VisitResult) -> Result<(), LayerError> {
        while let Some(member) = self.walker.next().map_err(archive_error)? {
            let format = match member.path.as_str() {
                "" | media::MEMBER_DIR if member.kind == MemberKind::Folder => continue,
                media::MEMBER_QCOW2 => Some(DiskFormat::Qcow2),
                media::MEMBER_RAW => Some(DiskFormat::Raw),
                media::MEMBER_MANIFEST => None,
                _ if self.disk.is_none() && self.descriptor.is_none() => {
                    return Err(LayerError::Ordinary(member.path));
                }
                _ => return Err(LayerError::Foreign(member.path)),
            };
            if let MemberKind::Special(kind) = member.kind {
                return Err(LayerError::Archive(ArchiveError::Kind(member.path, kind)));
            }
            match format {
                _ if member.kind == MemberKind::Folder => return Err(LayerError::Foreign(member.path)),
                Some(_) if self.disk.is_some() => return Err(LayerError::TwoDisks),
                Some(format) => self.take_disk(format, member.size, limits, visit)?,
                None => self.take_descriptor(member.size)?,
            }
        }
        Ok(())
    }

    fn take_disk(
        &mut self,
        format: DiskFormat,
        size: u64,
        limits: &Limits,
        visit: &mut dyn FnMut(DiskFile<'_>) -> VisitResult,
    ) -> Result<(), LayerError> {
        if size > limits.disk {
            return Err(LayerError::TooLarge { what: "disk", limit: limits.disk });
        }
        let hasher = self.descriptor.is_some().then(Hasher::new);
        let mut content = self.walker.content();
        let mut disk = Member { inner: &mut content, size: 0, limit: limits.disk, hasher, failed: false };
        hand_over(&mut disk, format, Some(size), visit)?;
        let digest = disk.hasher.map(Hasher::finish);
        self.disk = Some(DiskSummary { format, size, digest, bare: false });
        Ok(())
    }

    fn take_descriptor(&mut self, size: u64) -> Result<(), LayerError> {
        if size > MAX_MANIFEST {
            return Err(LayerError::TooLarge { what: "descriptor", limit: MAX_MANIFEST });
        }
        let mut bytes = Vec::new();
        self.walker.content().read_to_end(&mut bytes).map_err(stream_error)?;
        Manifest::parse(&bytes).map_err(LayerError::Descriptor)?;
        self.descriptor = Some(bytes);
        Ok(())
    }

    fn finish(self, annotated: Option<DiskFormat>) -> Result<(Option<DiskSummary>, Option<Vec<u8>>), LayerError> {
        match (annotated, self.disk) {
            (None, None) if self.descriptor.is_none() => Err(LayerError::Empty),
            (Some(annotation), Some(disk)) if annotation != disk.format => {
                Err(LayerError::FormatMismatch { annotation: annotation.name(), member: disk.format.name() })
            }
            (Some(_), None) => Err(LayerError::Empty),
            (_, disk) => Ok((disk, self.descriptor)),
        }
    }
}

fn archive_error(error: ArchiveError) -> LayerError {
    match error {
        ArchiveError::Io(error) => stream_error(error),
        other => LayerError::Archive(other),
    }
}

/// The disk goes on beyond the limit; carried through an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error("the disk has more than {0} bytes")]
struct DiskTooLarge(u64);

/// A disk's bytes: counted, capped, hashed where that is wanted.
struct Member<'a> {
    inner: &'a mut dyn Read,
    size: u64,
    limit: u64,
    hasher: Option<Hasher>,
    /// A read failed: what the visitor then says is about the layer.
    failed: bool,
}

impl Read for Member<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer).inspect_err(|_| self.failed = true)?;
        self.size = self.size.saturating_add(n as u64);
        if self.size > self.limit {
            self.failed = true;
            return Err(io::Error::other(DiskTooLarge(self.limit)));
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(buffer.get(..n).unwrap_or_default());
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests;
