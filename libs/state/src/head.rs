//! The head of a RAM snapshot: what must be known of it before anything is allocated or mapped. JSON, at the file's end.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::{
    index::{chunk_count, ENTRY},
    prefix::PREFIX,
    Fingerprint, Incompatible, Result, Section, SnapshotError, MAX_SECTIONS_BYTES, MAX_SECTION_BYTES,
};

/// The most guest memory that the format allows, in bytes; callers allow less.
pub const MAX_MEMORY: u64 = 1 << 44;
/// The most sections: each vCPU and each device has one.
pub const MAX_SECTIONS: usize = 4096;
/// The longest kind of a section in bytes.
const MAX_KIND: usize = 64;
/// The most vCPUs that a head may name.
const MAX_VCPUS: u32 = 1024;
/// The unit of guest memory.
const PAGE: u64 = 4096;

/// The processor architecture of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// `x86_64`.
    X86_64,
    /// `aarch64`.
    Aarch64,
}

impl Arch {
    /// The architecture of this build.
    pub const HOST: Self = if cfg!(target_arch = "aarch64") { Self::Aarch64 } else { Self::X86_64 };

    /// The number in the prefix: the ELF machine number (`EM_X86_64`, `EM_AARCH64` of elf.h).
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::X86_64 => 62,
            Self::Aarch64 => 183,
        }
    }

    pub(crate) fn from_number(number: u32) -> Option<Self> {
        [Self::X86_64, Self::Aarch64].into_iter().find(|arch| arch.number() == number)
    }

    /// The name as `uname -m` gives it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }
}

/// What a RAM snapshot says of itself. Its values are within their bounds once a [`crate::Blob`] or
/// [`crate::StateFile`] has given it out, but they are still the sender's words.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// The architecture.
    pub arch: Arch,
    /// vCPUs of the machine; at least 1.
    pub vcpus: u32,
    /// Guest memory in bytes without holes; a multiple of 4096, not 0.
    pub memory: u64,
    /// Digest (`sha256:…`) of the RAM blob that this one is a diff on; none: it is whole.
    pub parent: Option<String>,
    /// The host and the machine that it was taken on.
    pub fingerprint: Fingerprint,
}

impl Head {
    /// Whether this host can go on with it.
    ///
    /// # Errors
    /// [`Incompatible`], which names the feature, what was found and what is needed.
    pub fn check(&self, host: &Fingerprint) -> std::result::Result<(), Incompatible> {
        if self.arch != Arch::HOST {
            return Err(Incompatible::Arch { found: Arch::HOST.name(), needed: self.arch.name() });
        }
        self.fingerprint.check(host)
    }

    /// The values that the format bounds.
    pub(crate) fn validate(&self) -> Result<()> {
        let memory = self.memory;
        if memory == 0 || !memory.is_multiple_of(PAGE) {
            return Err(SnapshotError::damaged(format!("its memory of {memory} bytes is not a multiple of {PAGE}")));
        }
        if memory > MAX_MEMORY {
            return Err(SnapshotError::TooLarge { what: "memory", bytes: memory, limit: MAX_MEMORY });
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            let vcpus = self.vcpus;
            return Err(SnapshotError::damaged(format!("it has {vcpus} vCPUs, not 1 to {MAX_VCPUS}")));
        }
        self.fingerprint.validate().map_err(SnapshotError::Damaged)?;
        match &self.parent {
            Some(parent) if !is_digest(parent) => Err(SnapshotError::damaged("its parent is no sha256 digest")),
            _ => Ok(()),
        }
    }
}

/// `sha256:` and 64 lower-case hexadecimal digits.
fn is_digest(text: &str) -> bool {
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    text.strip_prefix("sha256:").is_some_and(|digits| digits.len() == 64 && digits.bytes().all(hex))
}

/// A range of the file with its checksum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Extent {
    pub offset: u64,
    pub length: u64,
    #[serde(with = "hex_digest")]
    pub checksum: [u8; 16],
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SectionEntry {
    pub kind: String,
    pub version: u32,
    pub offset: u64,
    pub length: u64,
    #[serde(with = "hex_digest")]
    pub checksum: [u8; 16],
}

/// The head as it stands in the file. Unknown fields are of later versions that this one can do without.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct HeadDocument {
    pub vcpus: u32,
    pub memory: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    pub fingerprint: Fingerprint,
    /// The chunks' index; a state file has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<Extent>,
    pub sections: Vec<SectionEntry>,
}

