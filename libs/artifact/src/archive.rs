//! Walks a tar archive of unknown origin with bounded memory and without unpacking anything.
//!
//! The `tar` crate decodes the header blocks; the walk between them is ours, because the crate reads extension records
//! (GNU long names, pax) into memory at the length the archive claims, and applies a pax size only in the mode that
//! does so. Here every record has a cap, every path is checked before anyone sees it, and one name comes once.

use std::collections::BTreeSet;
use std::io::{self, Read, Seek, SeekFrom};

/// Bytes of a header and of the padding's unit.
pub(crate) const BLOCK: u64 = 512;
/// Longest member name.
const MAX_PATH: usize = 1024;
/// Deepest member name, in components.
const MAX_DEPTH: usize = 16;
/// Longest extension record (pax, GNU long name).
const MAX_RECORD: u64 = 64 * 1024;
/// Most members of an archive; an OCI layout has one for each blob.
const MAX_MEMBERS: usize = 65_536;

/// Why an archive is refused.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Reading failed.
    #[error("the archive cannot be read")]
    Io(#[source] io::Error),
    /// The first block is no tar header.
    #[error("not a tar archive")]
    NotTar,
    /// A later block is no tar header.
    #[error("the tar header at byte {0} is damaged")]
    Damaged(u64),
    /// The archive ends inside a member or without its end marker.
    #[error("the tar archive is cut short at byte {0}")]
    Truncated(u64),
    /// A member's name leads out of the archive, or is no name.
    #[error("member \"{0}\" has a name that is not allowed: relative, without \"..\", at most {MAX_DEPTH} deep")]
    Path(String),
    /// A name comes twice.
    #[error("member \"{0}\" comes twice")]
    Duplicate(String),
    /// A link, a device, a sparse file: nothing an image of ours holds.
    #[error("member \"{0}\" is a {1}, only files and folders are allowed")]
    Kind(String, &'static str),
    /// More than a reader holds in memory.
    #[error("the archive holds {0}")]
    TooMany(&'static str),
}

impl From<io::Error> for ArchiveError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What a member is, of what may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemberKind {
    File,
    Folder,
    /// Named for the caller to refuse or ignore: links, devices, fifos, sparse files.
    Special(&'static str),
}

/// A member's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    /// Normalised: no leading `./`, no trailing `/`, no `..`.
    pub path: String,
    pub kind: MemberKind,
    /// Bytes of content.
    pub size: u64,
    /// Where the content begins in the archive.
    pub offset: u64,
}

/// The walk through an archive.
pub(crate) struct Walker<R> {
    reader: R,
    /// Moves the reader forward.
    skip: fn(&mut R, u64) -> io::Result<()>,
    position: u64,
    /// Bytes of the current member, its padding included, that were not read yet.
    content_left: u64,
    padding_left: u64,
    seen: BTreeSet<String>,
    ended: bool,
}

impl<R: Read> Walker<R> {
    /// Walks a stream.
    pub(crate) fn new(reader: R) -> Self {
        Self::with(reader, |reader, n| {
            let read = io::copy(&mut reader.take(n), &mut io::sink())?;
            (read == n).then_some(()).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        })
    }

    fn with(reader: R, skip: fn(&mut R, u64) -> io::Result<()>) -> Self {
        let (position, content_left, padding_left) = (0, 0, 0);
        Self { reader, skip, position, content_left, padding_left, seen: BTreeSet::new(), ended: false }
    }

    /// The next member, `None` at the archive's end; what is left of the last one is skipped.
    pub(crate) fn next(&mut self) -> Result<Option<Member>, ArchiveError> {
        let mut long_name: Option<Vec<u8>> = None;
        let mut pax = Pax::default();
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            let offset = self.position;
            let claimed = header.entry_size().map_err(|_| ArchiveError::Damaged(offset))?;
            match header.entry_type().as_byte() {
                b'L' => long_name = Some(trim_nul(self.record(claimed)?)),
                b'K' => drop(self.record(claimed)?),
                b'x' => pax = Pax::parse(&self.record(claimed)?).ok_or(ArchiveError::Damaged(offset))?,
                b'g' => {
                    let global = Pax::parse(&self.record(claimed)?).ok_or(ArchiveError::Damaged(offset))?;
                    if global.path.is_some() || global.size.is_some() || global.sparse {
                        return Err(ArchiveError::Damaged(offset));
                    }
                }
                kind => {
                    let raw = pax.path.take().or(long_name).unwrap_or_else(|| header.path_bytes().into_owned());
                    return self.member(kind, raw, &pax, claimed).map(Some);
                }
            }
        }
    }

    fn member(&mut self, kind: u8, raw: Vec<u8>, pax: &Pax, claimed: u64) -> Result<Member, ArchiveError> {
        let path = normalise(&raw).ok_or_else(|| ArchiveError::Path(shown(&raw)))?;
        let kind = match kind {
            _ if pax.sparse => MemberKind::Special("sparse file"),
            b'0' | 0 | b'7' if raw.ends_with(b"/") => MemberKind::Folder,
            b'0' | 0 | b'7' => MemberKind::File,
            b'5' => MemberKind::Folder,
            b'1' => MemberKind::Special("hard link"),
            b'2' => MemberKind::Special("symbolic link"),
            b'S' => MemberKind::Special("sparse file"),
            _ => MemberKind::Special("special file"),
        };
        // Links carry no content whatever their size says (POSIX ustar); other special members do.
        let has_content = !matches!(kind, MemberKind::Special("hard link" | "symbolic link"));
        let size = if has_content { pax.size.unwrap_or(claimed) } else { 0 };
        self.content_left = size;
        self.padding_left = padding(size);
        if kind != MemberKind::Folder && !self.seen.insert(path.clone()) {
            return Err(ArchiveError::Duplicate(path));
        }
        if self.seen.len() > MAX_MEMBERS {
            return Err(ArchiveError::TooMany("too many members"));
        }
        Ok(Member { path, kind, size, offset: self.position })
    }

    /// Reads the current member's content; a short archive is an error, not an end.
    pub(crate) fn content(&mut self) -> Content<'_, R> {
        Content { walker: self }
    }

    /// Skips to the next header and reads it; `None` at the end marker.
    fn header(&mut self) -> Result<Option<tar::Header>, ArchiveError> {
        if self.ended {
            return Ok(None);
        }
        let rest = self.content_left.saturating_add(self.padding_left);
        (self.skip)(&mut self.reader, rest).map_err(|e| self.cut(e))?;
        self.position = self.position.saturating_add(rest);
        (self.content_left, self.padding_left) = (0, 0);
        let mut header = tar::Header::new_old();
        let at = self.position;
        self.reader.read_exact(header.as_mut_bytes()).map_err(|e| match (at, e.kind()) {
            (0, io::ErrorKind::UnexpectedEof) => ArchiveError::NotTar,
            _ => self.cut(e),
        })?;
        self.position = self.position.saturating_add(BLOCK);
        if header.as_bytes().iter().all(|b| *b == 0) {
            self.ended = true;
            // An archive may be empty, but a run of zeros that begins a disk is not one.
            return if at == 0 { Err(ArchiveError::NotTar) } else { Ok(None) };
        }
        match checksum_holds(&header) {
            true => Ok(Some(header)),
            false if at == 0 => Err(ArchiveError::NotTar),
            false => Err(ArchiveError::Damaged(at)),
        }
    }

    /// Reads an extension record whole.
    fn record(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > MAX_RECORD {
            return Err(ArchiveError::TooMany("an extension record that is too long"));
        }
        self.content_left = size;
        self.padding_left = padding(size);
        let mut record = Vec::new();
        self.content().read_to_end(&mut record)?;
        Ok(record)
    }

    fn cut(&self, error: io::Error) -> ArchiveError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => ArchiveError::Truncated(self.position),
            _ => ArchiveError::Io(error),
        }
    }
}

