//! A new top for a disk whose machine runs: made beside the old one, locked, and entered into the record before the
//! machine is asked to use it.
//!
//! ```text
//!  record:  layers, top      ──NewTop::make──>   layers, frozen [top], top.1 (empty)  ──the machine freezes──> the same
//!                                                └──undo, if it did not──> layers, top
//! ```
//! Both records read the same as long as the new top is empty, so a crash at any point between loses nothing: the machine's
//! end is the crash's end too, and whoever opens the record next finds the old top's content below an empty one.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use ovms_disk::{Top, TopFiles};

use crate::{
    create_top,
    open::{holder_path, lock, open_plain, open_with},
    record::Record,
    sync, Error, Holder, Result, TopPaths,
};

/// The most tops that may lie frozen below a machine's writable one. Each is opened at every start and asked at every read of
/// what nobody above has written.
pub const MAX_FROZEN: usize = 32;
/// The most files that a disk may have: all of a machine's must fit one packet of 253 descriptors (`SCM_MAX_FD`).
const MAX_FILES: usize = 230;

/// A top that was made beside a running machine's, entered into its record.
#[derive(Debug)]
pub struct NewTop {
    /// Its files, opened for reading and writing; the data file holds the lock.
    pub files: TopFiles,
    /// Its paths, absolute.
    pub paths: TopPaths,
    record: PathBuf,
    before: Record,
}

impl NewTop {
    /// Makes a top for the disk of the record at `path`, whose own top the caller's machine holds. `None` for a machine
    /// without a disk.
    ///
    /// # Errors
    /// [`Error::Frozen`] if there are too many already, [`Error::NoTop`], [`Error::Record`], [`Error::Io`],
    /// [`Error::Disk`]. Nothing is left behind.
    pub fn make(path: &Path, holder: &Holder) -> Result<Option<Self>> {
        let before = Record::read(path)?;
        let loaded = Record::load(path)?;
        let (Some(disk), Some(loaded)) = (&before.disk, &loaded.disk) else { return Ok(None) };
        let none = || Error::NoTop(path.to_owned());
        let (top, loaded_top) = disk.top.as_ref().zip(loaded.top.as_ref()).ok_or_else(none)?;
        let count = disk.frozen.len() + 1;
        if count > MAX_FROZEN || disk.layers.len() + 2 * count > MAX_FILES {
            return Err(Error::Frozen { path: loaded_top.data.clone(), count: disk.frozen.len() });
        }
        let size = disk_size(loaded_top)?;
        // Every name is that of the oldest top with a number, so that it does not grow with the chain.
        let oldest = |of: &crate::Disk| of.frozen.first().or(of.top.as_ref()).map(|top| numbered(top, count));
        let (entry, paths) = oldest(disk).zip(oldest(loaded)).ok_or_else(none)?;
        let mut after = before.clone();
        if let Some(disk) = &mut after.disk {
            disk.frozen.push(top.clone());
            disk.top = Some(entry);
        }
        remove(&paths)?;
        let files = create(&paths, size, holder).and_then(|files| after.save(path).map(|()| files));
        let files = files.inspect_err(|_| {
            let _ = remove(&paths);
        })?;
        Ok(Some(Self { files, paths, record: path.to_owned(), before }))
    }

    /// Takes the new top back out of the record and removes it: for a machine that did not freeze.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Record`]; the record is sound with it and without it.
    pub fn undo(self) -> Result<()> {
        self.before.save(&self.record)?;
        remove(&self.paths)
    }
}

/// The disk's size: that of its top, since it may have grown.
fn disk_size(top: &TopPaths) -> Result<u64> {
    let (data, map) = (open_plain(&top.data)?, open_plain(&top.map)?);
    Ok(Top::open(data, map).map_err(Error::disk(&top.data))?.size())
}

fn numbered(top: &TopPaths, number: usize) -> TopPaths {
    let with = |path: &Path| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{number}"));
        PathBuf::from(name)
    };
    TopPaths { data: with(&top.data), map: with(&top.map) }
}

fn create(paths: &TopPaths, size: u64, holder: &Holder) -> Result<TopFiles> {
    create_top(paths, size)?;
    let dir = paths.data.parent().unwrap_or(Path::new("."));
    sync(dir).map_err(Error::io("sync", dir))?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let files = TopFiles { data: open_with(&options, &paths.data)?, map: open_with(&options, &paths.map)? };
    lock(&files.data, &paths.data, holder, false)?;
    Ok(files)
}

