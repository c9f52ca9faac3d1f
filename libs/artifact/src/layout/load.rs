//! An image of a layout, read as far as running it needs: documents, descriptor, resolved refs.

use std::io;

use super::write::Advancing;
use super::{digest_of, Layout, LayoutError, Progress, Quiet};
use crate::digest::{Digest, DigestError};
use crate::image::{self, Blob, ImageError, Parts, Resolved};
use crate::layer::{LayerError, Limits, ReadLayer};
use crate::manifest::Manifest;
use crate::media::Compression;
use crate::oci;

/// An image of a layout.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The image manifest: its digest is the image's identity.
    pub image: Blob,
    /// The config blob.
    pub config: Blob,
    /// The image's blobs, sorted.
    pub parts: Parts,
    /// Every `ref` of the OVMS manifest, resolved.
    pub resolved: Resolved,
    /// The layer that held the OVMS manifest; `None` if it is a blob of its own.
    pub descriptor: Option<Digest>,
}

/// An image's OCI documents as they are.
#[derive(Debug, Clone)]
pub struct Documents {
    /// The image manifest's blob.
    pub image: Blob,
    /// The image manifest.
    pub manifest: oci::ImageManifest,
    /// The config's bytes.
    pub config: Vec<u8>,
}

/// The OVMS manifest of an image and where it was found.
struct Found {
    manifest: Manifest,
    descriptor: Option<Digest>,
}

impl Layout {
    /// Reads the image for linux/amd64 (by tag, if there are several) and resolves its manifest.
    ///
    /// Layers are read and verified from the top until one holds a descriptor, which for an image of `ovm build` is the
    /// first, of a few kilobytes; the disks below are left alone. [`Layout::verify`] reads everything. Both read in this
    /// process: for layouts that somebody vouches for.
    ///
    /// # Errors
    /// [`LayoutError`] naming document, blob or field.
    pub fn load(&self, tag: Option<&str>) -> Result<Loaded, LayoutError> {
        self.load_image(&self.select(tag)?, &Limits::default())
    }

    /// [`Layout::load`] of an image manifest that was chosen already, its layers read by `layers`.
    ///
    /// # Errors
    /// [`LayoutError`] naming document, blob or field.
    pub fn load_image(&self, image: &oci::Descriptor, layers: &dyn ReadLayer) -> Result<Loaded, LayoutError> {
        let (image, config, mut parts) = self.parts(image)?;
        let mut found = None;
        for layer in parts.layers.iter_mut().rev() {
            if let Some(manifest) = self.read_layer(layer, layers, &Quiet)? {
                found = Some(Found { manifest, descriptor: Some(layer.blob.digest) });
                break;
            }
        }
        self.finish(image, config, parts, found)
    }

    /// [`Layout::load`], and every blob read to its end: digests, diff_ids, the structure of every layer.
    ///
    /// # Errors
    /// [`LayoutError`] naming the blob.
    pub fn verify(&self, tag: Option<&str>, progress: &dyn Progress) -> Result<Loaded, LayoutError> {
        let (image, config, mut parts) = self.parts(&self.select(tag)?)?;
        self.verify_plain(&parts, progress)?;
        let mut found = None;
        for layer in &mut parts.layers {
            // A layer above may hold a descriptor of its own, which then wins.
            if let Some(manifest) = self.read_layer(layer, &Limits::default(), progress)? {
                found = Some(Found { manifest, descriptor: Some(layer.blob.digest) });
            }
        }
        self.finish(image, config, parts, found)
    }

    /// [`Layout::load_image`], and every blob read to its end but the disk's layers, which are for a sandbox to parse.
    ///
    /// # Errors
    /// [`LayoutError`] naming the blob.
    pub fn verify_but_disks(
        &self,
        image: &oci::Descriptor,
        layers: &dyn ReadLayer,
        progress: &dyn Progress,
    ) -> Result<Loaded, LayoutError> {
        let mut loaded = self.load_image(image, layers)?;
        self.verify_plain(&loaded.parts, progress)?;
        let disks = &loaded.resolved.disks;
        let is_disk = |layer: &image::Layer| disks.iter().any(|disk| disk.layer.blob.digest == layer.blob.digest);
        for layer in loaded.parts.layers.iter_mut().filter(|layer| !is_disk(layer)) {
            self.read_layer(layer, layers, progress)?;
        }
        Ok(loaded)
    }

