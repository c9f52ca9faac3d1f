//! The files of a layout, in a directory or at their places in a tar.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Layout, LayoutError, Source};
use crate::archive::{MemberKind, Walker};
use crate::digest::Digest;
use crate::image::MAX_DOCUMENT;

/// Where a layout's files are.
pub(super) enum Files {
    Dir(PathBuf),
    Tar { path: PathBuf, file: Arc<File>, places: BTreeMap<String, Place> },
}

/// A member's content in the tar.
#[derive(Clone, Copy)]
pub(super) struct Place {
    offset: u64,
    size: u64,
}

/// Reads one member of a tar by position, so readers do not disturb each other.
struct Section {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let cap = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.file.read_at(buffer.get_mut(..cap).unwrap_or_default(), self.offset)?;
        self.offset = self.offset.saturating_add(n as u64);
        self.left = self.left.saturating_sub(n as u64);
        Ok(n)
    }
}

impl Files {
    pub(super) fn open(path: &Path) -> Result<Self, LayoutError> {
        let error = |source| LayoutError::Io { path: path.to_owned(), verb: "read", source };
        if std::fs::metadata(path).map_err(error)?.is_dir() {
            return Ok(Self::Dir(path.to_owned()));
        }
        let file = File::open(path).map_err(error)?;
        let refused = |source| LayoutError::Archive { path: path.to_owned(), source };
        let mut places = BTreeMap::new();
        let mut walker = Walker::seeking(BufReader::new(&file));
        while let Some(member) = walker.next().map_err(refused)? {
            // Anything that is no plain file cannot be one of the layout's; it is as good as absent.
            if member.kind == MemberKind::File {
                places.insert(member.path, Place { offset: member.offset, size: member.size });
            }
        }
        Ok(Self::Tar { path: path.to_owned(), file: Arc::new(file), places })
    }

    /// Opens a file by its name in the layout; `None` if there is none.
    pub(super) fn open_file(&self, name: &str) -> Result<Option<Box<dyn Read + Send>>, LayoutError> {
        match self {
            Self::Dir(dir) => {
                let path = dir.join(name);
                let opened = open_plain(&path);
                match opened {
                    Ok(file) => Ok(Some(Box::new(file))),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(source) => Err(LayoutError::Io { path, verb: "read", source }),
                }
            }
            Self::Tar { file, places, .. } => Ok(places.get(name).map(|place| -> Box<dyn Read + Send> {
                Box::new(Section { file: Arc::clone(file), offset: place.offset, left: place.size })
            })),
        }
    }

    /// Reads a small file whole; `None` if there is none.
    pub(super) fn document(&self, name: &str) -> Result<Option<Vec<u8>>, LayoutError> {
        let Some(reader) = self.open_file(name)? else { return Ok(None) };
        let mut bytes = Vec::new();
        let path = match self {
            Self::Dir(dir) => dir.join(name),
            Self::Tar { path, .. } => path.join(name),
        };
        reader.take(MAX_DOCUMENT.saturating_add(1)).read_to_end(&mut bytes).map_err(|source| LayoutError::Io {
            path,
            verb: "read",
            source,
        })?;
        let size = bytes.len() as u64;
        match size > MAX_DOCUMENT {
            true => Err(LayoutError::TooLarge { what: name.to_owned(), size }),
            false => Ok(Some(bytes)),
        }
    }

    pub(super) fn path(&self, name: &str) -> Option<PathBuf> {
        match self {
            Self::Dir(dir) => Some(dir.join(name)),
            Self::Tar { .. } => None,
        }
    }
}

/// Opens a plain file and nothing else: no symbolic link that leads elsewhere, no fifo that blocks.
fn open_plain(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file")),
    }
}

/// A blob of a layout, for a sink. Its reader fails at the end unless size and digest are right.
pub(super) struct BlobSource<'a> {
    pub layout: &'a Layout,
    pub digest: Digest,
    pub size: u64,
}

impl Source for BlobSource<'_> {
    fn name(&self) -> String {
        self.digest.to_string()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn open(&self) -> io::Result<Box<dyn Read + '_>> {
        let reader = self.layout.blob(&self.digest, self.size).map_err(io::Error::other)?;
        Ok(Box::new(reader))
    }
}
