//! Leases of user ids: each machine's VMM has one that no other process has.
//!
//! A lease is a locked file `<runtime>/uids/<uid>`. The lock ends with the engine that holds it, however it ends, so a
//! stale lease takes care of itself; since the VMM may outlive its engine by a moment, the file also names the VMM, and
//! a lease whose VMM lives is not taken.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ovms_config::settings::JailSettings;

use crate::error::{Error, Kind, Result};
use crate::process;
use crate::record::ProcessId;

/// A user id that is this machine's alone.
#[derive(Debug)]
pub(crate) struct UidLease {
    uid: u32,
    path: PathBuf,
    file: File,
}

impl UidLease {
    /// Takes a free id of the settings' range; groups have the same number. Engines begin at different places of the
    /// range, so that each need not try the ids of all others.
    pub(crate) fn take(runtime: &Path, range: &JailSettings) -> Result<Self> {
        Self::take_from(runtime, range, std::process::id())
    }

    fn take_from(runtime: &Path, range: &JailSettings, start: u32) -> Result<Self> {
        if range.uid_base == 0 || range.uid_base.checked_add(range.uid_count).is_none() {
            let message = "ovms.toml: jail.uid_base and jail.uid_count must name user ids other than 0 below 2^32";
            return Err(Error::new(Kind::InvalidArgument, message));
        }
        let dir = dir(runtime);
        let error = || Error::io(format!("a user id cannot be leased in {}", dir.display()));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(error())?;
        for step in 0..range.uid_count {
            let uid = range.uid_base + start.wrapping_add(step) % range.uid_count;
            if let Some(lease) = Self::try_take(dir.join(uid.to_string()), uid).map_err(error())? {
                return Ok(lease);
            }
        }
        Err(Error::new(
            Kind::Unavailable,
            format!("all {} user ids of ovms.toml's jail.uid_count are in use by machines", range.uid_count),
        ))
    }

    fn try_take(path: PathBuf, uid: u32) -> io::Result<Option<Self>> {
        let mut file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        match file.try_lock() {
            Ok(()) => (),
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(err)) => return Err(err),
        }
        // The holder before may have removed the file between our open and our lock; then the lock is on nothing.
        if fs::metadata(&path).is_ok_and(|meta| meta.ino() == file.metadata().map_or(0, |own| own.ino())) {
            let mut holder = String::new();
            file.read_to_string(&mut holder)?;
            let holder: Option<ProcessId> = serde_json::from_str(&holder).ok();
            if !holder.is_some_and(process::is_alive) {
                file.set_len(0)?;
                return Ok(Some(Self { uid, path, file }));
            }
        }
        Ok(None)
    }

    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    /// Names the process that lives under this id.
    pub(crate) fn assign(&mut self, process: ProcessId) -> Result<()> {
        let mut write = || -> io::Result<()> {
            self.file.rewind()?;
            self.file.write_all(&serde_json::to_vec(&process)?)
        };
        write().map_err(Error::io(format!("the lease {} cannot be written", self.path.display())))
    }
}

impl Drop for UidLease {
    fn drop(&mut self) {
        // Removed before the lock goes with the descriptor: whoever has opened it meanwhile sees that it is gone.
        if let Err(err) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %err, "a user id's lease cannot be removed");
        }
    }
}

/// Removes the lease of a machine whose engine and VMM are gone; no change if somebody holds it.
pub(crate) fn reclaim(runtime: &Path, uid: u32) -> io::Result<()> {
    let path = dir(runtime).join(uid.to_string());
    if path.exists() {
        drop(UidLease::try_take(path, uid)?);
    }
    Ok(())
}

fn dir(runtime: &Path) -> PathBuf {
    runtime.join("uids")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: JailSettings = JailSettings { uid_base: 1000, uid_count: 3 };

    fn own_id() -> ProcessId {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let field = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(19).unwrap().parse().unwrap();
        ProcessId { pid: std::process::id(), start_time: field }
    }

    #[test]
    fn no_two_machines_have_one_uid_and_a_freed_one_is_taken_again() {
        let dir = tempfile::tempdir().unwrap();
        let first = UidLease::take_from(dir.path(), &RANGE, 0).unwrap();
        let second = UidLease::take_from(dir.path(), &RANGE, 0).unwrap();
        assert_eq!((first.uid(), second.uid()), (1000, 1001));
        drop(first);
        assert_eq!(UidLease::take_from(dir.path(), &RANGE, 0).unwrap().uid(), 1000);
    }

    #[test]
    fn take_from_exhausted_range_returns_unavailable() {
        let dir = tempfile::tempdir().unwrap();
        let _all: Vec<_> = (0..3).map(|_| UidLease::take_from(dir.path(), &RANGE, 0).unwrap()).collect();
        let err = UidLease::take_from(dir.path(), &RANGE, 0).unwrap_err();
        assert_eq!(err.kind(), Kind::Unavailable);
    }

    #[test]
    fn a_stale_lease_is_taken_only_when_its_process_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let uids = dir.path().join("uids");
        fs::create_dir(&uids).unwrap();
        let living = own_id();
        fs::write(uids.join("1000"), serde_json::to_vec(&living).unwrap()).unwrap();
        let dead = ProcessId { start_time: living.start_time + 1, ..living };
        fs::write(uids.join("1001"), serde_json::to_vec(&dead).unwrap()).unwrap();
        assert_eq!(UidLease::take_from(dir.path(), &RANGE, 0).unwrap().uid(), 1001);
    }

    #[test]
    fn many_threads_never_share_a_uid() {
        let dir = tempfile::tempdir().unwrap();
        let range = JailSettings { uid_base: 1000, uid_count: 64 };
        let take = || UidLease::take(dir.path(), &range).unwrap();
        for _ in 0..20 {
            let leases: Vec<UidLease> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(take)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let mut uids: Vec<_> = leases.iter().map(UidLease::uid).collect();
            uids.sort_unstable();
            uids.dedup();
            assert_eq!(uids.len(), 8);
        }
    }

    #[test]
    fn take_uid_zero_returns_invalid_argument() {
        let dir = tempfile::tempdir().unwrap();
        let err = UidLease::take(dir.path(), &JailSettings { uid_base: 0, uid_count: 9 }).unwrap_err();
        assert_eq!(err.kind(), Kind::InvalidArgument);
    }
}
