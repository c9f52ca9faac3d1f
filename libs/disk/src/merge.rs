//! Several tops into one layer, for a commit of a disk that was frozen under its machine.

use std::{fs::File, os::unix::fs::FileExt};

use crate::{map::MapBuilder, Error, LayerMap, Result, Stack, State};

/// Bytes that are copied at once.
const COPY: u64 = 1 << 20;

impl Stack {
    /// Puts what the tops say together, the newest first, into one layer: writes its data to `data` (an empty file, made
    /// sparse) and returns its map. The stack must not be written meanwhile. Syncing `data` is the caller's.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn tops_to_layer(&self, data: &File) -> Result<LayerMap> {
        let size = self.size();
        let mut map = MapBuilder::default();
        let mut buffer = Vec::new();
        let mut data_end = 0;
        let mut at = 0;
        while at < size {
            let (state, end) = self.with_view(|view| view.top_run(at, size))?;
            while state == State::Data && at < end {
                let part = (end - at).min(COPY);
                buffer.resize(part as usize, 0);
                self.with_view(|view| view.read_slice(at, &mut buffer))?;
                data.write_all_at(&buffer, at).map_err(Error::io("write the layer's data file"))?;
                at += part;
                data_end = at;
            }
            map.push_to(end, state)?;
            at = end;
        }
        data.set_len(data_end).map_err(Error::io("size the layer's data file"))?;
        map.finish(size)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{StackFiles, Table, Top, TopFiles};

    const SIZE: u64 = 8 << 20;

    fn file(dir: &Path, name: &str) -> File {
        File::options().read(true).write(true).create(true).truncate(false).open(dir.join(name)).unwrap()
    }

    fn top(dir: &Path, name: &str) -> TopFiles {
        let (data, map) = (file(dir, &format!("{name}.data")), file(dir, &format!("{name}.map")));
        Top::create(&data, &map, SIZE).unwrap();
        TopFiles { data, map }
    }

    #[test]
    fn tops_merged_into_a_layer_read_as_they_did_and_become_a_top_again() {
        let dir = tempfile::tempdir().unwrap();
        Table::empty(SIZE).unwrap().write_to(&file(dir.path(), "table")).unwrap();
        let files = |frozen, top| StackFiles { table: file(dir.path(), "table"), layers: vec![], frozen, top };
        let stack = Stack::open(files(vec![], Some(top(dir.path(), "0"))), false).unwrap();
        stack.write_at(0, &[1; 3 << 20]).unwrap();
        stack.freeze(top(dir.path(), "1")).unwrap();
        stack.write_at(1 << 20, &[2; 4096]).unwrap();
        stack.discard(2 << 20, 4096).unwrap();
        stack.freeze(top(dir.path(), "2")).unwrap();
        stack.write_at(SIZE - 512, &[3; 512]).unwrap();
        stack.flush().unwrap();

        let data = file(dir.path(), "data");
        let map = stack.tops_to_layer(&data).unwrap();

        assert_eq!((map.bytes_of(State::Data), map.bytes_of(State::Zero)), ((3 << 20) - 4096 + 4096, 4096));
        let block_map = file(dir.path(), "map");
        Top::create_from_layer(&map, &data, &block_map).unwrap();
        let frozen = vec![TopFiles { data, map: block_map }];
        let again = Stack::open(files(frozen, Some(top(dir.path(), "new"))), false).unwrap();
        let read = |stack: &Stack| {
            let mut all = vec![0xEE; SIZE as usize];
            stack.read_at(0, &mut all).unwrap();
            all
        };
        assert!(read(&again) == read(&stack));
    }

    #[test]
    fn create_from_layer_of_odd_ranges_returns_where() {
        let dir = tempfile::tempdir().unwrap();
        let mut map = MapBuilder::default();
        map.push_to(512, State::Data).unwrap();
        let map = map.finish(SIZE).unwrap();
        let err = Top::create_from_layer(&map, &file(dir.path(), "data"), &file(dir.path(), "map")).unwrap_err();
        assert!(err.to_string().contains("range at 0"), "{err}");
    }
}
