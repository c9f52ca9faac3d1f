//! Images without a descriptor layer, as `oras push --config` makes them: their manifest is found through the
//! container's record, since the snapshots know nothing of it.

use std::collections::HashSet;

use ovms_artifact::digest::Digest;
use ovms_artifact::image::{parse_manifest, Blob, Parts, Resolved, MAX_DOCUMENT};
use ovms_artifact::manifest::{Manifest, MAX_MANIFEST};
use ovms_artifact::platform::{self, MAX_INDEX_DEPTH};
use ovms_artifact::{media, oci};

use super::refused;
use crate::error::{Context, Error, Result};
use ovms_containerd::proto::images as api;
use ovms_containerd::{Containerd, Scope};

/// What the image's documents say.
#[derive(Debug)]
pub struct Image {
    /// Name of the image.
    pub name: String,
    /// The OVMS manifest and the blobs that it names.
    pub resolved: Resolved,
    /// Places of the disk's layers among the image's layers, base first.
    pub disks: Vec<usize>,
    /// Entrypoint and Cmd of its config.
    pub args: Vec<String>,
}

/// Follows a container's record to its image. `chain` is the chain id of the layers that the container stands on.
pub async fn of_container(containerd: &Containerd, scope: &Scope, id: &str, chain: Option<&str>) -> Result<Image> {
    let image = record(containerd, scope, id).await?;
    let named = |err: Error| Error::new(err.kind(), format!("image {} cannot run", image.name)).because(err);
    let Documents { parts, args } = documents(containerd, scope, &image, chain).await.map_err(named)?;
    let blob = parts.manifest.as_ref().ok_or_else(|| {
        named(Error::invalid(format!(
            "it is no OVMS image: it has neither a descriptor layer nor a blob of type {}",
            media::MANIFEST
        )))
    })?;
    let manifest = manifest(containerd, scope, blob).await.map_err(named)?;
    let resolved =
        parts.resolve(manifest).map_err(|err| named(refused("its manifest and its blobs do not fit", err)))?;
    let place = |diff_id: &Digest, from: usize| parts.layers.iter().skip(from).position(|l| l.diff_id == *diff_id);
    let mut disks: Vec<usize> = Vec::new();
    for disk in &resolved.disks {
        let from = disks.last().map_or(0, |last| last + 1);
        let found = place(&disk.layer.diff_id, from).ok_or_else(|| Error::internal("a disk layer has no place"))?;
        disks.push(from + found);
    }
    Ok(Image { name: image.name.clone(), resolved, disks, args })
}

/// Entrypoint and Cmd of a container's image, if the image is still there.
pub async fn args_of(containerd: &Containerd, scope: &Scope, id: &str, chain: Option<&str>) -> Option<Vec<String>> {
    let image = record(containerd, scope, id).await.ok()?;
    Some(documents(containerd, scope, &image, chain).await.ok()?.args)
}

async fn record(containerd: &Containerd, scope: &Scope, id: &str) -> Result<api::Image> {
    let container = containerd.container(scope, id).await?;
    if container.image.is_empty() {
        return Err(Error::invalid(format!("container {id} has no image, and its layers have no descriptor")));
    }
    containerd.image(scope, &container.image).await.map_err(Error::from).map_err(|err| {
        let message = format!(
            "the image {} of container {id} has no descriptor layer and is needed for its kernel: keep the image until \
             its machine has started",
            container.image
        );
        Error::new(err.kind(), message).because(err)
    })
}

/// The documents of the manifest whose layers are the container's.
struct Documents {
    parts: Parts,
    args: Vec<String>,
}

async fn documents(
    containerd: &Containerd,
    scope: &Scope,
    image: &api::Image,
    chain: Option<&str>,
) -> Result<Documents> {
    let target = image.target.as_ref();
    let target = target.ok_or_else(|| Error::internal(format!("image {} has no target", image.name)))?;
    let digest = target.digest.as_str();
    if !media::is_index(&target.media_type) {
        return manifest_documents(containerd, scope, digest).await;
    }
    let mut last = Error::not_found("the image index has no manifest for linux/amd64 with the container's layers");
    // Best last. Indexes may nest, and name one entry many times.
    let (mut open, mut seen) = (vec![(digest.to_owned(), Some(0))], HashSet::new());
    while let Some((digest, depth)) = open.pop() {
        if !seen.insert(digest.clone()) {
            continue;
        }
        // Of several only that which the layers are of may have been fetched.
        let found = match depth {
            Some(depth) => entries(containerd, scope, &digest, depth).await.map(|found| {
                open.extend(found);
                None
            }),
            None => manifest_documents(containerd, scope, &digest).await.map(Some),
        };
        match found {
            Ok(Some(found))
                if chain.is_none_or(|chain| found.parts.chain_id().is_some_and(|id| id.to_string() == chain)) =>
            {
                return Ok(found);
            }
            Ok(_) => {}
            Err(err) => last = err,
        }
    }
    Err(last)
}

/// The entries of an index that can be for us, best last: their digests, and for an index how deep it lies.
async fn entries(
    containerd: &Containerd,
    scope: &Scope,
    digest: &str,
    depth: usize,
) -> Result<Vec<(String, Option<usize>)>> {
    if depth > MAX_INDEX_DEPTH {
        return Err(Error::invalid("the image nests indexes too deep"));
    }
    let bytes = containerd.read_small(scope, digest, MAX_DOCUMENT).await?;
    let index: oci::ImageIndex =
        serde_json::from_slice(&bytes).map_err(|err| refused("the image index cannot be read", err))?;
    let mut found: Vec<_> = platform::candidates(index.manifests())
        .map(|entry| {
            let index = media::is_index(entry.media_type().as_ref());
            (entry.digest().to_string(), index.then_some(depth + 1))
        })
        .collect();
    found.reverse();
    Ok(found)
}

async fn manifest_documents(containerd: &Containerd, scope: &Scope, digest: &str) -> Result<Documents> {
    let bytes = containerd.read_small(scope, digest, MAX_DOCUMENT).await?;
    let manifest = parse_manifest(&bytes).map_err(|err| refused("its OCI manifest is refused", err))?;
    ovms_artifact::image::check_config_type(&manifest).map_err(|err| refused("its config is refused", err))?;
    let config = containerd.read_small(scope, manifest.config().digest().as_ref(), MAX_DOCUMENT).await?;
    let parts = Parts::new(&manifest, &config).map_err(|err| refused("its documents are refused", err))?;
    let config: oci::ImageConfiguration =
        serde_json::from_slice(&config).map_err(|err| refused("its config cannot be read", err))?;
    let started = config.config().as_ref();
    let entrypoint = started.and_then(|config| config.entrypoint().clone()).unwrap_or_default();
    let cmd = started.and_then(|config| config.cmd().clone()).unwrap_or_default();
    Ok(Documents { parts, args: [entrypoint, cmd].concat() })
}

async fn manifest(containerd: &Containerd, scope: &Scope, blob: &Blob) -> Result<Manifest> {
    let bytes = containerd.read_small(scope, &blob.digest.to_string(), MAX_MANIFEST).await?;
    if Digest::of(&bytes) != blob.digest {
        return Err(Error::invalid(format!("the OVMS manifest has another digest than {}", blob.digest)));
    }
    Manifest::from_slice(&bytes).context_kind(crate::error::Kind::Invalid, || "its OVMS manifest is refused")
}
