//! From a registry into a sink.

use futures_util::StreamExt;
use oci_client::RegistryOperation;
use ovms_artifact::digest::{Digest, DigestError};
use ovms_artifact::image::{parse_manifest, Blob, MAX_DOCUMENT};
use ovms_artifact::layout::{Progress, Sink};
use ovms_artifact::platform::{self, MAX_INDEX_DEPTH};
use ovms_artifact::{media, oci};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE};
use reqwest::StatusCode;

use crate::stream::RemoteBlob;
use crate::{Registry, RegistryError};

/// Media types of what we call a manifest or an index.
const ACCEPTED: [&str; 4] = [media::OCI_MANIFEST, media::OCI_INDEX, media::DOCKER_MANIFEST, media::DOCKER_INDEX];

/// An image whose every blob is in the sink; no index names it yet.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// The image manifest's descriptor.
    pub image: oci::Descriptor,
    /// Bytes that came over the network.
    pub fetched: u64,
    /// Bytes that were there already.
    pub present: u64,
}

impl Registry {
    /// Copies the image for linux/amd64 into `sink`: config, layers, then the manifest.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn pull(&self, sink: &mut dyn Sink, progress: &dyn Progress) -> Result<Pulled, RegistryError> {
        let token = self.authorize(RegistryOperation::Pull)?;
        let (bytes, media_type) = self.image_manifest(token.as_deref())?;
        let manifest = parse_manifest(&bytes)?;
        let (mut fetched, mut present) = (0_u64, 0_u64);
        for descriptor in manifest.layers().iter().chain([manifest.config()]) {
            let blob = Blob::of(descriptor)?;
            if sink.has(&blob.digest, blob.size) {
                present = present.saturating_add(blob.size);
                continue;
            }
            let Self { runtime, client, reference, .. } = self;
            sink.put(&RemoteBlob { runtime, client, reference, blob: &blob }, progress)?;
            fetched = fetched.saturating_add(blob.size);
        }
        let (digest, size) = sink.put(&Document(bytes), &ovms_artifact::layout::Quiet)?;
        let descriptor = serde_json::json!({ "mediaType": media_type, "digest": digest, "size": size });
        let image = serde_json::from_value(descriptor)
            .map_err(|source| RegistryError::Document { what: "the image manifest".into(), source })?;
        Ok(Pulled { image, fetched, present })
    }

    /// The manifest of the image for linux/amd64, and its media type.
    fn image_manifest(&self, token: Option<&str>) -> Result<(Vec<u8>, String), RegistryError> {
        let mut name = self.reference.digest().or(self.reference.tag()).unwrap_or("latest").to_owned();
        for _ in 0..=MAX_INDEX_DEPTH {
            let (bytes, media_type) = self.manifest(&name, token)?;
            if !media::is_index(&media_type) {
                return Ok((bytes, media_type));
            }
            let index: oci::ImageIndex = serde_json::from_slice(&bytes).map_err(|source| RegistryError::Document {
                what: format!("the index of {}", self.reference),
                source,
            })?;
            let ours = platform::choose(index.manifests());
            name = ours.ok_or_else(|| RegistryError::Platform(self.reference.to_string()))?.digest().to_string();
        }
        Err(RegistryError::Platform(self.reference.to_string()))
    }

    /// Reads one manifest or index by its tag or digest, at most [`MAX_DOCUMENT`] bytes of it.
    fn manifest(&self, name: &str, token: Option<&str>) -> Result<(Vec<u8>, String), RegistryError> {
        let url = format!("{}://{}/v2/{}/manifests/{name}", self.scheme, self.host(), self.reference.repository());
        let failed = |source| RegistryError::Http { url: url.clone(), source };
        let mut request = self.http.get(&url).header(ACCEPT, ACCEPTED.join(", "));
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let (bytes, stated) = self.runtime.block_on(async {
            let answer = request.send().await.map_err(failed)?;
            match answer.status() {
                StatusCode::OK => {}
                StatusCode::NOT_FOUND => return Err(RegistryError::NotFound(self.reference.to_string())),
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    return Err(RegistryError::Unauthorized(self.reference.to_string()));
                }
                other => return Err(RegistryError::Status { url: url.clone(), status: other.as_u16() }),
            }
            let stated =
                answer.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
            let mut body = answer.bytes_stream();
            let mut bytes = Vec::new();
            while let Some(part) = body.next().await {
                bytes.extend_from_slice(&part.map_err(failed)?);
                if bytes.len() as u64 > MAX_DOCUMENT {
                    let what = format!("the manifest of {}", self.reference);
                    return Err(RegistryError::TooLarge { what, limit: MAX_DOCUMENT });
                }
            }
            Ok((bytes, stated))
        })?;
        if name.contains(':') {
            let expected: Digest = name.parse().map_err(RegistryError::Digest)?;
            let found = Digest::of(&bytes);
            if found != expected {
                let blob = format!("the manifest of {}", self.reference);
                return Err(RegistryError::Digest(DigestError::Mismatch { blob, expected, found }));
            }
        }
        let media_type = media_type(&bytes, &stated).map_err(|source| RegistryError::Document {
            what: format!("the manifest of {}", self.reference),
            source,
        })?;
        Ok((bytes, media_type))
    }
}

/// A document says itself what it is; for one that does not, the registry's header does.
fn media_type(bytes: &[u8], stated: &str) -> Result<String, serde_json::Error> {
    let document: serde_json::Value = serde_json::from_slice(bytes)?;
    let own = document.get("mediaType").and_then(|value| value.as_str());
    let stated = stated.split(';').next().unwrap_or_default().trim();
    Ok(own.unwrap_or(stated).to_owned())
}

/// The image manifest, whose bytes were checked when they were read.
struct Document(Vec<u8>);

impl ovms_artifact::layout::Source for Document {
    fn name(&self) -> String {
        "image manifest".to_owned()
    }

    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn open(&self) -> std::io::Result<Box<dyn std::io::Read + '_>> {
        Ok(Box::new(self.0.as_slice()))
    }
}
