//! From an OCI manifest, its config and the OVMS manifest to one [`Resolved`] image: which blob is what.
//!
//! ```text
//! OCI manifest ─┐
//! OCI config  ──┴─ Parts::new ──> layers with diff_ids, kernel, initrd, RAM by media type
//!                                   │  + OVMS manifest: topmost ovm/manifest.json of the layers (the descriptor),
//!                                   ▼    else the blob of the manifest's media type
//!                                Parts::resolve ──> Resolved
//! ```
//! Copying tools recompress layers and drop `artifactType` and annotations (skopeo does both), so neither is needed: an
//! image is known by its descriptor layer, and a `ref` is matched against diff_ids first, which survive, then against
//! blob digests. Images written by `oras push --config` have no descriptor; theirs is the manifest blob.

use crate::digest::{Digest, DigestError};
use crate::layer::{DiskSummary, Encoding, LayerError};
use crate::manifest::{DiskFormat, FieldErrors, Manifest, Ref};
use crate::media::{self, BlobKind};
use crate::oci;

/// The Entrypoint of every image `ovm build` writes: CRI demands one, nothing runs it. A container whose arguments
/// differ from its image's Entrypoint and Cmd was given arguments by its user.
pub const ENTRYPOINT: &str = "/ovm/boot";

/// Most bytes of an OCI manifest, index or config that are read; the limit registries set.
pub const MAX_DOCUMENT: u64 = 4 << 20;

/// Why an image cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// An OCI document is not what its type says.
    #[error("the {what} cannot be read")]
    Document {
        /// `image manifest`, `image config`, …
        what: &'static str,
        /// What the JSON reader says.
        #[source]
        source: serde_json::Error,
    },
    /// `oras push` without `--config`.
    #[error(
        "the image is a pure artifact (config type {0}), which no container can be made of: \
         `ovm pull` makes it a runnable image"
    )]
    PureArtifact(String),
    /// The config is for another platform.
    #[error("the image is for {os}/{arch}, this runtime runs linux/amd64")]
    Platform {
        /// Operating system of the config.
        os: String,
        /// Architecture of the config.
        arch: String,
    },
    /// containerd refuses such an image too.
    #[error("the image has {layers} layers but its config has {diff_ids} diff_ids")]
    DiffIds {
        /// Layer-typed blobs.
        layers: usize,
        /// Entries of `rootfs.diff_ids`.
        diff_ids: usize,
    },
    /// A digest of another algorithm, or none.
    #[error("{what} cannot be used")]
    Digest {
        /// Which digest.
        what: String,
        /// What is wrong with it.
        #[source]
        source: DigestError,
    },
    /// A layer's type or annotation.
    #[error("layer {0} cannot be used")]
    Layer(Digest, #[source] LayerError),
    /// No OVMS manifest anywhere.
    #[error("the image is no OVMS image: it has neither a descriptor layer nor a blob of type {}", media::MANIFEST)]
    NotOvms,
    /// The manifest names a blob that the image lacks.
    #[error("{field}: the image has no blob {reference}")]
    MissingBlob {
        /// The field, as `kernel.ref`.
        field: String,
        /// What it says.
        reference: String,
    },
    /// The manifest names no digest and the image has none or several blobs of the type.
    #[error("{field}: \"{reference}\" is not a digest, and the image has {found} blobs it could be")]
    Unpinned {
        /// The field, as `kernel.ref`.
        field: String,
        /// What it says.
        reference: String,
        /// How many blobs of that type there are.
        found: usize,
    },
    /// Base first, diffs after it, each once.
    #[error("{0}: its layer does not come after that of the disk layer before it")]
    DiskOrder(String),
    /// What the manifest says of a layer is not what the layer says.
    #[error("{field}: is {manifest}, but the layer is {layer}")]
    DiskFormat {
        /// The field, as `diskLayers[0].format`.
        field: String,
        /// What the manifest says.
        manifest: &'static str,
        /// What the layer's annotation or member says.
        layer: &'static str,
    },
    /// The OVMS manifest does not hold.
    #[error("the OVMS manifest is not valid")]
    Manifest(#[source] FieldErrors),
}

/// A blob of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Its digest, under which a content store has it.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its media type as the image says.
    pub media_type: String,
}

/// A layer-typed blob of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The blob.
    pub blob: Blob,
    /// The digest of its decompressed stream, from the config.
    pub diff_id: Digest,
    /// How it is to be read.
    pub encoding: Encoding,
    /// What [`crate::layer::read`] found in it, where it was read.
    pub disk: Option<DiskSummary>,
}

