//! Memory that stays: a shared, read-only mapping of a file whose data is locked in RAM.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ptr::NonNull;

use ovms_disk::ReadAt;
use rustix::io::Errno;
use rustix::mm::{mlock, mmap, munmap, MapFlags, ProtFlags};

/// The most ranges that are locked one by one: each takes two of the process's mappings, of which the kernel gives
/// 65,530 (`vm.max_map_count`).
const MAX_RANGES: usize = 4096;
/// The first guess at how large a hole must be to be left out, in bytes.
const HOLE: u64 = 2 << 20;
/// Bytes in a page.
const PAGE: u64 = 4096;

/// A mapping; the lock ends with it.
#[derive(Debug)]
pub struct Locked {
    at: NonNull<c_void>,
    len: usize,
    bytes: u64,
}

// SAFETY: the mapping is never read or written through this value, which only ends it; the kernel's calls on it may
// come from any thread.
unsafe impl Send for Locked {}
// SAFETY: as above; a shared reference gives nothing but a number.
unsafe impl Sync for Locked {}

impl Locked {
    /// Maps the file and locks its data, reading it in. Holes are left out: locking one would fill it with pages of
    /// zeros. Blocks for as long as reading takes.
    pub fn new(file: &File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let len = usize::try_from(length).map_err(|_| Errno::OVERFLOW)?;
        if len == 0 {
            return Err(Errno::INVAL.into());
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that anyone has. Nothing is
        // read through it, so a file that shrinks cannot fault here.
        let at = unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, file, 0) }?;
        let at = NonNull::new(at).ok_or(Errno::NOMEM)?;
        let mut locked = Self { at, len, bytes: 0 };
        for (start, end) in ranges(file, length)? {
            let (Ok(offset), Ok(part)) = (usize::try_from(start), usize::try_from(end - start)) else {
                return Err(Errno::OVERFLOW.into());
            };
            // SAFETY: the ranges lie within the file's length, so the pointer stays within the mapping made above; mlock
            // changes no memory.
            unsafe { mlock(locked.at.as_ptr().byte_add(offset), part) }?;
            locked.bytes += end - start;
        }
        Ok(locked)
    }

    /// Bytes that are locked.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: address and length are those of the mapping, which nobody else knows of.
        let _cannot_fail = unsafe { munmap(self.at.as_ptr(), self.len) };
    }
}

/// The file's data as page-aligned ranges, small holes among it; few enough of them.
fn ranges(file: &File, length: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut hole = HOLE;
    loop {
        let found = ranges_by(file, length, hole)?;
        if found.len() <= MAX_RANGES {
            return Ok(found);
        }
        hole = hole.saturating_mul(4);
    }
}

fn ranges_by(file: &File, length: u64, hole: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while let Some((start, end)) = file.next_data(at)?.filter(|(start, _)| *start < length) {
        let (start, end) = (start / PAGE * PAGE, end.next_multiple_of(PAGE).min(length));
        match found.last_mut() {
            Some(last) if start.saturating_sub(last.1) < hole => last.1 = end,
            _ => found.push((start, end)),
        }
        at = end;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    /// Bytes of a file that this process has locked; other tests lock other files.
    fn locked_of(file: &File) -> u64 {
        let inode = file.metadata().unwrap().ino().to_string();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut ours, mut locked) = (false, 0);
        for line in smaps.lines() {
            match line.split_whitespace().collect::<Vec<_>>().as_slice() {
                [range, _, _, _, found, ..] if range.contains('-') => ours = *found == inode,
                ["Locked:", kib, "kB"] if ours => locked += kib.parse::<u64>().unwrap() << 10,
                _ => {}
            }
        }
        locked
    }

    #[test]
    fn data_is_locked_and_holes_are_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        file.write_all_at(&[1; 4096], 32 << 20).unwrap();

        let locked = Locked::new(&file).unwrap();

        assert!((12288..1 << 20).contains(&locked.bytes()), "{}", locked.bytes());
        assert_eq!(locked_of(&file), locked.bytes());
        drop(locked);
        assert_eq!(locked_of(&file), 0);
    }

    #[test]
    fn many_small_holes_are_locked_over() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(40 << 20).unwrap();
        for at in (0..40 << 20).step_by(8192) {
            file.write_all_at(&[1; 4096], at).unwrap();
        }
        assert_eq!(ranges(&file, 40 << 20).unwrap(), [(0, (40 << 20) - 4096)]);
    }

    #[test]
    fn new_of_an_empty_file_returns_an_error() {
        assert!(Locked::new(&tempfile::tempfile().unwrap()).is_err());
    }
}
