//! The local store: one OCI image layout with many images, used by several processes at once.
//!
//! ```text
//!  <store>/oci-layout, index.json, blobs/sha256/…   as any layout; an entry's tag is its full name
//!  <store>/lock         shared: who adds blobs that no index names yet   exclusive: who removes what none names
//!  <store>/index.lock   held while index.json is read, changed and replaced
//! ```
//! Nobody waits for somebody's transfer: while blobs are being added, a removal takes the name away and leaves the blobs
//! to the next one.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::write::{failed, has_blob, put_blob, replaced, write_index};
use super::{annotation, digest_of, Layout, LayoutError, Progress, Sink, Source};
use crate::build::ImageName;
use crate::digest::Digest;
use crate::image::{self, Blob, MAX_DOCUMENT};
use crate::media;
use crate::oci;

const LOCK: &str = "lock";
const INDEX_LOCK: &str = "index.lock";
const BLOBS: &str = "blobs/sha256";
/// The shortest beginning of a digest that names an image.
const MIN_PREFIX: usize = 6;

/// A store on disk.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// What [`Store::remove`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The names that are gone.
    pub names: Vec<String>,
    /// The manifests of images that have no name any more.
    pub images: Vec<Digest>,
    /// Bytes of the blobs that were removed; `None` if blobs are being added, so that none could be.
    pub freed: Option<u64>,
}

impl Store {
    /// Opens the store in `dir` and makes it, for its owner alone, if it is not there.
    ///
    /// # Errors
    /// [`LayoutError::Io`], [`LayoutError::Occupied`] if the directory holds something else.
    pub fn open(dir: &Path) -> Result<Self, LayoutError> {
        let store = Self { dir: dir.to_owned() };
        if dir.join("index.json").exists() {
            return Ok(store);
        }
        let mut private = fs::DirBuilder::new();
        private.recursive(true).mode(0o700);
        private.create(dir.join(BLOBS)).map_err(|e| failed(dir, "written", e))?;
        let _lock = store.lock(INDEX_LOCK)?;
        if !dir.join("index.json").exists() {
            write_index(dir, Vec::new())?;
        }
        Ok(store)
    }

    /// Opens the store for reading: one that is not there yet has no images, and looking is no reason to make it.
    ///
    /// # Errors
    /// [`LayoutError::UnknownName`] of `text` if there is no store, [`LayoutError::Io`].
    pub fn existing(dir: &Path, text: &str) -> Result<Self, LayoutError> {
        match fs::metadata(dir.join("index.json")) {
            Ok(_) => Ok(Self { dir: dir.to_owned() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(LayoutError::UnknownName(text.to_owned())),
            Err(e) => Err(failed(dir, "read", e)),
        }
    }

    /// The store's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The store as a layout, as it is now.
    ///
    /// # Errors
    /// [`LayoutError`] if it is damaged.
    pub fn layout(&self) -> Result<Layout, LayoutError> {
        Layout::open(&self.dir)
    }

    /// Finds an image by its name (short forms are spelled out: `debian` is `docker.io/library/debian:latest`) or by its
    /// manifest's digest or a beginning of that.
    ///
    /// # Errors
    /// [`LayoutError::UnknownName`], [`LayoutError::AmbiguousName`], and those of reading.
    pub fn find(&self, text: &str) -> Result<oci::Descriptor, LayoutError> {
        let layout = self.layout()?;
        let found = matching(layout.index.manifests(), text);
        let Some(first) = found.first() else { return Err(LayoutError::UnknownName(text.to_owned())) };
        if found.iter().any(|other| other.digest() != first.digest()) {
            let names = found.iter().map(|d| name_of(d)).collect::<Vec<_>>().join(", ");
            return Err(LayoutError::AmbiguousName { text: text.to_owned(), names });
        }
        Ok((*first).clone())
    }

    /// The image manifest of this digest, named or not; `None` if its blob is not there.
    pub fn image(&self, digest: &Digest) -> Option<oci::Descriptor> {
        let size = fs::metadata(self.dir.join(BLOBS).join(digest.hex())).ok()?.len();
        let descriptor = json!({ "mediaType": media::OCI_MANIFEST, "digest": digest, "size": size });
        serde_json::from_value(descriptor).ok().filter(|_| size <= MAX_DOCUMENT)
    }

    /// Begins adding images. Blobs may be put for as long as it takes; they are safe until the sink is gone.
    ///
    /// # Errors
    /// [`LayoutError::Io`].
    pub fn writer(&self) -> Result<StoreSink, LayoutError> {
        let lock = self.lock_file(LOCK)?;
        lock.lock_shared().map_err(|e| failed(&self.dir.join(LOCK), "locked", e))?;
        Ok(StoreSink { store: self.clone(), _lock: lock })
    }

    /// Takes the images' names away (every name, if `text` is a digest), and removes the blobs that nobody needs any
    /// more. Manifests in `used` and what they name stay.
    ///
    /// # Errors
    /// [`LayoutError::UnknownName`] and those of reading and writing.
    pub fn remove(&self, text: &str, used: &[Digest]) -> Result<Removed, LayoutError> {
        let lock = self.lock(INDEX_LOCK)?;
        let entries = self.layout()?.index.manifests().clone();
        let gone: Vec<&oci::Descriptor> = matching(&entries, text);
        if gone.is_empty() {
            return Err(LayoutError::UnknownName(text.to_owned()));
        }
        let names = gone.iter().map(|d| name_of(d)).collect();
        let left: Vec<oci::Descriptor> = entries.iter().filter(|d| !gone.contains(d)).cloned().collect();
        let unnamed = gone.iter().filter(|d| left.iter().all(|other| other.digest() != d.digest()));
        let mut images = unnamed.map(|d| digest_of(d, "index.json")).collect::<Result<Vec<_>, _>>()?;
        images.dedup();
        write_index(&self.dir, left)?;
        drop(lock);
        Ok(Removed { names, images, freed: self.collect(used)? })
    }

    /// Removes blobs that no image of the index and none in `used` needs; `None` if somebody is adding blobs.
    ///
    /// # Errors
    /// [`LayoutError`]: nothing is removed unless every manifest could be read.
    pub fn collect(&self, used: &[Digest]) -> Result<Option<u64>, LayoutError> {
        let lock = self.lock_file(LOCK)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(None),
            Err(fs::TryLockError::Error(e)) => return Err(failed(&self.dir.join(LOCK), "locked", e)),
        }
        let layout = self.layout()?;
        let mut needed = BTreeSet::new();
        let named = layout.index.manifests().iter().cloned();
        for image in named.chain(used.iter().filter_map(|digest| self.image(digest))) {
            needed.insert(digest_of(&image, "index.json")?.hex());
            let bytes = layout.document("an image manifest", &digest_of(&image, "index.json")?, image.size())?;
            let manifest = image::parse_manifest(&bytes).map_err(LayoutError::Image)?;
            for blob in manifest.layers().iter().chain([manifest.config()]) {
                needed.insert(digest_of(blob, "an image manifest")?.hex());
            }
        }
        let blobs = self.dir.join(BLOBS);
        let unreadable = |e| failed(&blobs, "read", e);
        let mut freed: u64 = 0;
        for entry in fs::read_dir(&blobs).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            // Whatever has another name is left of an interrupted write.
            if entry.file_name().to_str().is_some_and(|name| needed.contains(name)) {
                continue;
            }
            let size = entry.metadata().map_err(unreadable)?.len();
            fs::remove_file(entry.path()).map_err(|e| failed(&entry.path(), "removed", e))?;
            freed = freed.saturating_add(size);
        }
        Ok(Some(freed))
    }

