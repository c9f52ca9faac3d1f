//! Folders below one directory, reached by descriptor only.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    self as sys, AtFlags, Dev, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, CWD,
};
use rustix::io::Errno;

use super::Target;

/// Path of a member as plain components: no root, no `.`, and `..` taken out as far as the root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Name(Vec<CString>);

impl Name {
    /// Reads the path in a header.
    pub fn of(path: &[u8]) -> Self {
        let mut parts = Vec::new();
        for part in path.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => {
                    parts.pop();
                }
                part => parts.extend(CString::new(part)),
            }
        }
        Self(parts)
    }

    /// The folder and the last component; `None` for the root.
    pub fn split(&self) -> Option<(Name, CString)> {
        let (base, folder) = self.0.split_last()?;
        Some((Name(folder.to_vec()), base.clone()))
    }

    fn path(&self) -> CString {
        let joined = self.0.iter().map(|part| part.as_bytes()).collect::<Vec<_>>().join(&b'/');
        // No component holds a zero byte.
        if joined.is_empty() {
            c".".to_owned()
        } else {
            CString::new(joined).unwrap_or_default()
        }
    }
}

/// A single component, if these bytes are one.
pub fn base(name: &[u8]) -> Option<CString> {
    match name {
        b"" | b"." | b".." => None,
        name => CString::new(name).ok(),
    }
}

/// The directory that a layer goes into.
pub struct Tree<'a> {
    root: OwnedFd,
    target: &'a Target,
}

impl<'a> Tree<'a> {
    /// Opens the target's directory.
    pub fn open(target: &'a Target) -> io::Result<Self> {
        Ok(Self { root: open_dir(&target.dir)?, target })
    }

    /// Opens a folder; `None` if it is not there or is none.
    pub fn find(&self, name: &Name) -> io::Result<Option<Folder>> {
        match open_in(&self.root, name) {
            Ok(fd) => Ok(Some(Folder(fd))),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(err) => Err(err.into()),
        }
    }

    /// Opens a folder and makes what is missing of its path.
    pub fn make(&self, name: &Name) -> io::Result<Folder> {
        match open_in(&self.root, name) {
            Ok(fd) => return Ok(Folder(fd)),
            Err(Errno::NOENT) => {}
            Err(err) => return Err(err.into()),
        }
        // Component by component, so that the depth of a hostile path costs no stack.
        let mut folder = Folder(open_in(&self.root, &Name::default())?);
        let mut here = Name::default();
        for base in &name.0 {
            here.0.push(base.clone());
            folder = match open_in(&self.root, &here) {
                Ok(fd) => Folder(fd),
                Err(Errno::NOENT) => {
                    sys::mkdirat(&folder.0, base, Mode::from_raw_mode(0o755))?;
                    sys::chmodat(&folder.0, base, Mode::from_raw_mode(0o755), AtFlags::empty())?;
                    let made = Folder(open_in(&self.root, &here)?);
                    self.copy_from_below(&here, &folder, base)?;
                    made
                }
                Err(err) => return Err(err.into()),
            };
        }
        Ok(folder)
    }

    /// Gives a folder that the archive left out the looks of the one it covers.
    fn copy_from_below(&self, name: &Name, parent: &Folder, base: &CStr) -> io::Result<()> {
        for below in &self.target.below {
            let root = open_dir(below)?;
            let found = match open_in(&root, name) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => continue,
                // Something else is there, or a whiteout: what lies further down is not covered any more.
                Err(Errno::NOTDIR | Errno::LOOP) => return Ok(()),
                Err(err) => return Err(err.into()),
            };
            let stat = sys::fstat(&found)?;
            parent.set_owner(base, stat.st_uid, stat.st_gid)?;
            sys::chmodat(&parent.0, base, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())?;
            copy_attributes(&found, parent, base)?;
            let time = |seconds: i64, nanos: u64| Timespec { tv_sec: seconds, tv_nsec: nanos as _ };
            let times = Timestamps {
                last_access: time(stat.st_atime, stat.st_atime_nsec),
                last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
            };
            sys::utimensat(&parent.0, base, &times, AtFlags::SYMLINK_NOFOLLOW)?;
            return Ok(());
        }
        Ok(())
    }
}

