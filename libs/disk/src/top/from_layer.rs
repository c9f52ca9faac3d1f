//! A layer as a top, for a disk that goes on where another machine's was frozen: it then lies below the writable top and is
//! part of what the next commit writes out.

use std::fs::File;

use super::{blocks, BlockMap, Top};
use crate::{Error, LayerMap, Result, State};

/// Blocks that are marked before the map may be written back, so that memory stays bounded: 1 GiB of the disk.
const STEP: u64 = (1 << 30) / Top::BLOCK;

impl Top {
    /// Makes a top out of a layer: `data` is the layer's own data file, which only gets longer, `map` an empty file.
    /// Syncing `data` is the caller's.
    ///
    /// # Errors
    /// The layer's ranges are no whole blocks of [`Top::BLOCK`] bytes, or a file cannot be written.
    pub fn create_from_layer(layer: &LayerMap, data: &File, map: &File) -> Result<()> {
        let size = layer.virtual_size();
        let defined = || layer.extents().filter(|extent| extent.state != State::Absent);
        let whole = |at: u64| at.is_multiple_of(Self::BLOCK) || at == size;
        if let Some(odd) = defined().find(|e| !whole(e.start) || !whole(e.start.saturating_add(e.len))) {
            let what = format!("its range at {} is not made of blocks of {} bytes", odd.start, Self::BLOCK);
            return Err(Error::BadFile { file: "layer map", what });
        }
        blocks::format(map, size)?;
        let length = data.metadata().map_err(Error::io("read the layer's data file"))?.len();
        let length = length.max(size.min(Self::MAX_LENGTH));
        data.set_len(length).map_err(Error::io("size the top's data file"))?;
        let (blocks, _) = BlockMap::open(map.try_clone().map_err(Error::io("open the top's block map"))?)?;
        for extent in defined() {
            let end = extent.start.saturating_add(extent.len).div_ceil(Self::BLOCK);
            let mut at = extent.start / Self::BLOCK;
            while at < end {
                let stop = at.saturating_add(STEP).min(end);
                blocks.set(at, stop, extent.state)?;
                if blocks.is_crowded() {
                    blocks.write(&blocks.changes())?;
                }
                at = stop;
            }
        }
        blocks.write(&blocks.changes())
    }
}
