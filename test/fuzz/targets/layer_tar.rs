//! A layer blob as it comes from a registry: tar, gzip, zstd or bare, by the first byte of the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovms_artifact::layer::{read, Encoding, Limits};

const TYPES: [(&str, Option<&str>); 6] = [
    ("application/vnd.oci.image.layer.v1.tar", None),
    ("application/vnd.oci.image.layer.v1.tar+gzip", None),
    ("application/vnd.oci.image.layer.v1.tar+zstd", None),
    ("application/vnd.oci.image.layer.v1.tar", Some("qcow2")),
    ("application/vnd.oci.image.layer.v1.tar", Some("raw")),
    ("application/vnd.oci.image.layer.v1.tar+gzip", Some("qcow2")),
];

fuzz_target!(|input: &[u8]| {
    let Some((choice, bytes)) = input.split_first() else { return };
    let (media_type, format) = TYPES[usize::from(*choice) % TYPES.len()];
    let Ok(encoding) = Encoding::identify(media_type, format) else { return };
    let limits = Limits { ratio: 100, ..Limits::default() };
    let _ = read(bytes, encoding, &limits, &mut |disk| {
        std::io::copy(disk.reader, &mut std::io::sink())?;
        Ok(())
    });
});
