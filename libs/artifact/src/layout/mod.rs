//! OCI image layouts: a directory or a tar with `oci-layout`, `index.json` and `blobs/sha256/<hex>`.
//!
//! [`Layout`] reads both alike; of a tar only the places of its members are remembered, nothing is unpacked. Every blob
//! comes through a [`VerifyingReader`]. [`Sink`] writes both; see `write.rs`.

mod load;
mod source;
mod store;
mod write;
pub(crate) use write::header;

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub use load::{Documents, Loaded};
pub use store::{Removed, Store, StoreSink};
pub use write::{DirSink, Progress, Quiet, Sink, Source, TarSink};

use crate::archive::ArchiveError;
use crate::build::ImageName;
use crate::digest::{Digest, DigestError, VerifyingReader};
use crate::image::{ImageError, MAX_DOCUMENT};
use crate::layer::LayerError;
use crate::manifest::ManifestError;
use crate::media;
use crate::oci;
use crate::platform::{self, MAX_INDEX_DEPTH};

use source::Files;

/// The layout version there is (OCI image layout specification).
const LAYOUT_VERSION: &str = "1.0.0";

/// Why a layout cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A file of the layout, or the layout itself.
    #[error("{} cannot be {verb}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// `read`, `written`, …
        verb: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The tar around the layout.
    #[error("{} is refused", path.display())]
    Archive {
        /// The tar.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ArchiveError,
    },
    /// No `oci-layout`, or one of an unknown version.
    #[error("{} is no OCI image layout ({why})", path.display())]
    NotLayout {
        /// The directory or tar.
        path: PathBuf,
        /// What is missing or wrong.
        why: String,
    },
    /// A JSON document of the layout.
    #[error("{0} cannot be read")]
    Document(String, #[source] serde_json::Error),
    /// A document larger than we hold in memory.
    #[error("{what} has {size} bytes, more than the {MAX_DOCUMENT} allowed")]
    TooLarge {
        /// `index.json`, `the image manifest`, …
        what: String,
        /// Its size in bytes.
        size: u64,
    },
    /// A digest of the layout's documents.
    #[error("a digest in {what} cannot be used")]
    Digest {
        /// The document.
        what: String,
        /// What is wrong with it.
        #[source]
        source: DigestError,
    },
    /// A blob that is named and not there.
    #[error("the layout has no blob {0}")]
    MissingBlob(Digest),
    /// Nothing to choose.
    #[error("the layout has no image for linux/amd64{}{}", if tag.is_empty() { "" } else { " with the tag " }, tag)]
    NoImage {
        /// The tag asked for, or nothing.
        tag: String,
    },
    /// Several images and no tag, or one that several have.
    #[error(
        "the layout has several images{}{}, choose one by its tag, full name or digest: {names}",
        if tag.is_empty() { "" } else { " with the tag " }, tag
    )]
    Ambiguous {
        /// The tag asked for, or nothing.
        tag: String,
        /// What each of them is chosen by.
        names: String,
    },
    /// Indexes within indexes.
    #[error("the image nests indexes deeper than {MAX_INDEX_DEPTH}")]
    Depth,
    /// A directory that is there and not ours to write into.
    #[error("{} exists and is no OCI image layout: choose another place", .0.display())]
    Occupied(PathBuf),
    /// The image in the layout.
    #[error("the image cannot be used")]
    Image(#[source] ImageError),
    /// One of the image's layers.
    #[error("layer {0} cannot be used")]
    Layer(Digest, #[source] LayerError),
    /// A layer whose stream has another digest than the config says.
    #[error("layer {layer} has the wrong diff_id: expected {expected}, found {found}")]
    DiffId {
        /// The blob.
        layer: Digest,
        /// What the config says.
        expected: Digest,
        /// What its decompressed stream has.
        found: Digest,
    },
    /// The text names several images of the store.
    #[error("\"{text}\" names several images of the store: {names}")]
    AmbiguousName {
        /// What was asked for.
        text: String,
        /// The names it could mean.
        names: String,
    },
    /// The store has no image of that name.
    #[error("the store has no image \"{0}\": ovm ls lists what is there, ovm pull fetches it")]
    UnknownName(String),
    /// The OVMS manifest in the layout.
    #[error("the OVMS manifest in {0} is refused")]
    Manifest(String, #[source] ManifestError),
}

/// A layout opened for reading.
pub struct Layout {
    path: PathBuf,
    files: Files,
    index: oci::ImageIndex,
}

/// One entry of a layout's index, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its tag, where it has one.
    pub tag: Option<String>,
    /// The name it gets in containerd, where it has one.
    pub name: Option<String>,
    /// Its manifest's or index's digest.
    pub digest: Digest,
}

impl Layout {
    /// Opens a layout: a directory or a tar.
    ///
    /// # Errors
    /// [`LayoutError`] if it is neither, damaged, or hostile.
    pub fn open(path: &Path) -> Result<Self, LayoutError> {
        let files = Files::open(path)?;
        let not = |why: &str| LayoutError::NotLayout { path: path.to_owned(), why: why.to_owned() };
        let marker = files.document("oci-layout")?.ok_or_else(|| not("it has no file oci-layout"))?;
        let marker: HashMap<String, serde_json::Value> =
            serde_json::from_slice(&marker).map_err(|e| LayoutError::Document("oci-layout".to_owned(), e))?;
        if marker.get("imageLayoutVersion").and_then(|v| v.as_str()) != Some(LAYOUT_VERSION) {
            return Err(not("oci-layout names no version we know"));
        }
        let index = files.document("index.json")?.ok_or_else(|| not("it has no file index.json"))?;
        let index = serde_json::from_slice(&index).map_err(|e| LayoutError::Document("index.json".to_owned(), e))?;
        Ok(Self { path: path.to_owned(), files, index })
    }

    /// The directory or tar.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the index lists.
    ///
    /// # Errors
    /// [`LayoutError::Digest`].
    pub fn entries(&self) -> Result<Vec<Entry>, LayoutError> {
        self.index
            .manifests()
            .iter()
            .map(|descriptor| {
                let digest = digest_of(descriptor, "index.json")?;
                Ok(Entry {
                    tag: annotation(descriptor, media::ANNOTATION_REF_NAME),
                    name: annotation(descriptor, media::ANNOTATION_IMAGE_NAME),
                    digest,
                })
            })
            .collect()
    }

    /// Opens a blob; the reader fails at the end unless size and digest are right.
    ///
    /// # Errors
    /// [`LayoutError::MissingBlob`], [`LayoutError::Io`].
    pub fn blob(&self, digest: &Digest, size: u64) -> Result<VerifyingReader<Box<dyn Read + Send>>, LayoutError> {
        let name = format!("blobs/sha256/{}", digest.hex());
        let reader = self.files.open_file(&name)?.ok_or(LayoutError::MissingBlob(*digest))?;
        Ok(VerifyingReader::new(reader, *digest, size))
    }

    /// Where a blob lies as a file of its own; `None` inside a tar. The path is not verified and may not exist.
    pub fn blob_path(&self, digest: &Digest) -> Option<PathBuf> {
        self.files.path(&format!("blobs/sha256/{}", digest.hex()))
    }

    /// A blob as something that can be written into another layout.
    pub fn source(&self, digest: Digest, size: u64) -> impl Source + '_ {
        source::BlobSource { layout: self, digest, size }
    }

    /// Reads a small blob whole.
    ///
    /// # Errors
    /// [`LayoutError::TooLarge`], [`LayoutError::MissingBlob`], [`LayoutError::Io`] also for a wrong digest.
    pub fn document(&self, what: &str, digest: &Digest, size: u64) -> Result<Vec<u8>, LayoutError> {
        if size > MAX_DOCUMENT {
            return Err(LayoutError::TooLarge { what: what.to_owned(), size });
        }
        let mut bytes = Vec::new();
        self.blob(digest, size)?.named(what).read_to_end(&mut bytes).map_err(|e| self.read_error(e))?;
        Ok(bytes)
    }

    fn read_error(&self, source: io::Error) -> LayoutError {
        LayoutError::Io { path: self.path.clone(), verb: "read", source }
    }

    /// Chooses the image manifest for linux/amd64, by tag if there are several images.
    ///
    /// A tag matches an entry's tag, its full name (short forms are spelled out: `a:1` is `docker.io/library/a:1`) or its
    /// digest. Entries of another platform are passed over.
    ///
    /// # Errors
    /// [`LayoutError::NoImage`], [`LayoutError::Ambiguous`], [`LayoutError::Depth`] and those of reading.
    pub fn select(&self, tag: Option<&str>) -> Result<oci::Descriptor, LayoutError> {
        let found: Vec<_> = self
            .index
            .manifests()
            .iter()
            .filter(|d| platform::is_ours(d) && tag.is_none_or(|t| is_called(d, t)))
            .collect();
        match found.as_slice() {
            [] => Err(LayoutError::NoImage { tag: tag.unwrap_or_default().to_owned() }),
            [first, rest @ ..] if rest.iter().all(|d| d.digest() == first.digest()) => {
                self.descend((*first).clone(), 0)
            }
            several => {
                let names = several.iter().map(|d| shortest_name(d, several)).collect::<Vec<_>>().join(", ");
                Err(LayoutError::Ambiguous { tag: tag.unwrap_or_default().to_owned(), names })
            }
        }
    }

    fn descend(&self, descriptor: oci::Descriptor, depth: usize) -> Result<oci::Descriptor, LayoutError> {
        if !media::is_index(descriptor.media_type().as_ref()) {
            return Ok(descriptor);
        }
        if depth >= MAX_INDEX_DEPTH {
            return Err(LayoutError::Depth);
        }
        let digest = digest_of(&descriptor, "an index")?;
        let bytes = self.document("an index", &digest, descriptor.size())?;
        let index: oci::ImageIndex =
            serde_json::from_slice(&bytes).map_err(|e| LayoutError::Document("an index".to_owned(), e))?;
        let next = platform::choose(index.manifests()).cloned();
        let next = next.ok_or(LayoutError::NoImage { tag: String::new() })?;
        self.descend(next, depth.saturating_add(1))
    }
}

