//! Builds a runnable image from files.
//!
//! ```text
//! Recipe { OVMS manifest, files } ─ check every file ─ write kernel, initrd, RAM, disk layers
//!    └─ pin the refs to their digests ─ write manifest, descriptor layer, config, OCI manifest ─ index
//! ```
//! The same recipe gives the same bytes: nothing of the clock, the host or the order of a hash map goes in. Times come
//! from the manifest or the caller (`SOURCE_DATE_EPOCH`), and without either there are none.

mod adopt;
mod check;
mod content;
mod name;
mod snapshot;
mod writer;

use std::io;
use std::path::{Path, PathBuf};

use serde_json::json;
use time::format_description::well_known::Rfc3339;
use time::OffsetDateTime;

pub use adopt::{is_pure_artifact, runnable};
pub use name::ImageName;
pub use snapshot::Snapshot;

use crate::digest::Digest;
use crate::image::Blob;
use crate::layout::{LayoutError, Progress, Sink};
use crate::manifest::{
    DiskFormat, DiskLayer, FieldErrors, Manifest, ManifestError, Metadata, Platform, RamCompression, Ref, MAX_MANIFEST,
};
use crate::media;
use crate::oci;

use content::{Plain, Wrapped};
use writer::{Frame, Writer};

/// Why an image cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file is missing or cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The kernel is none.
    #[error("{} is not a kernel that can be booted: {problem}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What it is.
        problem: &'static str,
    },
    /// A disk file cannot be a layer.
    #[error("{} cannot be a disk layer: {problem}", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// Why, and the way out.
        problem: String,
    },
    /// A `ref` that is no file.
    #[error("{field}: \"{reference}\" is {what}, but a build takes files: download it and name the file")]
    NotAFile {
        /// The field, as `kernel.ref`.
        field: String,
        /// What it says.
        reference: String,
        /// `a digest`, `a URL`, `a registry reference`.
        what: &'static str,
    },
    /// The name an image is to have.
    #[error("\"{name}\" cannot be an image's name: {why}")]
    Name {
        /// The name.
        name: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// The hand-written manifest.
    #[error("{} is refused", path.display())]
    Manifest {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// A diff of RAM whose base lacks what it builds on.
    #[error(
        "the snapshot holds only what changed against RAM {parent}, which the image {base} does not have: take a whole \
         one (--full)"
    )]
    NoParent {
        /// The RAM blob that is missing.
        parent: Digest,
        /// The image that should have it.
        base: Digest,
    },
    /// The recipe's manifest.
    #[error("the image's manifest would not be valid")]
    Invalid(#[source] FieldErrors),
    /// A JSON document could not be made.
    #[error("the image's documents cannot be written")]
    Document(#[source] serde_json::Error),
    /// The layout could not be written.
    #[error("the layout cannot be written")]
    Layout(#[source] LayoutError),
}

impl From<LayoutError> for BuildError {
    fn from(error: LayoutError) -> Self {
        Self::Layout(error)
    }
}

/// What an image is to be made of: a manifest, and the file for each of its refs.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The manifest; its refs are replaced by digests.
    pub manifest: Manifest,
    /// The file of `kernel.ref`.
    pub kernel: Option<PathBuf>,
    /// The file of `initrd.ref`.
    pub initrd: Option<PathBuf>,
    /// The files of `diskLayers[].ref`, in their order.
    pub disks: Vec<PathBuf>,
    /// The file of `ramSnapshot.ref`, compressed as the manifest says.
    pub ram_snapshot: Option<PathBuf>,
}

/// How an image is to be written.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The image's names; without any, one of the manifest's name and version.
    pub names: Vec<ImageName>,
    /// Disk layers as the bare disk files instead of tars that hold them.
    pub raw_layers: bool,
    /// When the image was made, where its manifest does not say: seconds since 1970.
    pub epoch: Option<u64>,
}