/// What an image's documents say, before its OVMS manifest is known.
#[derive(Debug, Clone, PartialEq)]
pub struct Parts {
    /// All layer-typed blobs, base first; the descriptor layer is the last of an image of `ovm build`.
    pub layers: Vec<Layer>,
    /// The blob of the OVMS manifest's type.
    pub manifest: Option<Blob>,
    /// Blobs of the kernel's type.
    pub kernels: Vec<Blob>,
    /// Blobs of the initrd's type.
    pub initrds: Vec<Blob>,
    /// Blobs of a RAM snapshot's type.
    pub ram_snapshots: Vec<Blob>,
    /// All other blobs.
    pub others: Vec<Blob>,
}

/// An image with every `ref` resolved to a blob it has.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The OVMS manifest, valid.
    pub manifest: Manifest,
    /// The kernel; without one the machine boots its disk.
    pub kernel: Option<Blob>,
    /// The initial RAM disk.
    pub initrd: Option<Blob>,
    /// The RAM snapshot.
    pub ram_snapshot: Option<Blob>,
    /// The disk's layers, base first.
    pub disks: Vec<Disk>,
}

/// A disk layer with the format its manifest gives it.
#[derive(Debug, Clone, PartialEq)]
pub struct Disk {
    /// The layer.
    pub layer: Layer,
    /// The format, `Qcow2` or `Raw`.
    pub format: DiskFormat,
}

/// Reads an OCI image manifest.
///
/// # Errors
/// [`ImageError::Document`].
pub fn parse_manifest(bytes: &[u8]) -> Result<oci::ImageManifest, ImageError> {
    serde_json::from_slice(bytes).map_err(|source| ImageError::Document { what: "image manifest", source })
}

/// Whether a config descriptor is one that a container can be made of.
///
/// # Errors
/// [`ImageError::PureArtifact`] if not.
pub fn check_config_type(manifest: &oci::ImageManifest) -> Result<(), ImageError> {
    let media_type = manifest.config().media_type().to_string();
    match media::is_image_config(&media_type) {
        true => Ok(()),
        false => Err(ImageError::PureArtifact(media_type)),
    }
}

impl Blob {
    /// The blob a descriptor describes.
    ///
    /// # Errors
    /// [`ImageError::Digest`], for a digest that is not sha256.
    pub fn of(descriptor: &oci::Descriptor) -> Result<Self, ImageError> {
        let media_type = descriptor.media_type().to_string();
        let digest = Digest::try_from(descriptor.digest())
            .map_err(|source| ImageError::Digest { what: format!("the digest of a {media_type} blob"), source })?;
        Ok(Self { digest, size: descriptor.size(), media_type })
    }
}

impl Parts {
    /// Sorts an image's blobs; `config` is the config blob's content.
    ///
    /// # Errors
    /// [`ImageError`] for a pure artifact, another platform, wrong counts, digests or layer annotations.
    pub fn new(manifest: &oci::ImageManifest, config: &[u8]) -> Result<Self, ImageError> {
        check_config_type(manifest)?;
        let config: oci::ImageConfiguration =
            serde_json::from_slice(config).map_err(|source| ImageError::Document { what: "image config", source })?;
        let (os, arch) = (config.os().to_string(), config.architecture().to_string());
        if os != "linux" || arch != "amd64" {
            return Err(ImageError::Platform { os, arch });
        }
        let mut parts = Self::sort(manifest.layers())?;
        let diff_ids = config.rootfs().diff_ids();
        if parts.layers.len() != diff_ids.len() {
            return Err(ImageError::DiffIds { layers: parts.layers.len(), diff_ids: diff_ids.len() });
        }
        for (i, (layer, diff_id)) in parts.layers.iter_mut().zip(diff_ids).enumerate() {
            let what = || format!("diff_id {i} of the config");
            layer.diff_id = diff_id.parse().map_err(|source| ImageError::Digest { what: what(), source })?;
        }
        Ok(parts)
    }

    fn sort(descriptors: &[oci::Descriptor]) -> Result<Self, ImageError> {
        let mut parts = Self {
            layers: Vec::new(),
            manifest: None,
            kernels: Vec::new(),
            initrds: Vec::new(),
            ram_snapshots: Vec::new(),
            others: Vec::new(),
        };
        for descriptor in descriptors {
            let blob = Blob::of(descriptor)?;
            match BlobKind::of(&blob.media_type) {
                BlobKind::Layer(_) => {
                    let format = descriptor.annotations().as_ref().and_then(|a| a.get(media::ANNOTATION_FORMAT));
                    let encoding = Encoding::identify(&blob.media_type, format.map(String::as_str))
                        .map_err(|e| ImageError::Layer(blob.digest, e))?;
                    parts.layers.push(Layer { diff_id: blob.digest, blob, encoding, disk: None });
                }
                BlobKind::Manifest if parts.manifest.is_none() => parts.manifest = Some(blob),
                BlobKind::Kernel => parts.kernels.push(blob),
                BlobKind::Initrd => parts.initrds.push(blob),
                BlobKind::RamSnapshot => parts.ram_snapshots.push(blob),
                BlobKind::Manifest | BlobKind::BootstrapConfig | BlobKind::Other => parts.others.push(blob),
            }
        }
        Ok(parts)
    }

