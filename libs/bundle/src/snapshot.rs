//! What an engine leaves in a directory when it has taken a RAM snapshot: enough to make an image of, or to resume from,
//! on this host or another.
//!
//! ```text
//!  DIR/snapshot.json   SnapshotRecord, written last: without it the snapshot is not complete
//!  DIR/ram             the RAM blob (docs/ram-snapshot.md)
//!  DIR/disk.qcow2      what the frozen tops hold, as a diff on the image's disk; missing if there is no disk
//! ```

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use ovms_artifact::manifest::Manifest;
use serde::{Deserialize, Serialize};

use crate::{publish::write_new, Error, Result};

/// The record's name in the directory.
pub const SNAPSHOT_RECORD: &str = "snapshot.json";
/// The RAM blob's name in the directory.
pub const SNAPSHOT_RAM: &str = "ram";
/// The disk diff's name in the directory.
pub const SNAPSHOT_DISK: &str = "disk.qcow2";
/// The version of [`SnapshotRecord`]'s format.
pub const SNAPSHOT_VERSION: u32 = 1;
/// The largest record that is read, in bytes.
const MAX_RECORD: u64 = 8 << 20;

/// `snapshot.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct SnapshotRecord {
    /// [`SNAPSHOT_VERSION`].
    pub version: u32,
    /// The machine, `namespace/id`.
    pub machine: String,
    /// Digest of the image that the machine was made from, if it is known: the snapshot's `subject`.
    pub image: Option<String>,
    /// The manifest of that image as the machine had it.
    pub manifest: Manifest,
    /// The RAM blob.
    pub ram: SnapshotRam,
    /// Size of `disk.qcow2` in bytes and of the disk that it is a diff on; none without a disk.
    pub disk: Option<SnapshotDisk>,
}

/// The RAM blob of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct SnapshotRam {
    /// Digest of the blob.
    pub digest: String,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Digests of the RAM blobs that it needs below it, the nearest first; empty if it is whole.
    #[serde(default)]
    pub parents: Vec<String>,
    /// vCPUs of the machine.
    pub vcpus: u32,
    /// Its memory in bytes.
    pub memory: u64,
    /// Microseconds for which the guest stood still.
    pub stood_micros: u64,
}

/// The disk diff of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct SnapshotDisk {
    /// Digest of `disk.qcow2`.
    pub digest: String,
    /// Its size in bytes.
    pub size: u64,
    /// The disk's size in bytes.
    pub virtual_size: u64,
}

impl SnapshotRecord {
    /// Reads the record of the snapshot in `dir`. It is hostile: the directory may come out of an archive.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Record`].
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(SNAPSHOT_RECORD);
        let bad = |why: String| Error::Record { path: path.clone(), why };
        let length = fs::metadata(&path).map_err(Error::io("read", &path))?.len();
        if length > MAX_RECORD {
            return Err(bad(format!("it has {length} bytes, more than {MAX_RECORD}")));
        }
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        let record: Self = serde_json::from_slice(&text).map_err(|err| bad(err.to_string()))?;
        if record.version != SNAPSHOT_VERSION {
            let found = record.version;
            return Err(bad(format!("it has format version {found}, this program reads version {SNAPSHOT_VERSION}")));
        }
        Ok(record)
    }

    /// Writes the record into `dir`: temporary file, sync, rename.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Record`].
    pub fn save(&self, dir: &Path) -> Result<PathBuf> {
        let path = dir.join(SNAPSHOT_RECORD);
        let bad = |err: serde_json::Error| Error::Record { path: path.clone(), why: err.to_string() };
        let mut text = serde_json::to_vec_pretty(self).map_err(bad)?;
        text.push(b'\n');
        write_new(&path, |file| file.write_all(&text).map_err(Error::io("write", &path)))?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_record_is_loaded_again_and_another_version_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = SnapshotRecord {
            version: SNAPSHOT_VERSION,
            machine: "default/vm1".into(),
            image: None,
            manifest: Manifest::new("test/image", "1"),
            ram: SnapshotRam {
                digest: "sha256:00".into(),
                size: 1,
                parents: Vec::new(),
                vcpus: 1,
                memory: 64 << 20,
                stood_micros: 900,
            },
            disk: None,
        };
        record.save(dir.path()).unwrap();
        assert_eq!(SnapshotRecord::load(dir.path()).unwrap(), record);
        record.version = 9;
        record.save(dir.path()).unwrap();
        let err = SnapshotRecord::load(dir.path()).unwrap_err().to_string();
        assert!(err.contains("version 9"), "{err}");
    }
}
