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