    fn verify_plain(&self, parts: &Parts, progress: &dyn Progress) -> Result<(), LayoutError> {
        for blob in parts.plain_blobs() {
            let mut reader = Advancing { inner: self.blob(&blob.digest, blob.size)?, progress };
            progress.begin(&blob.digest.to_string(), blob.size);
            io::copy(&mut reader, &mut io::sink()).map_err(|e| self.read_error(e))?;
            progress.end();
        }
        Ok(())
    }

    /// Reads an image's OCI manifest and config.
    ///
    /// # Errors
    /// [`LayoutError`] naming the document.
    pub fn documents(&self, image: &oci::Descriptor) -> Result<Documents, LayoutError> {
        let digest = digest_of(image, "index.json")?;
        let image = Blob::of(image).map_err(LayoutError::Image)?;
        let bytes = self.document("the image manifest", &digest, image.size)?;
        let manifest = image::parse_manifest(&bytes).map_err(LayoutError::Image)?;
        image::check_config_type(&manifest).map_err(LayoutError::Image)?;
        let config = Blob::of(manifest.config()).map_err(LayoutError::Image)?;
        let config = self.document("the image config", &config.digest, config.size)?;
        Ok(Documents { image, manifest, config })
    }

    fn parts(&self, image: &oci::Descriptor) -> Result<(Blob, Blob, Parts), LayoutError> {
        let Documents { image, manifest, config: bytes } = self.documents(image)?;
        let config = Blob::of(manifest.config()).map_err(LayoutError::Image)?;
        let parts = Parts::new(&manifest, &bytes).map_err(LayoutError::Image)?;
        Ok((image, config, parts))
    }

    fn finish(&self, image: Blob, config: Blob, parts: Parts, found: Option<Found>) -> Result<Loaded, LayoutError> {
        let Found { manifest, descriptor } = match found {
            Some(found) => found,
            None => Found { manifest: self.manifest_blob(&parts)?, descriptor: None },
        };
        let resolved = parts.resolve(manifest).map_err(LayoutError::Image)?;
        Ok(Loaded { image, config, parts, resolved, descriptor })
    }

    fn manifest_blob(&self, parts: &Parts) -> Result<Manifest, LayoutError> {
        let blob = parts.manifest.as_ref().ok_or(LayoutError::Image(ImageError::NotOvms))?;
        let bytes = self.document("the OVMS manifest", &blob.digest, blob.size)?;
        Manifest::parse(&bytes).map_err(|e| LayoutError::Manifest(format!("blob {}", blob.digest), e))
    }

    /// Reads a layer to its end, checks both its digests, notes its disk and returns its descriptor.
    fn read_layer(
        &self,
        layer: &mut image::Layer,
        layers: &dyn ReadLayer,
        progress: &dyn Progress,
    ) -> Result<Option<Manifest>, LayoutError> {
        let blob = &layer.blob;
        let mut reader = Advancing { inner: self.blob(&blob.digest, blob.size)?, progress };
        progress.begin(&blob.digest.to_string(), blob.size);
        let refused = |e| LayoutError::Layer(blob.digest, e);
        let summary = layers.read_layer(&mut reader, layer.encoding);
        let (diff_id, disk, descriptor) = match summary {
            Ok(summary) => (Some(summary.diff_id), summary.disk, summary.descriptor),
            // A layer of files is none of ours; its blob is still what it says.
            Err(LayerError::Ordinary(_) | LayerError::Empty) => {
                io::copy(&mut reader, &mut io::sink()).map_err(|e| self.read_error(e))?;
                (None, None, None)
            }
            Err(LayerError::Io(e)) if is_digest_error(&e) => return Err(self.read_error(e)),
            Err(e) => return Err(refused(e)),
        };
        progress.end();
        // An uncompressed layer's diff_id is its blob's digest, whatever it holds.
        let diff_id = diff_id.or((layer.encoding.compression == Compression::None).then_some(blob.digest));
        if let Some(found) = diff_id.filter(|found| *found != layer.diff_id) {
            return Err(LayoutError::DiffId { layer: blob.digest, expected: layer.diff_id, found });
        }
        let manifest = descriptor.as_deref().map(Manifest::parse).transpose();
        let manifest = manifest.map_err(|e| LayoutError::Manifest(format!("layer {}", blob.digest), e))?;
        layer.disk = disk;
        Ok(manifest)
    }
}

fn is_digest_error(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<DigestError>())
}