/// What was built.
#[derive(Debug, Clone, PartialEq)]
pub struct Built {
    /// The image manifest.
    pub image: Blob,
    /// The OVMS manifest as it was written, every ref a digest.
    pub manifest: Manifest,
    /// The image's names.
    pub names: Vec<ImageName>,
    /// Bytes of all blobs together.
    pub size: u64,
}

impl Recipe {
    /// Reads a hand-written manifest whose refs are files, relative to its own folder.
    ///
    /// # Errors
    /// [`BuildError::Read`], [`BuildError::Manifest`], [`BuildError::NotAFile`].
    pub fn from_manifest(path: &Path) -> Result<Self, BuildError> {
        let read = |source| BuildError::Read { path: path.to_owned(), source };
        let size = std::fs::metadata(path).map_err(read)?.len();
        let refused = |source| BuildError::Manifest { path: path.to_owned(), source };
        if size > MAX_MANIFEST {
            return Err(refused(ManifestError::TooLarge(size)));
        }
        let manifest = Manifest::from_slice(&std::fs::read(path).map_err(read)?).map_err(refused)?;
        let base = path.parent().unwrap_or(Path::new(""));
        let file = |field: &str, reference: &Ref| file_of(field, reference, base);
        let kernel = manifest.kernel.as_ref().map(|k| file("kernel.ref", &k.reference)).transpose()?;
        let initrd = manifest.initrd.as_ref().map(|i| file("initrd.ref", &i.reference)).transpose()?;
        let ram_snapshot = manifest.ram_snapshot.as_ref().map(|r| file("ramSnapshot.ref", &r.reference)).transpose()?;
        let disks = manifest.disk_layers.iter().enumerate();
        let disks =
            disks.map(|(i, d)| file(&format!("diskLayers[{i}].ref"), &d.reference)).collect::<Result<_, _>>()?;
        Ok(Self { manifest, kernel, initrd, disks, ram_snapshot })
    }

    /// Adds a disk layer on top.
    pub fn push_disk(&mut self, path: PathBuf, format: DiskFormat) {
        let reference = Ref::File(path.clone());
        self.manifest.disk_layers.push(DiskLayer { reference, format, size: None, extra: serde_json::Map::new() });
        self.disks.push(path);
    }

    /// Judges manifest and files without writing anything.
    ///
    /// # Errors
    /// [`BuildError`] naming field or file.
    pub fn check(&self) -> Result<(), BuildError> {
        self.manifest.validate().map_err(BuildError::Invalid)?;
        if let Some(kernel) = &self.kernel {
            check::kernel(kernel)?;
        }
        for (path, layer) in self.disks.iter().zip(&self.manifest.disk_layers) {
            check::disk(path, layer.format)?;
        }
        for path in self.kernel.iter().chain(&self.initrd).chain(&self.disks).chain(&self.ram_snapshot) {
            plain(path)?;
        }
        Ok(())
    }

    /// Checks the recipe and writes the image into `sink`.
    ///
    /// # Errors
    /// [`BuildError`]; nothing that an index names is written before everything succeeded.
    pub fn build(
        self,
        mut sink: Box<dyn Sink>,
        options: Options,
        progress: &dyn Progress,
    ) -> Result<Built, BuildError> {
        self.check()?;
        if options.raw_layers {
            for (path, layer) in self.disks.iter().zip(&self.manifest.disk_layers) {
                check::bare(path, layer.format)?;
            }
        }
        let mut writer = Writer::new(sink.as_mut(), progress);
        let manifest = writer.write_files(self, &options)?;
        let names = match options.names.is_empty() {
            true => vec![ImageName::of_manifest(&manifest.name, &manifest.version)],
            false => options.names,
        };
        let image = writer.write_documents(&manifest, options.epoch, Frame::of(&manifest))?;
        let size = writer.size;
        let entries = names.iter().map(|name| index_entry(&image, name)).collect::<Result<_, _>>()?;
        sink.finish(entries)?;
        Ok(Built { image, manifest, names, size })
    }
}

