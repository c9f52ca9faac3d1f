//! A checkpoint to resume from: a directory with a RAM blob and the disk of the same instant
//! (`ovms_bundle::SnapshotRecord`). It comes out of an archive and is hostile; whoever gave it removes it.
//!
//! ```text
//!  snapshot.json ─> digests ┬─ ram ────────> ram/<hex>/, held by the container's snapshot alone
//!                           └─ disk.qcow2 ──copy, verified──> sandboxed worker ──> a top below the machine's first
//! ```
//! `disk.qcow2` holds everything that the machine had ever added to the disk of its image, so it takes the place of the
//! difference that a client has applied to the snapshot (`ctr containers restore --rw`): that one may be older, or newer
//! where the machine was not stopped in between.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ovms_artifact::digest::Digest;
use ovms_artifact::manifest::{DiskFormat, Manifest};
use ovms_bundle::worker::Source;
use ovms_bundle::{SnapshotRecord, SNAPSHOT_DISK, SNAPSHOT_RAM};
use serde::{Deserialize, Serialize};

use super::ram::{self, Wanted};
use super::tops::{self, Base};
use super::unpack;
use crate::daemon::Daemon;
use crate::error::{Context, Error, Kind, Result};

/// What marks a snapshot's directory as one made of a checkpoint.
pub const MARK: &str = "checkpoint.json";

/// A checkpoint whose record was read.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    mark: Mark,
    disk: Option<(u64, u64)>,
}

/// Which checkpoint a snapshot was made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Mark {
    /// Digest of the RAM blob.
    pub ram: Digest,
    /// Digest of the disk.
    pub disk: Option<Digest>,
}

impl Checkpoint {
    /// Reads what the directory says of itself.
    pub async fn load(daemon: &Arc<Daemon>, dir: &Path) -> Result<Self> {
        if !ram::is_allowed(daemon) {
            return Err(Error::precondition(
                "this host resumes no machine from RAM: ram.policy in ovms.toml is not \"allow\"",
            ));
        }
        let dir = dir.to_owned();
        daemon
            .blocking(move |_| {
                let failed = || format!("the checkpoint {} cannot be used", dir.display());
                let record = SnapshotRecord::load(&dir).context_kind(Kind::Invalid, failed)?;
                let digest = |text: &str| text.parse::<Digest>().context_kind(Kind::Invalid, failed);
                let ram = digest(&record.ram.digest)?;
                let disk = record.disk.as_ref().map(|disk| digest(&disk.digest)).transpose()?;
                let sizes = record.disk.map(|disk| (disk.size, disk.virtual_size));
                Ok(Self { dir, mark: Mark { ram, disk }, disk: sizes })
            })
            .await
    }

    /// Which one it is.
    pub fn mark(&self) -> &Mark {
        &self.mark
    }

    /// Its RAM, treated as the image's manifest asks.
    pub fn wanted(&self, manifest: &Manifest) -> Wanted {
        Wanted::with(manifest, self.mark.ram)
    }

    /// The file of its RAM blob.
    pub fn ram(&self) -> PathBuf {
        self.dir.join(SNAPSHOT_RAM)
    }

    /// Its disk as a top; none if its machine had no disk. `size` is that of the image's disk.
    pub fn base(&self, daemon: &Daemon, size: Option<u64>) -> Result<Option<Base>> {
        let (digest, (length, virtual_size)) = match (self.mark.disk.zip(self.disk), size) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(unfit("has a disk, the image has none")),
            (None, Some(_)) => return Err(unfit("has no disk, the image has one")),
            (Some(disk), Some(_)) => disk,
        };
        let failed = || "the checkpoint's disk is refused";
        let path = self.dir.join(SNAPSHOT_DISK);
        let file = unpack::open_plain(&path).context(failed)?;
        let file = file.ok_or_else(|| Error::invalid(format!("the checkpoint lacks {}", path.display())))?;
        let copy = copy(daemon, file, digest, length).map_err(|err| Error::new(err.kind(), failed()).because(err))?;
        let made = tops::new_dir(daemon)?;
        let input = unpack::Input {
            name: digest.to_string(),
            file: copy,
            source: Source::Disk { format: DiskFormat::Qcow2 },
            expect: None,
        };
        unpack::run(daemon, input, made.path(), &mut |_| ())?;
        let base = Base::of_unpacked(made)?;
        let found = base.virtual_size;
        if found != virtual_size || size.is_some_and(|size| found < size) {
            let size = size.unwrap_or_default();
            return Err(unfit(&format!(
                "has a disk of {found} bytes, its record says {virtual_size}, and that of the image has {size}"
            )));
        }
        Ok(Some(base))
    }
}

fn unfit(why: &str) -> Error {
    Error::invalid(format!("the checkpoint is not one of a machine of this image: it {why}"))
}

fn copy(daemon: &Daemon, from: File, digest: Digest, size: u64) -> Result<File> {
    let most = daemon.settings.limits.layer_data;
    if size > most {
        return Err(Error::invalid(format!("it has {size} bytes, more than the {most} allowed (limits.layer_data)")));
    }
    let mut file = tempfile::tempfile_in(daemon.layout.tmp()).context(|| "cannot make a file")?;
    let mut reader = ovms_artifact::digest::VerifyingReader::new(from, digest, size);
    io::copy(&mut reader, &mut file).context_kind(Kind::Invalid, || "its file has another digest")?;
    Ok(file)
}