impl<R: Read + Seek> Walker<R> {
    /// Walks a file: content that nobody reads is seeked over. A member may lie beyond the file's end; who reads it sees.
    pub(crate) fn seeking(reader: R) -> Self {
        Self::with(reader, |reader, n| {
            let n = i64::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof))?;
            reader.seek(SeekFrom::Current(n)).map(drop)
        })
    }
}

/// The content of a [`Walker`]'s current member.
pub(crate) struct Content<'a, R> {
    walker: &'a mut Walker<R>,
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let walker = &mut *self.walker;
        let cap = usize::try_from(walker.content_left).unwrap_or(usize::MAX).min(buffer.len());
        if cap == 0 {
            return Ok(0);
        }
        let n = walker.reader.read(buffer.get_mut(..cap).unwrap_or_default())?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        walker.content_left = walker.content_left.saturating_sub(n as u64);
        walker.position = walker.position.saturating_add(n as u64);
        Ok(n)
    }
}

/// Whether a block is a tar header: its checksum holds. A disk whose first sector does is not told from an archive.
pub(crate) fn is_header(block: &[u8]) -> bool {
    let Some(block) = block.get(..BLOCK as usize) else { return false };
    block.iter().any(|b| *b != 0) && checksum_holds(tar::Header::from_byte_slice(block))
}

fn checksum_holds(header: &tar::Header) -> bool {
    let bytes = header.as_bytes();
    // The checksum's own eight bytes (148 to 155) count as spaces.
    let sum: u32 =
        bytes.iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
    header.cksum().is_ok_and(|stated| stated == sum)
}

/// Zeros after a member of `size` bytes.
pub(crate) fn padding(size: u64) -> u64 {
    size.checked_next_multiple_of(BLOCK).map_or(0, |end| end.saturating_sub(size))
}

/// The records of a pax header that matter here.
#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    size: Option<u64>,
    sparse: bool,
}

impl Pax {
    /// Parses `<length> <key>=<value>\n` records; `None` if they are damaged.
    fn parse(mut bytes: &[u8]) -> Option<Self> {
        let mut pax = Self::default();
        while !bytes.is_empty() && bytes.iter().any(|b| *b != 0) {
            let space = bytes.iter().position(|b| *b == b' ')?;
            let length: usize = std::str::from_utf8(bytes.get(..space)?).ok()?.parse().ok()?;
            let record = bytes.get(space.checked_add(1)?..length)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|b| *b == b'=')?;
            let (key, value) = (record.get(..equals)?, record.get(equals.checked_add(1)?..)?);
            match key {
                b"path" => pax.path = Some(value.to_vec()),
                b"size" => pax.size = Some(std::str::from_utf8(value).ok()?.parse().ok()?),
                key if key.starts_with(b"GNU.sparse.") => pax.sparse = true,
                _ => {}
            }
            bytes = bytes.get(length..)?;
        }
        Some(pax)
    }
}

fn trim_nul(mut name: Vec<u8>) -> Vec<u8> {
    while name.last() == Some(&0) {
        name.pop();
    }
    name
}

fn normalise(raw: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(raw).ok()?;
    if text.len() > MAX_PATH || text.starts_with('/') || text.chars().any(char::is_control) {
        return None;
    }
    let parts: Vec<&str> = text.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    if parts.len() > MAX_DEPTH || parts.contains(&"..") {
        return None;
    }
    Some(parts.join("/"))
}

fn shown(raw: &[u8]) -> String {
    String::from_utf8_lossy(raw).chars().filter(|c| !c.is_control()).take(100).collect()
}

#[cfg(test)]
mod tests;
