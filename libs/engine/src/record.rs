//! The record of a machine on disk: `<runtime>/machines/<namespace>/<id>/record.json`, written before the VMM is spawned
//! and at every change of state (a temporary file takes its place), so that whoever finds it can end and remove the machine.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{renameat2, RenameFlags, AT_FDCWD};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::machine::{ExitInfo, State};
use crate::process;

/// What is known of a machine; all that `cleanup` needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The machine's name.
    pub id: String,
    /// Its namespace.
    pub namespace: String,
    /// The state.
    pub state: State,
    /// When it was created.
    pub created: SystemTime,
    /// The VMM, once it was spawned.
    pub process: Option<ProcessId>,
    /// Directories of its cgroup, one for each hierarchy.
    pub cgroup: Vec<PathBuf>,
    /// User and group id of the VMM.
    pub uid: Option<u32>,
    /// Data files of the disk tops that it holds.
    pub tops: Vec<PathBuf>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Steps of the start: (step, microseconds since its creation began).
    #[serde(default)]
    pub timeline: Vec<(String, u64)>,
    /// How it ended, once it has.
    pub exit: Option<ExitInfo>,
    /// Which one of that name its maker means, if it says ([`crate::CreateSpec::instance`]).
    #[serde(default)]
    pub instance: Option<String>,
}

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The number.
    pub pid: u32,
    /// When it began, in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_time: u64,
}

impl ProcessId {
    /// Whether it still is there; one that has ended and only waits to be reaped is not.
    #[must_use]
    pub fn is_alive(self) -> bool {
        process::is_alive(self)
    }
}

const RECORD: &str = "record.json";
const RECORD_TMP: &str = "record.json.tmp";
const LOCK: &str = "lock";

/// The longest name of a machine or a namespace in bytes.
const MAX_NAME: usize = 128;

/// Refuses a name that is not one path component of the plain alphabet.
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let starts_well = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if starts_well && name.len() <= MAX_NAME && name.bytes().all(plain) {
        return Ok(());
    }
    let message =
        format!("{what} {name:?} is not 1 to {MAX_NAME} letters, digits, '.', '_' or '-' with a letter or digit first");
    Err(Error::new(Kind::InvalidArgument, message))
}

/// A machine's directory, held by the engine that made the machine.
#[derive(Debug)]
pub(crate) struct Slot {
    dir: PathBuf,
    /// Locked as long as the engine lives: whoever gets the lock knows that nobody looks after the machine any more.
    lock: File,
}

/// Who has a name.
pub(crate) enum Claim {
    /// We have it now.
    Ours(Slot),
    /// A living engine has it.
    Taken,
    /// An engine that is gone had it; its machine must be cleaned up first.
    Stale(Found),
}

impl Slot {
    /// Takes the name for a new machine.
    pub(crate) fn claim(runtime: &Path, namespace: &str, id: &str) -> Result<Claim> {
        let dir = dir(runtime, namespace, id);
        let error = || Error::io(format!("the machine's directory {} cannot be made", dir.display()));
        if let Some(parent) = dir.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(error())?;
        }
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => (),
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
                return Ok(match Found::open(runtime, namespace, id)? {
                    Some(found) if found.is_stale() => Claim::Stale(found),
                    _ => Claim::Taken,
                });
            }
            Err(err) => return Err(error()(err)),
        }
        let options = || File::options().write(true).create_new(true).mode(0o600).open(dir.join(LOCK));
        let file = options().map_err(error())?;
        match file.try_lock() {
            Ok(()) => {
                // Somebody may have taken it for left before it was locked.
                let slot = Self { dir, lock: file };
                Ok(if slot.is_ours() { Claim::Ours(slot) } else { Claim::Taken })
            }
            Err(TryLockError::WouldBlock) => Ok(Claim::Taken),
            Err(TryLockError::Error(err)) => Err(error()(err)),
        }
    }

    /// Replaces the record. No change if somebody has removed the machine from outside: the path may be another's.
    pub(crate) fn write(&self, record: &Record) -> Result<()> {
        if !self.is_ours() {
            return Ok(());
        }
        write(&self.dir, record).map_err(Error::io(format!("the record in {} cannot be written", self.dir.display())))
    }

    /// Removes the directory; the name is free then. No change if somebody else has done that.
    pub(crate) fn remove(&self) -> Result<()> {
        if !self.is_ours() {
            return Ok(());
        }
        remove_dir(&self.dir)
    }

    /// Whether the directory still is the one that was made for this machine.
    fn is_ours(&self) -> bool {
        let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
        let lock = self.lock.metadata().map(id);
        fs::metadata(self.dir.join(LOCK)).is_ok_and(|now| lock.is_ok_and(|own| own == id(now)))
    }
}

/// A machine's directory as somebody else than its engine finds it. What is read and removed through it is that
/// directory's, even if another machine has taken the name, and with it the path, meanwhile.
#[derive(Debug)]
pub(crate) struct Found {
    path: PathBuf,
    dir: File,
    /// Held if no engine looks after the machine any more: nobody takes the name before it is let go.
    lock: Option<File>,
    /// Nobody will ever lock it: its engine died before it had made the lock.
    unborn: bool,
}