    fn lock(&self, name: &str) -> Result<File, LayoutError> {
        let file = self.lock_file(name)?;
        file.lock().map_err(|e| failed(&self.dir.join(name), "locked", e))?;
        Ok(file)
    }

    fn lock_file(&self, name: &str) -> Result<File, LayoutError> {
        let path = self.dir.join(name);
        let open = || File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
        open().map_err(|e| failed(&path, "opened", e))
    }
}

/// Adds to a [`Store`].
pub struct StoreSink {
    store: Store,
    /// Held shared.
    _lock: File,
}

impl Sink for StoreSink {
    fn put(&mut self, source: &dyn Source, progress: &dyn Progress) -> Result<(Digest, u64), LayoutError> {
        put_blob(&self.store.dir, source, progress)
    }

    fn has(&self, digest: &Digest, size: u64) -> bool {
        has_blob(&self.store.dir, digest, size)
    }

    /// The entries' tags become their full names: a store has many images that are called `latest`.
    fn finish(self: Box<Self>, entries: Vec<oci::Descriptor>) -> Result<(), LayoutError> {
        let entries: Vec<oci::Descriptor> = entries.into_iter().map(with_full_tag).collect();
        let _lock = self.store.lock(INDEX_LOCK)?;
        let old = self.store.layout()?.index.manifests().clone();
        let mut all: Vec<oci::Descriptor> = old.into_iter().filter(|old| !replaced(old, &entries)).collect();
        all.extend(entries);
        write_index(&self.store.dir, all)
    }
}

fn with_full_tag(mut entry: oci::Descriptor) -> oci::Descriptor {
    if let Some(name) = annotation(&entry, media::ANNOTATION_IMAGE_NAME) {
        let mut annotations = entry.annotations().clone().unwrap_or_default();
        annotations.insert(media::ANNOTATION_REF_NAME.to_owned(), name);
        entry.set_annotations(Some(annotations));
    }
    entry
}

/// The entries that a text means: by name, else by digest.
fn matching<'a>(entries: &'a [oci::Descriptor], text: &str) -> Vec<&'a oci::Descriptor> {
    let full = ImageName::parse(text).map_or_else(|_| text.to_owned(), |name| name.full);
    let by_name: Vec<_> = entries.iter().filter(|d| name_of(d) == full).collect();
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    if !by_name.is_empty() || hex.len() < MIN_PREFIX || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return by_name;
    }
    let begins = |d: &&oci::Descriptor| Blob::of(d).is_ok_and(|blob| blob.digest.hex().starts_with(hex));
    entries.iter().filter(begins).collect()
}

fn name_of(entry: &oci::Descriptor) -> String {
    annotation(entry, media::ANNOTATION_REF_NAME).unwrap_or_else(|| entry.digest().to_string())
}

#[cfg(test)]
mod tests;
