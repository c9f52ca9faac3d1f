//! Directories for what is there only while a verb works: `<state>/scratch/<name>/`.
//!
//! Each is locked as long as the process lives that made it; one whose lock is free was left by a killed process, and whoever
//! comes next removes it: what lies there may be the whole memory of somebody's machine. The parent is locked while
//! one is made or stale ones are removed, so that no directory is seen between its making and its lock. They do not lie in
//! `<state>/tmp`, which the snapshotter empties when it starts.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A directory of this process's own, removed with it.
pub struct Scratch {
    dir: TempDir,
    _lock: File,
}

impl Scratch {
    /// Makes one, empty and for its owner alone, and removes those of killed processes.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn make(state: &Path) -> io::Result<Self> {
        let all = all_dir(state);
        DirBuilder::new().recursive(true).mode(0o700).create(&all)?;
        let alone = File::open(&all)?;
        alone.lock()?;
        remove_stale(&all);
        let dir = tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir_in(&all)?;
        let lock = File::open(dir.path())?;
        lock.lock()?;
        Ok(Self { dir, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Removes the directories of killed processes. Only a help: what cannot be removed now is left to the next.
pub fn sweep(state: &Path) {
    let all = all_dir(state);
    let Ok(alone) = File::open(&all) else { return };
    // Who has the lock removes them, too.
    if alone.try_lock().is_ok() {
        remove_stale(&all);
    }
}

fn remove_stale(all: &Path) {
    for entry in fs::read_dir(all).into_iter().flatten().flatten() {
        let dir = entry.path();
        if File::open(&dir).is_ok_and(|lock| lock.try_lock().is_ok()) {
            // It is in nobody's way: an error is not worth the verb.
            let _ = fs::remove_dir_all(&dir);
        }
    }
}

fn all_dir(state: &Path) -> PathBuf {
    state.join("scratch")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(state: &Path) -> Vec<PathBuf> {
        fs::read_dir(all_dir(state)).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// What a killed process leaves: the directory, without its lock.
    fn killed(state: &Path) -> PathBuf {
        let Scratch { dir, _lock } = Scratch::make(state).unwrap();
        let path = dir.keep();
        fs::write(path.join("ram"), b"secret").unwrap();
        path
    }

    #[test]
    fn a_killed_processs_directory_goes_and_a_held_one_stays() {
        let state = tempfile::tempdir().unwrap();
        let held = Scratch::make(state.path()).unwrap();
        fs::write(held.path().join("ram"), b"x").unwrap();
        for _ in 0..2 {
            let left = killed(state.path());
            assert!(left.exists());
            sweep(state.path());
            assert_eq!(names(state.path()), [held.path()]);
        }

        let left = killed(state.path());
        let next = Scratch::make(state.path()).unwrap();

        assert!(!left.exists() && next.path().exists());
        assert_eq!(fs::read(held.path().join("ram")).unwrap(), b"x");
        drop((held, next));
        assert_eq!(names(state.path()).len(), 0);
    }

    #[test]
    fn only_its_owner_may_look_into_it() {
        let state = tempfile::tempdir().unwrap();
        let scratch = Scratch::make(state.path()).unwrap();
        for dir in [scratch.path(), &all_dir(state.path())] {
            assert_eq!(fs::metadata(dir).unwrap().permissions().mode() & 0o777, 0o700);
        }
    }

    #[test]
    fn sweep_without_a_directory_makes_none() {
        let state = tempfile::tempdir().unwrap();
        sweep(state.path());
        assert!(!all_dir(state.path()).exists());
    }
}
