//! Filling the directory of a RAM snapshot: the RAM blob by the machine, then the disk's diff, then the record, which makes
//! it complete. A directory that is not finished is emptied again.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
};

use ovms_artifact::digest::{Digest, Hasher};
use ovms_disk::{qcow2::Plan, Stack, StackFiles, TopFiles};

use crate::{
    open::open_plain, snapshot::SNAPSHOT_DISK, snapshot::SNAPSHOT_RAM, snapshot::SNAPSHOT_RECORD, sync, Disk, Error,
    Result, SnapshotDisk, SnapshotRecord,
};

/// Bytes that are copied or hashed between two looks at whether somebody has cancelled.
const STEP: usize = 1 << 20;

/// A directory that a snapshot is being written into.
#[derive(Debug)]
pub struct SnapshotDir {
    dir: PathBuf,
    finished: bool,
}

impl SnapshotDir {
    /// Takes an existing empty directory.
    ///
    /// # Errors
    /// [`Error::Io`] if it is none, or not empty.
    pub fn begin(dir: &Path) -> Result<Self> {
        let mut entries = fs::read_dir(dir).map_err(Error::io("read the directory", dir))?;
        if entries.next().is_some() {
            let source = io::Error::from(io::ErrorKind::DirectoryNotEmpty);
            return Err(Error::Io { verb: "write a snapshot into", path: dir.to_owned(), source });
        }
        Ok(Self { dir: dir.to_owned(), finished: false })
    }

    /// The RAM blob's file, made empty.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create_ram(&self) -> Result<File> {
        self.create(SNAPSHOT_RAM)
    }

    /// Makes the RAM blob durable, once it is complete, and says its digest and size. `ram` is what
    /// [`SnapshotDir::create_ram`] gave: a file opened later would not be told what went wrong on the disk before.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Cancelled`].
    pub fn seal_ram(&self, ram: &File, cancelled: &dyn Fn() -> bool) -> Result<(String, u64)> {
        let path = self.dir.join(SNAPSHOT_RAM);
        // The disk and a processor work at the same time; neither needs the other's result.
        let (synced, hashed) = thread::scope(|scope| {
            let synced = scope.spawn(|| ram.sync_all());
            let hashed = hash(ram, cancelled);
            (synced.join(), hashed)
        });
        let (digest, size) = hashed.map_err(Error::io("read", &path))?.ok_or(Error::Cancelled)?;
        let synced = synced.unwrap_or_else(|_| Err(io::Error::other("its thread panicked")));
        synced.map_err(Error::io("sync", &path))?;
        Ok((digest.to_string(), size))
    }

    /// Writes what the disk's frozen tops add to its layers.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Disk`], [`Error::Cancelled`].
    pub fn write_disk(&self, disk: &Disk, cancelled: &dyn Fn() -> bool) -> Result<SnapshotDisk> {
        let path = self.dir.join(SNAPSHOT_DISK);
        let failed = || Error::disk(&path);
        let stack = frozen(disk)?;
        let plan = Plan::diff(&stack).map_err(failed())?;
        let mut out = Hashing { file: self.create(SNAPSHOT_DISK)?, hasher: Hasher::new(), cancelled };
        plan.write_to(&mut out).map_err(|err| if cancelled() { Error::Cancelled } else { failed()(err) })?;
        out.file.sync_all().map_err(Error::io("sync", &path))?;
        let (size, digest) = (out.hasher.size(), out.hasher.finish());
        Ok(SnapshotDisk { digest: digest.to_string(), size, virtual_size: plan.virtual_size() })
    }

    /// Writes the record; the snapshot is complete and durable then.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Record`].
    pub fn finish(mut self, record: &SnapshotRecord) -> Result<()> {
        sync(&self.dir).map_err(Error::io("sync", &self.dir))?;
        record.save(&self.dir)?;
        self.finished = true;
        Ok(())
    }

    fn create(&self, name: &str) -> Result<File> {
        let path = self.dir.join(name);
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path);
        file.map_err(Error::io("create", path))
    }
}

impl Drop for SnapshotDir {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // What cannot be removed is not complete without its record, which goes first.
        for name in [SNAPSHOT_RECORD, SNAPSHOT_RAM, SNAPSHOT_DISK] {
            let _ = fs::remove_file(self.dir.join(name));
        }
    }
}

/// Digest and size of a whole file; `None` if somebody has cancelled.
fn hash(file: &File, cancelled: &dyn Fn() -> bool) -> io::Result<Option<(Digest, u64)>> {
    let (mut hasher, mut buffer) = (Hasher::new(), vec![0; STEP]);
    while !cancelled() {
        let size = hasher.size();
        match file.read_at(&mut buffer, size)? {
            0 => return Ok(Some((hasher.finish(), size))),
            read => hasher.update(buffer.get(..read).unwrap_or_default()),
        }
    }
    Ok(None)
}

