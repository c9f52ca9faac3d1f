//! Opening a bundle: every file by its path once, the top under a lock that lives as long as its descriptors.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use ovms_disk::{Stack, StackFiles, Top, TopFiles};
use rustix::{
    fs::{flock, FlockOperation},
    io::Errno,
};

use crate::{record::Disk, Error, Record, Result, TopPaths};

/// The longest name of a holder that is read back.
const MAX_HOLDER: usize = 200;

/// A bundle's open files, ready to be passed to a VMM.
#[derive(Debug)]
pub struct Bundle {
    /// The record, its paths absolute.
    pub record: Record,
    /// The kernel, opened read-only.
    pub kernel: Option<File>,
    /// The initial RAM disk, opened read-only.
    pub initrd: Option<File>,
    /// The disk.
    pub disk: Option<DiskFiles>,
}

/// A disk's open files.
#[derive(Debug)]
pub struct DiskFiles {
    /// The table, opened read-only.
    pub table: File,
    /// The layers, base first, opened read-only.
    pub layers: Vec<File>,
    /// The frozen tops, oldest first, opened read-only.
    pub frozen: Vec<TopFiles>,
    /// The top's data file. It holds the lock: the lock ends when this descriptor and every copy of it, in whatever
    /// process, is closed.
    pub top_data: File,
    /// The top's map.
    pub top_map: File,
    /// The top was opened read-only, under a shared lock.
    pub read_only: bool,
}

impl Bundle {
    /// Opens everything that the record at `path` names. The top is locked: exclusively, or shared if it is opened
    /// `read_only`. `holder` is what another one who wants it is told ("machine default/vm1, pid 123").
    ///
    /// # Errors
    /// [`Error::InUse`] if another machine holds the top, [`Error::NoTop`] for a template, [`Error::Record`],
    /// [`Error::Io`].
    pub fn open(path: &Path, holder: &str, read_only: bool) -> Result<Bundle> {
        let record = Record::load(path)?;
        let kernel = record.kernel.as_deref().map(open_plain).transpose()?;
        let initrd = record.initrd.as_deref().map(open_plain).transpose()?;
        let disk = record.disk.as_ref().map(|disk| open_disk(disk, path, holder, read_only)).transpose()?;
        Ok(Bundle { record, kernel, initrd, disk })
    }
}

impl DiskFiles {
    /// Opens the disk in this process, for tools; a VMM gets the descriptors instead.
    ///
    /// # Errors
    /// A file is damaged, or they do not fit together.
    pub fn into_stack(self) -> ovms_disk::Result<Stack> {
        let top = Some(TopFiles { data: self.top_data, map: self.top_map });
        Stack::open(StackFiles { table: self.table, layers: self.layers, frozen: self.frozen, top }, self.read_only)
    }
}

fn open_disk(disk: &Disk, record: &Path, holder: &str, read_only: bool) -> Result<DiskFiles> {
    let read_only = read_only || disk.read_only;
    let top = disk.top.as_ref().ok_or_else(|| Error::NoTop(record.to_owned()))?;
    let mut options = OpenOptions::new();
    options.read(true).write(!read_only).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let top_data = open_with(&options, &top.data)?;
    lock(&top_data, &top.data, holder, read_only)?;
    let top_map = open_with(&options, &top.map)?;
    let table = open_plain(&disk.table)?;
    let layers = disk.layers.iter().map(|layer| open_plain(layer)).collect::<Result<_>>()?;
    let frozen = |paths: &TopPaths| Ok(TopFiles { data: open_plain(&paths.data)?, map: open_plain(&paths.map)? });
    let frozen = disk.frozen.iter().map(frozen).collect::<Result<_>>()?;
    Ok(DiskFiles { table, layers, frozen, top_data, top_map, read_only })
}

/// Opens a plain file read-only: no symbolic link that leads elsewhere, no fifo that blocks.
fn open_plain(path: &Path) -> Result<File> {
    open_with(OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK), path)
}

fn open_with(options: &OpenOptions, path: &Path) -> Result<File> {
    let file = options.open(path).map_err(Error::io("open", path))?;
    if !file.metadata().map_err(Error::io("open", path))?.is_file() {
        return Err(Error::io("open", path)(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a plain file")));
    }
    Ok(file)
}

fn lock(file: &File, path: &Path, holder: &str, shared: bool) -> Result<()> {
    let how = if shared { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    match flock(file, how) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(Error::InUse { path: path.to_owned(), holder: read_holder(path) }),
        Err(e) => return Err(Error::io("lock", path)(e.into())),
    }
    // Only a help for the next one's message, so a failure does not stop a start.
    let _ = fs::write(holder_path(path), holder.as_bytes());
    Ok(())
}

fn holder_path(data: &Path) -> PathBuf {
    let mut name = OsString::from(data);
    name.push(".holder");
    name.into()
}

fn read_holder(data: &Path) -> String {
    let text = fs::read(holder_path(data)).unwrap_or_default();
    let text: String = String::from_utf8_lossy(&text).chars().filter(|c| !c.is_control()).take(MAX_HOLDER).collect();
    if text.is_empty() {
        "another process".into()
    } else {
        text
    }
}

/// Makes a fresh top for a disk of `size` bytes at these paths, which must not exist. Milliseconds, a few KiB of disk;
/// durable on return only once the directory is synced.
///
/// # Errors
/// [`Error::Io`], [`Error::Disk`].
pub fn create_top(paths: &TopPaths, size: u64) -> Result<()> {
    let create = |path: &Path| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        options.open(path).map_err(Error::io("create", path))
    };
    let (data, map) = (create(&paths.data)?, create(&paths.map)?);
    Top::create(&data, &map, size).map_err(Error::disk(&paths.data))?;
    data.sync_all().map_err(Error::io("sync", &paths.data))?;
    map.sync_all().map_err(Error::io("sync", &paths.map))
}
