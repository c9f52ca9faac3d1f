//! Packets on the control socket and lines on the bundle socket: a VMM that its guest has taken over may send anything.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovms_config::{VmConfig, VmSpec};
use ovms_proto::bundle::{read_line, FromSnapshotter, ToSnapshotter};
use ovms_proto::control::{FromVmm, Request};

fuzz_target!(|bytes: &[u8]| {
    let _ = serde_json::from_slice::<FromVmm>(bytes);
    let _ = serde_json::from_slice::<Request>(bytes);
    if let Ok(config) = serde_json::from_slice::<VmConfig>(bytes) {
        let _ = VmSpec::new(config, 6);
    }
    let _ = read_line::<FromSnapshotter>(&mut &*bytes);
    let _ = read_line::<ToSnapshotter>(&mut &*bytes);
});
