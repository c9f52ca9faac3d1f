//! Opening a bundle: every file by its path once, the top under a lock that lives as long as its descriptors.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::Read,
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use ovms_disk::{Stack, StackFiles, Top, TopFiles};
use rustix::{
    fs::{flock, FlockOperation},
    io::Errno,
};

use crate::{record::Disk, Error, Ram, Record, Result, TopPaths};

/// The longest name of a holder that is read back.
const MAX_HOLDER: usize = 200;
/// The largest file of a holder that is read back, in bytes: the name, and a path of the longest kind.
const MAX_HOLDER_FILE: u64 = 8 << 10;

/// Who holds a top, as it says in `<data>.holder`: its name on the first line, the path of its socket on the second. The
/// file stays when the holder has gone; only the lock tells whether one is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// What another one who wants the top is told ("machine default/vm1, held by process 123").
    pub text: String,
    /// Where the machine's engine can be asked to freeze the top (`ovms_proto::machine`), an absolute path.
    pub socket: Option<PathBuf>,
}

impl From<&str> for Holder {
    fn from(text: &str) -> Self {
        Self { text: text.to_owned(), socket: None }
    }
}

/// Reads who said last that it holds the top with this data file; `None` if nobody has ever.
#[must_use]
pub fn holder(data: &Path) -> Option<Holder> {
    let mut file = Vec::new();
    File::open(holder_path(data)).ok()?.take(MAX_HOLDER_FILE).read_to_end(&mut file).ok()?;
    let text = String::from_utf8_lossy(&file);
    let mut lines = text.lines();
    let plain = |line: &str| line.chars().filter(|c| !c.is_control()).take(MAX_HOLDER).collect::<String>();
    let text = plain(lines.next()?);
    let socket = lines.next().map(PathBuf::from).filter(|path| path.is_absolute());
    (!text.is_empty()).then_some(Holder { text, socket })
}

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
    /// `read_only`. `holder` is what another one who wants it is told.
    ///
    /// # Errors
    /// [`Error::InUse`] if another machine holds the top, [`Error::NoTop`] for a template, [`Error::Record`],
    /// [`Error::Io`].
    pub fn open(path: &Path, holder: impl Into<Holder>, read_only: bool) -> Result<Bundle> {
        let holder = holder.into();
        let record = Record::load(path)?;
        let kernel = record.kernel.as_deref().map(open_plain).transpose()?;
        let initrd = record.initrd.as_deref().map(open_plain).transpose()?;
        let disk = record.disk.as_ref().map(|disk| open_disk(disk, path, &holder, read_only)).transpose()?;
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

/// The open files of a RAM snapshot in its unpacked form.
#[derive(Debug)]
pub struct RamFiles {
    /// Head and sections, opened read-only.
    pub state: File,
    /// The memory, opened read-only.
    pub memory: File,
    /// The working set, opened read-only; none: nobody has recorded one yet.
    pub working_set: Option<File>,
}

impl RamFiles {
    /// Opens what a record's [`Ram`] names.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(ram: &Ram) -> Result<Self> {
        let working_set = match open_plain(&ram.working_set) {
            Ok(file) => Some(file),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => None,
            Err(err) => return Err(err),
        };
        Ok(Self { state: open_plain(&ram.state)?, memory: open_plain(&ram.memory)?, working_set })
    }
}

fn open_disk(disk: &Disk, record: &Path, holder: &Holder, read_only: bool) -> Result<DiskFiles> {
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
pub(crate) fn open_plain(path: &Path) -> Result<File> {
    open_with(OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK), path)
}

pub(crate) fn open_with(options: &OpenOptions, path: &Path) -> Result<File> {
    let file = options.open(path).map_err(Error::io("open", path))?;
    if !file.metadata().map_err(Error::io("open", path))?.is_file() {
        return Err(Error::io("open", path)(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a plain file")));
    }
    Ok(file)
}

/// Takes the lock of a top, and says by whom.
pub(crate) fn lock(file: &File, path: &Path, by: &Holder, shared: bool) -> Result<()> {
    let how = if shared { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    match flock(file, how) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let holder = holder(path).map_or_else(|| "another process".to_owned(), |holder| holder.text);
            return Err(Error::InUse { path: path.to_owned(), holder });
        }
        Err(e) => return Err(Error::io("lock", path)(e.into())),
    }
    let mut text = by.text.clone().into_bytes();
    if let Some(socket) = &by.socket {
        text.push(b'\n');
        text.extend_from_slice(socket.as_os_str().as_bytes());
    }
    // Only a help for the next one, so a failure does not stop a start.
    let _ = fs::write(holder_path(path), text);
    Ok(())
}

pub(crate) fn holder_path(data: &Path) -> PathBuf {
    let mut name = OsString::from(data);
    name.push(".holder");
    name.into()
}

/// Makes a fresh top for a disk of `size` bytes at these paths, which must not exist. Milliseconds, a few KiB of disk;
/// durable on return only once the directory is synced.
///
/// # Errors
/// [`Error::Io`], [`Error::Disk`].
pub fn create_top(paths: &TopPaths, size: u64) -> Result<()> {
    let (data, map) = make_top(paths, size)?;
    data.sync_all().map_err(Error::io("sync", &paths.data))?;
    map.sync_all().map_err(Error::io("sync", &paths.map))
}

/// [`create_top`] for a top that need not outlive the host's own end.
pub(crate) fn make_top(paths: &TopPaths, size: u64) -> Result<(File, File)> {
    let create = |path: &Path| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        options.open(path).map_err(Error::io("create", path))
    };
    let (data, map) = (create(&paths.data)?, create(&paths.map)?);
    Top::create(&data, &map, size).map_err(Error::disk(&paths.data))?;
    Ok((data, map))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let paths = TopPaths { data: dir.path().join("data"), map: dir.path().join("map") };
        create_top(&paths, 1 << 20).unwrap();
        assert_eq!(holder(&paths.data), None);
        let cases = [
            Holder { text: "machine a/b".into(), socket: Some("/run/ovms/machines/a/b/machine.sock".into()) },
            Holder { text: "a commit".into(), socket: None },
        ];
        for by in cases {
            lock(&File::open(&paths.data).unwrap(), &paths.data, &by, false).unwrap();
            assert_eq!(holder(&paths.data), Some(by));
        }
    }

    #[test]
    fn holder_strange_file_returns_what_may_be_shown() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let read = |text: &[u8]| {
            fs::write(holder_path(&data), text).unwrap();
            holder(&data)
        };
        assert_eq!(read(b""), None);
        assert_eq!(read(b"\n/run/x"), None);
        assert_eq!(read(b"\x1b[31mred\nrelative/path"), Some("[31mred".into()));
        assert_eq!(read(&[b'x'; 100_000]).unwrap().text.len(), MAX_HOLDER);
    }
}