/// Removes a top that no record names: one whose machine did not freeze, or what a crash has left.
fn remove(paths: &TopPaths) -> Result<()> {
    for path in [&paths.data, &paths.map, &holder_path(&paths.data)] {
        match fs::remove_file(path) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", path)(err)),
            _ => (),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{unpack::instantiate, Bundle, Disk, Manifest, RECORD_VERSION};
    use ovms_disk::Table;
    use std::fs::File;

    const SIZE: u64 = 1 << 20;

    fn instance(dir: &Path) -> PathBuf {
        let table = dir.join("table");
        Table::empty(SIZE).unwrap().write_to(&File::create(&table).unwrap()).unwrap();
        let disk =
            Disk { virtual_size: SIZE, table, layers: Vec::new(), frozen: Vec::new(), top: None, read_only: false };
        let template = Record {
            version: RECORD_VERSION,
            image: None,
            manifest: Manifest::new("test/image", "1"),
            kernel: None,
            initrd: None,
            disk: Some(disk),
            ram: None,
        };
        instantiate(&template, dir).unwrap()
    }

    fn stack(record: &Path) -> ovms_disk::Stack {
        Bundle::open(record, "a test", false).unwrap().disk.unwrap().into_stack().unwrap()
    }

    fn files(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn each_new_top_lies_above_what_was_written_before() {
        let dir = tempfile::tempdir().unwrap();
        let record = instance(dir.path());
        for number in 0..3_u8 {
            let running = stack(&record);
            running.write_at(u64::from(number) * 4096, &[number + 1; 512]).unwrap();
            let new = NewTop::make(&record, &"machine a/b".into()).unwrap().unwrap();
            running.freeze(new.files).unwrap();
            let err = Bundle::open(&record, "another", false).unwrap_err().to_string();
            assert!(err.contains("machine a/b"), "{err}");
        }
        let loaded = Record::load(&record).unwrap().disk.unwrap();
        let names = |top: &TopPaths| top.data.file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(loaded.frozen.iter().map(names).collect::<Vec<_>>(), ["top.data", "top.data.1", "top.data.2"]);
        assert_eq!(names(&loaded.top.unwrap()), "top.data.3");
        let (stack, mut block) = (stack(&record), [0; 512]);
        for number in 0..3_u8 {
            stack.read_at(u64::from(number) * 4096, &mut block).unwrap();
            assert_eq!(block, [number + 1; 512]);
        }
    }

    #[test]
    fn undo_leaves_what_was_there_and_a_crash_instead_of_it_reads_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let record = instance(dir.path());
        let before = stack(&record);
        before.write_at(0, &[7; 512]).unwrap();
        before.flush().unwrap();
        drop(before);
        let (text, count) = (fs::read(&record).unwrap(), files(dir.path()));
        NewTop::make(&record, &"a".into()).unwrap().unwrap().undo().unwrap();
        assert_eq!((fs::read(&record).unwrap(), files(dir.path())), (text, count));

        drop(NewTop::make(&record, &"a".into()).unwrap().unwrap());
        let mut block = [0; 512];
        stack(&record).read_at(0, &mut block).unwrap();
        assert_eq!(block, [7; 512]);
    }

    #[test]
    fn what_a_crash_left_before_the_record_was_written_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let record = instance(dir.path());
        fs::write(dir.path().join("top.data.1"), "half").unwrap();
        let new = NewTop::make(&record, &"a".into()).unwrap().unwrap();
        assert_eq!(new.paths.data, dir.path().join("top.data.1"));
    }

    #[test]
    fn make_too_many_returns_frozen_with_the_way_out_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = instance(dir.path());
        let mut record = Record::read(&path).unwrap();
        let top = record.disk.as_ref().unwrap().top.clone().unwrap();
        record.disk.as_mut().unwrap().frozen = vec![top; MAX_FROZEN];
        record.save(&path).unwrap();
        let count = files(dir.path());
        let err = NewTop::make(&path, &"a".into()).unwrap_err();
        assert!(err.to_string().contains("frozen 32 times"), "{err}");
        let disk = record.disk.as_mut().unwrap();
        disk.frozen.truncate(20);
        disk.layers = vec!["layer".into(); 190];
        record.save(&path).unwrap();
        let err = NewTop::make(&path, &"a".into()).unwrap_err();
        assert!(err.to_string().contains("frozen 20 times"), "{err}");
        assert_eq!(files(dir.path()), count);
    }
}
