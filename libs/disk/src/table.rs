//! The table of a whole stack: extent → layer file, or zero.
//!
//! Layers are numbered from the base, 0, upwards. The table of a stack is that of the stack below with one layer's map
//! laid over it, so a child's table is computed without reading any other layer's map.

use std::fs::File;

use crate::{LayerMap, Result};

/// One range of a disk and where its bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableExtent {
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its length, in bytes.
    pub len: u64,
    /// The number of the layer whose data file holds it at the same offset; `None` for zeros.
    pub layer: Option<u16>,
}

/// The merged map of a stack of layers.
#[derive(Debug)]
pub struct Table {
    size: u64,
}

impl Table {
    /// The table of a disk with no layer: `size` bytes of zeros.
    #[must_use]
    pub fn empty(size: u64) -> Table {
        Table { size }
    }

    /// The table of the stack that has the layer of `map` on top of this one. The disk takes the layer's size.
    ///
    /// # Errors
    /// There are 65,535 layers already.
    pub fn overlay(&self, map: &LayerMap) -> Result<Table> {
        let _ = map;
        unimplemented!()
    }

    /// The table of these layers, base first.
    ///
    /// # Errors
    /// There are more than 65,535 layers.
    pub fn merge<'a>(maps: impl IntoIterator<Item = &'a LayerMap>) -> Result<Table> {
        let _ = maps.into_iter();
        unimplemented!()
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.size
    }

    /// How many layers it was merged from.
    #[must_use]
    pub fn layers(&self) -> u16 {
        0
    }

    /// The ranges in order; together they tile the disk.
    pub fn extents(&self) -> impl Iterator<Item = TableExtent> + '_ {
        std::iter::empty()
    }

    /// Opens a table file: checks all of it once, then maps it, so that it costs no memory of its own. The file must
    /// never change while the table lives.
    ///
    /// # Errors
    /// The file cannot be read, or is damaged, or of another version.
    pub fn open(file: &File) -> Result<Table> {
        let _ = file;
        unimplemented!()
    }

    /// Writes the table into an empty file. Syncing it is the caller's.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_to(&self, file: &File) -> Result<()> {
        let _ = file;
        unimplemented!()
    }
}
