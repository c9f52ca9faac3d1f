//! `Diff` of a machine's snapshot: its tops as one disk layer that runs. A machine that is running goes on meanwhile: its
//! disk is frozen, and what was frozen is read ([`super::tops`]).
//!
//! The layer is one tar with a new descriptor and the top as `ovm/disk.qcow2`. The descriptor comes first and names the
//! disk by the digest of its file, since it cannot name the layer that it lies in. The disk is written twice, once to
//! learn that digest and once into the tar, and never stored in between.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use flate2::write::GzEncoder;
use ovms_artifact::digest::{Digest, Hasher};
use ovms_artifact::manifest::{DiskFormat, DiskLayer, Manifest};
use ovms_artifact::media::{self, Compression};
use ovms_bundle::Record;
use ovms_disk::qcow2::Plan;
use ovms_disk::Stack;

use super::resolve::prepare;
use super::tops::{open_still, Still};
use crate::daemon::Daemon;
use crate::error::{Context, Error, Kind as ErrorKind, Result};
use crate::proto::diff::DiffRequest;
use crate::store::Chain;
use crate::upload::{self, BlobWriter};
use ovms_containerd::proto::types::Descriptor;
use ovms_containerd::Scope;

/// Label by which containerd's clients learn the diff_id of a layer's blob.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// Writes what a machine's snapshot adds to its parents as a layer into containerd's content store.
pub async fn diff(daemon: &Arc<Daemon>, scope: &Scope, request: DiffRequest, chain: &Chain) -> Result<Descriptor> {
    let media_type = match request.media_type.as_str() {
        "" => media::OCI_LAYER_GZIP.to_owned(),
        given => given.to_owned(),
    };
    let compression = media::layer_compression(&media_type).ok_or_else(|| {
        Error::new(ErrorKind::Unimplemented, format!("media type {media_type:?} is not that of a layer"))
    })?;
    // A container's key is its id: what was never started is made ready now.
    let container = chain.key.rsplit('/').next().unwrap_or_default().to_owned();
    let prepared = prepare(daemon, scope, &container, chain).await?;
    let reference = match request.r#ref.as_str() {
        "" => format!("ovms-diff-{}-{}", chain.record.number, std::process::id()),
        given => given.to_owned(),
    };
    let scope = &daemon.containerd.leased(scope).await?;
    let (writer, upload) = upload::begin(daemon.containerd.content(), scope, &reference).await;
    let written = daemon
        .blocking(move |_| {
            let Still { record, stack } = open_still(&prepared.bundle)?;
            write_layer(record, stack.as_ref(), writer, compression)
        })
        .await;
    let written = match written {
        Ok(written) => written,
        Err(err) => return Err(upload.abort().await.unwrap_or(err)),
    };
    let mut labels = request.labels;
    labels.insert(UNCOMPRESSED.into(), written.diff_id.to_string());
    upload.commit(written.digest, written.size, labels).await?;
    tracing::info!(key = chain.key, digest = %written.digest, size = written.size, "disk diff written");
    Ok(Descriptor {
        media_type,
        digest: written.digest.to_string(),
        size: i64::try_from(written.size).unwrap_or(i64::MAX),
        annotations: Default::default(),
    })
}

/// What was written.
struct Written {
    diff_id: Digest,
    digest: Digest,
    size: u64,
}

fn write_layer(record: Record, stack: Option<&Stack>, writer: BlobWriter, compression: Compression) -> Result<Written> {
    let failed = || "the disk diff cannot be written";
    let plan = stack.map(Plan::diff).transpose().context(failed)?;
    let mut found = None;
    if let Some(plan) = &plan {
        let mut hasher = Hasher::new();
        plan.write_to(&mut hasher).context(failed)?;
        let size = hasher.size();
        found = Some((hasher.finish(), size));
    }
    let descriptor = descriptor(record.manifest, &record.kernel, &record.initrd, found)?;

    let blob = Hashing { inner: writer, hasher: Hasher::new() };
    let mut tar = Hashing { inner: Compressor::new(blob, compression).context(failed)?, hasher: Hasher::new() };
    let text = |to: &mut dyn Write| to.write_all(&descriptor);
    member(&mut tar, media::MEMBER_MANIFEST, descriptor.len() as u64, &text).context(failed)?;
    if let Some((plan, (_, size))) = plan.zip(found) {
        let disk = |to: &mut dyn Write| plan.write_to(to).map_err(io::Error::other);
        member(&mut tar, media::MEMBER_QCOW2, size, &disk).context(failed)?;
    }
    tar.write_all(&[0; 2 * BLOCK]).context(failed)?;
    let Hashing { inner, hasher } = tar;
    let diff_id = hasher.finish();
    let mut blob = inner.finish().context(failed)?;
    blob.flush().context(failed)?;
    Ok(Written { diff_id, size: blob.hasher.size(), digest: blob.hasher.finish() })
}

