//! Makes a runnable image of a pure artifact: what `oras push` writes, whose config is `{}` or one of its blobs.
//!
//! ```text
//!  artifact:  config {}   vmlinuz  initrd  base.qcow2 (layer type)  ovms.json
//!  image:     config (diff_ids)   [manifest' vmlinuz initrd (RAM)]  base.qcow2  descriptor
//! ```
//! Every blob stays byte for byte what it was; only documents are new: a manifest whose refs are digests, its descriptor
//! layer, a config. A `ref` is found by its digest, by the file name that oras wrote down as the blob's title, or because
//! there is only one blob that it can mean.

use serde_json::{json, Value};

use super::writer::{Frame, Writer};
use super::{index_entry, BuildError, Built, ImageName};
use crate::digest::Digest;
use crate::image::{self, Blob, ImageError};
use crate::layer::{Encoding, LayerError, ReadLayer};
use crate::layout::{Layout, LayoutError, Progress, Sink};
use crate::manifest::{DiskFormat, Manifest, Ref};
use crate::media::{self, BlobKind, Compression};
use crate::oci;

/// Annotation in which oras keeps a file's name (OCI image specification, pre-defined annotation keys).
const TITLE: &str = "org.opencontainers.image.title";

/// Whether an image manifest is one that needs [`runnable`] before a machine or a container can be made of it.
///
/// # Errors
/// [`LayoutError`] if the manifest cannot be read.
pub fn is_pure_artifact(layout: &Layout, image: &oci::Descriptor) -> Result<bool, LayoutError> {
    Ok(!media::is_image_config(read(layout, image)?.config().media_type().as_ref()))
}

/// A blob of the artifact.
struct Part {
    blob: Blob,
    kind: BlobKind,
    title: Option<String>,
    descriptor: Value,
}

/// Writes a runnable image of the artifact `image` in `layout` into `sink`; compressed layers are read by `layers`.
///
/// # Errors
/// [`BuildError`] naming blob or field; nothing that an index names is written before everything succeeded.
pub fn runnable(
    layout: &Layout,
    image: &oci::Descriptor,
    names: Vec<ImageName>,
    layers: &dyn ReadLayer,
    mut sink: Box<dyn Sink>,
    progress: &dyn Progress,
) -> Result<Built, BuildError> {
    let parts = parts(layout, image)?;
    let mut manifest = manifest(layout, &parts)?;
    let plain = pin(&mut manifest, &parts)?;
    let disks = pin_disks(&mut manifest, &parts)?;
    manifest.validate().map_err(BuildError::Invalid)?;

    let mut writer = Writer::new(sink.as_mut(), progress);
    for part in plain {
        let from = layout.source(part.blob.digest, part.blob.size);
        writer.adopt(&part.blob, part.descriptor.clone(), None, &from)?;
    }
    for (part, format) in disks {
        let diff_id = diff_id(layout, part, format, layers)?;
        let mut descriptor = part.descriptor.clone();
        if let Some(descriptor) = descriptor.as_object_mut() {
            let annotations = descriptor.entry("annotations").or_insert_with(|| json!({}));
            if let Some(annotations) = annotations.as_object_mut() {
                annotations.insert(media::ANNOTATION_FORMAT.to_owned(), format.name().into());
            }
        }
        let from = layout.source(part.blob.digest, part.blob.size);
        writer.adopt(&part.blob, descriptor, Some(diff_id), &from)?;
    }
    let frame = Frame::of(&manifest);
    let image = writer.write_documents(&manifest, None, frame)?;
    let size = writer.size;
    let entries = names.iter().map(|name| index_entry(&image, name)).collect::<Result<_, _>>()?;
    sink.finish(entries)?;
    Ok(Built { image, manifest, names, size })
}

fn read(layout: &Layout, image: &oci::Descriptor) -> Result<oci::ImageManifest, LayoutError> {
    let image = Blob::of(image).map_err(LayoutError::Image)?;
    let bytes = layout.document("the image manifest", &image.digest, image.size)?;
    image::parse_manifest(&bytes).map_err(LayoutError::Image)
}

/// Every blob of the artifact; one of our types may stand in the config's place.
fn parts(layout: &Layout, image: &oci::Descriptor) -> Result<Vec<Part>, BuildError> {
    let document = read(layout, image)?;
    let mut parts = Vec::new();
    for descriptor in [document.config()].into_iter().chain(document.layers()) {
        let blob = Blob::of(descriptor).map_err(|e| BuildError::Layout(LayoutError::Image(e)))?;
        let title = descriptor.annotations().as_ref().and_then(|all| all.get(TITLE)).cloned();
        let kind = BlobKind::of(&blob.media_type);
        let descriptor = serde_json::to_value(descriptor).map_err(BuildError::Document)?;
        parts.push(Part { blob, kind, title, descriptor });
    }
    Ok(parts)
}

