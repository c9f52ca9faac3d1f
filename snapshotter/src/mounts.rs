//! What a snapshot mounts as.
//!
//! Ordinary snapshots mount as containerd's overlayfs snapshotter mounts them: a bind of the only directory there is,
//! or an overlay. A machine's snapshot is always one bind of its own directory, because every client mounts the root
//! file system in its own process before the shim is asked, and only a bind works everywhere.

use std::path::Path;

use crate::layout::Layout;
use crate::store::{Chain, Content, Kind};
use ovms_containerd::proto::types::Mount;

/// Mount options that this host's overlay wants beside the directories.
#[derive(Clone, Debug, Default)]
pub struct OverlayOptions(Vec<String>);

impl OverlayOptions {
    /// Asks the kernel.
    pub fn probe() -> Self {
        let mut options = Vec::new();
        // In a user namespace overlay may only use user.* attributes.
        if in_user_namespace() {
            options.push("userxattr".to_owned());
        }
        // With an index the kernel binds lower and upper directories to each other by file handles, which does not
        // survive that one lower directory serves many overlays.
        if Path::new("/sys/module/overlay/parameters/index").exists() {
            options.push("index=off".to_owned());
        }
        Self(options)
    }

    /// Name of the attribute that hides what lies below a directory.
    pub fn opaque_attribute(&self) -> &'static str {
        if self.0.iter().any(|option| option == "userxattr") {
            "user.overlay.opaque"
        } else {
            "trusted.overlay.opaque"
        }
    }
}

/// Whether user ids are mapped here: outside any user namespace the map is the whole range.
fn in_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    !map.is_empty() && map.split_whitespace().ne(["0", "0", "4294967295"])
}

/// The mounts of an active snapshot or a view.
pub fn mounts(layout: &Layout, overlay: &OverlayOptions, chain: &Chain) -> Vec<Mount> {
    let record = &chain.record;
    let access = if record.kind == Kind::View { "ro" } else { "rw" };
    let directory = |number| layout.fs(number).to_string_lossy().into_owned();
    if record.content != Content::Files || chain.parents.is_empty() {
        return vec![bind(directory(record.number), access)];
    }
    let mut options = Vec::new();
    if record.kind == Kind::Active {
        options.push(format!("workdir={}", layout.work(record.number).display()));
        options.push(format!("upperdir={}", directory(record.number)));
    } else if let [only] = chain.parents.as_slice() {
        return vec![bind(directory(only.number), access)];
    }
    let lower: Vec<String> = chain.parents.iter().map(|parent| directory(parent.number)).collect();
    options.push(format!("lowerdir={}", lower.join(":")));
    options.extend(overlay.0.iter().cloned());
    vec![Mount { r#type: "overlay".into(), source: "overlay".into(), target: String::new(), options }]
}

fn bind(source: String, access: &str) -> Mount {
    Mount { r#type: "bind".into(), source, target: String::new(), options: vec!["rbind".into(), access.into()] }
}

/// The directory that a write through these mounts ends up in: the source of a bind, the upper directory of an
/// overlay.
pub fn target(mounts: &[Mount]) -> Option<&Path> {
    let [mount] = mounts else { return None };
    match mount.r#type.as_str() {
        "bind" => Some(Path::new(&mount.source)),
        "overlay" => mount.options.iter().find_map(|option| option.strip_prefix("upperdir=")).map(Path::new),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Layer, Record};

    fn record(number: u64, kind: Kind, content: Content) -> Record {
        Record {
            number,
            kind,
            parent: String::new(),
            labels: Default::default(),
            created: (0, 0),
            updated: (0, 0),
            content,
            usage: None,
        }
    }

    fn options(kind: Kind, content: Content, parents: &[u64]) -> (String, String, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        let chain = Chain {
            key: "x".into(),
            record: record(9, kind, content.clone()),
            parents: parents.iter().map(|number| record(*number, Kind::Committed, content.clone())).collect(),
        };
        let made = mounts(&layout, &OverlayOptions(vec!["index=off".into()]), &chain);
        assert_eq!(made.len(), 1);
        let root = format!("{}/", layout.snapshots().display());
        let short = |text: &String| text.replace(&root, "");
        (made[0].r#type.clone(), short(&made[0].source), made[0].options.iter().map(short).collect())
    }

    #[test]
    fn ordinary_snapshots_mount_as_overlayfs_does() {
        let (kind, source, opts) = options(Kind::Active, Content::Files, &[]);
        assert_eq!((kind.as_str(), source.as_str(), opts), ("bind", "9/fs", vec!["rbind".into(), "rw".into()]));
        let (kind, _, opts) = options(Kind::Active, Content::Files, &[3, 1]);
        assert_eq!(kind, "overlay");
        assert_eq!(opts, ["workdir=9/work", "upperdir=9/fs", "lowerdir=3/fs:1/fs", "index=off"]);
        let (kind, source, opts) = options(Kind::View, Content::Files, &[3]);
        assert_eq!((kind.as_str(), source.as_str(), opts), ("bind", "3/fs", vec!["rbind".into(), "ro".into()]));
        let (kind, _, opts) = options(Kind::View, Content::Files, &[3, 1]);
        assert_eq!((kind.as_str(), opts), ("overlay", vec!["lowerdir=3/fs:1/fs".into(), "index=off".into()]));
    }

    #[test]
    fn a_machine_mounts_as_a_bind_of_its_own_directory() {
        let machine = Content::Machine(Layer::Empty);
        let (kind, source, opts) = options(Kind::Active, machine.clone(), &[3, 1]);
        assert_eq!((kind.as_str(), source.as_str(), opts), ("bind", "9/fs", vec!["rbind".into(), "rw".into()]));
        let (_, source, opts) = options(Kind::View, machine, &[3]);
        assert_eq!((source.as_str(), opts), ("9/fs", vec!["rbind".into(), "ro".into()]));
    }

    #[test]
    fn target_is_where_a_write_ends_up() {
        let overlay = Mount {
            r#type: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: vec!["workdir=/w".into(), "upperdir=/u".into(), "lowerdir=/l".into()],
        };
        assert_eq!(target(&[bind("/b".into(), "rw")]), Some(Path::new("/b")));
        assert_eq!(target(&[overlay]), Some(Path::new("/u")));
        assert_eq!(target(&[]), None);
    }
}