impl Found {
    /// Finds the directory, and takes its lock unless its engine lives; `None`: there is none.
    pub(crate) fn open(runtime: &Path, namespace: &str, id: &str) -> Result<Option<Self>> {
        let path = dir(runtime, namespace, id);
        let error = || Error::io(format!("the machine's directory {} cannot be opened", path.display()));
        let dir = match File::open(&path) {
            Ok(dir) => dir,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(error()(err)),
        };
        let mut found = Self { path: path.clone(), dir, lock: None, unborn: false };
        match File::options().write(true).open(found.file(LOCK)) {
            Ok(file) => match file.try_lock() {
                // The holder before may have removed it between our open and our lock.
                Ok(()) => found.lock = Some(file).filter(|_| found.is_current()),
                Err(TryLockError::WouldBlock) => (),
                Err(TryLockError::Error(err)) => return Err(error()(err)),
            },
            // Made or removed by somebody else at this moment, or left so by one who died in between.
            Err(err) if err.kind() == io::ErrorKind::NotFound => found.unborn = is_old(&path),
            Err(err) => return Err(error()(err)),
        }
        Ok(Some(found))
    }

    /// No engine looks after it any more, and none will while this is held.
    pub(crate) fn is_stale(&self) -> bool {
        self.lock.is_some() || self.unborn
    }

    /// Whether its engine, if it lives, has had the time to lock it and to write its record.
    pub(crate) fn is_old(&self) -> bool {
        is_old(&self.path)
    }

    /// Whether it still is what the name means.
    pub(crate) fn is_current(&self) -> bool {
        let same = |now: fs::Metadata, own: fs::Metadata| (now.dev(), now.ino()) == (own.dev(), own.ino());
        fs::metadata(&self.path).is_ok_and(|now| self.dir.metadata().is_ok_and(|own| same(now, own)))
    }

    /// The record; `None` if none was written.
    pub(crate) fn record(&self) -> Result<Option<Record>> {
        read_file(&self.file(RECORD), &self.path)
    }

    /// Removes it.
    pub(crate) fn remove(&self) -> Result<()> {
        let error = || Error::io(format!("the machine's directory {} cannot be removed", self.path.display()));
        let gone = |err: &io::Error| err.kind() == io::ErrorKind::NotFound;
        let names = fs::read_dir(self.file(".")).map_err(error())?.flatten().map(|entry| entry.file_name());
        // The lock last: without it, whoever wants the name would take the directory for one that is just being made.
        for name in names.filter(|name| name != LOCK).chain([LOCK.into()]) {
            match fs::remove_file(self.file(name)) {
                Err(err) if !gone(&err) => return Err(error()(err)),
                _ => (),
            }
        }
        // A new machine's is not empty, so even one that took the path just now stays.
        match self.is_current().then(|| fs::remove_dir(&self.path)) {
            Some(Err(err)) if !gone(&err) && err.kind() != io::ErrorKind::DirectoryNotEmpty => Err(error()(err)),
            _ => Ok(()),
        }
    }

    /// A file of this very directory.
    fn file(&self, name: impl AsRef<Path>) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.dir.as_raw_fd())).join(name)
    }
}

/// Whether a directory was not changed for longer than it takes to make its lock and its record.
fn is_old(dir: &Path) -> bool {
    let changed = fs::metadata(dir).and_then(|meta| meta.modified());
    changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|age| age > Duration::from_secs(10)))
}

fn write(dir: &Path, record: &Record) -> io::Result<()> {
    let tmp = dir.join(RECORD_TMP);
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    // Not synced: no machine outlives the host's own end, and up to then the page cache keeps what was written. And
    // exchanged, not replaced: where the runtime directory is on a disk, file systems sync a file that replaces another
    // (ext4's auto_da_alloc: 14 ms in every start).
    let record = dir.join(RECORD);
    match renameat2(AT_FDCWD, &tmp, AT_FDCWD, &record, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => fs::remove_file(&tmp),
        // The first record, or a file system that cannot exchange.
        Err(Errno::ENOENT | Errno::EINVAL) => fs::rename(&tmp, record),
        Err(errno) => Err(errno.into()),
    }
}

/// Reads a record; `None` if there is no such machine, or none that came as far as having one.
pub(crate) fn read(runtime: &Path, namespace: &str, id: &str) -> Result<Option<Record>> {
    let dir = dir(runtime, namespace, id);
    read_file(&dir.join(RECORD), &dir)
}

/// Reads the record that lies in `dir`.
fn read_file(file: &Path, dir: &Path) -> Result<Option<Record>> {
    let error = || format!("the record {} cannot be read", dir.join(RECORD).display());
    match fs::read(file) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map(Some).map_err(|err| Error::new(Kind::Internal, error()).because(err))
        }
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(Error::io(error())(err)),
    }
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Ok(()) => Ok(()),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(err) => Err(Error::io(format!("the machine's directory {} cannot be removed", dir.display()))(err)),
    }
}

