//! The image of a running machine's snapshot: the base image's layers, what the disk has become, and the RAM.
//!
//! ```text
//!  base:      [manifest  kernel  initrd  (RAM blobs)]  disk 0 … disk n  descriptor
//!  snapshot:  [manifest' kernel  initrd  RAM (parents)] disk 0 … disk n  descriptor  disk n+1  descriptor'
//! ```
//! The base's layer-typed blobs stay as they are and where they are, its descriptor among them, so that containerd shares
//! the base's snapshots; the topmost descriptor is the one that counts. `subject` names the base.

use std::path::PathBuf;

use serde_json::{json, Map, Value};

use super::content::Wrapped;
use super::writer::{Frame, Writer};
use super::{index_entry, plain, BuildError, Built, ImageName};
use crate::digest::Digest;
use crate::image::{Blob, ImageError, Parts};
use crate::layer::ReadLayer;
use crate::layout::{Documents, Layout, LayoutError, Progress, Sink};
use crate::manifest::{DiskFormat, DiskLayer, MachineDefaults, Manifest, Metadata, RamCompression, RamSnapshot, Ref};
use crate::{media, oci};

/// What the image of a snapshot is made of.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The RAM blob, in our format, its chunks compressed by lz4.
    pub ram: PathBuf,
    /// RAM blobs that it needs below it, the nearest first; the base image has them.
    pub parents: Vec<Digest>,
    /// What was written to the disk since the base, as a qcow2 file; none for a machine without a disk.
    pub disk: Option<PathBuf>,
    /// vCPUs of the machine.
    pub vcpus: u32,
    /// Its memory in bytes.
    pub memory: u64,
    /// Hold the decoded memory in tmpfs.
    pub preload_hint: bool,
    /// Lock the decoded memory in RAM.
    pub mlock_required: bool,
    /// The image's names.
    pub names: Vec<ImageName>,
    /// When it was taken: seconds since 1970.
    pub epoch: Option<u64>,
}

impl Snapshot {
    /// Writes the image of a snapshot of a machine that was made from `image` of the layout `base`, whose layers are read by
    /// `layers`.
    ///
    /// # Errors
    /// [`BuildError`]; nothing that an index names is written before everything succeeded.
    pub fn build(
        self,
        base: &Layout,
        image: &oci::Descriptor,
        layers: &dyn ReadLayer,
        mut sink: Box<dyn Sink>,
        progress: &dyn Progress,
    ) -> Result<Built, BuildError> {
        let documents = base.documents(image)?;
        let loaded = base.load_image(image, layers)?;
        let mut writer = Writer::new(sink.as_mut(), progress);
        let mut manifest = self.manifest(&loaded.resolved.manifest);
        self.adopt_plain(base, &documents, &loaded.parts, &mut writer)?;
        let ram = writer.list(&plain(&self.ram)?, media::RAM_SNAPSHOT_LZ4, None)?;
        if let Some(snapshot) = &mut manifest.ram_snapshot {
            snapshot.reference = ram.into();
        }
        self.adopt_layers(base, &documents, &loaded.parts, &mut writer)?;
        if let Some(path) = &self.disk {
            let disk = plain(path)?;
            let size = Some(disk.size);
            let read = |source| BuildError::Read { path: path.clone(), source };
            let epoch = self.epoch.unwrap_or_default();
            let wrapped = Wrapped::new(disk, media::MEMBER_QCOW2, epoch).map_err(read)?;
            let reference = writer.list(&wrapped, media::OCI_LAYER, Some(DiskFormat::Qcow2))?.into();
            manifest.disk_layers.push(DiskLayer { reference, format: DiskFormat::Qcow2, size, extra: Map::new() });
        }
        manifest.validate().map_err(BuildError::Invalid)?;
        let frame = frame(&documents, &manifest)?;
        let image = writer.write_documents(&manifest, self.epoch, frame)?;
        let size = writer.size;
        let entries = self.names.iter().map(|name| index_entry(&image, name)).collect::<Result<_, _>>()?;
        sink.finish(entries)?;
        Ok(Built { image, manifest, names: self.names, size })
    }

