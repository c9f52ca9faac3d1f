//! The contents of an image's blobs: bytes in memory, a file, or a disk file wrapped in a tar.

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::path::{Path, PathBuf};

use crate::archive;
use crate::layout::Source;
use crate::media;

/// Bytes in memory.
pub(super) struct Bytes {
    pub name: &'static str,
    pub bytes: Vec<u8>,
}

impl Source for Bytes {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn open(&self) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(Cursor::new(self.bytes.as_slice())))
    }
}

/// A file as it is. Its size is fixed when the build begins; a file that grows or shrinks meanwhile is an error.
pub(super) struct Plain {
    pub path: PathBuf,
    pub size: u64,
}

impl Plain {
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file"));
        }
        Ok(Self { path: path.to_owned(), size: metadata.len() })
    }
}

impl Source for Plain {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn open(&self) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(Exactly { inner: File::open(&self.path)?, left: self.size }))
    }
}

/// A disk file as the one member of an uncompressed tar.
pub(super) struct Wrapped {
    pub disk: Plain,
    head: Vec<u8>,
    tail: u64,
}

impl Wrapped {
    /// Wraps `disk` as `member`, below a folder `ovm/`, everything dated `mtime` (seconds since 1970).
    pub(super) fn new(disk: Plain, member: &str, mtime: u64) -> io::Result<Self> {
        let head = tar_head(member, disk.size, mtime)?;
        let tail = archive::padding(disk.size).saturating_add(archive::BLOCK.saturating_mul(2));
        Ok(Self { disk, head, tail })
    }
}

impl Source for Wrapped {
    fn name(&self) -> String {
        self.disk.name()
    }

    fn size(&self) -> u64 {
        (self.head.len() as u64).saturating_add(self.disk.size).saturating_add(self.tail)
    }

    fn open(&self) -> io::Result<Box<dyn Read + '_>> {
        let tail = io::repeat(0).take(self.tail);
        Ok(Box::new(Cursor::new(self.head.as_slice()).chain(self.disk.open()?).chain(tail)))
    }
}

/// The descriptor layer: a tar with `ovm/manifest.json`.
pub(super) fn descriptor_tar(manifest: &[u8], mtime: u64) -> io::Result<Vec<u8>> {
    let mut tar = tar_head(media::MEMBER_MANIFEST, manifest.len() as u64, mtime)?;
    tar.extend_from_slice(manifest);
    let tail = archive::padding(manifest.len() as u64).saturating_add(archive::BLOCK.saturating_mul(2));
    io::copy(&mut io::repeat(0).take(tail), &mut tar)?;
    Ok(tar)
}

/// Everything of a one-member tar that comes before the member's content.
fn tar_head(member: &str, size: u64, mtime: u64) -> io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut folder = crate::layout::header(0, mtime, tar::EntryType::Directory);
    builder.append_data(&mut folder, format!("{}/", media::MEMBER_DIR), io::empty())?;
    let mut head = std::mem::take(builder.get_mut());
    let mut header = crate::layout::header(size, mtime, tar::EntryType::Regular);
    header.set_path(member)?;
    header.set_cksum();
    head.extend_from_slice(header.as_bytes());
    Ok(head)
}

/// Reads as many bytes as were promised, or fails.
struct Exactly {
    inner: File,
    left: u64,
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        let changed = (n == 0 && self.left > 0 && !buffer.is_empty()) || n as u64 > self.left;
        self.left = self.left.saturating_sub(n as u64);
        match changed {
            true => Err(io::Error::new(io::ErrorKind::InvalidData, "the file changed its size while it was read")),
            false => Ok(n),
        }
    }
}
