//! Directories for what is there only while a verb works, in `<state>/scratch/` or TMPDIR.
//!
//! ```text
//!  .ovm-scratch-XXXXXX ──lock, rename──> ovm-scratch-XXXXXX ──> removed by its process, or, once its lock is free since the
//!  (empty)                                                      process was killed, by whoever comes next
//! ```
//! What a killed process leaves may be the whole memory of somebody's machine. A directory has its name only with its lock,
//! so that none is taken for left between its making and its lock. They do not lie in `<state>/tmp`, which the snapshotter
//! empties when it starts.

use std::env;
use std::fs::{self, DirBuilder, DirEntry, File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::geteuid;

const PREFIX: &str = "ovm-scratch-";
/// Before it is locked.
const NEW: &str = ".ovm-scratch-";
/// No process takes so long from making a directory to locking it.
const MAKING: Duration = Duration::from_secs(60);

/// A directory of this process's own, removed with it.
pub struct Scratch {
    dir: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Makes one on the file system of our state, empty and for its owner alone, and removes those of killed processes.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn in_state(state: &Path) -> io::Result<Self> {
        let all = all_dir(state);
        DirBuilder::new().recursive(true).mode(0o700).create(&all)?;
        Self::make(&all)
    }

    /// The same in TMPDIR, which others may use, too.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn in_tmp() -> io::Result<Self> {
        Self::make(&env::temp_dir())
    }

    fn make(all: &Path) -> io::Result<Self> {
        remove_stale(all);
        let private = Permissions::from_mode(0o700);
        let new = tempfile::Builder::new().prefix(NEW).permissions(private).tempdir_in(all)?;
        let lock = File::open(new.path())?;
        lock.lock()?;
        let name = new.path().file_name().unwrap_or_default().to_string_lossy().replacen(NEW, PREFIX, 1);
        let dir = all.join(name);
        fs::rename(new.path(), &dir)?;
        let _ = new.keep();
        Ok(Self { dir, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now is left to the next.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Removes the directories of killed processes from our state. Only a help: what cannot be removed now is left to the next.
pub fn sweep(state: &Path) {
    remove_stale(&all_dir(state));
}

fn remove_stale(all: &Path) {
    // It is in nobody's way: an error is not worth the verb.
    for entry in fs::read_dir(all).into_iter().flatten().flatten() {
        let (name, dir) = (entry.file_name(), entry.path());
        let name = name.to_string_lossy();
        if name.starts_with(PREFIX) && ours(&entry).is_some() {
            if File::open(&dir).is_ok_and(|lock| lock.try_lock().is_ok()) {
                let _ = fs::remove_dir_all(&dir);
            }
        } else if name.starts_with(NEW) && ours(&entry).is_some_and(|found| is_old(&found)) {
            let _ = fs::remove_dir(&dir);
        }
    }
}

/// What it is, if it is a directory of this user's.
fn ours(entry: &DirEntry) -> Option<Metadata> {
    entry.metadata().ok().filter(|found| found.is_dir() && found.uid() == geteuid().as_raw())
}

fn is_old(found: &Metadata) -> bool {
    found.modified().ok().and_then(|made| made.elapsed().ok()).is_some_and(|age| age > MAKING)
}

fn all_dir(state: &Path) -> PathBuf {
    state.join("scratch")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    fn names(all: &Path) -> Vec<PathBuf> {
        fs::read_dir(all).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// What a killed process leaves: the directory, without its lock.
    fn killed(all: &Path) -> PathBuf {
        let dir = all.join("ovm-scratch-killed");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("ram"), b"secret").unwrap();
        dir
    }

    #[test]
    fn a_killed_processs_directory_goes_and_a_held_one_stays() {
        let state = tempfile::tempdir().unwrap();
        let held = Scratch::in_state(state.path()).unwrap();
        let all = all_dir(state.path());
        fs::write(held.path().join("ram"), b"x").unwrap();
        for _ in 0..2 {
            killed(&all);
            sweep(state.path());
            assert_eq!(names(&all), [held.path()]);
        }

        let left = killed(&all);
        let next = Scratch::in_state(state.path()).unwrap();

        assert!(!left.exists() && next.path().exists());
        assert_eq!(fs::read(held.path().join("ram")).unwrap(), b"x");
        drop((held, next));
        assert_eq!(names(&all).len(), 0);
    }

    #[test]
    fn only_its_owner_may_look_into_it() {
        let state = tempfile::tempdir().unwrap();
        let scratch = Scratch::in_state(state.path()).unwrap();
        for dir in [scratch.path(), &all_dir(state.path())] {
            assert_eq!(fs::metadata(dir).unwrap().permissions().mode() & 0o777, 0o700);
        }
    }

    #[test]
    fn what_others_have_beside_it_stays() {
        let all = tempfile::tempdir().unwrap();
        fs::create_dir(all.path().join("ovm-something")).unwrap();
        fs::write(all.path().join("ovm-scratch-file"), b"").unwrap();
        std::os::unix::fs::symlink("/", all.path().join("ovm-scratch-link")).unwrap();
        let before = names(all.path());

        drop(Scratch::make(all.path()).unwrap());

        assert_eq!(names(all.path()), before);
    }

    #[test]
    fn one_that_is_being_made_stays_and_one_whose_maker_was_killed_goes() {
        let all = tempfile::tempdir().unwrap();
        let new = all.path().join(".ovm-scratch-new");
        fs::create_dir(&new).unwrap();
        remove_stale(all.path());
        assert!(new.exists());

        let long_ago = SystemTime::now() - 2 * MAKING;
        File::open(&new).unwrap().set_modified(long_ago).unwrap();
        remove_stale(all.path());
        assert!(!new.exists());
    }

    #[test]
    fn sweep_without_a_directory_makes_none() {
        let state = tempfile::tempdir().unwrap();
        sweep(state.path());
        assert!(!all_dir(state.path()).exists());
    }
}
