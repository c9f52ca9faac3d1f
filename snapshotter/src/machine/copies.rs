//! Copies of kernels and initial RAM disks: one file for each digest, verified while it arrives, needed as long as a
//! snapshot holds it. containerd may drop its own blob once the image is removed, also under a running machine.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use ovms_artifact::digest::{Digest, VerifyingReader};

use crate::daemon::Daemon;
use crate::error::{Context, Error, Kind as ErrorKind, Result};
use ovms_containerd::Scope;

/// Makes sure that a blob is here, which its snapshot holds already: a cleanup takes away what nobody holds. `field`
/// names it in errors (`kernel.ref`).
pub async fn keep(daemon: &Arc<Daemon>, scope: &Scope, field: &str, digest: Digest) -> Result<PathBuf> {
    let path = daemon.layout.blobs().join(digest.hex());
    let _alone = daemon.keyed.lock(format!("blob {digest}")).await;
    if path.exists() {
        return Ok(path);
    }
    let named = |err: Error| {
        let message = match err.kind() {
            ErrorKind::NotFound => format!("{field}: the image's blob {digest} is missing"),
            _ => format!("{field}: blob {digest} cannot be copied"),
        };
        Error::new(err.kind(), message).because(err)
    };
    let size = daemon.containerd.blob_size(scope, &digest.to_string()).await.map_err(|err| named(err.into()))?;
    let most = daemon.settings.limits.boot_file;
    if size > most {
        return Err(Error::invalid(format!(
            "{field}: blob {digest} has {size} bytes, more than the {most} allowed (limits.boot_file)"
        )));
    }
    let (reader, _transfer) =
        daemon.containerd.read_blob(scope, &digest.to_string()).await.map_err(|err| named(err.into()))?;
    let to = path.clone();
    let copied = daemon
        .blocking(move |daemon| {
            let failed = || format!("cannot write {}", to.display());
            let mut made = tempfile::NamedTempFile::new_in(daemon.layout.tmp()).context(failed)?;
            let mut reader = VerifyingReader::new(reader, digest, size);
            io::copy(&mut reader, made.as_file_mut()).context_kind(ErrorKind::Invalid, || "the blob is refused")?;
            publish(made, &to).context(failed)
        })
        .await;
    copied.map_err(named)?;
    tracing::info!(%digest, size, field, "copied out of containerd's content store");
    Ok(path)
}

fn publish(made: tempfile::NamedTempFile, to: &std::path::Path) -> io::Result<()> {
    let file: &File = made.as_file();
    file.sync_all()?;
    made.persist(to).map_err(|err| err.error)?;
    to.parent().map_or(Ok(()), ovms_bundle::sync)
}