fn copy_attributes(from: &OwnedFd, parent: &Folder, base: &CStr) -> io::Result<()> {
    let from = magic(from);
    let mut names = vec![0; 64 << 10];
    match sys::listxattr(&from, &mut names) {
        Ok(len) => names.truncate(len),
        Err(Errno::NOTSUP | Errno::NODATA) => return Ok(()),
        Err(err) => return Err(err.into()),
    }
    for name in names.split(|byte| *byte == 0) {
        let Ok(name) = std::str::from_utf8(name) else { continue };
        if name.is_empty() || name.starts_with("trusted.") || name.starts_with("user.overlay.") {
            continue;
        }
        let mut value = vec![0; 64 << 10];
        match sys::getxattr(&from, name, &mut value) {
            Ok(len) => {
                value.truncate(len);
                parent.set_attribute(base, name, &value)?;
            }
            Err(Errno::NOTSUP | Errno::NODATA) => {}
            Err(err) => return Err(err.into()),
        }
    }
    Ok(())
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(sys::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Opens a folder with `root` as the root of the walk. A path that leads through symbolic links must end less than
/// 4096 bytes below the host's root, so that links cannot stack folders deeper than anybody could remove them again.
fn open_in(root: &OwnedFd, name: &Name) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let path = name.path();
    match sys::openat2(root, &path, flags, Mode::empty(), resolve | ResolveFlags::NO_SYMLINKS) {
        Err(Errno::LOOP) => {
            let found = sys::openat2(root, &path, flags, Mode::empty(), resolve)?;
            sys::readlinkat(CWD, magic(&found), Vec::new())?;
            Ok(found)
        }
        other => other,
    }
}

/// The path by which calls that take no descriptor reach an open file.
pub(super) fn magic(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// An open folder of the tree.
pub struct Folder(OwnedFd);

impl AsFd for Folder {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Folder {
    /// Makes room for a member: what is there goes, but a folder stays for a folder. Says whether a whiteout went, so
    /// that a folder in its place still hides what the whiteout hid.
    pub fn clear(&self, base: &CStr, folder: bool) -> io::Result<bool> {
        let found = match sys::statat(&self.0, base, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(false),
            found => found?,
        };
        match FileType::from_raw_mode(found.st_mode) {
            FileType::Directory if folder => return Ok(false),
            // Its depth is bounded by the length of a path, see open_in.
            FileType::Directory => std::fs::remove_dir_all(self.path_of(base))?,
            _ => sys::unlinkat(&self.0, base, AtFlags::empty())?,
        }
        Ok(FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice && found.st_rdev == 0)
    }

    /// Hides what lies below: overlay takes a character device 0:0 for a file that is gone. What this layer itself made
    /// is not hidden.
    pub fn white_out(&self, base: &CStr) -> io::Result<()> {
        let mode = Mode::from_raw_mode(0);
        match sys::mknodat(&self.0, base, FileType::CharacterDevice, mode, Dev::default()) {
            Err(Errno::EXIST) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Sets owner and group, of a symbolic link itself.
    pub fn set_owner(&self, base: &CStr, uid: u32, gid: u32) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        Ok(sys::chownat(&self.0, base, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Sets an extended attribute, of a symbolic link itself.
    pub fn set_attribute(&self, base: &CStr, name: &str, value: &[u8]) -> io::Result<()> {
        Ok(sys::lsetxattr(self.path_of(base), name, value, XattrFlags::empty())?)
    }

    /// A path to something in this folder, for calls that take no descriptor.
    fn path_of(&self, base: &CStr) -> PathBuf {
        Path::new(&magic(&self.0)).join(OsStr::from_bytes(base.to_bytes()))
    }
}