impl HeadDocument {
    pub fn head(&self, arch: Arch) -> Head {
        Head {
            arch,
            vcpus: self.vcpus,
            memory: self.memory,
            parent: self.parent.clone(),
            fingerprint: self.fingerprint.clone(),
        }
    }

    /// Index, sections and head follow each other without a gap, up to the end of the file; chunks lie before them. So
    /// nothing overlaps and every length is bounded by the file's own.
    pub fn check_layout(&self, head_offset: u64) -> Result<()> {
        if self.sections.len() > MAX_SECTIONS {
            let found = self.sections.len();
            return Err(SnapshotError::damaged(format!("it has {found} sections, at most {MAX_SECTIONS}")));
        }
        let mut end = self.data_end();
        if end < PREFIX {
            return Err(SnapshotError::damaged("its index begins within the prefix"));
        }
        if let Some(index) = &self.index {
            if !index.length.is_multiple_of(ENTRY) || index.length / ENTRY > chunk_count(self.memory) {
                let length = index.length;
                return Err(SnapshotError::damaged(format!("its index of {length} bytes does not fit its memory")));
            }
            end = end.saturating_add(index.length);
        }
        check_total(self.sections.iter().map(|entry| entry.length))?;
        let mut kinds = HashSet::new();
        for entry in &self.sections {
            let kind = &entry.kind;
            if kind.is_empty() || kind.len() > MAX_KIND || !kind.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(SnapshotError::damaged("a section has no proper kind"));
            }
            if !kinds.insert(kind) {
                return Err(SnapshotError::damaged(format!("it has two sections of kind {kind}")));
            }
            if entry.length > MAX_SECTION_BYTES as u64 {
                let (bytes, limit) = (entry.length, MAX_SECTION_BYTES as u64);
                return Err(SnapshotError::TooLarge { what: "section", bytes, limit });
            }
            if entry.offset != end {
                return Err(SnapshotError::damaged(format!("section {kind} is not where it must be")));
            }
            end = end.saturating_add(entry.length);
        }
        if end == head_offset {
            Ok(())
        } else {
            Err(SnapshotError::damaged("the head is not where it must be"))
        }
    }

    /// Where the chunks' area ends.
    pub fn data_end(&self) -> u64 {
        self.index.as_ref().map_or(PREFIX, |index| index.offset)
    }
}

/// All sections together, whoever writes or reads them.
fn check_total(lengths: impl Iterator<Item = u64>) -> Result<()> {
    let bytes = lengths.fold(0_u64, u64::saturating_add);
    let limit = MAX_SECTIONS_BYTES as u64;
    if bytes > limit {
        return Err(SnapshotError::TooLarge { what: "saved state", bytes, limit });
    }
    Ok(())
}

/// Sections that can be written.
pub(crate) fn check_sections(sections: &[Section]) -> Result<()> {
    let unwritable = |why: String| Err(SnapshotError::Unwritable(why));
    if sections.len() > MAX_SECTIONS {
        return unwritable(format!("there are {} sections, at most {MAX_SECTIONS} fit", sections.len()));
    }
    check_total(sections.iter().map(|section| section.payload.len() as u64))?;
    let mut kinds = HashSet::new();
    for section in sections {
        let kind = &section.kind;
        if kind.is_empty() || kind.len() > MAX_KIND || !kind.bytes().all(|b| b.is_ascii_graphic()) {
            return unwritable(format!("{kind:?} is no kind of a section"));
        }
        if section.payload.len() > MAX_SECTION_BYTES {
            return unwritable(format!("section {kind} has {} bytes", section.payload.len()));
        }
        if !kinds.insert(kind) {
            return unwritable(format!("there are two sections of kind {kind}"));
        }
    }
    Ok(())
}

/// A checksum as 32 hexadecimal digits, in the order of the bytes.
mod hex_digest {
    use serde::{de::Error, Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(digest: &[u8; 16], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format!("{:032x}", u128::from_be_bytes(*digest)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[u8; 16], D::Error> {
        let text = String::deserialize(from)?;
        let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match u128::from_str_radix(&text, 16) {
            Ok(number) if digits => Ok(number.to_be_bytes()),
            _ => Err(D::Error::custom("a checksum is not 32 hexadecimal digits")),
        }
    }
}
