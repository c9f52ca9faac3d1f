//! From a tag to the names an image gets in a layout's index.
//!
//! Two readers want two names: skopeo and oras look for the tag (`org.opencontainers.image.ref.name`), containerd for
//! the full name (`io.containerd.image.name`), in the form its clients spell names out: `debian:1` is
//! `docker.io/library/debian:1`. `ctr` takes names as they are, so the full name is what a user types there.

use super::BuildError;
use crate::media;
use crate::oci::Descriptor;

/// The names of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageName {
    /// `docker.io/library/debian:1`
    pub full: String,
    /// `1`
    pub tag: String,
}

impl ImageName {
    /// Spells out a name with its tag, `latest` if it has none. The grammar is that of the distribution reference.
    ///
    /// # Errors
    /// [`BuildError::Name`], for a name outside the grammar, or one with a digest.
    pub fn parse(text: &str) -> Result<Self, BuildError> {
        let refused = |why: &'static str| BuildError::Name { name: text.to_owned(), why };
        if text.contains('@') {
            return Err(refused("a digest cannot be chosen, it follows from the content"));
        }
        let (path, tag) = match text.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, tag),
            _ => (text, "latest"),
        };
        if !is_tag(tag) {
            return Err(refused("a tag has 1 to 128 letters, digits, \".\", \"_\", \"-\""));
        }
        let (host, repository) = match path.split_once('/') {
            Some((host, rest)) if host == "localhost" || host.contains(['.', ':']) => (host, rest.to_owned()),
            Some(_) => ("docker.io", path.to_owned()),
            None => ("docker.io", format!("library/{path}")),
        };
        let begins = host.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[');
        let host_ok = begins && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".:-[]".contains(&b));
        if !host_ok || !repository.split('/').all(is_component) || repository.len() > 255 {
            return Err(refused(
                "a name has lower-case letters and digits, with \".\", \"_\", \"-\" and \"/\" between",
            ));
        }
        Ok(Self { full: format!("{host}/{repository}:{tag}"), tag: tag.to_owned() })
    }

    /// The entry of a layout's index that gives an image this name.
    #[must_use]
    pub fn entry(&self, image: &Descriptor) -> Descriptor {
        let names = [(media::ANNOTATION_REF_NAME, &self.tag), (media::ANNOTATION_IMAGE_NAME, &self.full)];
        let mut entry = image.clone();
        entry.set_annotations(Some(names.map(|(key, name)| (key.to_owned(), name.clone())).into()));
        entry
    }

    /// The name of a manifest that was given no tag, from its `name` and `version`; letters are made small and what
    /// the grammar does not know becomes `-`.
    pub fn of_manifest(name: &str, version: &str) -> Self {
        let clean = |text: &str, keep: &[u8]| -> String {
            let fits = |b: u8| b.is_ascii_alphanumeric() || keep.contains(&b);
            text.bytes().map(|b| if fits(b) { char::from(b) } else { '-' }).collect()
        };
        let repository: Vec<String> = clean(name, b"./_-")
            .to_ascii_lowercase()
            .split('/')
            .map(|part| part.trim_matches(['.', '_', '-']).to_owned())
            .filter(|part| !part.is_empty())
            .collect();
        let tag: String = clean(version, b"._-").trim_start_matches(['.', '-']).chars().take(128).collect();
        let tag = if tag.is_empty() { "latest" } else { &tag };
        Self::parse(&format!("{}:{tag}", repository.join("/")))
            .unwrap_or_else(|_| Self { full: format!("docker.io/library/image:{tag}"), tag: tag.to_owned() })
    }
}

fn is_tag(tag: &str) -> bool {
    let first = tag.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    first && tag.len() <= 128 && tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// `[a-z0-9]+` with one of `.`, `_`, `__`, or dashes between.
fn is_component(part: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = part.as_bytes();
    edge(bytes.first()) && edge(bytes.last()) && bytes.iter().all(|b| inner(*b)) && !part.contains("..")
}
