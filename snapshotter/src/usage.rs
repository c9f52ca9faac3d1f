//! Disk space of a directory: allocated blocks, each inode once.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::store::Usage;

/// Adds up a directory and everything in it. What disappears meanwhile does not count.
pub fn of(path: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut todo = vec![path.to_owned()];
    while let Some(path) = todo.pop() {
        let found = match fs::symlink_metadata(&path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
            found => found?,
        };
        if found.nlink() > 1 && !found.is_dir() && !seen.insert((found.dev(), found.ino())) {
            continue;
        }
        // st_blocks counts 512-byte units, whatever the file system's own.
        usage.bytes += found.blocks() * 512;
        usage.inodes += 1;
        if found.is_dir() {
            for entry in fs::read_dir(&path)? {
                todo.push(entry?.path());
            }
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_holes_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, vec![1; 8192]).unwrap();
        let one = of(dir.path()).unwrap();
        fs::hard_link(&file, dir.path().join("link")).unwrap();
        fs::File::create(dir.path().join("hole")).unwrap().set_len(1 << 30).unwrap();
        let two = of(dir.path()).unwrap();
        assert!(one.bytes >= 8192);
        assert_eq!((two.inodes, two.bytes), (one.inodes + 1, one.bytes));
    }
}
