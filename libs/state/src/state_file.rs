//! The `state` file of an unpacked RAM snapshot: head and sections, in the encoding of a blob that holds no memory.

use std::{fs::File, os::unix::fs::FileExt};

use crate::{
    head::{check_sections, HeadDocument, SectionEntry},
    prefix::{digest, Prefix, MAX_HEAD, PREFIX},
    Blob, Head, Result, Section, SnapshotError,
};

/// Reads and writes `state` files.
#[derive(Debug)]
pub struct StateFile;

impl StateFile {
    /// Reads the head alone, at most 2 MiB: what an engine needs before it starts anything.
    ///
    /// # Errors
    /// As [`Blob::open`].
    pub fn head(file: &File) -> Result<Head> {
        Ok(open(file)?.head().clone())
    }

    /// Reads head and sections.
    ///
    /// # Errors
    /// As [`Blob::open`] and [`Blob::sections`].
    pub fn read(file: &File) -> Result<(Head, Vec<Section>)> {
        let blob = open(file)?;
        Ok((blob.head().clone(), blob.sections()?))
    }

    /// Writes an empty file full. It is not synced.
    ///
    /// # Errors
    /// [`SnapshotError::Unwritable`], [`SnapshotError::Io`].
    pub fn write(file: &File, head: &Head, sections: &[Section]) -> Result<()> {
        head.validate()?;
        let mut document = HeadDocument {
            vcpus: head.vcpus,
            memory: head.memory,
            parent: head.parent.clone(),
            fingerprint: head.fingerprint.clone(),
            index: None,
            sections: Vec::new(),
        };
        write_tail(file, head, &mut document, PREFIX, sections).map(|_| ())
    }
}

fn open(file: &File) -> Result<Blob> {
    Blob::open(file.try_clone().map_err(SnapshotError::io("read the state of the RAM snapshot"))?)
}

/// Writes sections and head from `offset` on, then the prefix; returns the length of the file.
pub(crate) fn write_tail(
    file: &File,
    head: &Head,
    document: &mut HeadDocument,
    offset: u64,
    sections: &[Section],
) -> Result<u64> {
    check_sections(sections)?;
    let mut bytes = Vec::new();
    for section in sections {
        document.sections.push(SectionEntry {
            kind: section.kind.clone(),
            version: section.version,
            offset: offset.saturating_add(bytes.len() as u64),
            length: section.payload.len() as u64,
            checksum: digest(&section.payload),
        });
        bytes.extend_from_slice(&section.payload);
    }
    let head_offset = offset.saturating_add(bytes.len() as u64);
    let text = serde_json::to_vec(document).map_err(SnapshotError::Head)?;
    if text.len() as u64 > MAX_HEAD {
        return Err(SnapshotError::Unwritable(format!("its head has {} bytes, at most {MAX_HEAD} fit", text.len())));
    }
    bytes.extend_from_slice(&text);
    let prefix = Prefix {
        arch: head.arch,
        head_offset,
        head_length: text.len() as u64,
        file_length: offset.saturating_add(bytes.len() as u64),
        head_digest: digest(&text),
    };
    let failed = || SnapshotError::io("write the RAM snapshot");
    file.write_all_at(&bytes, offset).map_err(failed())?;
    file.set_len(prefix.file_length).map_err(failed())?;
    file.write_all_at(&prefix.encode(), 0).map_err(failed())?;
    Ok(prefix.file_length)
}
