//! The bundle record, `bundle.json`: where everything is that a machine starts from.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use ovms_artifact::manifest::Manifest;
use serde::{Deserialize, Serialize};

use crate::{publish::write_new, Error, Result};

/// The version of [`Record`]'s format.
pub const RECORD_VERSION: u32 = 1;
/// The largest record that is read, in bytes.
const MAX_RECORD: u64 = 8 << 20;

/// Where everything is that a machine starts from. A path that is not absolute is meant from the record's own
/// directory, so a directory that holds record and files can be renamed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Record {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// Digest of the image that it was made from, for people and logs.
    pub image: Option<String>,
    /// The OVMS manifest, validated: name, kernel arguments, devices, default vCPUs and memory (`defaults`).
    pub manifest: Manifest,
    /// The kernel.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The disk; none for a machine that lives in its initial RAM disk.
    pub disk: Option<Disk>,
    /// The RAM snapshot that the machine resumes from; none: it boots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram: Option<Ram>,
}

/// A RAM snapshot in its unpacked form; see `ovms_state`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Ram {
    /// Digest of the RAM blob.
    pub digest: String,
    /// Digests of the RAM blobs that it needs below it, the nearest first; empty if it is whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<String>,
    /// Head and sections.
    pub state: PathBuf,
    /// The memory.
    pub memory: PathBuf,
    /// The working set that restores have recorded; the file may be missing, the next restore then makes it.
    pub working_set: PathBuf,
    /// Keep all of it locked in RAM.
    #[serde(default)]
    pub mlock: bool,
}

/// A disk's files; see `ovms_disk::StackFiles`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Disk {
    /// The disk's size in bytes when the record was written; a top may have grown since.
    pub virtual_size: u64,
    /// The merged table.
    pub table: PathBuf,
    /// The layers' data files, base first.
    pub layers: Vec<PathBuf>,
    /// Tops that were frozen under a machine and lie below the writable one, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub frozen: Vec<TopPaths>,
    /// The writable top; none in a template that instances are made of.
    pub top: Option<TopPaths>,
    /// The guest may not write, whatever the caller asks for.
    #[serde(default)]
    pub read_only: bool,
}

/// The two files of a writable top.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct TopPaths {
    /// The data file. It carries the lock; beside it lies `<data>.holder`, which names who holds it.
    pub data: PathBuf,
    /// The block map.
    pub map: PathBuf,
}

impl Record {
    /// Reads a record and makes its paths absolute.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Record`].
    pub fn load(path: &Path) -> Result<Record> {
        let mut record = Self::read(path)?;
        let dir = path.parent().unwrap_or(Path::new("."));
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let dir = std::path::absolute(dir).map_err(Error::io("read", path))?;
        record.each_path(|p| *p = dir.join(&*p));
        Ok(record)
    }

    /// Reads a record with its paths as they are written there.
    pub(crate) fn read(path: &Path) -> Result<Record> {
        let bad = |why: String| Error::Record { path: path.to_owned(), why };
        let length = fs::metadata(path).map_err(Error::io("read", path))?.len();
        if length > MAX_RECORD {
            return Err(bad(format!("it has {length} bytes, more than {MAX_RECORD}")));
        }
        let text = fs::read(path).map_err(Error::io("read", path))?;
        let record: Record = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        if record.version != RECORD_VERSION {
            let found = record.version;
            return Err(bad(format!("it has format version {found}, this program reads version {RECORD_VERSION}")));
        }
        Ok(record)
    }

    /// Writes the record: temporary file, sync, rename.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Record`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = self.text(path)?;
        write_new(path, |file| file.write_all(&text).map_err(Error::io("write", path)))
    }

    /// The record's bytes; errors name `path`.
    pub(crate) fn text(&self, path: &Path) -> Result<Vec<u8>> {
        let bad = |e: serde_json::Error| Error::Record { path: path.to_owned(), why: e.to_string() };
        let mut text = serde_json::to_vec_pretty(self).map_err(bad)?;
        text.push(b'\n');
        Ok(text)
    }

    /// Every file that it names.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        self.clone().each_path(|path| paths.push(path.clone()));
        paths
    }

    fn each_path(&mut self, mut change: impl FnMut(&mut PathBuf)) {
        self.kernel.iter_mut().chain(self.initrd.iter_mut()).for_each(&mut change);
        if let Some(disk) = &mut self.disk {
            change(&mut disk.table);
            disk.layers.iter_mut().for_each(&mut change);
            for top in disk.frozen.iter_mut().chain(&mut disk.top) {
                change(&mut top.data);
                change(&mut top.map);
            }
        }
        if let Some(ram) = &mut self.ram {
            [&mut ram.state, &mut ram.memory, &mut ram.working_set].into_iter().for_each(change);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            version: RECORD_VERSION,
            image: Some("sha256:00".into()),
            manifest: Manifest::new("test/image", "1"),
            kernel: Some("kernel".into()),
            initrd: Some("/srv/initrd".into()),
            disk: Some(Disk {
                virtual_size: 4096,
                table: "table".into(),
                layers: vec!["a/data".into(), "/srv/b/data".into()],
                frozen: vec![TopPaths { data: "0.data".into(), map: "0.map".into() }],
                top: Some(TopPaths { data: "top.data".into(), map: "top.map".into() }),
                read_only: false,
            }),
            ram: None,
        }
    }

    #[test]
    fn relative_paths_are_meant_from_the_records_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle.json");
        record().save(&path).unwrap();
        let loaded = Record::load(&path).unwrap();
        let at = |name: &str| dir.path().join(name);
        assert_eq!((loaded.kernel, loaded.initrd), (Some(at("kernel")), Some("/srv/initrd".into())));
        let disk = loaded.disk.unwrap();
        assert_eq!((disk.table, disk.layers), (at("table"), vec![at("a/data"), "/srv/b/data".into()]));
        assert_eq!(disk.frozen, [TopPaths { data: at("0.data"), map: at("0.map") }]);
        assert_eq!(disk.top, Some(TopPaths { data: at("top.data"), map: at("top.map") }));
    }

    #[test]
    fn save_replaces_the_old_record_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle.json");
        record().save(&path).unwrap();
        Record { image: None, ..record() }.save(&path).unwrap();
        assert_eq!(Record::load(&path).unwrap().image, None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn load_of_no_record_returns_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle.json");
        let mut newer = serde_json::to_value(record()).unwrap();
        newer["version"] = 2.into();
        let mut odd = serde_json::to_value(record()).unwrap();
        odd["hook"] = "/bin/sh".into();
        let cases = [
            (newer.to_string(), "format version 2"),
            (odd.to_string(), "unknown field `hook`"),
            ("{".into(), "EOF"),
            (" ".repeat(9 << 20), "more than"),
        ];
        for (text, want) in cases {
            fs::write(&path, text).unwrap();
            let error = Record::load(&path).unwrap_err();
            assert!(matches!(error, Error::Record { .. }) && error.to_string().contains(want), "{error}");
        }
    }
}
