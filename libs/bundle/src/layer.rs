//! One layer of an image in block-stack form, in a directory of its own.
//!
//! ```text
//!  <dir>/data   the layer's bytes, sparse, each at its guest offset
//!  <dir>/map    which ranges it defines (ovms_disk::LayerMap)
//! ```

use std::path::{Path, PathBuf};

use ovms_disk::LayerMap;

use crate::{Error, Result};

/// Name of the data file in a layer's directory.
pub const DATA: &str = "data";
/// Name of the map in a layer's directory.
pub const MAP: &str = "map";

/// The data file of the layer in `dir`.
#[must_use]
pub fn data_path(dir: &Path) -> PathBuf {
    dir.join(DATA)
}

/// The map of the layer in `dir`.
#[must_use]
pub fn map_path(dir: &Path) -> PathBuf {
    dir.join(MAP)
}

/// Reads the map of the layer in `dir`.
///
/// # Errors
/// [`Error::Io`], [`Error::Disk`].
pub fn load_map(dir: &Path) -> Result<LayerMap> {
    let path = map_path(dir);
    let file = std::fs::File::open(&path).map_err(Error::io("open", &path))?;
    LayerMap::read_from(&file).map_err(Error::disk(path))
}
