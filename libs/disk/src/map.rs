//! The map of one layer: which ranges it defines, and how.
//!
//! Both the map of a layer and the merged [`crate::Table`] tile the whole disk: a sorted list of starts, each with a
//! tag, each lasting until the next. One tile is one 64-bit word, the tag in its upper 16 bits and the start, in
//! sectors, in its lower 48, so that a search compares words.

use std::fs::File;

use crate::Result;

/// What a layer says about a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing: the layer below decides.
    Absent,
    /// The bytes are in the layer's data file, at the same offset.
    Data,
    /// The bytes are zeros, whatever lies below.
    Zero,
}

/// A range of one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its length, in bytes.
    pub len: u64,
    /// What the layer says about it.
    pub state: State,
}

/// Which ranges of a disk a layer defines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerMap {
    size: u64,
    tiles: Vec<u64>,
}

impl LayerMap {
    /// The size of the layer's disk, in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.size
    }

    /// The ranges in order, absent ones too; together they tile the disk.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let _ = &self.tiles;
        std::iter::empty()
    }

    /// Reads a map file.
    ///
    /// # Errors
    /// The file cannot be read, or is damaged, or of another version.
    pub fn read_from(file: &File) -> Result<LayerMap> {
        let _ = file;
        unimplemented!()
    }

    /// Writes the map into an empty file. Syncing it is the caller's.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_to(&self, file: &File) -> Result<()> {
        let _ = file;
        unimplemented!()
    }
}