    /// All blobs that are not layers.
    pub fn plain_blobs(&self) -> impl Iterator<Item = &Blob> {
        let typed = [&self.kernels, &self.initrds, &self.ram_snapshots, &self.others];
        self.manifest.iter().chain(typed.into_iter().flatten())
    }

    /// The chain id of the topmost layer: the name of the snapshot a container starts from; `None` without layers.
    pub fn chain_id(&self) -> Option<Digest> {
        self.layers.iter().fold(None, |parent, layer| Some(layer.diff_id.chained_on(parent.as_ref())))
    }

    /// Finds the blob of every `ref` of the OVMS manifest, which is validated first.
    ///
    /// # Errors
    /// [`ImageError`] naming the field.
    pub fn resolve(&self, manifest: Manifest) -> Result<Resolved, ImageError> {
        manifest.validate().map_err(ImageError::Manifest)?;
        let find = |field: &str, reference: Option<&Ref>, typed: &[Blob]| {
            reference.map(|reference| self.find_blob(field, reference, typed)).transpose()
        };
        let kernel = find("kernel.ref", manifest.kernel.as_ref().map(|k| &k.reference), &self.kernels)?;
        let initrd = find("initrd.ref", manifest.initrd.as_ref().map(|i| &i.reference), &self.initrds)?;
        let ram = manifest.ram_snapshot.as_ref().map(|r| &r.reference);
        let ram_snapshot = find("ramSnapshot.ref", ram, &self.ram_snapshots)?;
        let disks = self.find_disks(&manifest)?;
        Ok(Resolved { manifest, kernel, initrd, ram_snapshot, disks })
    }

    /// A blob by digest (of whatever type), or by its type where the manifest was written without digests.
    fn find_blob(&self, field: &str, reference: &Ref, typed: &[Blob]) -> Result<Blob, ImageError> {
        let Some(digest) = reference.digest() else {
            return match typed {
                [only] => Ok(only.clone()),
                _ => Err(unpinned(field, reference, typed.len())),
            };
        };
        let all = [&self.kernels, &self.initrds, &self.ram_snapshots, &self.others];
        all.into_iter()
            .flatten()
            .find(|blob| blob.digest == digest)
            .cloned()
            .ok_or_else(|| ImageError::MissingBlob { field: field.to_owned(), reference: reference.to_string() })
    }

    /// The layers of the disk, each above the one before it; one layer's content may come several times.
    fn find_disks(&self, manifest: &Manifest) -> Result<Vec<Disk>, ImageError> {
        let mut disks = Vec::new();
        let mut above = self.layers.as_slice();
        for (i, disk) in manifest.disk_layers.iter().enumerate() {
            let field = format!("diskLayers[{i}].ref");
            let at = match disk.reference.digest() {
                Some(digest) => position(above, &digest).ok_or_else(|| match position(&self.layers, &digest) {
                    Some(_) => ImageError::DiskOrder(field.clone()),
                    None => ImageError::MissingBlob { field: field.clone(), reference: digest.to_string() },
                })?,
                // Written without digests: the layers are the disk, in their order, if their number says so.
                None if self.layers.len() == manifest.disk_layers.len() => 0,
                None => return Err(unpinned(&field, &disk.reference, self.layers.len())),
            };
            let rest = above.get(at..).unwrap_or_default();
            let Some((layer, rest)) = rest.split_first() else { break };
            above = rest;
            check_format(i, disk.format, layer)?;
            disks.push(Disk { layer: layer.clone(), format: disk.format });
        }
        Ok(disks)
    }
}

/// Where a `ref` points among the layers: diff_ids first, then blob digests, then the disk files inside.
fn position(layers: &[Layer], digest: &Digest) -> Option<usize> {
    let by = |matches: &dyn Fn(&Layer) -> bool| layers.iter().position(matches);
    by(&|l| l.diff_id == *digest)
        .or_else(|| by(&|l| l.blob.digest == *digest))
        .or_else(|| by(&|l| l.disk.is_some_and(|d| d.digest == Some(*digest))))
}

fn check_format(index: usize, manifest: DiskFormat, layer: &Layer) -> Result<(), ImageError> {
    let found = layer.disk.map(|d| d.format).or(layer.encoding.annotated);
    match found.filter(|found| *found != manifest) {
        None => Ok(()),
        Some(found) => Err(ImageError::DiskFormat {
            field: format!("diskLayers[{index}].format"),
            manifest: manifest.name(),
            layer: found.name(),
        }),
    }
}

fn unpinned(field: &str, reference: &Ref, found: usize) -> ImageError {
    ImageError::Unpinned { field: field.to_owned(), reference: reference.to_string(), found }
}

#[cfg(test)]
mod tests;