/// Every record there is; what cannot be read is left out.
pub(crate) fn all(runtime: &Path) -> Vec<Record> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries(&runtime.join("machines"))
        .flat_map(|namespace| entries(&namespace).collect::<Vec<_>>())
        .filter_map(|machine| serde_json::from_slice(&fs::read(machine.join(RECORD)).ok()?).ok())
        .collect()
}

/// The machines of a namespace that have a directory, with or without a record.
pub(crate) fn names(runtime: &Path, namespace: &str) -> Vec<String> {
    let entries = fs::read_dir(runtime.join("machines").join(namespace)).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Where a machine's engine listens for other processes.
pub(crate) fn socket(runtime: &Path, namespace: &str, id: &str) -> PathBuf {
    dir(runtime, namespace, id).join(ovms_proto::machine::SOCKET)
}

fn dir(runtime: &Path, namespace: &str, id: &str) -> PathBuf {
    runtime.join("machines").join(namespace).join(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            id: "vm1".into(),
            namespace: "default".into(),
            state: State::Creating,
            created: SystemTime::now(),
            process: Some(ProcessId { pid: 7, start_time: 9 }),
            cgroup: vec!["/sys/fs/cgroup/memory/default/vm1".into()],
            uid: Some(1_900_000_000),
            tops: vec!["/var/lib/ovms/top".into()],
            vcpus: 1,
            memory: 512 << 20,
            timeline: vec![("spawned".into(), 12)],
            exit: None,
            instance: Some("1a".into()),
        }
    }

    fn claim(runtime: &Path) -> Claim {
        Slot::claim(runtime, "default", "vm1").unwrap()
    }

    #[test]
    fn a_record_written_is_read_again_and_gone_after_remove() {
        let runtime = tempfile::tempdir().unwrap();
        let Claim::Ours(slot) = claim(runtime.path()) else { panic!("the name is free") };
        assert_eq!(read(runtime.path(), "default", "vm1").unwrap(), None);
        slot.write(&record()).unwrap();
        assert_eq!(
            read(runtime.path(), "default", "vm1").unwrap(),
            Some(record()).map(|mut r| {
                r.created = read(runtime.path(), "default", "vm1").unwrap().unwrap().created;
                r
            })
        );
        assert_eq!(all(runtime.path()).len(), 1);
        slot.remove().unwrap();
        slot.remove().unwrap();
        assert_eq!(read(runtime.path(), "default", "vm1").unwrap(), None);
    }

    #[test]
    fn a_name_is_taken_while_its_engine_lives_and_stale_afterwards() {
        let runtime = tempfile::tempdir().unwrap();
        let first = claim(runtime.path());
        assert!(matches!(first, Claim::Ours(_)));
        assert!(matches!(claim(runtime.path()), Claim::Taken));
        drop(first);
        assert!(matches!(claim(runtime.path()), Claim::Stale(_)));
    }

    #[test]
    fn check_name_strange_returns_invalid_argument() {
        for name in ["", ".", "..", "a/b", "-x", "a b", "a\0b", &"x".repeat(129)] {
            assert_eq!(check_name("id", name).unwrap_err().kind(), Kind::InvalidArgument, "{name:?}");
        }
        check_name("id", "k8s.io_web-1").unwrap();
    }

    #[test]
    fn read_damaged_record_returns_internal() {
        let runtime = tempfile::tempdir().unwrap();
        let _slot = claim(runtime.path());
        fs::write(dir(runtime.path(), "default", "vm1").join(RECORD), b"{").unwrap();
        assert_eq!(read(runtime.path(), "default", "vm1").unwrap_err().kind(), Kind::Internal);
    }

    #[test]
    fn what_is_found_and_removed_is_that_machine_and_not_the_next_of_its_name() {
        let runtime = tempfile::tempdir().unwrap();
        let path = dir(runtime.path(), "default", "vm1");
        let Claim::Ours(first) = claim(runtime.path()) else { panic!("the name is free") };
        first.write(&record()).unwrap();
        let found = Found::open(runtime.path(), "default", "vm1").unwrap().unwrap();
        assert!(!found.is_stale() && found.is_current());
        first.remove().unwrap();
        let Claim::Ours(second) = claim(runtime.path()) else { panic!("the name is free again") };
        second.write(&Record { instance: Some("2b".into()), ..record() }).unwrap();

        assert!(!found.is_current());
        assert_eq!(found.record().unwrap(), None);
        found.remove().unwrap();
        first.write(&record()).unwrap();
        first.remove().unwrap();
        let left = read_file(&path.join(RECORD), &path).unwrap().unwrap();
        assert_eq!(left.instance.as_deref(), Some("2b"));
        assert!(matches!(claim(runtime.path()), Claim::Taken), "the second one still has its lock");
    }

    #[test]
    fn nobody_takes_the_name_of_a_stale_machine_while_it_is_being_removed() {
        let runtime = tempfile::tempdir().unwrap();
        drop(claim(runtime.path()));
        let Claim::Stale(found) = claim(runtime.path()) else { panic!("nobody looks after it") };
        assert!(matches!(claim(runtime.path()), Claim::Taken));
        found.remove().unwrap();
        assert!(matches!(claim(runtime.path()), Claim::Ours(_)));
    }
}
