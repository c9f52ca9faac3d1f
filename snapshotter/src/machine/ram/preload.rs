//! RAM on tmpfs (`preload_hint`): a copy of the memory file that the kernel cannot push out to the disk it came from. The
//! file on disk stays, so what a reboot or another's need takes from tmpfs is copied again, without any blob.
//!
//! ```text
//!  <root>/ram/<hex>/memory ──copy, as the budget allows──> <runtime>/ram/<root's id>/<hex>
//! ```
//! The id keeps apart daemons that share a runtime directory. Names that begin with a dot are being made.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ovms_artifact::digest::Digest;
use ovms_disk::ReadAt;
use rustix::fs::statfs;

use crate::daemon::Daemon;
use crate::error::{Context, Result};
use crate::layout;

/// tmpfs, as `statfs` calls it (`TMPFS_MAGIC` of the kernel's include/uapi/linux/magic.h).
const TMPFS: u64 = 0x0102_1994;

/// What tmpfs holds for one daemon.
#[derive(Debug)]
pub struct Preloads {
    dir: PathBuf,
}

impl Preloads {
    /// Those of the daemon with this root directory; what an earlier one left unfinished is removed.
    pub fn open(runtime: &Path, root: &Path) -> Result<Self> {
        let id = Digest::of(root.as_os_str().as_encoded_bytes()).hex();
        let dir = runtime.join("ram").join(id.get(..16).unwrap_or_default());
        let preloads = Self { dir };
        for name in preloads.names()? {
            if name.starts_with('.') {
                let path = preloads.dir.join(&name);
                layout::remove(&path).context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(preloads)
    }

    /// Takes away what is not needed; returns what is left to be removed.
    pub fn detach(&self, needed: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
        let mut gone = Vec::new();
        for hex in self.names()?.into_iter().filter(|name| !name.starts_with('.')) {
            if !needed(&hex) {
                let (from, to) = (self.dir.join(&hex), self.dir.join(format!(".gone-{hex}")));
                fs::rename(&from, &to).context(|| format!("cannot remove {}", from.display()))?;
                gone.push(to);
            }
        }
        Ok(gone)
    }

    /// The copy of a digest, if it is there.
    pub fn find(&self, hex: &str) -> Option<PathBuf> {
        Some(self.dir.join(hex)).filter(|path| path.exists())
    }

    /// Whether a file is one of these copies.
    pub fn holds(&self, path: &Path) -> bool {
        path.starts_with(&self.dir)
    }

    fn names(&self) -> Result<Vec<String>> {
        if self.dir.exists() {
            crate::daemon::names(&self.dir)
        } else {
            Ok(Vec::new())
        }
    }

    /// Bytes that the copies take.
    fn used(&self) -> io::Result<u64> {
        let entries = match fs::read_dir(&self.dir) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(0),
            entries => entries?,
        };
        entries.map(|entry| Ok(entry?.metadata()?.blocks() * 512)).sum()
    }
}

/// Where the memory of a digest is to be mapped from: the copy on tmpfs if it fits, else the file itself, and why. One at a
/// time, since they share the budget.
pub fn place(daemon: &Daemon, hex: &str, memory: &Path) -> Result<(PathBuf, Option<String>)> {
    let preloads = &daemon.preloads;
    if let Some(copy) = preloads.find(hex) {
        return Ok((copy, None));
    }
    let on_disk = |why: String| Ok((memory.to_owned(), Some(format!("preload_hint: {why}: it is mapped from disk"))));
    let failed = || format!("cannot use {}", preloads.dir.display());
    let from = File::open(memory).context(|| format!("cannot open {}", memory.display()))?;
    let size = from.metadata().context(failed)?.blocks() * 512;
    let (used, budget) = (preloads.used().context(failed)?, daemon.settings.ram.preload_budget);
    if used.saturating_add(size) > budget {
        let (size, used, budget) = (size >> 20, used >> 20, budget >> 20);
        return on_disk(format!(
            "{size} MiB of RAM do not fit the {budget} MiB of tmpfs ({used} MiB taken; ram.preload_budget)"
        ));
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&preloads.dir).context(failed)?;
    if statfs(&preloads.dir).context(failed)?.f_type as u64 != TMPFS {
        return on_disk(format!("{} is not on tmpfs (paths.runtime)", preloads.dir.display()));
    }
    let (made, copy) = (preloads.dir.join(format!(".new-{hex}")), preloads.dir.join(hex));
    let copied = copy_sparse(&from, &made).and_then(|()| fs::rename(&made, &copy));
    match copied {
        Ok(()) => Ok((copy, None)),
        // The budget is the operator's word, but the file system may hold less.
        Err(err) => {
            let _never_made = fs::remove_file(&made);
            on_disk(format!("RAM cannot be copied into {}: {err}", preloads.dir.display()))
        }
    }
}

/// Copies a file's data and leaves its holes.
fn copy_sparse(from: &File, to: &Path) -> io::Result<()> {
    let length = from.metadata()?.len();
    let _never_made = fs::remove_file(to);
    let mut to = File::options().write(true).create_new(true).mode(0o600).open(to)?;
    to.set_len(length)?;
    let mut at = 0;
    while let Some((start, end)) = from.next_data(at)? {
        let mut from = from;
        from.seek(SeekFrom::Start(start))?;
        to.seek(SeekFrom::Start(start))?;
        io::copy(&mut from.take(end - start), &mut to)?;
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_sparse_copy_has_the_same_bytes_and_the_same_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::options().read(true).write(true).create_new(true).open(&from).unwrap();
        file.set_len(32 << 20).unwrap();
        file.write_all_at(&[7; 3 << 20], 5 << 20).unwrap();
        file.write_all_at(&[8; 4096], (32 << 20) - 4096).unwrap();

        copy_sparse(&file, &to).unwrap();

        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 4 << 20);
    }

    #[test]
    fn what_is_unfinished_or_unneeded_goes() {
        let dir = tempfile::tempdir().unwrap();
        let preloads = Preloads::open(dir.path(), Path::new("/root")).unwrap();
        assert!(preloads.detach(|_| false).unwrap().is_empty());
        fs::create_dir_all(&preloads.dir).unwrap();
        for name in ["aa", "bb", ".new-cc"] {
            fs::write(preloads.dir.join(name), "").unwrap();
        }

        let preloads = Preloads::open(dir.path(), Path::new("/root")).unwrap();
        let gone = preloads.detach(|hex| hex == "bb").unwrap();

        assert_eq!((gone.len(), preloads.find("aa"), preloads.names().unwrap().len()), (1, None, 2));
        assert!(preloads.find("bb").is_some() && !preloads.dir.join(".new-cc").exists());
    }
}
