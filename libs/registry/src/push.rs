//! From a layout to a registry.

use std::collections::BTreeSet;
use std::sync::mpsc;

use futures_util::TryStreamExt;
use oci_client::{Reference, RegistryOperation};
use ovms_artifact::digest::Digest;
use ovms_artifact::image::{parse_manifest, Blob};
use ovms_artifact::layout::{Layout, Progress};
use ovms_artifact::{media, oci};
use reqwest::header::HeaderValue;

use crate::error::Context;
use crate::stream::body;
use crate::{Registry, RegistryError};

/// A repository that has some of an image's blobs already.
#[derive(Debug, Clone)]
pub struct Holder {
    /// An image of it.
    pub reference: Reference,
    /// The digests of its blobs.
    pub blobs: BTreeSet<Digest>,
}

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The image manifest's digest.
    pub digest: Digest,
    /// Bytes of blobs that went over the network.
    pub sent: u64,
    /// Bytes of blobs that the registry took over from another repository.
    pub mounted: u64,
    /// Bytes of blobs that were there already.
    pub present: u64,
}

impl Registry {
    /// Copies an image of `layout` to the registry; only what the registry lacks is sent. Blobs that another repository of
    /// the same registry has (`holders`) are mounted where the registry can do that.
    ///
    /// # Errors
    /// [`RegistryError`]; the manifest is written last, so an image is there whole or not at all.
    pub fn push(
        &self,
        layout: &Layout,
        image: &oci::Descriptor,
        holders: &[Holder],
        progress: &dyn Progress,
    ) -> Result<Pushed, RegistryError> {
        self.authorize(RegistryOperation::Push)?;
        let found = Blob::of(image)?;
        let bytes = layout.document("the image manifest", &found.digest, found.size)?;
        let manifest = parse_manifest(&bytes)?;
        let elsewhere = |holder: &&Holder| {
            let from = &holder.reference;
            from.resolve_registry() == self.host() && from.repository() != self.reference.repository()
        };
        let holders: Vec<&Holder> = holders.iter().filter(elsewhere).collect();
        let mut pushed = Pushed { digest: found.digest, sent: 0, mounted: 0, present: 0 };
        let mut done = BTreeSet::new();
        for descriptor in manifest.layers().iter().chain([manifest.config()]) {
            let blob = Blob::of(descriptor)?;
            if done.insert(blob.digest) {
                let from = holders.iter().find(|holder| holder.blobs.contains(&blob.digest));
                self.push_blob(layout, &blob, from.map(|from| &from.reference), progress, &mut pushed)?;
            }
        }
        let docker = found.media_type == media::DOCKER_MANIFEST;
        let media_type = HeaderValue::from_static(if docker { media::DOCKER_MANIFEST } else { media::OCI_MANIFEST });
        let put = self.client.push_manifest_raw(&self.reference, bytes, media_type);
        self.runtime.block_on(put).context(|| format!("the manifest of {} cannot be pushed", self.reference))?;
        Ok(pushed)
    }

    fn push_blob(
        &self,
        layout: &Layout,
        blob: &Blob,
        from: Option<&Reference>,
        progress: &dyn Progress,
        pushed: &mut Pushed,
    ) -> Result<(), RegistryError> {
        let digest = blob.digest.to_string();
        let what = || format!("blob {digest} cannot be pushed to {}", self.reference);
        let exists = self.client.blob_exists(&self.reference, &digest);
        if self.runtime.block_on(exists).context(what)? {
            pushed.present = pushed.present.saturating_add(blob.size);
            return Ok(());
        }
        // A registry that cannot mount, or lacks the blob there, begins an upload instead, which it forgets.
        let mount = from.map(|from| self.client.mount_blob(&self.reference, from, &digest));
        if mount.is_some_and(|mount| self.runtime.block_on(mount).is_ok()) {
            pushed.mounted = pushed.mounted.saturating_add(blob.size);
            return Ok(());
        }
        progress.begin(&digest, blob.size);
        // The body is read on this thread, but as a task that outlives no borrow: it tells how far it is by a channel.
        let (tell, told) = mpsc::channel();
        let reader = layout.blob(&blob.digest, blob.size)?;
        let stream = body(reader, move |bytes| {
            let _ = tell.send(bytes);
        });
        let put = self.client.push_blob_stream(&self.reference, stream.map_ok(Into::into), &digest, Some(blob.size));
        self.runtime
            .block_on(async {
                let mut put = std::pin::pin!(put);
                let mut tick = tokio::time::interval(std::time::Duration::from_millis(100));
                loop {
                    tokio::select! {
                        done = &mut put => break done,
                        _ = tick.tick() => progress.advance(told.try_iter().sum()),
                    }
                }
            })
            .context(what)?;
        progress.advance(told.try_iter().sum());
        progress.end();
        pushed.sent = pushed.sent.saturating_add(blob.size);
        Ok(())
    }
}
