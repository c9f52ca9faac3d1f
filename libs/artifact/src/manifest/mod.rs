//! The OVMS manifest, schemaVersion 1: every field of the specification, and ours under `io.ovms`.
//!
//! ```text
//! bytes ──parse──> Manifest (right shape, every value typed) ──validate──> Ok | FieldErrors (all of them, by field)
//! ```
//! Parsing rejects what has the wrong type, validation what has no meaning or that this runtime cannot give; both name
//! the field as the manifest's author wrote it (`diskLayers[1].format: …`). Unknown fields are kept, since the schema
//! allows them, and written back as they were.

mod refs;
mod validate;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use refs::Ref;
pub use validate::{FieldError, FieldErrors, MAX_CMDLINE};

use crate::media;

/// Largest manifest that is read, in bytes; that of containerd's smallest client limit for a manifest, 4 MiB.
pub const MAX_MANIFEST: u64 = 4 << 20;

/// Why a text is no OVMS manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or a value of the wrong type.
    #[error("{field} cannot be read")]
    Syntax {
        /// The field, as `diskLayers[1].format`; "the manifest" for the whole.
        field: String,
        /// What the JSON reader says.
        #[source]
        source: serde_json::Error,
    },
    /// Larger than [`MAX_MANIFEST`].
    #[error("the manifest has {0} bytes, more than the {MAX_MANIFEST} allowed")]
    TooLarge(u64),
    /// The right shape, but values that do not hold.
    #[error("the manifest is not valid")]
    Invalid(#[source] FieldErrors),
}

/// An OVMS manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Version of the manifest format; 1 is the only one there is.
    pub schema_version: u64,
    /// [`media::MANIFEST`], or its old alias.
    pub media_type: String,
    /// The image's name, for people and for the default tag.
    pub name: String,
    /// The image's version, for people and for the default tag.
    pub version: String,
    /// The kernel; without one the disk is to be booted by firmware, which this version does not have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Kernel>,
    /// The initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<Initrd>,
    /// The disk, base first, diffs after it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk_layers: Vec<DiskLayer>,
    /// The RAM snapshot a start may restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram_snapshot: Option<RamSnapshot>,
    /// Devices beyond those that every machine has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<Device>,
    /// Who made it, when, for which platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Metadata>,
    /// Advice to the runtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_hints: Option<RuntimeHints>,
    /// A disk layer is an OCI container image that is started inside a VM (OCI-compatibility notes).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub container_mode: bool,
    /// Our extension: the machine the image wants when nobody says otherwise.
    #[serde(rename = "io.ovms", default, skip_serializing_if = "Option::is_none")]
    pub defaults: Option<MachineDefaults>,
    /// Fields we do not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// `kernel`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// The kernel's blob.
    #[serde(rename = "ref")]
    pub reference: Ref,
    /// The kernel command line, at most [`MAX_CMDLINE`] bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub args: Option<String>,
    /// Fields we do not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// `initrd`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Initrd {
    /// The initial RAM disk's blob.
    #[serde(rename = "ref")]
    pub reference: Ref,
    /// Fields we do not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The format of a disk layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
    /// The bytes of the disk themselves.
    Raw,
    /// Named by the schema, described nowhere: read, never accepted.
    Ovfms,
}

impl DiskFormat {
    /// The name as it is written in manifests and annotations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Ovfms => "ovfms",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "qcow2" => Some(Self::Qcow2),
            "raw" => Some(Self::Raw),
            "ovfms" => Some(Self::Ovfms),
            _ => None,
        }
    }

    /// The name of the tar member that holds a disk of this format; none for `ovfms`.
    pub fn member(self) -> Option<&'static str> {
        match self {
            Self::Qcow2 => Some(media::MEMBER_QCOW2),
            Self::Raw => Some(media::MEMBER_RAW),
            Self::Ovfms => None,
        }
    }
}

/// One of `diskLayers`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskLayer {
    /// The layer: matched against diff_ids first, then blob digests, then the digest of the disk file in the layer.
    #[serde(rename = "ref")]
    pub reference: Ref,
    /// The disk's format.
    pub format: DiskFormat,
    /// Size of the disk file in bytes (of the file, not of the disk it describes). Advisory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Fields we do not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// How a RAM snapshot is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RamCompression {
    /// lz4 frames.
    #[default]
    Lz4,
    /// zstd frames; foreseen by the specification.
    Zstd,
}

