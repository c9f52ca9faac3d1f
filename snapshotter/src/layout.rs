//! Names and makes what lies below the daemon's root.
//!
//! ```text
//! root/            0700, one daemon at a time (lock)
//!   lock
//!   metadata.redb
//!   s/<number>/    one snapshot
//!     fs/          what clients mount: overlay's upper or lower directory, or the bind source of a machine
//!     work/        overlay's work directory
//!     layer/       a machine's layer in block-stack form (crate::machine)
//!     top/         a machine's writable disk, made when it is first resolved, and what was frozen of it
//!   blobs/<hex>    copies of kernels and initial RAM disks
//!   ram/<hex>/     RAM snapshots in unpacked form (crate::machine::ram)
//!   tmp/           what is being made; emptied at start
//! ```
//! Snapshot directories have short names, since an overlay's mount options name one for each layer and must fit one
//! page. Whatever must survive a crash is made under another name, synced, renamed, and its parent synced.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ovms_bundle::sync;

use crate::error::{Context, Error, Result};

/// How long a predecessor's lock may outlive it.
const HANDOVER: Duration = Duration::from_secs(1);

/// The daemon's root directory.
#[derive(Debug)]
pub struct Layout {
    root: PathBuf,
    /// Held as long as the daemon lives.
    _lock: File,
}

impl Layout {
    /// Makes what is missing below `root` and locks it.
    pub fn open(root: &Path) -> Result<Self> {
        let failed = || format!("cannot use the root directory {}", root.display());
        make_dir(root, 0o700, true).context(failed)?;
        let root = root.canonicalize().context(failed)?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(root.join("lock"));
        let lock = lock.context(failed)?;
        // As with the sockets: a predecessor's lock may outlive it by a moment.
        let deadline = Instant::now() + HANDOVER;
        let take = || rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive);
        let mut taken = take();
        while taken.is_err() && Instant::now() < deadline {
            std::thread::sleep(HANDOVER / 100);
            taken = take();
        }
        taken.map_err(|source| {
            Error::precondition(format!("another snapshotter uses {}: stop it or give --root", root.display()))
                .because(source)
        })?;
        for dir in ["s", "blobs", "ram", "tmp"] {
            make_dir(&root.join(dir), 0o700, true).context(failed)?;
        }
        let layout = Self { root, _lock: lock };
        for entry in fs::read_dir(layout.tmp()).context(failed)? {
            remove(&entry.context(failed)?.path()).context(failed)?;
        }
        // RAM is made beside its place, under a name that begins with a dot.
        for entry in fs::read_dir(layout.ram()).context(failed)? {
            let entry = entry.context(failed)?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                remove(&entry.path()).context(failed)?;
            }
        }
        Ok(layout)
    }

    /// The metadata store.
    pub fn store(&self) -> PathBuf {
        self.root.join("metadata.redb")
    }

    /// Directory of things being made.
    pub fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// Directory of all blobs.
    pub fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    /// Directory of all unpacked RAM snapshots.
    pub fn ram(&self) -> PathBuf {
        self.root.join("ram")
    }

    /// The root itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Directory of all snapshots.
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("s")
    }

    /// A snapshot's own directory.
    pub fn snapshot(&self, number: u64) -> PathBuf {
        self.snapshots().join(number.to_string())
    }

    /// What clients mount.
    pub fn fs(&self, number: u64) -> PathBuf {
        self.snapshot(number).join("fs")
    }

    /// Overlay's work directory.
    pub fn work(&self, number: u64) -> PathBuf {
        self.snapshot(number).join("work")
    }

    /// The number of the snapshot whose `fs` directory this is, by its name alone.
    pub fn number_of(&self, fs: &Path) -> Option<u64> {
        let number: u64 = fs.strip_prefix(self.snapshots()).ok()?.parent()?.to_str()?.parse().ok()?;
        (self.fs(number) == fs).then_some(number)
    }

    /// Makes a snapshot's directory, with `fs` owned by `owner`; durable on return.
    pub fn make_snapshot(&self, number: u64, work: bool, owner: Option<(u32, u32)>) -> Result<()> {
        let make = || -> io::Result<()> {
            let made = tempfile::Builder::new().prefix("new-").tempdir_in(self.tmp())?;
            let fs = made.path().join("fs");
            make_dir(&fs, 0o755, false)?;
            if let Some((uid, gid)) = owner {
                std::os::unix::fs::chown(&fs, Some(uid), Some(gid))?;
            }
            if work {
                make_dir(&made.path().join("work"), 0o711, false)?;
            }
            rustix::fs::chmod(made.path(), rustix::fs::Mode::from_raw_mode(0o711))?;
            publish(made.path(), &self.snapshot(number))?;
            let _renamed = made.keep();
            Ok(())
        };
        make().context(|| format!("cannot make the directory of snapshot {number}"))
    }

    /// Takes a snapshot's directory away at once; its bytes go when the returned path is removed.
    pub fn detach_snapshot(&self, number: u64) -> Result<PathBuf> {
        self.detach(&self.snapshot(number), &number.to_string())
    }

    /// Takes away a file or directory below the root at once, by a name of its own among what goes.
    pub fn detach(&self, path: &Path, name: &str) -> Result<PathBuf> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // What was taken away under this name before may still be on its way out.
        let gone = self.tmp().join(format!("gone-{name}-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        match fs::rename(path, &gone) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                Err(err).context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(gone),
        }
    }
}

/// The tops in a snapshot's directory; the bundle record says which files in it are what.
pub fn top_dir(snapshot: &Path) -> PathBuf {
    snapshot.join("top")
}

/// Makes a directory with exactly this mode, whatever the umask.
fn make_dir(path: &Path, mode: u32, parents: bool) -> io::Result<()> {
    if parents && path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(parents).mode(mode).create(path)?;
    Ok(rustix::fs::chmod(path, rustix::fs::Mode::from_raw_mode(mode))?)
}

/// Renames what was made to its final name, durably. The content of files must have been synced.
pub fn publish(made: &Path, name: &Path) -> io::Result<()> {
    sync(made)?;
    fs::rename(made, name)?;
    name.parent().map_or(Ok(()), sync)
}

/// Removes a file or a whole directory; that it is not there is no error.
pub fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(err) => Err(err),
    };
    match removed {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_of_takes_only_the_fs_directory_of_a_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        assert_eq!(layout.number_of(&layout.fs(12)), Some(12));
        for other in ["s/12", "s/12/fs/x", "s/012/fs", "s/x/fs", "blobs/12/fs", "s/1/2/fs"] {
            assert_eq!(layout.number_of(&layout.root.join(other)), None, "{other}");
        }
    }

    #[test]
    fn open_of_a_locked_root_returns_who_is_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Layout::open(dir.path()).unwrap();
        let err = Layout::open(dir.path()).unwrap_err();
        assert!(err.chain().contains("another snapshotter"), "{}", err.chain());
    }

    #[test]
    fn open_empties_tmp() {
        let dir = tempfile::tempdir().unwrap();
        drop(Layout::open(dir.path()).unwrap());
        fs::create_dir(dir.path().join("tmp/new-1")).unwrap();
        drop(Layout::open(dir.path()).unwrap());
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }
}
