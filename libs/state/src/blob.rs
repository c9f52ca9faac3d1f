//! Reading a RAM blob. The file is hostile: it may come from a registry.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use crate::{
    head::{HeadDocument, SectionEntry},
    index::{self, Entry},
    prefix::{digest, Prefix},
    Head, Result, Section, SnapshotError,
};

/// A RAM blob whose prefix and head were read and hold. Neither sections nor chunks have been looked at.
#[derive(Debug)]
pub struct Blob {
    file: Arc<File>,
    head: Head,
    document: HeadDocument,
}

impl Blob {
    /// Reads prefix and head, at most 2 MiB.
    ///
    /// # Errors
    /// [`SnapshotError`] if this is no RAM snapshot, one of another epoch, or damaged.
    pub fn open(file: impl Into<Arc<File>>) -> Result<Self> {
        let file = file.into();
        let prefix = Prefix::read(&file)?;
        // Bounded by the prefix's own check.
        let bytes = read(&file, prefix.head_offset, prefix.head_length, "read the RAM snapshot's head")?;
        if digest(&bytes) != prefix.head_digest {
            return Err(SnapshotError::Checksum("the head".into()));
        }
        let document: HeadDocument = serde_json::from_slice(&bytes).map_err(SnapshotError::Head)?;
        let head = document.head(prefix.arch);
        head.validate()?;
        document.check_layout(prefix.head_offset)?;
        Ok(Self { file, head, document })
    }

    /// The head.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Whether it holds memory; a state file does not.
    #[must_use]
    pub fn has_memory(&self) -> bool {
        self.document.index.is_some()
    }

    /// Reads all sections, each at most [`crate::MAX_SECTION_BYTES`] and together at most [`crate::MAX_SECTIONS_BYTES`].
    ///
    /// # Errors
    /// [`SnapshotError::Checksum`] names the section that is damaged.
    pub fn sections(&self) -> Result<Vec<Section>> {
        let read_one = |entry: &SectionEntry| {
            let payload = read(&self.file, entry.offset, entry.length, "read a section of the RAM snapshot")?;
            if digest(&payload) != entry.checksum {
                return Err(SnapshotError::Checksum(format!("section {}", entry.kind)));
            }
            Ok(Section { kind: entry.kind.clone(), version: entry.version, payload })
        };
        self.document.sections.iter().map(read_one).collect()
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Reads and checks the index. Its size is bounded by the file's, which holds it, and by the memory's.
    pub(crate) fn index(&self) -> Result<Vec<Entry>> {
        let Some(at) = &self.document.index else {
            return Err(SnapshotError::damaged("it holds no memory, only the state"));
        };
        let bytes = read(&self.file, at.offset, at.length, "read the RAM snapshot's index")?;
        if digest(&bytes) != at.checksum {
            return Err(SnapshotError::Checksum("the index".into()));
        }
        index::decode(&bytes, self.head.memory, at.offset)
    }
}

/// Reads a range that the caller has bounded.
fn read(file: &File, offset: u64, length: u64, verb: &'static str) -> Result<Vec<u8>> {
    let length = usize::try_from(length).map_err(|_| SnapshotError::damaged("a length does not fit this host"))?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).map_err(SnapshotError::io(verb))?;
    Ok(bytes)
}
