//! RAM that must not leave memory (`mlock_required`): the daemon holds one locked mapping of the memory file, which all
//! machines that run from it share, for as long as a container's snapshot uses it.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};

use crate::daemon::Daemon;
use crate::error::{Context, Error, Result};
use crate::sys::Locked;

/// Prefix of the store's keys by which containers hold a lock.
const KEY: &str = "mlock ";

/// The locked files by their digests.
#[derive(Debug, Default)]
pub struct LockedFiles(Mutex<HashMap<String, Locked>>);

impl LockedFiles {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Locked>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing is locked.
    pub fn is_empty(&self) -> bool {
        self.all().is_empty()
    }

    /// Gives up what nobody needs.
    pub fn retain(&self, needed: impl Fn(&str) -> bool) {
        let gone: Vec<_> = self.all().extract_if(|digest, _| !needed(&key(digest))).collect();
        // Unmapping takes a while and needs no lock.
        for (digest, locked) in gone {
            tracing::info!(digest, bytes = locked.bytes(), "RAM is no longer locked");
        }
    }
}

/// The store's key by which a container holds the lock on a digest.
pub fn key(digest: &str) -> String {
    format!("{KEY}{digest}")
}

/// The digest that a store's key locks, if it is such a key.
pub fn digest_of(key: &str) -> Option<&str> {
    key.strip_prefix(KEY)
}

/// Locks the memory file of a digest, unless it is locked already. Blocks while it is read in. The caller makes sure that
/// it is called once at a time for each digest.
pub fn lock(daemon: &Daemon, digest: &str, memory: &Path) -> Result<()> {
    if daemon.locked.all().contains_key(digest) {
        return Ok(());
    }
    let started = std::time::Instant::now();
    let file = File::open(memory).context(|| format!("cannot open {}", memory.display()))?;
    let locked = Locked::new(&file).map_err(|err| refused(&file, digest, err))?;
    tracing::info!(digest, bytes = locked.bytes(), took = ?started.elapsed(), "RAM is locked in memory");
    daemon.locked.all().insert(digest.to_owned(), locked);
    Ok(())
}

fn refused(file: &File, digest: &str, err: std::io::Error) -> Error {
    use std::os::unix::fs::MetadataExt;
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
