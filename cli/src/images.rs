//! Where an image comes from: a layout on disk, or the local store.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use ovms_artifact::build::ImageName;
use ovms_artifact::digest::Digest;
use ovms_artifact::image::Blob;
use ovms_artifact::layout::{Layout, LayoutError, Store};
use ovms_artifact::oci::Descriptor;
use ovms_bundle::worker::{Launcher, LayerReader};
use ovms_config::Settings;
use ovms_registry::Holder;

use crate::error::CliError;

/// An image that was asked for.
pub struct Found {
    /// Where it is.
    pub layout: Layout,
    /// Its manifest.
    pub image: Descriptor,
}

/// The store's directory.
pub fn store_dir(settings: &Settings) -> PathBuf {
    settings.paths.state.join("store")
}

/// Who reads layers of images that nobody vouches for.
pub fn layers(settings: &Settings) -> LayerReader {
    LayerReader { launcher: Launcher::new(), limits: (&settings.limits).into() }
}

/// Finds an image by what a user types: the path of a layout (and a tag in it), else a name or digest in the store.
pub fn find(settings: &Settings, text: &str, tag: Option<&str>) -> Result<Found, CliError> {
    let path = Path::new(text);
    if is_path(text) || tag.is_some() {
        let layout = Layout::open(path)?;
        let image = layout.select(tag)?;
        return Ok(Found { layout, image });
    }
    let store = Store::existing(&store_dir(settings), text)?;
    let image = store.find(text)?;
    Ok(Found { layout: store.layout()?, image })
}

/// Whether a text means a file or a directory: there is one, or it looks like one.
pub fn is_path(text: &str) -> bool {
    let begins = ["/", "./", "../"].iter().any(|begin| text.starts_with(begin));
    begins || [".json", ".tar"].iter().any(|end| text.ends_with(end)) || Path::new(text).exists()
}

/// Spells out a name that an image is to get; a digest may stand in the tag's place.
pub fn name(text: &str) -> Result<ImageName, CliError> {
    match text.split_once('@') {
        Some((_, digest)) => {
            let reference = ovms_registry::parse(text)?;
            Ok(ImageName { full: reference.whole(), tag: digest.to_owned() })
        }
        None => Ok(ImageName::parse(text)?),
    }
}

/// Which repositories have which blobs, as far as the store's images tell.
pub fn holders(store: &Store) -> Result<Vec<Holder>, CliError> {
    let layout = store.layout()?;
    let mut holders = Vec::new();
    for entry in layout.entries()? {
        let reference = entry.name.as_deref().map(ovms_registry::parse);
        let (Some(Ok(reference)), Some(image)) = (reference, store.image(&entry.digest)) else { continue };
        let Ok(documents) = layout.documents(&image) else { continue };
        let listed = documents.manifest.layers().iter().chain([documents.manifest.config()]);
        let blobs: BTreeSet<Digest> = listed.filter_map(|d| Blob::of(d).ok()).map(|blob| blob.digest).collect();
        holders.push(Holder { reference, blobs });
    }
    Ok(holders)
}

/// The digest of an image's manifest.
pub fn digest(image: &Descriptor) -> Result<Digest, CliError> {
    Ok(Blob::of(image).map_err(LayoutError::Image)?.digest)
}
