//! Turning one disk layer into block-stack form, in one pass.
//!
//! The result is a sparse raw file with every byte at its guest offset, and a [`LayerMap`] that says which ranges the
//! layer defines. A qcow2 may leave ranges absent (they fall through to the layer below); a raw layer defines its whole
//! range: data, or zeros where it has holes.

use std::fs::File;

use crate::{LayerMap, ReadAt, Result};

/// The format of a layer, as the image's manifest or the tar member's name gives it; never guessed from content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// qcow2, version 2 or 3.
    Qcow2,
    /// The disk's bytes as they are.
    Raw,
}

/// What a hostile layer may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The largest virtual size, in bytes.
    pub max_virtual_bytes: u64,
    /// The most bytes of data that may come out of the layer.
    pub max_data_bytes: u64,
    /// The most bytes of data for each byte of the layer file. Applies beyond the first 64 MiB of data.
    pub max_ratio: u64,
}

impl Default for Limits {
    /// 64 TiB of virtual size, 4 TiB of data, 1100 bytes for each (zlib cannot exceed 1032).
    fn default() -> Self {
        Limits { max_virtual_bytes: 64 << 40, max_data_bytes: 4 << 40, max_ratio: 1100 }
    }
}

/// What a layer's header says about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// The layer's format.
    pub format: Format,
    /// The size of the disk that it describes, in bytes, rounded up to whole sectors.
    pub virtual_size: u64,
    /// The length of the layer file, in bytes.
    pub file_size: u64,
}

/// Reads and checks a layer's header and nothing more: for `ovm build`, `validate` and `inspect`.
///
/// # Errors
/// Whatever would make [`convert`] refuse the layer by its header.
pub fn probe<S: ReadAt + ?Sized>(source: &S, format: Format, limits: &Limits) -> Result<Info> {
    let _ = (source, format, limits);
    unimplemented!()
}

/// Converts a layer: writes its data to `data` (an empty file; made sparse, as long as the virtual size) and returns
/// the map. `progress(done, total)` is called about once for each MiB with guest bytes.
///
/// # Errors
/// The layer is refused (see [`crate::Error`]) or a file cannot be read or written; `data` is then worthless.
pub fn convert<S: ReadAt + ?Sized>(
    source: &S,
    format: Format,
    data: &File,
    limits: &Limits,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<LayerMap> {
    let _ = (source, format, data, limits, progress);
    unimplemented!()
}
