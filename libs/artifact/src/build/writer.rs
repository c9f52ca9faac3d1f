//! Writes an image's blobs and documents in the order that readers rely on.

use serde_json::{json, Map, Value};

use super::content::{descriptor_tar, Bytes};
use super::BuildError;
use crate::digest::Digest;
use crate::image::{Blob, ENTRYPOINT};
use crate::layout::{Progress, Sink, Source};
use crate::manifest::{DiskFormat, Manifest};
use crate::media;

/// Writes blobs and remembers their descriptors.
pub(super) struct Writer<'a> {
    sink: &'a mut dyn Sink,
    progress: &'a dyn Progress,
    /// Descriptors of the image manifest's `layers`.
    layers: Vec<Value>,
    diff_ids: Vec<Digest>,
    /// Bytes of all blobs together.
    pub size: u64,
}

/// What an image's documents say beside what follows from its blobs.
pub(super) struct Frame {
    /// The config, without `rootfs`.
    pub config: Map<String, Value>,
    /// Annotations of the image manifest.
    pub annotations: Map<String, Value>,
    /// Descriptor of the image that this one belongs to.
    pub subject: Option<Value>,
}

impl Frame {
    /// That of a new image.
    pub(super) fn of(manifest: &Manifest) -> Self {
        let metadata = manifest.metadata.clone().unwrap_or_default();
        let mut config = Map::new();
        config.insert("architecture".to_owned(), "amd64".into());
        config.insert("os".to_owned(), "linux".into());
        config.insert("config".to_owned(), json!({ "Entrypoint": [ENTRYPOINT] }));
        config.extend(metadata.created.map(|created| ("created".to_owned(), Value::from(created))));
        config.extend(metadata.author.map(|author| ("author".to_owned(), Value::from(author))));
        Self { config, annotations: annotations(manifest), subject: None }
    }
}

impl<'a> Writer<'a> {
    pub(super) fn new(sink: &'a mut dyn Sink, progress: &'a dyn Progress) -> Self {
        Self { sink, progress, layers: Vec::new(), diff_ids: Vec::new(), size: 0 }
    }

    fn put(&mut self, source: &dyn Source) -> Result<(Digest, u64), BuildError> {
        let (digest, size) = self.sink.put(source, self.progress)?;
        self.size = self.size.saturating_add(size);
        Ok((digest, size))
    }

    /// Writes a blob and lists it in the image manifest.
    pub(super) fn list(
        &mut self,
        source: &dyn Source,
        media_type: &str,
        format: Option<DiskFormat>,
    ) -> Result<Digest, BuildError> {
        let (digest, size) = self.put(source)?;
        let mut descriptor = json!({ "mediaType": media_type, "digest": digest, "size": size });
        if let (Some(format), Some(object)) = (format, descriptor.as_object_mut()) {
            object.insert("annotations".to_owned(), json!({ media::ANNOTATION_FORMAT: format.name() }));
        }
        self.layers.push(descriptor);
        if media_type == media::OCI_LAYER {
            self.diff_ids.push(digest);
        }
        Ok(digest)
    }

    /// Lists a blob of another image under the descriptor that it has there; it is copied unless it is here already.
    pub(super) fn adopt(
        &mut self,
        blob: &Blob,
        descriptor: Value,
        diff_id: Option<Digest>,
        from: &dyn Source,
    ) -> Result<(), BuildError> {
        if !self.sink.has(&blob.digest, blob.size) {
            // The source fails unless it is the blob, so nothing is listed that is not there.
            self.sink.put(from, self.progress)?;
        }
        self.size = self.size.saturating_add(blob.size);
        self.layers.push(descriptor);
        self.diff_ids.extend(diff_id);
        Ok(())
    }

    /// Writes manifest blob, descriptor layer, config and image manifest.
    pub(super) fn write_documents(
        &mut self,
        manifest: &Manifest,
        epoch: Option<u64>,
        frame: Frame,
    ) -> Result<Blob, BuildError> {
        let bytes = manifest.to_bytes().map_err(BuildError::Document)?;
        let tar = descriptor_tar(&bytes, epoch.unwrap_or_default())
            .map_err(|source| BuildError::Read { path: media::MEMBER_MANIFEST.into(), source })?;
        self.list(&Bytes { name: "manifest", bytes }, media::MANIFEST, None)?;
        // Who reads only the first blob of an artifact finds what the artifact is.
        self.layers.rotate_right(1);
        self.list(&Bytes { name: "descriptor", bytes: tar }, media::OCI_LAYER, None)?;

        let mut config = frame.config;
        config.insert("rootfs".to_owned(), json!({ "type": "layers", "diff_ids": self.diff_ids }));
        let bytes = crate::json::to_bytes(&config).map_err(BuildError::Document)?;
        let (config, config_size) = self.put(&Bytes { name: "config", bytes })?;
        let mut document = json!({
            "schemaVersion": 2,
            "mediaType": media::OCI_MANIFEST,
            "artifactType": media::MANIFEST,
            "config": { "mediaType": media::OCI_CONFIG, "digest": config, "size": config_size },
            "layers": self.layers,
            "annotations": frame.annotations,
        });
        if let (Some(subject), Some(object)) = (frame.subject, document.as_object_mut()) {
            object.insert("subject".to_owned(), subject);
        }
        let bytes = crate::json::to_bytes(&document).map_err(BuildError::Document)?;
        let (digest, size) = self.put(&Bytes { name: "image manifest", bytes })?;
        Ok(Blob { digest, size, media_type: media::OCI_MANIFEST.to_owned() })
    }
}

fn annotations(manifest: &Manifest) -> Map<String, Value> {
    let mut annotations = Map::new();
    let mut add = |key: &str, value: Option<&str>| {
        annotations.extend(value.map(|v| (format!("org.opencontainers.image.{key}"), Value::from(v))));
    };
    let metadata = manifest.metadata.as_ref();
    add("title", Some(&manifest.name));
    add("version", Some(&manifest.version));
    add("authors", metadata.and_then(|m| m.author.as_deref()));
    add("created", metadata.and_then(|m| m.created.as_deref()));
    annotations
}
