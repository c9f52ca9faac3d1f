//! Reading and writing the kernel's small files.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::file_error;
use crate::error::{Error, Kind, Result};

/// The most that is read of one file; the longest, `memory.stat` and `blkio.*` of a host with many disks, stay far
/// below.
const MAX_FILE: u64 = 1 << 20;

/// A mounted cgroup hierarchy.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// Where.
    pub(super) point: PathBuf,
    /// `cgroup` or `cgroup2`.
    pub(super) kind: String,
    /// Super block options: the controllers of a version 1 hierarchy among them.
    pub(super) options: Vec<String>,
}

/// The cgroup mounts in /proc/self/mountinfo (proc_pid_mountinfo(5)).
pub(super) fn mounts(mountinfo: &str) -> Vec<Mount> {
    mountinfo.lines().filter_map(mount).collect()
}

fn mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut after = after.split(' ');
    let kind = after.next().filter(|kind| *kind == "cgroup" || *kind == "cgroup2")?;
    let options = after.nth(1)?.split(',').map(str::to_owned).collect();
    Some(Mount { point: before.split(' ').nth(4)?.into(), kind: kind.to_owned(), options })
}

pub(super) fn read(path: &Path) -> Result<String> {
    let mut text = String::new();
    let file = File::open(path).map_err(file_error("opened", path))?;
    file.take(MAX_FILE).read_to_string(&mut text).map_err(file_error("read", path))?;
    Ok(text)
}

/// The number in a file; `max` is `u64::MAX`, anything that cannot be read 0.
pub(super) fn number(path: &Path) -> u64 {
    read(path).map_or(0, |text| match text.trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    })
}

/// `name value` lines.
pub(super) fn fields(text: &str) -> Vec<(String, u64)> {
    let pair = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

/// The value of one `name value` line; 0 if there is none.
pub(super) fn field(text: &str, name: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

/// Sets a limit. A file that is not there means a controller that the host does not have: told to the log, since the
/// limit then is not kept.
pub(super) fn set(dir: &Path, file: &str, value: &str) -> Result<()> {
    let path = dir.join(file);
    match write(&path, value) {
        Ok(()) => Ok(()),
        Err(err) if err.kind() == io::ErrorKind::NotFound && dir.exists() => {
            tracing::warn!(path = %path.display(), value, "the host has no such cgroup control: the limit is not kept");
            Ok(())
        }
        Err(err) if matches!(err.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::ResourceBusy) => {
            let (kind, message) = match err.kind() {
                io::ErrorKind::ResourceBusy => (Kind::FailedPrecondition, "is below what is in use now"),
                _ => (Kind::InvalidArgument, "is refused by the kernel"),
            };
            Err(Error::new(kind, format!("{value:?} for the cgroup's {file} {message}")).because(err))
        }
        Err(err) => Err(file_error("written", &path)(err)),
    }
}

/// One write of the whole value, as these files want it.
pub(super) fn write(path: &Path, value: &str) -> io::Result<()> {
    File::options().write(true).open(path)?.write_all(value.as_bytes())
}

pub(super) fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::io(format!("the cgroup {} cannot be made", dir.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_both_versions_are_found() {
        let text = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                    32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                    41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let found = mounts(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].point, Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert!(found[0].options.contains(&"cpuacct".to_owned()));
        assert_eq!(found[1].kind, "cgroup2");
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "oom 1\noom_kill 3\nlow x\n";
        assert_eq!(field(text, "oom_kill"), 3);
        assert_eq!(field(text, "oom"), 1);
        assert_eq!(field(text, "none"), 0);
        assert_eq!(fields(text), [("oom".to_owned(), 1), ("oom_kill".to_owned(), 3)]);
    }

    #[test]
    fn numbers_know_max_and_survive_nonsense() {
        let dir = tempfile::tempdir().unwrap();
        for (text, expected) in [("42\n", 42), ("max\n", u64::MAX), ("many", 0)] {
            fs::write(dir.path().join("file"), text).unwrap();
            assert_eq!(number(&dir.path().join("file")), expected);
        }
        assert_eq!(number(&dir.path().join("none")), 0);
    }
}
