//! The map of one layer: which ranges of the disk it defines, and how.

use std::fs::File;

use crate::{
    tiles::{self, Builder, Kind},
    ReadAt, Result,
};

pub(crate) const KIND: Kind = Kind { magic: *b"OVMSMAP\0", file: "layer map" };

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

impl State {
    pub(crate) fn tag(self) -> u16 {
        match self {
            State::Absent => 0,
            State::Data => 1,
            State::Zero => 2,
        }
    }

    pub(crate) fn from_tag(tag: u16) -> State {
        match tag {
            1 => State::Data,
            2 => State::Zero,
            _ => State::Absent,
        }
    }
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
    words: Vec<u64>,
}

impl LayerMap {
    /// The size of the layer's disk, in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.size
    }

    /// The ranges in order, absent ones too; together they tile the disk.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        tiles::iter(&self.words, self.size).map(|(start, end, tag)| Extent {
            start,
            len: end.saturating_sub(start),
            state: State::from_tag(tag),
        })
    }

    /// The sum of the ranges of one state, in bytes.
    #[must_use]
    pub fn bytes_of(&self, state: State) -> u64 {
        self.extents().filter(|e| e.state == state).map(|e| e.len).sum()
    }

    /// Reads a map file.
    ///
    /// # Errors
    /// The file cannot be read, or is damaged, or of another version.
    pub fn read_from<S: ReadAt + ?Sized>(source: &S) -> Result<LayerMap> {
        let mut words = Vec::new();
        let head = tiles::check(source, KIND, |_, tag| tag <= 2, |part| words.extend_from_slice(part))?;
        Ok(LayerMap { size: head.size, words })
    }

    /// Writes the map into an empty file. Syncing it is the caller's.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_to(&self, file: &File) -> Result<()> {
        tiles::write(file, KIND, 1, self.size, &self.words)
    }
}

/// Builds a layer's map front to back.
#[derive(Debug, Default)]
pub(crate) struct MapBuilder(Builder);

impl MapBuilder {
    /// Appends a range that begins where the last one ended.
    pub fn push_to(&mut self, end: u64, state: State) -> Result<()> {
        self.0.push_to(end, state.tag())
    }

    /// Where the next range will begin.
    pub fn end(&self) -> u64 {
        self.0.end()
    }

    /// Ends the map at `size`; what was not said is absent.
    pub fn finish(mut self, size: u64) -> Result<LayerMap> {
        self.0.push_to(size, State::Absent.tag())?;
        debug_assert!(self.0.end() == size);
        Ok(LayerMap { size, words: self.0.finish() })
    }
}
