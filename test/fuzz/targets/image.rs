//! OCI manifest, image config and descriptor of one image, separated by zero bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovms_artifact::image::{parse_manifest, Parts};
use ovms_artifact::manifest::Manifest;

fuzz_target!(|bytes: &[u8]| {
    let mut documents = bytes.splitn(3, |byte| *byte == 0);
    let (Some(manifest), Some(config)) = (documents.next(), documents.next()) else { return };
    let Ok(manifest) = parse_manifest(manifest) else { return };
    let Ok(parts) = Parts::new(&manifest, config) else { return };
    let _ = parts.chain_id();
    if let Some(Ok(descriptor)) = documents.next().map(Manifest::from_slice) {
        let _ = parts.resolve(descriptor);
    }
});
