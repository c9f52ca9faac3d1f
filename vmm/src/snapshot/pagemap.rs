//! Which pages of guest memory are this process's own, without touching one.
//!
//! `/proc/self/pagemap` rather than mincore(2), which takes a page that was swapped out for one that never was, and
//! rather than its newer ioctl PAGEMAP_SCAN, which kernels before 6.7 lack: reading 8 bytes a page costs about 3 ms a GiB
//! while the guest runs.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use ovms_state::CHUNK;

use super::chunks::ChunkSet;
use super::view::Region;

const PAGE: u64 = 4096;
const ENTRY: u64 = 8;
/// Bytes that are read at once: 128 MiB of memory.
const BUFFER: usize = 256 << 10;

// Bits of an entry: Documentation/admin-guide/mm/pagemap.rst.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// A page of a file, which a private mapping shares until it writes.
const FILE: u64 = 1 << 61;

/// Adds the chunks of `region` in which some page is the process's own. `map` is /proc/self/pagemap.
pub(super) fn own(map: &File, region: &Region, into: &ChunkSet) -> io::Result<()> {
    let (first, pages) = (region.host / PAGE, region.len / PAGE);
    let mut buffer = vec![0u8; BUFFER];
    let mut at = 0;
    while at < pages {
        let want = ((pages - at) * ENTRY).min(BUFFER as u64) as usize;
        let Some(part) = buffer.get_mut(..want) else { break };
        map.read_exact_at(part, (first + at) * ENTRY)?;
        let (entries, _) = part.as_chunks::<8>();
        for (index, _) in (at..).zip(entries).filter(|(_, entry)| is_own(u64::from_ne_bytes(**entry))) {
            into.insert(region.first + index * PAGE / CHUNK as u64);
        }
        at += want as u64 / ENTRY;
    }
    Ok(())
}

fn is_own(entry: u64) -> bool {
    entry & FILE == 0 && entry & (PRESENT | SWAPPED) != 0
}

/// Adds the chunks that hold data of a sparse `file`, the memory in one piece; a hole reads as zeroes.
pub(super) fn data_of(file: &File, chunks: Range<u64>, into: &ChunkSet) -> io::Result<()> {
    use nix::errno::Errno;
    use nix::unistd::{lseek, Whence};
    let end = (chunks.end * CHUNK as u64) as i64;
    let mut at = 0;
    while at < end {
        let data = match lseek(file, at, Whence::SeekData) {
            Ok(data) => data,
            // Nothing but holes up to the end.
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let hole = lseek(file, data, Whence::SeekHole)?;
        into.insert_range(data as u64 / CHUNK as u64..(hole as u64).div_ceil(CHUNK as u64).min(chunks.end));
        at = hole;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Ram;
    use crate::snapshot::view::View;
    use vm_memory::{Bytes, GuestAddress};

    fn own(ram: &Ram) -> Vec<Range<u64>> {
        let view = View::new(ram);
        let set = ChunkSet::new(view.chunks());
        let map = File::open("/proc/self/pagemap").unwrap();
        view.regions().iter().for_each(|region| super::own(&map, region, &set).unwrap());
        set.runs(0)
    }

    #[test]
    fn only_touched_pages_are_own() {
        let ram = Ram::map(32 << 20).unwrap();
        assert!(own(&ram).is_empty());
        // Below 2 MiB, where pages are small.
        ram.memory().write_obj(1u8, GuestAddress(5 * CHUNK as u64)).unwrap();
        assert_eq!(own(&ram).as_slice(), std::slice::from_ref(&(5..6)));
    }

    #[test]
    fn data_of_a_sparse_file_leaves_holes_out() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100 * CHUNK as u64).unwrap();
        file.write_all_at(&[1; 4096], 7 * CHUNK as u64).unwrap();
        file.write_all_at(&[1; 4096], 99 * CHUNK as u64).unwrap();
        let set = ChunkSet::new(100);
        data_of(&file, 0..100, &set).unwrap();
        assert!(set.contains(7) && set.contains(99) && !set.contains(50));
    }
}