/// The disk as its layers and frozen tops have it, without the writable top, whose machine goes on.
fn frozen(disk: &Disk) -> Result<Stack> {
    let files = StackFiles {
        table: open_plain(&disk.table)?,
        layers: disk.layers.iter().map(|layer| open_plain(layer)).collect::<Result<_>>()?,
        frozen: disk
            .frozen
            .iter()
            .map(|top| Ok(TopFiles { data: open_plain(&top.data)?, map: open_plain(&top.map)? }))
            .collect::<Result<_>>()?,
        top: None,
    };
    Stack::open(files, true).map_err(Error::disk(&disk.table))
}

/// Hashes what is written, and stops when somebody has cancelled.
struct Hashing<'a> {
    file: File,
    hasher: Hasher,
    cancelled: &'a dyn Fn() -> bool,
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if (self.cancelled)() {
            return Err(io::Error::other("it was cancelled"));
        }
        let written = self.file.write(bytes.get(..STEP).unwrap_or(bytes))?;
        self.hasher.update(bytes.get(..written).unwrap_or_default());
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{create_top, Manifest, SnapshotRam, TopPaths, SNAPSHOT_VERSION};
    use ovms_disk::{Table, Top};

    const SIZE: u64 = 1 << 20;

    /// A disk with one frozen top that holds a block.
    fn disk(dir: &Path) -> Disk {
        let table = dir.join("table");
        Table::empty(SIZE).unwrap().write_to(&File::create(&table).unwrap()).unwrap();
        let top = TopPaths { data: dir.join("data"), map: dir.join("map") };
        create_top(&top, SIZE).unwrap();
        let open = |path: &Path| File::options().read(true).write(true).open(path).unwrap();
        let files = TopFiles { data: open(&top.data), map: open(&top.map) };
        let files = StackFiles { table: File::open(&table).unwrap(), layers: vec![], frozen: vec![], top: Some(files) };
        let stack = Stack::open(files, false).unwrap();
        stack.write_at(65536, &[9; 4096]).unwrap();
        stack.flush().unwrap();
        assert_eq!(Top::open(open(&top.data), open(&top.map)).unwrap().size(), SIZE);
        Disk { virtual_size: SIZE, table, layers: vec![], frozen: vec![top], top: None, read_only: false }
    }

    fn record(ram: (String, u64), disk: SnapshotDisk) -> SnapshotRecord {
        let ram = SnapshotRam {
            digest: ram.0,
            size: ram.1,
            parents: Vec::new(),
            vcpus: 1,
            memory: 64 << 20,
            stood_micros: 1,
        };
        let (version, manifest) = (SNAPSHOT_VERSION, Manifest::new("test/image", "1"));
        SnapshotRecord { version, machine: "a/b".into(), image: None, manifest, ram, disk: Some(disk) }
    }

    #[test]
    fn a_finished_directory_holds_what_its_record_says() {
        let (files, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let snapshot = SnapshotDir::begin(dir.path()).unwrap();
        let mut blob = snapshot.create_ram().unwrap();
        blob.write_all(b"memory").unwrap();
        let disk = snapshot.write_disk(&disk(files.path()), &|| false).unwrap();
        let ram = snapshot.seal_ram(&blob, &|| false).unwrap();
        snapshot.finish(&record(ram, disk)).unwrap();

        let loaded = SnapshotRecord::load(dir.path()).unwrap();
        let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
        assert_eq!((loaded.ram.digest, loaded.ram.size), (Digest::of(b"memory").to_string(), 6));
        let (disk, image) = (loaded.disk.unwrap(), read(SNAPSHOT_DISK));
        assert_eq!((disk.digest, disk.size), (Digest::of(&image).to_string(), image.len() as u64));
        assert_eq!(disk.virtual_size, SIZE);
        assert!(image.ends_with(&[0; 512]) && image.windows(512).any(|window| window == [9; 512]));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn cancelled_at_any_step_leaves_an_empty_directory() {
        let (files, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let disk = disk(files.path());
        let snapshot = SnapshotDir::begin(dir.path()).unwrap();
        let mut blob = snapshot.create_ram().unwrap();
        blob.write_all(b"memory").unwrap();
        assert!(matches!(snapshot.seal_ram(&blob, &|| true), Err(Error::Cancelled)));
        assert!(matches!(snapshot.write_disk(&disk, &|| true), Err(Error::Cancelled)));
        drop(snapshot);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn begin_in_a_full_directory_returns_why_and_touches_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(SNAPSHOT_RAM), "old").unwrap();
        let err = SnapshotDir::begin(dir.path()).unwrap_err();
        assert!(err.to_string().contains("write a snapshot into"), "{err}");
        assert_eq!(fs::read(dir.path().join(SNAPSHOT_RAM)).unwrap(), b"old");
    }
}
