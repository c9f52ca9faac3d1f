//! A machine's RAM file held in the host's memory (`mlock_required`) where no snapshotter does that: one shared, locked,
//! read-only mapping. What the guest makes its own of it, its VMM locks itself.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ovms_disk::ReadAt;

use crate::error::{Error, Kind, Result};
use crate::sys::LockedMap;

/// Bytes that are read at a time: this process's other mappings wait for it.
const STEP: usize = 1 << 20;

/// How long the guest has lived before the file is read for it. What it touches is locked by its VMM anyway; a thread that
/// reads gigabytes would take a processor from its first moments.
const PAUSE: Duration = Duration::from_millis(50);

/// The mapping; it ends when this does.
#[derive(Debug)]
pub(crate) struct RamLock {
    map: Arc<LockedMap>,
    file: File,
    length: usize,
    ended: Arc<AtomicBool>,
}

impl RamLock {
    /// Maps the file's first `length` bytes so that each page stays in memory once it was brought in.
    pub(crate) fn take(file: &File, length: u64) -> Result<Self> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let map = LockedMap::new(file.as_fd(), length).map_err(|err| {
            let message = format!(
                "the image demands that its {length} bytes of RAM are locked (mlock_required), which this process may not \
                 do: raise its limit of locked memory (LimitMEMLOCK=infinity, ulimit -l unlimited)"
            );
            Error::new(Kind::FailedPrecondition, message).because(err)
        })?;
        let file = file.try_clone().map_err(Error::io("the RAM file cannot be held in memory"))?;
        Ok(Self { map: Arc::new(map), file, length, ended: Arc::default() })
    }

    /// Has a thread bring the file in, [`PAUSE`] after the guest began to live: it would be in the way of the start. Holes
    /// are left out: no disk has to give them back.
    pub(crate) fn bring_in(&self) {
        let (map, length, ended) = (Arc::clone(&self.map), self.length, Arc::clone(&self.ended));
        let begin = || {
            let file = self.file.try_clone()?;
            let read = move || {
                thread::sleep(PAUSE);
                if let Err(err) = read(&file, &map, length, &ended) {
                    tracing::warn!(%err, "the RAM file is locked only where it is used");
                }
            };
            thread::Builder::new().name("ovms-ram".into()).stack_size(128 << 10).spawn(read)
        };
        if let Err(err) = begin() {
            tracing::warn!(%err, "the RAM file is locked only where it is used");
        }
    }
}

impl Drop for RamLock {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
    }
}

/// Brings the file's data into memory, where the mapping keeps it.
fn read(file: &File, map: &LockedMap, length: usize, ended: &AtomicBool) -> io::Result<()> {
    let mut at = 0;
    while let Some((start, end)) = file.next_data(at)? {
        // The mapping ends where a length ends that is no number of this host's.
        let (mut from, to) =
            (usize::try_from(start).unwrap_or(length), usize::try_from(end).unwrap_or(length).min(length));
        while from < to {
            if ended.load(Ordering::Acquire) {
                return Ok(());
            }
            let stop = to.min(from.saturating_add(STEP));
            map.populate(from..stop)?;
            from = stop;
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::FileExt;
    use std::time::Instant;

    fn locked() -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// Bytes that the mapping of a file has in memory.
    fn in_memory(file: &str) -> u64 {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut ours = false;
        for line in smaps.lines() {
            ours |= line.contains(file);
            if let Some(kib) = line.strip_prefix("Rss:").filter(|_| ours) {
                return kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10;
            }
        }
        panic!("{file} is not mapped");
    }

    #[test]
    fn data_is_brought_in_and_holes_are_left_out() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let file = named.as_file();
        file.set_len(4 << 20).unwrap();
        file.write_all_at(&[1; 1 << 20], 1 << 20).unwrap();
        file.write_all_at(&[1; 8192], 3 << 20).unwrap();
        // No more than the 8 MiB that a user may lock by default (MLOCK_LIMIT of the kernel's include/uapi/linux/resource.h).
        let map = LockedMap::new(file.as_fd(), 4 << 20).unwrap();

        read(file, &map, 4 << 20, &AtomicBool::new(false)).unwrap();

        let found = in_memory(&named.path().display().to_string());
        assert!(((1 << 20) + 8192..2 << 20).contains(&found), "{found}");
    }

    #[test]
    fn the_mapping_is_locked_until_it_is_dropped() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 16384], 0).unwrap();
        let lock = match RamLock::take(&file, 16384) {
            Ok(lock) => lock,
            // A limit below four pages.
            Err(err) => return assert!(err.chain().contains("ulimit -l"), "{}", err.chain()),
        };
        lock.bring_in();
        assert!(locked() >= 16384);
        drop(lock);
        let begin = Instant::now();
        while locked() >= 16384 && begin.elapsed() < Duration::from_secs(5) {
            thread::yield_now();
        }
        assert!(locked() < 16384);
    }
}
