//! Layers of ordinary images: the blob from containerd, decompressed, untarred into a snapshot's directory.
//!
//! Whether the first layer of an image is ordinary or a machine's can only be seen in it, so its beginning is looked at
//! before anything is made.

use std::io::{self, Cursor, Read};

use ovms_artifact::decompress::{Caps, Decompressed};
use ovms_artifact::digest::{Digest, HashingReader, VerifyingReader};
use ovms_artifact::layer::{self, Encoding, LayerError};
use ovms_artifact::media::Compression;
use ovms_config::settings::LimitSettings;

use crate::daemon::Daemon;
use crate::error::{Context, Error, Kind as ErrorKind, Result};
use crate::store::Chain;
use crate::untar::{self, Target};
use ovms_containerd::proto::types::Descriptor;
use ovms_containerd::BlobReader;

/// As much of a layer as is looked at to tell what it is.
const BEGINNING: u64 = 256 << 10;

/// What was applied.
#[derive(Clone, Copy, Debug)]
pub struct Applied {
    /// Digest of the decompressed stream.
    pub diff_id: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// What a layer turned out to be.
#[derive(Debug)]
pub enum Found {
    /// Ordinary, and applied.
    Applied(Applied),
    /// A machine's; nothing was made.
    Machine,
}

/// A layer's blob on its way from containerd.
pub struct Blob {
    reader: VerifyingReader<BlobReader>,
    compression: Compression,
    limits: LimitSettings,
}

impl Blob {
    /// A blob with the digest and size of its descriptor.
    pub fn new(reader: BlobReader, of: &Descriptor, compression: Compression, limits: &LimitSettings) -> Result<Self> {
        let digest: Digest = of.digest.parse().context_kind(ErrorKind::Invalid, || "the layer cannot be verified")?;
        let size = u64::try_from(of.size).context_kind(ErrorKind::Invalid, || "the layer has no size")?;
        Ok(Self { reader: VerifyingReader::new(reader, digest, size), compression, limits: limits.clone() })
    }
}

/// Applies a layer to an active snapshot, unless it is `first` in its image and a machine's.
pub fn apply(daemon: &Daemon, chain: &Chain, blob: Blob, first: bool) -> Result<Found> {
    let Blob { mut reader, compression, limits } = blob;
    let cannot_read = || "the layer cannot be decompressed";
    let caps = Caps::new(limits.layer_data, limits.layer_ratio);
    let mut stream = HashingReader::new(Decompressed::new(&mut reader, compression, caps).context(cannot_read)?);
    let mut beginning = Vec::new();
    if first {
        (&mut stream).take(BEGINNING).read_to_end(&mut beginning).context_kind(ErrorKind::Invalid, cannot_read)?;
        if is_machine(&beginning)? {
            return Ok(Found::Machine);
        }
    }
    let target = Target {
        dir: daemon.layout.fs(chain.record.number),
        below: chain.parents.iter().map(|parent| daemon.layout.fs(parent.number)).collect(),
        opaque_attribute: daemon.overlay.opaque_attribute(),
    };
    let mut content = Cursor::new(beginning).chain(&mut stream);
    let not_applied = || format!("the layer cannot be applied to snapshot {}", chain.key);
    untar::apply(&mut content, &target).context(not_applied)?;
    // The digest covers what follows the archive's end, too.
    io::copy(&mut content, &mut io::sink()).context(not_applied)?;
    let size = stream.size();
    let diff_id = stream.finish();
    reader.finish().context_kind(ErrorKind::Invalid, not_applied)?;
    Ok(Found::Applied(Applied { diff_id, size }))
}

/// Whether a layer that begins so is a machine's.
fn is_machine(beginning: &[u8]) -> Result<bool> {
    let encoding = Encoding { compression: Compression::None, annotated: None };
    let stop = &mut |_: layer::DiskFile<'_>| Err("a disk".into());
    match layer::read(beginning, encoding, &layer::Limits::default(), stop) {
        Ok(_) | Err(LayerError::Visitor(_)) => Ok(true),
        // The empty archive is a layer of ordinary images.
        Err(LayerError::Ordinary(_) | LayerError::Empty) => Ok(false),
        Err(err @ LayerError::Unannotated) => Err(Error::invalid("the layer cannot be applied").because(err)),
        // Whatever else is wrong with it is said by the one who reads all of it.
        Err(LayerError::Archive(_) | LayerError::Io(_)) => Ok(false),
        Err(_) => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar_of(name: &str, data: &[u8]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, data).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn a_machine_is_told_by_its_first_file() {
        assert!(is_machine(&tar_of("ovm/disk.qcow2", b"QFI\xfb")).unwrap());
        assert!(is_machine(&tar_of("ovm/disk.raw", &[0; 300_000])[..BEGINNING as usize]).unwrap());
        assert!(is_machine(&tar_of("ovm/manifest.json", b"{}")).unwrap());
        assert!(!is_machine(&tar_of("bin/sh", b"#!")).unwrap());
        assert!(!is_machine(&[0; 1024]).unwrap());
    }

    #[test]
    fn is_machine_of_a_bare_disk_returns_the_way_out() {
        let err = is_machine(&[b"QFI\xfb".as_slice(), &[1; 4096]].concat()).unwrap_err();
        assert!(err.chain().contains("--preserve-digests"), "{}", err.chain());
    }
}
