//! Writing layouts: every blob hashed as it is written, nothing visible before it is whole and on disk.
//!
//! ```text
//! directory: blob → blobs/sha256/.tmp… ─fsync, rename─> blobs/sha256/<hex>  …  index.json last, the same way
//! tar:       blob → measured first (a tar wants the name before the bytes), then appended and verified;
//!            the whole tar is a temporary file beside its place until the end
//! ```
//! A crash leaves blobs that no index names, never an index that names what is not there.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::NamedTempFile;

use super::{annotation, LayoutError, LAYOUT_VERSION};
use crate::digest::{Digest, HashingReader, VerifyingReader};
use crate::image::MAX_DOCUMENT;
use crate::media;
use crate::oci;

/// Bytes copied at once, and the grain at which runs of zeros become holes.
const CHUNK: usize = 256 * 1024;

/// A blob's content, readable as often as it takes.
pub trait Source {
    /// What the blob is called in progress and errors.
    fn name(&self) -> String;
    /// The content's size in bytes.
    fn size(&self) -> u64;
    /// The content from its beginning.
    ///
    /// # Errors
    /// Those of opening.
    fn open(&self) -> io::Result<Box<dyn Read + '_>>;
}

/// Who wants to know how far writing got.
pub trait Progress {
    /// Work on `what` begins, of so many bytes.
    fn begin(&self, what: &str, bytes: u64);
    /// So many more bytes are done.
    fn advance(&self, bytes: u64);
    /// The work begun last is done.
    fn end(&self);
}

/// Progress nobody looks at.
pub struct Quiet;

impl Progress for Quiet {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn end(&self) {}
}

/// A layout being written.
pub trait Sink {
    /// Writes a blob and returns its digest and size; writing one twice leaves one.
    ///
    /// # Errors
    /// [`LayoutError::Io`], also when the content changes while it is read.
    fn put(&mut self, source: &dyn Source, progress: &dyn Progress) -> Result<(Digest, u64), LayoutError>;

    /// Whether the layout has this blob already, so that putting it again can be saved. No promise: `false` is always
    /// right.
    fn has(&self, digest: &Digest, size: u64) -> bool {
        let _ = (digest, size);
        false
    }

    /// Writes the index and makes the layout visible. An entry replaces the one of the same tag and full name.
    ///
    /// # Errors
    /// [`LayoutError`].
    fn finish(self: Box<Self>, entries: Vec<oci::Descriptor>) -> Result<(), LayoutError>;
}

/// Writes a directory, new or already a layout.
pub struct DirSink {
    dir: PathBuf,
    entries: Vec<oci::Descriptor>,
}

impl DirSink {
    /// Opens `dir` for writing; makes it if it is not there. What a layout there already lists, it keeps.
    ///
    /// # Errors
    /// [`LayoutError::Occupied`] if it holds anything that is not a layout.
    pub fn create(dir: &Path) -> Result<Self, LayoutError> {
        let blobs = dir.join("blobs/sha256");
        let occupied = match fs::read_dir(dir) {
            Ok(mut entries) => entries.next().is_some(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => false,
            Err(e) if e.kind() == io::ErrorKind::NotADirectory => return Err(LayoutError::Occupied(dir.to_owned())),
            Err(e) => return Err(failed(dir, "read", e)),
        };
        // A directory that has only our own blobs is what an interrupted build leaves behind.
        let entries = match (occupied, dir.join("index.json").exists(), blobs.is_dir()) {
            (false, ..) | (true, false, true) => Vec::new(),
            (true, true, _) => super::Layout::open(dir)?.index.manifests().clone(),
            (true, false, false) => return Err(LayoutError::Occupied(dir.to_owned())),
        };
        fs::create_dir_all(&blobs).map_err(|e| failed(&blobs, "written", e))?;
        Ok(Self { dir: dir.to_owned(), entries })
    }
}

/// Writes a small file of the layout in `dir`, whole or not at all.
fn write_document(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), LayoutError> {
    let path = dir.join(name);
    let write = || {
        let mut file = temporary(dir)?;
        file.write_all(bytes)?;
        persist(file, &path)
    };
    write().map_err(|e| failed(&path, "written", e))
}

/// Writes what makes a directory a layout, and its list of images.
pub(super) fn write_index(dir: &Path, entries: Vec<oci::Descriptor>) -> Result<(), LayoutError> {
    write_document(dir, "oci-layout", &layout_marker()?)?;
    write_document(dir, "index.json", &index_bytes(entries)?)
}

impl Sink for DirSink {
    fn put(&mut self, source: &dyn Source, progress: &dyn Progress) -> Result<(Digest, u64), LayoutError> {
        put_blob(&self.dir, source, progress)
    }