    /// The base's manifest with this machine's figures; the RAM's digest is not known yet.
    fn manifest(&self, base: &Manifest) -> Manifest {
        let mut manifest = base.clone();
        let defaults = manifest.defaults.get_or_insert_with(MachineDefaults::default);
        (defaults.vcpus, defaults.memory_bytes) = (Some(self.vcpus), Some(self.memory));
        manifest.ram_snapshot = Some(RamSnapshot {
            reference: Ref::File(self.ram.clone()),
            compression: RamCompression::Lz4,
            preload_hint: self.preload_hint,
            mlock_required: self.mlock_required,
            extra: Map::new(),
        });
        let metadata = manifest.metadata.get_or_insert_with(Metadata::default);
        metadata.created = super::rfc3339(self.epoch).or(metadata.created.take());
        manifest
    }

    /// Everything of the base that is no layer, but its manifest and the RAM that is not a parent.
    fn adopt_plain(
        &self,
        base: &Layout,
        documents: &Documents,
        parts: &Parts,
        writer: &mut Writer<'_>,
    ) -> Result<(), BuildError> {
        for parent in &self.parents {
            if !parts.ram_snapshots.iter().any(|blob| blob.digest == *parent) {
                return Err(BuildError::NoParent { parent: *parent, base: documents.image.digest });
            }
        }
        let manifest = parts.manifest.as_ref().map(|blob| blob.digest);
        let ram = |blob: &Blob| parts.ram_snapshots.contains(blob) && !self.parents.contains(&blob.digest);
        for descriptor in documents.manifest.layers() {
            let blob = Blob::of(descriptor).map_err(image_error)?;
            let layer = media::layer_compression(&blob.media_type).is_some();
            if !layer && Some(blob.digest) != manifest && !ram(&blob) {
                let source = base.source(blob.digest, blob.size);
                writer.adopt(&blob, value(descriptor)?, None, &source)?;
            }
        }
        Ok(())
    }

    fn adopt_layers(
        &self,
        base: &Layout,
        documents: &Documents,
        parts: &Parts,
        writer: &mut Writer<'_>,
    ) -> Result<(), BuildError> {
        let is_layer = |d: &&oci::Descriptor| media::layer_compression(d.media_type().as_ref()).is_some();
        for (descriptor, layer) in documents.manifest.layers().iter().filter(is_layer).zip(&parts.layers) {
            let source = base.source(layer.blob.digest, layer.blob.size);
            writer.adopt(&layer.blob, value(descriptor)?, Some(layer.diff_id), &source)?;
        }
        Ok(())
    }
}

/// What the base's config and annotations say stays: a container of the snapshot is started as one of the base is.
fn frame(documents: &Documents, manifest: &Manifest) -> Result<Frame, BuildError> {
    let mut frame = Frame::of(manifest);
    let mut config: Map<String, Value> = serde_json::from_slice(&documents.config).map_err(BuildError::Document)?;
    // The history has an entry for each layer, and nobody needs one that lies about the new ones.
    config.remove("history");
    let created = frame.config.remove("created");
    config.extend(created.map(|created| ("created".to_owned(), created)));
    frame.config = config;
    let mut annotations: Map<String, Value> = match documents.manifest.annotations() {
        Some(annotations) => annotations.iter().map(|(k, v)| (k.clone(), Value::from(v.as_str()))).collect(),
        None => Map::new(),
    };
    annotations.append(&mut frame.annotations);
    frame.annotations = annotations;
    let Blob { digest, size, media_type } = &documents.image;
    frame.subject = Some(json!({ "mediaType": media_type, "digest": digest, "size": size }));
    Ok(frame)
}

fn value(descriptor: &oci::Descriptor) -> Result<Value, BuildError> {
    serde_json::to_value(descriptor).map_err(BuildError::Document)
}

fn image_error(source: ImageError) -> BuildError {
    BuildError::Layout(LayoutError::Image(source))
}

#[cfg(test)]
mod tests;
