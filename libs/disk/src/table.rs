//! The table of a whole stack: extent → layer file, or zero.
//!
//! Layers are numbered from the base, 0, upwards. The table of a stack is that of the stack below with one layer's map
//! laid over it, so a child's table is computed without reading any other layer's map. A disk takes the size of its
//! topmost layer: a smaller one cuts off what lies below for good, a larger one adds zeros.

use std::{
    fs::File,
    sync::atomic::{AtomicUsize, Ordering},
};

use crate::{
    sys::MappedWords,
    tiles::{self, Builder, Head, Kind, HEADER},
    Error, LayerMap, Result, State,
};

const KIND: Kind = Kind { magic: *b"OVMSTBL\0", file: "disk table" };
/// The tag of zeros; every lower one is a layer's number.
const ZERO: u16 = u16::MAX;

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
    layers: u16,
    words: Words,
    /// The tile of the last look-up: neighbouring requests find theirs without a search.
    hint: AtomicUsize,
}

#[derive(Debug)]
enum Words {
    Owned(Vec<u64>),
    Mapped(MappedWords),
}

impl Table {
    fn owned(size: u64, layers: u16, words: Vec<u64>) -> Table {
        Table { size, layers, words: Words::Owned(words), hint: AtomicUsize::new(0) }
    }

    fn words(&self) -> &[u64] {
        match &self.words {
            Words::Owned(words) => words,
            Words::Mapped(map) => map.words().get(HEADER / 8..).unwrap_or_default(),
        }
    }

    /// The table of a disk with no layer: `size` bytes of zeros, rounded up to whole sectors.
    ///
    /// # Errors
    /// `size` is beyond 2⁵⁷ bytes.
    pub fn empty(size: u64) -> Result<Table> {
        let limit = tiles::MAX_SIZE;
        let size = size.checked_next_multiple_of(crate::SECTOR).filter(|s| *s <= limit).ok_or(Error::Limit {
            what: "virtual size",
            value: size,
            limit,
        })?;
        let mut builder = Builder::default();
        builder.push_to(size, ZERO)?;
        Ok(Table::owned(size, 0, builder.finish()))
    }

    /// The table of the stack that has the layer of `map` on top of this one. The disk takes the layer's size.
    ///
    /// # Errors
    /// There are 65,535 layers already, or too many extents.
    pub fn overlay(&self, map: &LayerMap) -> Result<Table> {
        if self.layers == ZERO {
            return Err(Error::Limit { what: "number of layers", value: u64::from(ZERO) + 1, limit: u64::from(ZERO) });
        }
        let mut builder = Builder::default();
        let mut below = tiles::iter(self.words(), self.size).peekable();
        for extent in map.extents() {
            let end = extent.start.saturating_add(extent.len);
            match extent.state {
                State::Data => builder.push_to(end, self.layers)?,
                State::Zero => builder.push_to(end, ZERO)?,
                State::Absent => {
                    while let Some(&(_, below_end, tag)) = below.peek() {
                        builder.push_to(below_end.min(end), tag)?;
                        if below_end > end {
                            break;
                        }
                        below.next();
                    }
                    builder.push_to(end, ZERO)?;
                }
            }
            while below.next_if(|(_, below_end, _)| *below_end <= end).is_some() {}
        }
        Ok(Table::owned(map.virtual_size(), self.layers + 1, builder.finish()))
    }