/// `ramSnapshot`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RamSnapshot {
    /// The snapshot's blob.
    #[serde(rename = "ref")]
    pub reference: Ref,
    /// The blob's compression.
    #[serde(default)]
    pub compression: RamCompression,
    /// Hold the decoded memory in tmpfs.
    #[serde(default)]
    pub preload_hint: bool,
    /// Lock the decoded memory in RAM.
    #[serde(default)]
    pub mlock_required: bool,
    /// Fields we do not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// One of `devices`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// The kind of device; `ivshmem` is the only one there is.
    #[serde(rename = "type")]
    pub kind: String,
    /// The device's name, unique in the manifest.
    pub name: String,
    /// Size of its memory in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Guest-physical address of its memory, hexadecimal with `0x`; the machine chooses one if it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmio_addr: Option<String>,
    /// Fields we do not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// `metadata`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Metadata {
    /// Who made the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// When it was made, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// What it runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Fields we do not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// `metadata.platform`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Platform {
    /// `x86_64` (or `amd64`), the only one of v0.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arch: Option<String>,
    /// Needs UEFI firmware, which v0.1 does not have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uefi: Option<bool>,
    /// Fields we do not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// `runtimeHints`: advice, never obeyed blindly.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RuntimeHints {
    /// Runtimes the author prefers, best first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preferred_runtime: Vec<String>,
    /// The start the author hopes for, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold_start_target_ms: Option<u64>,
    /// Fields we do not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// `io.ovms`, our extension: the machine the image wants. A limit or an annotation of the container overrides it, it
/// overrides `ovms.toml`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MachineDefaults {
    /// Number of virtual CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Guest memory in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Fields we do not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Manifest {
    /// A manifest of this name and version that describes nothing yet.
    pub fn new(name: impl Into<String>, version: impl Into<String>) -> Self {
        Self {
            schema_version: 1,
            media_type: media::MANIFEST.to_owned(),
            name: name.into(),
            version: version.into(),
            kernel: None,
            initrd: None,
            disk_layers: Vec::new(),
            ram_snapshot: None,
            devices: Vec::new(),
            metadata: None,
            runtime_hints: None,
            container_mode: false,
            defaults: None,
            extra: Map::new(),
        }
    }

    /// Reads a manifest's shape; [`Manifest::validate`] judges its values.
    ///
    /// # Errors
    /// [`ManifestError::TooLarge`], or [`ManifestError::Syntax`] with the field that is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let size = bytes.len() as u64;
        if size > MAX_MANIFEST {
            return Err(ManifestError::TooLarge(size));
        }
        let mut json = serde_json::Deserializer::from_slice(bytes);
        let syntax = |field: String, source| {
            let field = if field == "." { "the manifest".to_owned() } else { field };
            ManifestError::Syntax { field, source }
        };
        let manifest =
            serde_path_to_error::deserialize(&mut json).map_err(|e| syntax(e.path().to_string(), e.into_inner()))?;
        json.end().map_err(|e| syntax(".".to_owned(), e))?;
        Ok(manifest)
    }

    /// [`Manifest::parse`], then [`Manifest::validate`].
    ///
    /// # Errors
    /// Those of both.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest = Self::parse(bytes)?;
        manifest.validate().map_err(ManifestError::Invalid)?;
        Ok(manifest)
    }

    /// The manifest as the bytes of its blob: indented JSON, the same for the same manifest.
    ///
    /// # Errors
    /// Those of the JSON writer.
    pub fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// The image's vCPUs, if it says.
    pub fn vcpus(&self) -> Option<u32> {
        self.defaults.as_ref().and_then(|d| d.vcpus)
    }

    /// The image's memory in bytes, if it says.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.defaults.as_ref().and_then(|d| d.memory_bytes)
    }

    /// The kernel command line, empty if there is none.
    pub fn cmdline(&self) -> &str {
        self.kernel.as_ref().and_then(|k| k.args.as_deref()).unwrap_or_default()
    }
}

impl Device {
    /// `mmio_addr` as a number.
    ///
    /// # Errors
    /// The text, if it is not `0x` and at most 16 hexadecimal digits.
    pub fn address(&self) -> Result<Option<u64>, &str> {
        let Some(text) = self.mmio_addr.as_deref() else { return Ok(None) };
        let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).ok_or(text)?;
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(text);
        }
        u64::from_str_radix(digits, 16).map(Some).map_err(|_| text)
    }
}

#[cfg(test)]
mod tests;
