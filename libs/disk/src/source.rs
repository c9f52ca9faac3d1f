//! Positional reads from whatever holds a disk layer: a file, or bytes in memory for tests and fuzzing.

use std::{fs::File, io, os::unix::fs::FileExt};

/// Something that can be read at any offset without a cursor.
pub trait ReadAt {
    /// Reads up to `buf.len()` bytes at `offset`; 0 means the end.
    ///
    /// # Errors
    /// Any error of the medium.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// The length in bytes.
    ///
    /// # Errors
    /// Any error of the medium.
    fn size(&self) -> io::Result<u64>;

    /// The next range `(start, end)` at or after `offset` that may hold other bytes than zeros; `None` if there is none.
    ///
    /// # Errors
    /// Any error of the medium.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let end = self.size()?;
        Ok((offset < end).then_some((offset, end)))
    }

    /// Fills `buf` from `offset`; what lies past the end reads as zeros. Returns the number of bytes that were there.
    ///
    /// # Errors
    /// Any error of the medium.
    fn read_padded(&self, buf: &mut [u8], mut offset: u64) -> io::Result<usize> {
        let mut rest = buf;
        let mut done = 0_usize;
        while !rest.is_empty() {
            match self.read_at(rest, offset) {
                Ok(0) => break,
                Ok(n) => {
                    let n = n.min(rest.len());
                    rest = rest.split_at_mut(n).1;
                    done = done.saturating_add(n);
                    offset = offset.saturating_add(n as u64);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        rest.fill(0);
        Ok(done)
    }
}

impl ReadAt for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let end = ReadAt::size(self)?;
        if offset >= end {
            return Ok(None);
        }
        let start = match rustix::fs::seek(self, rustix::fs::SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            // The file system knows no holes: everything may be data.
            Err(rustix::io::Errno::INVAL) => return Ok(Some((offset, end))),
            Err(e) => return Err(e.into()),
        };
        let stop = rustix::fs::seek(self, rustix::fs::SeekFrom::Hole(start))?;
        Ok(Some((start, stop.min(end).max(start))))
    }
}

impl ReadAt for &[u8] {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.len());
        let rest = self.split_at(from).1;
        let n = rest.len().min(buf.len());
        buf.split_at_mut(n).0.copy_from_slice(rest.split_at(n).0);
        Ok(n)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}
