//! Cluster maps and tables as they lie on disk: what reads must write back to something that reads the same.
#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use ovms_disk::{LayerMap, Table};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(map) = LayerMap::read_from(&bytes) {
        let file = tempfile::tempfile().expect("a temporary file");
        map.write_to(&file).expect("a map that was read can be written");
        let again = LayerMap::read_from(&file).expect("and read again");
        assert!(map.extents().eq(again.extents()));
        if let Ok(table) = Table::merge([&map]) {
            assert_eq!(table.virtual_size(), map.virtual_size());
        }
    }
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(bytes).expect("room for the input");
    if let Ok(table) = Table::open(&file) {
        assert!(table.extents().count() <= bytes.len());
    }
});
