//! A `ref` of the manifest: a digest, a file, a URL, or a name in a registry.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::{Digest, DigestError};

/// Where a blob is. Only a digest can be run; the others are resolved and pinned by `ovm build` and `ovm pull`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ref {
    /// The blob's digest.
    Digest(Digest),
    /// It starts like a digest (`sha256:`) but is none; kept so that validation can name the field.
    BadDigest(String),
    /// An external URL.
    Url(String),
    /// A name in a registry: its first component is a host (has a dot or a port, or is `localhost`).
    Registry(String),
    /// A file, relative to the manifest that names it.
    File(PathBuf),
}

impl Ref {
    /// Sorts a `ref` into its kind by its syntax alone.
    pub fn parse(text: &str) -> Self {
        match text.parse() {
            Ok(digest) => return Self::Digest(digest),
            Err(DigestError::Syntax(_)) if text.starts_with("sha256:") || text.starts_with("sha512:") => {
                return Self::BadDigest(text.to_owned())
            }
            Err(_) => {}
        }
        if let Some(path) = text.strip_prefix("file://").or_else(|| text.strip_prefix("file:")) {
            return Self::File(PathBuf::from(path));
        }
        if text.contains("://") {
            return Self::Url(text.to_owned());
        }
        let explicit_path = ["/", "./", "../"].iter().any(|p| text.starts_with(p));
        let host = text.split_once('/').map(|(host, _)| host).unwrap_or_default();
        if !explicit_path && (host == "localhost" || host.contains('.') || host.contains(':')) {
            return Self::Registry(text.to_owned());
        }
        Self::File(PathBuf::from(text))
    }

    /// The digest, if it is one.
    pub fn digest(&self) -> Option<Digest> {
        match self {
            Self::Digest(digest) => Some(*digest),
            _ => None,
        }
    }

    /// A path for this `ref` below `base`, for the kinds that may name a file: a registry-like name may be one too
    /// (`disks.d/base.qcow2`), so `ovm build` looks.
    pub fn path_below(&self, base: &Path) -> Option<PathBuf> {
        match self {
            Self::File(path) => Some(base.join(path)),
            Self::Registry(name) => Some(base.join(name)),
            _ => None,
        }
    }
}

impl fmt::Display for Ref {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest(digest) => digest.fmt(f),
            Self::BadDigest(text) | Self::Url(text) | Self::Registry(text) => f.write_str(text),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

impl From<Digest> for Ref {
    fn from(digest: Digest) -> Self {
        Self::Digest(digest)
    }
}

impl Serialize for Ref {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ref {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::parse(&String::deserialize(deserializer)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_sorts_by_syntax() {
        let digest = Digest::of(b"x");
        assert_eq!(Ref::parse(&digest.to_string()), Ref::Digest(digest));
        assert_eq!(Ref::parse("sha256:kernel-digest"), Ref::BadDigest("sha256:kernel-digest".into()));
        assert_eq!(Ref::parse("https://example.org/k"), Ref::Url("https://example.org/k".into()));
        assert_eq!(Ref::parse("ghcr.io/x/y:1"), Ref::Registry("ghcr.io/x/y:1".into()));
        assert_eq!(Ref::parse("localhost/x"), Ref::Registry("localhost/x".into()));
        assert_eq!(Ref::parse("vmlinuz-6.12"), Ref::File("vmlinuz-6.12".into()));
        assert_eq!(Ref::parse("./a.b/c"), Ref::File("./a.b/c".into()));
        assert_eq!(Ref::parse("disks/base.qcow2"), Ref::File("disks/base.qcow2".into()));
    }
}