    /// The table of these layers, base first.
    ///
    /// # Errors
    /// There are more than 65,535 layers, or too many extents.
    pub fn merge<'a>(maps: impl IntoIterator<Item = &'a LayerMap>) -> Result<Table> {
        maps.into_iter().try_fold(Table::empty(0)?, |table, map| table.overlay(map))
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.size
    }

    /// How many layers it was merged from.
    #[must_use]
    pub fn layers(&self) -> u16 {
        self.layers
    }

    /// The ranges in order; together they tile the disk.
    pub fn extents(&self) -> impl Iterator<Item = TableExtent> + '_ {
        tiles::iter(self.words(), self.size).map(|(start, end, tag)| TableExtent {
            start,
            len: end.saturating_sub(start),
            layer: (tag != ZERO).then_some(tag),
        })
    }

    /// The layer that holds `offset` (`None`: zeros) and where its extent ends. Past the end of the disk all is zeros.
    pub(crate) fn find(&self, offset: u64) -> (Option<u16>, u64) {
        if offset >= self.size {
            return (None, u64::MAX);
        }
        let (tag, end, index) = tiles::find(self.words(), self.size, offset, self.hint.load(Ordering::Relaxed));
        self.hint.store(index, Ordering::Relaxed);
        // A tile always reaches past the offset it was found for; the maximum keeps a bad file from stalling a reader.
        ((tag != ZERO).then_some(tag), end.max(offset.saturating_add(crate::SECTOR)))
    }

    /// Opens a table file: checks all of it once, then maps it, so that it costs no memory of its own. The file must
    /// never change while the table lives.
    ///
    /// # Errors
    /// The file cannot be read, or is damaged, or of another version.
    pub fn open(file: &File) -> Result<Table> {
        let tag_ok = |head: &Head, tag: u16| tag == ZERO || u32::from(tag) < head.layers;
        let head = tiles::check(file, KIND, tag_ok, |_| {})?;
        let layers = u16::try_from(head.layers)
            .map_err(|_| Error::BadFile { file: KIND.file, what: format!("it names {} layers", head.layers) })?;
        // The check above made sure that the file has exactly this length.
        let count = usize::try_from(head.count).unwrap_or(usize::MAX).saturating_add(HEADER / 8);
        let mapped = MappedWords::map(file, count).map_err(Error::io("map the disk table"))?;
        Ok(Table { size: head.size, layers, words: Words::Mapped(mapped), hint: AtomicUsize::new(0) })
    }

    /// Writes the table into an empty file. Syncing it is the caller's.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_to(&self, file: &File) -> Result<()> {
        tiles::write(file, KIND, u32::from(self.layers), self.size, self.words())
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::FileExt};

    use proptest::prelude::*;

    use super::*;
    use crate::{map::MapBuilder, SECTOR};

    fn layer() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec((0..3_u8, 1..20_usize), 0..12)
            .prop_map(|runs| runs.into_iter().flat_map(|(state, len)| vec![state; len]).collect())
    }

    /// A map of one state for each sector.
    fn map_of(states: &[u8]) -> LayerMap {
        let mut builder = MapBuilder::default();
        for (i, state) in states.iter().enumerate() {
            builder.push_to((i as u64 + 1) * SECTOR, State::from_tag(u16::from(*state))).unwrap();
        }
        builder.finish(states.len() as u64 * SECTOR).unwrap()
    }

    proptest! {
        /// Laying maps over each other gives, sector by sector, the topmost layer that says something.
        #[test]
        fn overlay_equals_a_plain_model(layers in prop::collection::vec(layer(), 0..6)) {
            let mut model: Vec<Option<u16>> = Vec::new();
            for (n, states) in layers.iter().enumerate() {
                model.resize(states.len(), None);
                for (slot, state) in model.iter_mut().zip(states) {
                    match State::from_tag(u16::from(*state)) {
                        State::Data => *slot = Some(n as u16),
                        State::Zero => *slot = None,
                        State::Absent => {}
                    }
                }
            }
            let maps: Vec<LayerMap> = layers.iter().map(|l| map_of(l)).collect();
            let merged = Table::merge(&maps).unwrap();
            let file = tempfile::tempfile().unwrap();
            merged.write_to(&file).unwrap();
            for table in [merged, Table::open(&file).unwrap()] {
                prop_assert_eq!(table.virtual_size(), model.len() as u64 * SECTOR);
                prop_assert_eq!(usize::from(table.layers()), layers.len());
                for (i, want) in model.iter().enumerate().chain(model.iter().enumerate().rev()) {
                    let (found, end) = table.find(i as u64 * SECTOR);
                    prop_assert_eq!(found, *want, "sector {}", i);
                    prop_assert!(end > i as u64 * SECTOR && end <= table.virtual_size());
                }
                prop_assert_eq!(table.find(table.virtual_size()).0, None);
                prop_assert_eq!(table.extents().map(|e| e.len).sum::<u64>(), table.virtual_size());
            }
        }
    }

    #[test]
    fn damaged_table_file_returns_bad_file() {
        let table = Table::merge([&map_of(&[1, 1, 0, 2, 1]), &map_of(&[0, 1, 0, 1])]).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        table.write_to(&file).unwrap();
        let length = file.metadata().unwrap().len();
        let mut good = vec![0; length as usize];
        file.read_exact_at(&mut good, 0).unwrap();
        for byte in 0..good.len() {
            let mut bad = good.clone();
            bad[byte] ^= 0x10;
            file.write_all_at(&bad, 0).unwrap();
            assert!(matches!(Table::open(&file), Err(Error::BadFile { .. })), "byte {byte}");
        }
        file.write_all_at(&good, 0).unwrap();
        Table::open(&file).unwrap();
        file.set_len(length - 8).unwrap();
        assert!(matches!(Table::open(&file), Err(Error::BadFile { .. })));
        file.set_len(0).unwrap();
        file.write_all(b"OVMSTBL\0").unwrap();
        assert!(matches!(Table::open(&file), Err(Error::BadFile { .. })));
    }

    #[test]
    fn layer_map_is_no_table() {
        let file = tempfile::tempfile().unwrap();
        map_of(&[1, 2]).write_to(&file).unwrap();
        assert!(matches!(Table::open(&file), Err(Error::BadFile { .. })));
        assert_eq!(LayerMap::read_from(&file).unwrap(), map_of(&[1, 2]));
    }
}