/// The machine's manifest with this disk as one more layer, and with the digests of what it boots. RAM that the image
/// carries belongs to the disk as it was then, so it goes.
fn descriptor(
    mut manifest: Manifest,
    kernel: &Option<PathBuf>,
    initrd: &Option<PathBuf>,
    disk: Option<(Digest, u64)>,
) -> Result<Vec<u8>> {
    let failed = || "the descriptor cannot be made";
    // Copies are named by their digests (copies::keep).
    let digest_of = |path: &Option<PathBuf>| -> Result<Option<Digest>> {
        let name = path.as_ref().and_then(|path| path.file_name()).map(|name| name.to_string_lossy());
        name.map(|hex| format!("sha256:{hex}").parse::<Digest>().context(failed)).transpose()
    };
    if let (Some(kernel), Some(digest)) = (&mut manifest.kernel, digest_of(kernel)?) {
        kernel.reference = digest.into();
    }
    if let (Some(initrd), Some(digest)) = (&mut manifest.initrd, digest_of(initrd)?) {
        initrd.reference = digest.into();
    }
    manifest.ram_snapshot = None;
    manifest.disk_layers.extend(disk.map(|(digest, size)| DiskLayer {
        reference: digest.into(),
        format: DiskFormat::Qcow2,
        size: Some(size),
        extra: Default::default(),
    }));
    manifest.to_bytes().context(failed)
}

/// Bytes in a block of a tar.
const BLOCK: usize = 512;

/// Writes one member, whose content has exactly this size.
fn member(
    to: &mut dyn Write,
    name: &str,
    size: u64,
    content: &dyn Fn(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name)?;
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_cksum();
    to.write_all(header.as_bytes())?;
    content(to)?;
    let padding = size.next_multiple_of(BLOCK as u64) - size;
    io::copy(&mut io::repeat(0).take(padding), to).map(drop)
}

/// Hashes what passes.
struct Hashing<W> {
    inner: W,
    hasher: Hasher,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(bytes.get(..written).unwrap_or(bytes));
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Compresses as a media type says.
enum Compressor<W: Write> {
    None(W),
    Gzip(GzEncoder<W>),
    Zstd(zstd::Encoder<'static, W>),
}

impl<W: Write> Compressor<W> {
    fn new(to: W, compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::None(to),
            Compression::Gzip => Self::Gzip(GzEncoder::new(to, flate2::Compression::default())),
            Compression::Zstd => Self::Zstd(zstd::Encoder::new(to, zstd::DEFAULT_COMPRESSION_LEVEL)?),
        })
    }

    fn finish(self) -> io::Result<W> {
        match self {
            Self::None(to) => Ok(to),
            Self::Gzip(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
        }
    }
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(to) => to.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::None(to) => to.flush(),
            Self::Gzip(encoder) => encoder.flush(),
            Self::Zstd(encoder) => encoder.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovms_artifact::layer::{read, Encoding, Limits};

    #[test]
    fn a_layer_written_is_read_again() {
        let manifest = Manifest::new("test", "1");
        let disk = b"a disk of some bytes";
        let text = descriptor(
            manifest,
            &Some(format!("/b/{}", Digest::of(b"k").hex()).into()),
            &None,
            Some((Digest::of(disk), 20)),
        );
        let text = text.unwrap();
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let mut tar = Hashing { inner: Compressor::new(Vec::new(), compression).unwrap(), hasher: Hasher::new() };
            member(&mut tar, media::MEMBER_MANIFEST, text.len() as u64, &|to| to.write_all(&text)).unwrap();
            member(&mut tar, media::MEMBER_QCOW2, 20, &|to| to.write_all(disk)).unwrap();
            tar.write_all(&[0; 1024]).unwrap();
            let (diff_id, blob) = (tar.hasher.finish(), tar.inner.finish().unwrap());

            let encoding = Encoding { compression, annotated: None };
            let found = read(blob.as_slice(), encoding, &Limits::default(), &mut |_| Ok(())).unwrap();

            assert_eq!(found.diff_id, diff_id);
            assert_eq!(found.descriptor.as_deref(), Some(text.as_slice()));
            let found = found.disk.unwrap();
            assert_eq!((found.format, found.size, found.digest), (DiskFormat::Qcow2, 20, Some(Digest::of(disk))));
        }
    }
}
