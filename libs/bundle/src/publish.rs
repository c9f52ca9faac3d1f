//! Writing files that are either there whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use crate::{Error, Result};

/// Syncs a file or directory.
///
/// # Errors
/// That of the system.
pub fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Writes a file by way of a temporary one beside it: sync, rename, sync of the directory. Replaces what was there.
///
/// # Errors
/// [`Error::Io`].
pub fn write_new(path: &Path, with: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let failed = || Error::io("write", path);
    let mut temporary = tempfile::Builder::new().prefix(".new-").tempfile_in(dir).map_err(failed())?;
    with(temporary.as_file_mut())?;
    temporary.as_file_mut().flush().and_then(|()| temporary.as_file().sync_all()).map_err(failed())?;
    temporary.persist(path).map_err(|e| failed()(e.error))?;
    sync(dir).map_err(failed())
}

/// Renames a directory whose files are synced to its final name, durably. If another process was faster, theirs stays
/// and ours is removed.
///
/// # Errors
/// [`Error::Io`].
pub fn publish(made: &Path, name: &Path) -> Result<()> {
    sync(made).map_err(Error::io("sync", made))?;
    match fs::rename(made, name) {
        Ok(()) => {}
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTEMPTY | libc::EEXIST)) => {
            fs::remove_dir_all(made).map_err(Error::io("remove", made))?;
        }
        Err(e) => return Err(Error::io("rename into", name)(e)),
    }
    let dir = name.parent().unwrap_or(Path::new("."));
    sync(dir).map_err(Error::io("sync", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_new_that_fails_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write_new(&path, |file| file.write_all(b"old").map_err(Error::io("write", &path))).unwrap();
        let failing = |file: &mut File| {
            file.write_all(b"new").map_err(Error::io("write", &path))?;
            Err(Error::Image("no".into()))
        };
        write_new(&path, failing).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn publish_onto_what_another_made_keeps_theirs() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, name) = (dir.path().join("ours"), dir.path().join("name"));
        for (made, text) in [(&name, "theirs"), (&ours, "ours")] {
            fs::create_dir(made).unwrap();
            fs::write(made.join("file"), text).unwrap();
        }
        publish(&ours, &name).unwrap();
        assert_eq!(fs::read_to_string(name.join("file")).unwrap(), "theirs");
        assert!(!ours.exists());
    }
}
