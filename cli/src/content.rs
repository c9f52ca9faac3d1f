//! The image of a machine that containerd started, out of containerd's content store.
//!
//! containerd may have dropped the blobs of layers that it has unpacked; then the image's registry has to have them.

use std::io::{self, Read};

use ovms_artifact::digest::{Digest, DigestError, VerifyingReader};
use ovms_artifact::image::{parse_manifest, Blob, ImageError, MAX_DOCUMENT};
use ovms_artifact::layout::{LayoutError, Progress, Quiet, Sink, Source};
use ovms_artifact::media;
use ovms_artifact::oci::{Descriptor, ImageIndex};
use ovms_artifact::platform::{self, MAX_INDEX_DEPTH};
use ovms_config::Settings;
use ovms_containerd::{Containerd, Error, Kind, Scope};
use ovms_registry::Registry;
use serde_json::json;
use tokio::runtime::Runtime;

use crate::error::CliError;

/// containerd, on behalf of one namespace.
struct Content {
    runtime: Runtime,
    containerd: Containerd,
    scope: Scope,
}

/// Copies what the image of container `id` has and `sink` lacks, and returns its manifest's descriptor.
///
/// # Errors
/// The container or its image is gone, or a blob of it is nowhere.
pub fn fetch(
    settings: &Settings,
    namespace: &str,
    id: &str,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<Descriptor, CliError> {
    let content = Content::open(settings, namespace)?;
    let container = content.runtime.block_on(content.containerd.container(&content.scope, id))?;
    let name = container.image;
    if name.is_empty() {
        return Err(CliError::not_found(format!("container {namespace}/{id} has no image to make a snapshot on")));
    }
    let image = content.runtime.block_on(content.containerd.image(&content.scope, &name))?;
    let target = image.target.unwrap_or_default();
    let (bytes, blob) = content.manifest(&target.digest, &target.media_type)?;
    let manifest = parse_manifest(&bytes).map_err(LayoutError::Image)?;
    for descriptor in manifest.layers().iter().chain([manifest.config()]) {
        let wanted = Blob::of(descriptor).map_err(LayoutError::Image)?;
        if sink.has(&wanted.digest, wanted.size) {
            continue;
        }
        let digest = wanted.digest.to_string();
        match content.runtime.block_on(content.containerd.blob_size(&content.scope, &digest)) {
            Ok(_) => {
                sink.put(&ContentBlob { content: &content, blob: wanted }, progress)?;
            }
            Err(err) if err.kind() == Kind::NotFound => {
                from_registry(&name, &blob.digest, sink, progress).map_err(|pull| {
                    let digest = digest.clone();
                    CliError::not_found(Lacking { name: name.clone(), digest, source: pull })
                })?;
                break;
            }
            Err(err) => return Err(err.into()),
        }
    }
    sink.put(&Document(bytes), &Quiet)?;
    let descriptor = json!({ "mediaType": blob.media_type, "digest": blob.digest, "size": blob.size });
    serde_json::from_value(descriptor).map_err(CliError::invalid)
}

/// A blob that is neither here nor there.
#[derive(Debug, thiserror::Error)]
#[error("containerd no longer has blob {digest} of image {name}, and it cannot be pulled")]
struct Lacking {
    name: String,
    digest: String,
    source: ovms_registry::RegistryError,
}

fn from_registry(
    name: &str,
    digest: &Digest,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<(), ovms_registry::RegistryError> {
    let tagged = ovms_registry::parse(name)?;
    let exact = ovms_registry::parse(&format!("{}/{}@{digest}", tagged.registry(), tagged.repository()))?;
    Registry::open(exact, false)?.pull(sink, progress).map(drop)
}

impl Content {
    fn open(settings: &Settings, namespace: &str) -> Result<Self, CliError> {
        // A worker of its own: blobs are read by this thread while they come.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(CliError::io)?;
        let connect = async { Containerd::new(&settings.paths.containerd_socket) };
        let containerd = runtime.block_on(connect)?;
        Ok(Self { runtime, containerd, scope: Scope::namespace(namespace)? })
    }

    /// The image manifest for linux/amd64 that a digest leads to, and its blob.
    fn manifest(&self, digest: &str, media_type: &str) -> Result<(Vec<u8>, Blob), CliError> {
        let (mut digest, mut media_type) = (digest.to_owned(), media_type.to_owned());
        for _ in 0..=MAX_INDEX_DEPTH {
            let (bytes, found) = self.document(&digest)?;
            if !media::is_index(&media_type) {
                let size = bytes.len() as u64;
                return Ok((bytes, Blob { digest: found, size, media_type }));
            }
            let index: ImageIndex = serde_json::from_slice(&bytes)
                .map_err(|source| LayoutError::Image(ImageError::Document { what: "image index", source }))?;
            let ours = platform::choose(index.manifests()).ok_or(LayoutError::NoImage { tag: String::new() })?;
            (digest, media_type) = (ours.digest().to_string(), ours.media_type().to_string());
        }
        Err(LayoutError::Depth.into())
    }

    /// Reads a manifest or an index.
    fn document(&self, digest: &str) -> Result<(Vec<u8>, Digest), CliError> {
        let bytes = self.runtime.block_on(self.containerd.read_small(&self.scope, digest, MAX_DOCUMENT))?;
        let expected: Digest = digest.parse().map_err(CliError::invalid)?;
        let found = Digest::of(&bytes);
        if found != expected {
            let blob = "the image manifest".to_owned();
            return Err(CliError::invalid(DigestError::Mismatch { blob, expected, found }));
        }
        Ok((bytes, found))
    }
}

/// A blob of containerd's, for a sink.
struct ContentBlob<'a> {
    content: &'a Content,
    blob: Blob,
}

impl Source for ContentBlob<'_> {
    fn name(&self) -> String {
        self.blob.digest.to_string()
    }

    fn size(&self) -> u64 {
        self.blob.size
    }

    fn open(&self) -> io::Result<Box<dyn Read + '_>> {
        let Content { runtime, containerd, scope } = self.content;
        let digest = self.blob.digest.to_string();
        let (reader, transfer) = runtime.block_on(containerd.read_blob(scope, &digest)).map_err(io::Error::other)?;
        let reader = Held { reader, _transfer: transfer };
        Ok(Box::new(VerifyingReader::new(reader, self.blob.digest, self.blob.size)))
    }
}

/// A reader and what keeps its bytes coming.
struct Held {
    reader: ovms_containerd::BlobReader,
    _transfer: ovms_containerd::Transfer,
}

impl Read for Held {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

/// The image manifest, whose bytes were checked when they were read.
struct Document(Vec<u8>);

impl Source for Document {
    fn name(&self) -> String {
        "image manifest".to_owned()
    }

    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn open(&self) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(self.0.as_slice()))
    }
}

impl From<Error> for CliError {
    fn from(error: Error) -> Self {
        match error.kind() {
            Kind::NotFound => Self::not_found(error),
            Kind::Unavailable => Self::unavailable(error),
            Kind::Precondition => Self::not_now(error),
            Kind::Invalid => Self::invalid(error),
            Kind::Internal => Self::io(error),
        }
    }
}