impl Writer<'_> {
    /// Writes every file of the recipe and pins the manifest's refs to what was written.
    fn write_files(&mut self, recipe: Recipe, options: &Options) -> Result<Manifest, BuildError> {
        let mut manifest = recipe.manifest;
        fill_metadata(&mut manifest, options.epoch);
        if let (Some(path), Some(kernel)) = (&recipe.kernel, &mut manifest.kernel) {
            kernel.reference = self.list(&plain(path)?, media::KERNEL, None)?.into();
        }
        if let (Some(path), Some(initrd)) = (&recipe.initrd, &mut manifest.initrd) {
            initrd.reference = self.list(&plain(path)?, media::INITRD, None)?.into();
        }
        if let (Some(path), Some(ram)) = (&recipe.ram_snapshot, &mut manifest.ram_snapshot) {
            let media_type = match ram.compression {
                RamCompression::Lz4 => media::RAM_SNAPSHOT_LZ4,
                RamCompression::Zstd => media::RAM_SNAPSHOT_ZSTD,
            };
            ram.reference = self.list(&plain(path)?, media_type, None)?.into();
        }
        for (path, layer) in recipe.disks.iter().zip(&mut manifest.disk_layers) {
            let disk = plain(path)?;
            layer.size = Some(disk.size);
            let digest = match (options.raw_layers, layer.format.member()) {
                (false, Some(member)) => {
                    let read = |source| BuildError::Read { path: path.clone(), source };
                    let wrapped = Wrapped::new(disk, member, options.epoch.unwrap_or_default()).map_err(read)?;
                    self.list(&wrapped, media::OCI_LAYER, Some(layer.format))?
                }
                _ => self.list(&disk, media::OCI_LAYER, Some(layer.format))?,
            };
            layer.reference = digest.into();
        }
        Ok(manifest)
    }
}

/// The entry of a layout's index for one name of the image.
fn index_entry(image: &Blob, name: &ImageName) -> Result<oci::Descriptor, BuildError> {
    serde_json::from_value(json!({
        "mediaType": image.media_type,
        "artifactType": media::MANIFEST,
        "digest": image.digest,
        "size": image.size,
        "platform": { "architecture": "amd64", "os": "linux" },
        "annotations": { media::ANNOTATION_REF_NAME: name.tag, media::ANNOTATION_IMAGE_NAME: name.full },
    }))
    .map_err(BuildError::Document)
}

/// Writes down what the build knows and the manifest leaves open: the platform, and the time if the caller gave one.
fn fill_metadata(manifest: &mut Manifest, epoch: Option<u64>) {
    let metadata = manifest.metadata.get_or_insert_with(Metadata::default);
    let platform = metadata.platform.get_or_insert_with(Platform::default);
    platform.arch.get_or_insert_with(|| "x86_64".to_owned());
    platform.uefi.get_or_insert(false);
    if metadata.created.is_none() {
        metadata.created = rfc3339(epoch);
    }
}

/// Seconds since 1970 as metadata has them.
fn rfc3339(epoch: Option<u64>) -> Option<String> {
    let time = OffsetDateTime::from_unix_timestamp(i64::try_from(epoch?).ok()?).ok()?;
    time.format(&Rfc3339).ok()
}

fn plain(path: &Path) -> Result<Plain, BuildError> {
    Plain::new(path).map_err(|source| BuildError::Read { path: path.to_owned(), source })
}

/// The file a `ref` names. A name that could be a registry's is a file if there is one.
fn file_of(field: &str, reference: &Ref, base: &Path) -> Result<PathBuf, BuildError> {
    let refused = |what| Err(BuildError::NotAFile { field: field.to_owned(), reference: reference.to_string(), what });
    match (reference, reference.path_below(base)) {
        (Ref::File(_), Some(path)) => Ok(path),
        (Ref::Registry(_), Some(path)) if path.exists() => Ok(path),
        (Ref::Registry(_), _) => refused("a registry reference"),
        (Ref::Url(_), _) => refused("a URL"),
        _ => refused("a digest"),
    }
}

#[cfg(test)]
mod tests;
