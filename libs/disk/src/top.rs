//! The writable top of a stack: a sparse data file and a map of its 4 KiB blocks.

use std::fs::File;

use crate::{LayerMap, Result};

/// A top on disk, writable or frozen.
#[derive(Debug)]
pub struct Top {}

impl Top {
    /// Bytes in a block, the unit of the map.
    pub const BLOCK: u64 = 4096;

    /// Makes a fresh top for a disk of `size` bytes out of two empty files. Both stay tiny on disk.
    ///
    /// # Errors
    /// The files cannot be written, or `size` is no multiple of 512.
    pub fn create(data: &File, map: &File, size: u64) -> Result<()> {
        let _ = (data, map, size);
        unimplemented!()
    }

    /// Opens a top's two files as they were last flushed.
    ///
    /// # Errors
    /// The map is damaged or of another version, or a file cannot be read.
    pub fn open(data: File, map: File) -> Result<Top> {
        let _ = (data, map);
        unimplemented!()
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        0
    }

    /// The top's map in the form of a layer's, so that its data file can become a layer as it is.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn to_layer_map(&self) -> Result<LayerMap> {
        unimplemented!()
    }
}