fn manifest(layout: &Layout, parts: &[Part]) -> Result<Manifest, BuildError> {
    let part = parts.iter().find(|part| part.kind == BlobKind::Manifest);
    let blob = &part.ok_or(BuildError::Layout(LayoutError::Image(ImageError::NotOvms)))?.blob;
    let bytes = layout.document("the OVMS manifest", &blob.digest, blob.size)?;
    let refused = |source| BuildError::Layout(LayoutError::Manifest(format!("blob {}", blob.digest), source));
    Manifest::parse(&bytes).map_err(refused)
}

/// Replaces the refs of kernel, initrd and RAM by digests; returns their blobs.
fn pin<'a>(manifest: &mut Manifest, parts: &'a [Part]) -> Result<Vec<&'a Part>, BuildError> {
    let kernel = manifest.kernel.as_mut().map(|kernel| ("kernel.ref", &mut kernel.reference, BlobKind::Kernel));
    let initrd = manifest.initrd.as_mut().map(|initrd| ("initrd.ref", &mut initrd.reference, BlobKind::Initrd));
    let ram = manifest.ram_snapshot.as_mut();
    let ram = ram.map(|ram| ("ramSnapshot.ref", &mut ram.reference, BlobKind::RamSnapshot));
    let mut found = Vec::new();
    for (field, reference, kind) in [kernel, initrd, ram].into_iter().flatten() {
        let part = find(field, reference, parts, |part| part.kind == kind)?;
        *reference = part.blob.digest.into();
        found.push(part);
    }
    // RAM that the named RAM builds on comes along.
    let also = parts.iter().filter(|part| part.kind == BlobKind::RamSnapshot);
    let also: Vec<_> = also.filter(|part| found.iter().all(|other| other.blob.digest != part.blob.digest)).collect();
    found.extend(also);
    Ok(found)
}

/// The same for the disk's layers, with the format of each.
fn pin_disks<'a>(manifest: &mut Manifest, parts: &'a [Part]) -> Result<Vec<(&'a Part, DiskFormat)>, BuildError> {
    let is_layer = |part: &Part| matches!(part.kind, BlobKind::Layer(_));
    let layers: Vec<&Part> = parts.iter().filter(|part| is_layer(part)).collect();
    let in_order = layers.len() == manifest.disk_layers.len();
    let mut found = Vec::new();
    for (i, disk) in manifest.disk_layers.iter_mut().enumerate() {
        let part = match find(&format!("diskLayers[{i}].ref"), &disk.reference, parts, is_layer) {
            Ok(part) => part,
            // Written without digests or titles: the layers are the disk, in their order, if their number says so.
            Err(error) => match layers.get(i).filter(|_| in_order && disk.reference.digest().is_none()) {
                Some(part) => part,
                None => return Err(error),
            },
        };
        disk.reference = part.blob.digest.into();
        found.push((part, disk.format));
    }
    Ok(found)
}

/// The blob that a `ref` means.
fn find<'a>(
    field: &str,
    reference: &Ref,
    parts: &'a [Part],
    fits: impl Fn(&Part) -> bool,
) -> Result<&'a Part, BuildError> {
    let refused = |error| BuildError::Layout(LayoutError::Image(error));
    if let Some(digest) = reference.digest() {
        let missing = || ImageError::MissingBlob { field: field.to_owned(), reference: digest.to_string() };
        return parts.iter().find(|part| part.blob.digest == digest).ok_or_else(|| refused(missing()));
    }
    let name = reference.to_string();
    let name = name.strip_prefix("./").unwrap_or(&name);
    let fitting: Vec<&Part> = parts.iter().filter(|part| fits(part)).collect();
    let titled = fitting.iter().find(|part| part.title.as_deref() == Some(name));
    match (titled, fitting.as_slice()) {
        (Some(part), _) | (None, [part]) => Ok(part),
        (None, several) => {
            let reference = reference.to_string();
            Err(refused(ImageError::Unpinned { field: field.to_owned(), reference, found: several.len() }))
        }
    }
}

/// The digest of a layer's decompressed stream.
fn diff_id(layout: &Layout, part: &Part, format: DiskFormat, layers: &dyn ReadLayer) -> Result<Digest, BuildError> {
    let refused = |source| BuildError::Layout(LayoutError::Layer(part.blob.digest, source));
    let encoding = Encoding::identify(&part.blob.media_type, Some(format.name())).map_err(refused)?;
    if encoding.compression == Compression::None {
        return Ok(part.blob.digest);
    }
    let mut reader = layout.blob(&part.blob.digest, part.blob.size)?;
    match layers.read_layer(&mut reader, encoding) {
        Ok(summary) => Ok(summary.diff_id),
        Err(LayerError::Ordinary(name)) => Err(refused(LayerError::Foreign(name))),
        Err(error) => Err(refused(error)),
    }
}

#[cfg(test)]
mod tests;