/// Whether an entry of an index is meant by what somebody calls an image.
fn is_called(entry: &oci::Descriptor, text: &str) -> bool {
    let full = ImageName::parse(text).map_or_else(|_| text.to_owned(), |name| name.full);
    annotation(entry, media::ANNOTATION_REF_NAME).is_some_and(|tag| tag == text)
        || annotation(entry, media::ANNOTATION_IMAGE_NAME).is_some_and(|name| name == text || name == full)
        || entry.digest().as_ref() == text
}

/// The shortest that an entry can be called to be told from the other images: tag, full name, digest.
fn shortest_name(entry: &oci::Descriptor, among: &[&oci::Descriptor]) -> String {
    let unique = |name: &String| among.iter().all(|other| other.digest() == entry.digest() || !is_called(other, name));
    let names = [media::ANNOTATION_REF_NAME, media::ANNOTATION_IMAGE_NAME].map(|name| annotation(entry, name));
    names.into_iter().flatten().find(unique).unwrap_or_else(|| entry.digest().to_string())
}

fn annotation(descriptor: &oci::Descriptor, name: &str) -> Option<String> {
    descriptor.annotations().as_ref()?.get(name).cloned()
}

fn digest_of(descriptor: &oci::Descriptor, what: &str) -> Result<Digest, LayoutError> {
    Digest::try_from(descriptor.digest()).map_err(|source| LayoutError::Digest { what: what.to_owned(), source })
}

#[cfg(test)]
mod tests;
