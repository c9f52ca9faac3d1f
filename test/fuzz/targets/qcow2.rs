//! A qcow2 layer: whatever its bytes say, the conversion ends, with a map or an error. What it accepts must be stable:
//! converting the same bytes again gives the same map.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovms_disk::layer::{convert, probe, Format, Limits};

/// Small enough that a bomb is refused within the fuzzer's memory and time.
const LIMITS: Limits = Limits { max_virtual_bytes: 1 << 30, max_data_bytes: 8 << 20, max_ratio: 1100 };

fuzz_target!(|bytes: &[u8]| {
    let once = || {
        let data = tempfile::tempfile().expect("a temporary file");
        convert(&bytes, Format::Qcow2, &data, &LIMITS, &mut |_, _| {})
    };
    let Ok(map) = once() else { return };
    let info = probe(&bytes, Format::Qcow2, &LIMITS).expect("a layer that converts has a sound header");
    assert_eq!(map.virtual_size(), info.virtual_size);
    assert!(map.extents().eq(once().expect("it converted before").extents()));
});
