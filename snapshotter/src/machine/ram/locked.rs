//! RAM that must not leave memory (`mlock_required`): the daemon holds one locked mapping of each memory file that machines
//! run from, which all of them share, for as long as a container's snapshot uses it. A digest may be in memory twice: those
//! who came before there was room on tmpfs map the file on disk, later ones its copy ([`super::preload`]).

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ovms_bundle::ram::memory_path;
use ovms_bundle::Ram;
use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};

use crate::daemon::Daemon;
use crate::error::{Context, Error, Result};
use crate::sys::Locked;

/// Prefix of the store's keys by which containers hold a lock on a file on disk.
const KEY: &str = "mlock ";
/// The same for the copy on tmpfs.
const KEY_TMPFS: &str = "mlock tmpfs ";

/// Which file of a digest is locked: the one that a machine maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    digest: String,
    tmpfs: bool,
}

impl Place {
    /// That of RAM which a machine is given.
    pub fn of(daemon: &Daemon, ram: &Ram) -> Self {
        Self { digest: ram.digest.clone(), tmpfs: daemon.preloads.holds(&ram.memory) }
    }

    /// The place that a store's key locks, if it is such a key.
    pub fn of_key(key: &str) -> Option<Self> {
        let tmpfs = key.strip_prefix(KEY_TMPFS);
        let digest = tmpfs.or_else(|| key.strip_prefix(KEY))?;
        Some(Self { digest: digest.to_owned(), tmpfs: tmpfs.is_some() })
    }

    /// The store's key by which a container holds the lock.
    pub fn key(&self) -> String {
        let prefix = if self.tmpfs { KEY_TMPFS } else { KEY };
        format!("{prefix}{}", self.digest)
    }

    /// The file, if it is there: a reboot empties tmpfs, and ends all who mapped it.
    pub fn memory(&self, daemon: &Daemon) -> Option<PathBuf> {
        let hex = self.digest.strip_prefix("sha256:").unwrap_or(&self.digest);
        match self.tmpfs {
            true => daemon.preloads.find(hex),
            false => Some(memory_path(&daemon.layout.ram().join(hex))),
        }
    }
}

/// One locked file.
#[derive(Debug)]
struct Entry {
    /// The store's key that it is locked for.
    key: String,
    locked: Locked,
}

/// The locked files by device and inode, which a mapping keeps from being given to another file. A file that took the
/// place of a locked one is locked beside it: machines may still run from the one before.
#[derive(Debug, Default)]
pub struct LockedFiles(Mutex<HashMap<(u64, u64), Entry>>);

impl LockedFiles {
    fn all(&self) -> MutexGuard<'_, HashMap<(u64, u64), Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up what no key of the store holds. `held` is asked while [`lock`] waits, which a container calls after its key
    /// was stored: so either the key is seen here, or the file is locked anew.
    pub fn release(&self, held: impl FnOnce() -> Result<BTreeSet<String>>) -> Result<()> {
        let mut all = self.all();
        if all.is_empty() {
            return Ok(());
        }
        let held = held()?;
        let gone: Vec<_> = all.extract_if(|_, entry| !held.contains(&entry.key)).collect();
        // Unmapping takes a while and needs no lock.
        drop(all);
        for (_, Entry { key, locked }) in gone {
            tracing::info!(key, bytes = locked.bytes(), "RAM is no longer locked");
        }
        Ok(())
    }
}

/// Locks a memory file, unless this very file is locked already. Blocks while it is read in. The caller makes sure that it
/// is called once at a time for each place.
pub fn lock(daemon: &Daemon, place: &Place, memory: &Path) -> Result<()> {
    let failed = || format!("cannot open {}", memory.display());
    let file = File::open(memory).context(failed)?;
    let found = file.metadata().context(failed)?;
    let id = (found.dev(), found.ino());
    if daemon.locked.all().contains_key(&id) {
        return Ok(());
    }
    let started = std::time::Instant::now();
    let locked = Locked::new(&file).map_err(|err| refused(&file, &place.digest, err))?;
    let (key, took) = (place.key(), started.elapsed());
    tracing::info!(memory = %memory.display(), bytes = locked.bytes(), ?took, "RAM is locked in memory");
    daemon.locked.all().insert(id, Entry { key, locked });
    Ok(())
}

fn refused(file: &File, digest: &str, err: std::io::Error) -> Error {
    let mib = file.metadata().map_or(0, |found| found.blocks() * 512) >> 20;
    let limit = match getrlimit(Resource::Memlock).current {
        None => "not limited (RLIMIT_MEMLOCK)".to_owned(),
        Some(bytes) => format!("limited to {} KiB (RLIMIT_MEMLOCK)", bytes >> 10),
    };
    Error::precondition(format!(
        "ramSnapshot.mlock_required: {mib} MiB of RAM snapshot {digest} cannot be locked in memory, which is {limit}: set \
         LimitMEMLOCK=infinity for ovms-snapshotter.service, and have that much memory free"
    ))
    .because(err)
}

/// Raises the limit on locked memory as far as this process may.
pub fn raise_limit() {
    let limit = getrlimit(Resource::Memlock);
    if limit.current != limit.maximum {
        if let Err(err) = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit }) {
            tracing::debug!(error = %err, "the limit on locked memory cannot be raised");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn locked(key: &str) -> ((u64, u64), Entry) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 4096]).unwrap();
        let found = file.metadata().unwrap();
        ((found.dev(), found.ino()), Entry { key: key.into(), locked: Locked::new(&file).unwrap() })
    }

    #[test]
    fn release_keeps_what_is_held_and_asks_while_nobody_can_lock() {
        let files = LockedFiles::default();
        files.release(|| panic!("there is nothing to ask for")).unwrap();
        files.all().extend([locked("mlock sha256:a"), locked("mlock tmpfs sha256:a")]);

        files
            .release(|| {
                assert!(files.0.try_lock().is_err());
                Ok(BTreeSet::from(["mlock tmpfs sha256:a".to_owned()]))
            })
            .unwrap();

        let left: Vec<_> = files.all().values().map(|entry| entry.key.clone()).collect();
        assert_eq!(left, ["mlock tmpfs sha256:a"]);
        files.release(|| Err(Error::internal("the store failed"))).unwrap_err();
        assert_eq!(files.all().len(), 1);
    }

    #[test]
    fn keys_of_the_store_are_read_again() {
        for (key, tmpfs) in [("mlock sha256:a", false), ("mlock tmpfs sha256:a", true)] {
            let place = Place::of_key(key).unwrap();
            assert_eq!((place.digest.as_str(), place.tmpfs, place.key().as_str()), ("sha256:a", tmpfs, key));
        }
        assert_eq!(Place::of_key("ram sha256:a"), None);
    }
}
