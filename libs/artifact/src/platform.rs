//! Which image of an index a machine of this runtime can be made of: the one for linux/amd64.

use crate::media;
use crate::oci;

/// Most indexes within indexes on the way to an image.
pub const MAX_INDEX_DEPTH: usize = 4;

/// How well an entry of an index suits: for another platform or of a type we do not know, for no platform in particular
/// (a nested index may hold anything), or expressly for ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    None,
    Any,
    Ours,
}

fn fit(entry: &oci::Descriptor) -> Fit {
    let media_type = entry.media_type().to_string();
    if !media::is_index(&media_type) && !media::is_image_manifest(&media_type) {
        return Fit::None;
    }
    match entry.platform() {
        None => Fit::Any,
        Some(platform) if platform.os().to_string() == "linux" && platform.architecture().to_string() == "amd64" => {
            Fit::Ours
        }
        Some(_) => Fit::None,
    }
}

/// Whether an entry can be for us: an image or index, for linux/amd64 or for no platform in particular.
pub fn is_ours(entry: &oci::Descriptor) -> bool {
    fit(entry) != Fit::None
}

/// The images and nested indexes that can be for us, best first: those that say linux/amd64, then those that say no platform.
pub fn candidates(entries: &[oci::Descriptor]) -> impl Iterator<Item = &oci::Descriptor> {
    let all = |wanted: Fit| entries.iter().filter(move |entry| fit(entry) == wanted);
    all(Fit::Ours).chain(all(Fit::Any))
}

/// The image or nested index to go on with.
pub fn choose(entries: &[oci::Descriptor]) -> Option<&oci::Descriptor> {
    candidates(entries).next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{json, Value};

    fn entry(media_type: &str, platform: Value) -> oci::Descriptor {
        let digest = crate::digest::Digest::of(format!("{media_type} {platform}").as_bytes());
        let mut entry = json!({ "mediaType": media_type, "digest": digest, "size": 1 });
        if !platform.is_null() {
            entry["platform"] = platform;
        }
        serde_json::from_value(entry).unwrap()
    }

    fn of(os: &str, architecture: &str) -> oci::Descriptor {
        entry(media::OCI_MANIFEST, json!({ "os": os, "architecture": architecture }))
    }

    #[test]
    fn what_says_our_platform_goes_before_what_says_none() {
        let (ours, any) = (of("linux", "amd64"), entry(media::OCI_MANIFEST, Value::Null));
        let others = [of("linux", "arm64"), of("windows", "amd64"), of("unknown", "unknown")];
        let all = |last: &[oci::Descriptor]| [&others[..], last].concat();
        assert_eq!(choose(&all(&[any.clone(), ours.clone()])), Some(&ours));
        assert_eq!(choose(&all(&[ours.clone(), any.clone()])), Some(&ours));
        assert_eq!(choose(&all(std::slice::from_ref(&any))), Some(&any));
        assert_eq!(choose(&others), None);
        assert_eq!(choose(&[]), None);
    }

    #[test]
    fn nested_indexes_and_docker_types_count_and_unknown_types_do_not() {
        for media_type in [media::OCI_INDEX, media::DOCKER_INDEX, media::DOCKER_MANIFEST] {
            assert!(is_ours(&entry(media_type, Value::Null)), "{media_type}");
        }
        let unknown = entry("application/vnd.example+json", json!({ "os": "linux", "architecture": "amd64" }));
        assert!(!is_ours(&unknown) && choose(&[unknown]).is_none());
    }
}