    fn has(&self, digest: &Digest, size: u64) -> bool {
        has_blob(&self.dir, digest, size)
    }

    fn finish(self: Box<Self>, entries: Vec<oci::Descriptor>) -> Result<(), LayoutError> {
        let mut all: Vec<oci::Descriptor> =
            self.entries.iter().filter(|old| !replaced(old, &entries)).cloned().collect();
        all.extend(entries);
        write_index(&self.dir, all)
    }
}

/// Writes a blob of the layout in `dir`.
pub(super) fn put_blob(dir: &Path, source: &dyn Source, progress: &dyn Progress) -> Result<(Digest, u64), LayoutError> {
    let blobs = dir.join("blobs/sha256");
    let read_failed = |e| failed(Path::new(&source.name()), "read", e);
    let mut reader = HashingReader::new(source.open().map_err(read_failed)?);
    let mut file = temporary(&blobs).map_err(|e| failed(&blobs, "written", e))?;
    progress.begin(&source.name(), source.size());
    copy_sparse(&mut reader, file.as_file_mut(), progress).map_err(|e| e.into_error(source, &blobs))?;
    progress.end();
    let size = reader.size();
    let digest = reader.finish();
    let path = blobs.join(digest.hex());
    persist(file, &path).map_err(|e| failed(&path, "written", e))?;
    Ok((digest, size))
}

/// Whether the layout in `dir` has a blob of this name and size; blobs are named only when they are whole.
pub(super) fn has_blob(dir: &Path, digest: &Digest, size: u64) -> bool {
    let path = dir.join("blobs/sha256").join(digest.hex());
    fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() == size)
}

/// Writes a tar, as `ctr image import` and `skopeo copy oci-archive:` read it.
pub struct TarSink {
    path: PathBuf,
    tar: tar::Builder<BufWriter<NamedTempFile>>,
    written: BTreeSet<Digest>,
    /// Modification time of every member, seconds since 1970.
    mtime: u64,
}

impl TarSink {
    /// Begins a tar that will appear at `path` when it is finished.
    ///
    /// # Errors
    /// [`LayoutError::Io`].
    pub fn create(path: &Path, mtime: u64) -> Result<Self, LayoutError> {
        let begin = || {
            let mut tar = tar::Builder::new(BufWriter::with_capacity(CHUNK, temporary(parent(path))?));
            for folder in ["blobs/", "blobs/sha256/"] {
                let mut header = header(0, mtime, tar::EntryType::Directory);
                tar.append_data(&mut header, folder, io::empty())?;
            }
            Ok(tar)
        };
        let tar = begin().map_err(|e| failed(path, "written", e))?;
        Ok(Self { path: path.to_owned(), tar, written: BTreeSet::new(), mtime })
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), LayoutError> {
        let mut header = header(bytes.len() as u64, self.mtime, tar::EntryType::Regular);
        self.tar.append_data(&mut header, name, bytes).map_err(|e| failed(&self.path, "written", e))
    }
}

impl Sink for TarSink {
    fn put(&mut self, source: &dyn Source, progress: &dyn Progress) -> Result<(Digest, u64), LayoutError> {
        let read_failed = |e| failed(Path::new(&source.name()), "read", e);
        progress.begin(&source.name(), source.size().saturating_mul(2));
        let mut measured = HashingReader::new(Advancing { inner: source.open().map_err(read_failed)?, progress });
        let size = io::copy(&mut measured, &mut io::sink()).map_err(read_failed)?;
        let digest = measured.finish();
        if self.written.insert(digest) {
            let mut header = header(size, self.mtime, tar::EntryType::Regular);
            let reader = Advancing { inner: source.open().map_err(read_failed)?, progress };
            let mut reader = VerifyingReader::new(reader, digest, size).named(source.name());
            let name = format!("blobs/sha256/{}", digest.hex());
            self.tar
                .append_data(&mut header, name, &mut reader)
                .and_then(|()| reader.finish())
                .map_err(|e| failed(&self.path, "written", e))?;
        }
        progress.end();
        Ok((digest, size))
    }

