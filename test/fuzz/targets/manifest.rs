//! The OVMS manifest: what parses and is valid must survive writing and reading.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovms_artifact::manifest::Manifest;

fuzz_target!(|bytes: &[u8]| {
    let Ok(manifest) = Manifest::parse(bytes) else { return };
    let written = manifest.to_bytes().expect("a manifest that was read can be written");
    assert_eq!(Manifest::parse(&written).expect("and read again"), manifest);
    let _ = manifest.unpinned();
});