    fn finish(mut self: Box<Self>, entries: Vec<oci::Descriptor>) -> Result<(), LayoutError> {
        self.append("index.json", &index_bytes(entries)?)?;
        self.append("oci-layout", &layout_marker()?)?;
        let Self { path, tar, .. } = *self;
        let finish = || {
            let file = tar.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
            persist(file, &path)
        };
        finish().map_err(|e| failed(&path, "written", e))
    }
}

/// Counts what is read towards a progress.
pub(super) struct Advancing<'a, R> {
    pub inner: R,
    pub progress: &'a dyn Progress,
}

impl<R: Read> Read for Advancing<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.progress.advance(n as u64);
        Ok(n)
    }
}

/// A member's header that says nothing about who made it on which machine.
pub(crate) fn header(size: u64, mtime: u64, kind: tar::EntryType) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(if kind == tar::EntryType::Directory { 0o755 } else { 0o644 });
    header.set_size(size);
    header.set_mtime(mtime);
    header.set_uid(0);
    header.set_gid(0);
    header
}

enum CopyError {
    Read(io::Error),
    Write(io::Error),
}

impl CopyError {
    fn into_error(self, source: &dyn Source, to: &Path) -> LayoutError {
        match self {
            Self::Read(e) => failed(Path::new(&source.name()), "read", e),
            Self::Write(e) => failed(to, "written", e),
        }
    }
}

/// Copies to a fresh file, leaving holes where a whole chunk is zero.
fn copy_sparse(reader: &mut dyn Read, file: &mut File, progress: &dyn Progress) -> Result<(), CopyError> {
    let mut chunk = Vec::with_capacity(CHUNK);
    let mut size: u64 = 0;
    loop {
        chunk.clear();
        let n = reader.take(CHUNK as u64).read_to_end(&mut chunk).map_err(CopyError::Read)? as u64;
        if n == 0 {
            return file.set_len(size).map_err(CopyError::Write);
        }
        size = size.saturating_add(n);
        match chunk.iter().all(|b| *b == 0) {
            true => file.seek(SeekFrom::Start(size)).map(drop).map_err(CopyError::Write)?,
            false => file.write_all(&chunk).map_err(CopyError::Write)?,
        }
        progress.advance(n);
    }
}

/// Whether one of the new entries has the old one's place: its tag and its full name, since images of different names may
/// have one tag.
pub(super) fn replaced(old: &oci::Descriptor, new: &[oci::Descriptor]) -> bool {
    let identity =
        |entry| [media::ANNOTATION_REF_NAME, media::ANNOTATION_IMAGE_NAME].map(|name| annotation(entry, name));
    new.iter().any(|new| identity(new) == identity(old))
}

fn layout_marker() -> Result<Vec<u8>, LayoutError> {
    crate::json::to_bytes(&json!({ "imageLayoutVersion": LAYOUT_VERSION }))
        .map_err(|e| LayoutError::Document("oci-layout".to_owned(), e))
}

fn index_bytes(entries: Vec<oci::Descriptor>) -> Result<Vec<u8>, LayoutError> {
    let index = json!({ "schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": entries });
    let bytes = crate::json::to_bytes(&index).map_err(|e| LayoutError::Document("index.json".to_owned(), e))?;
    let size = bytes.len() as u64;
    match size > MAX_DOCUMENT {
        true => Err(LayoutError::TooLarge { what: "index.json".to_owned(), size }),
        false => Ok(bytes),
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A temporary file that becomes world-readable like any other, as the umask allows.
fn temporary(dir: &Path) -> io::Result<NamedTempFile> {
    use std::os::unix::fs::PermissionsExt;
    tempfile::Builder::new().prefix(".tmp-").permissions(fs::Permissions::from_mode(0o666)).tempfile_in(dir)
}

/// Makes a temporary file durable under its name.
fn persist(file: NamedTempFile, path: &Path) -> io::Result<()> {
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    File::open(parent(path))?.sync_all()
}

pub(super) fn failed(path: &Path, verb: &'static str, source: io::Error) -> LayoutError {
    LayoutError::Io { path: path.to_owned(), verb, source }
}
