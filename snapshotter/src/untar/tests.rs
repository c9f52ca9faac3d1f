use std::fs;
use std::os::unix::fs::{symlink, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use super::*;

/// An archive in memory; headers are written as they are, so that hostile names get in.
struct Archive(Vec<u8>);

impl Archive {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn raw(mut self, name: &[u8], kind: tar::EntryType, link: &str, data: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.as_ustar_mut().unwrap().name[..name.len()].copy_from_slice(name);
        header.as_ustar_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(0o754);
        header.set_uid(u64::from(rustix::process::getuid().as_raw()));
        header.set_gid(u64::from(rustix::process::getgid().as_raw()));
        header.set_mtime(1_000_000_000);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, data: &str) -> Self {
        self.raw(name.as_bytes(), tar::EntryType::Regular, "", data.as_bytes())
    }

    fn dir(self, name: &str) -> Self {
        self.raw(name.as_bytes(), tar::EntryType::Directory, "", b"")
    }

    fn symlink(self, name: &str, to: &str) -> Self {
        self.raw(name.as_bytes(), tar::EntryType::Symlink, to, b"")
    }

    fn apply(mut self, target: &Target) -> Result<(), UntarError> {
        self.0.extend_from_slice(&[0; 1024]);
        apply(&mut self.0.as_slice(), target)
    }
}

/// A directory with `upper` to apply to, `lower` below it, and `outside` that nothing may touch.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["upper", "lower", "outside"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    fn upper(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join("upper").join(name)
    }

    /// The first layer of an image.
    fn base(&self) -> Target {
        Target { dir: self.upper(""), below: Vec::new(), opaque_attribute: "user.overlay.opaque" }
    }

    /// A layer above `lower`.
    fn above(&self) -> Target {
        Target { below: vec![self.dir.path().join("lower")], ..self.base() }
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn members_come_out_as_they_are() {
    let place = Place::new();
    Archive::new()
        .dir("./")
        .dir("bin/")
        .file("bin/tool", "tool")
        .symlink("bin/link", "/bin/tool")
        .raw(b"bin/hard", tar::EntryType::Link, "bin/tool", b"")
        .raw(b"fifo", tar::EntryType::Fifo, "", b"")
        .apply(&place.base())
        .unwrap();

    assert_eq!(read(&place.upper("bin/tool")), "tool");
    assert_eq!(fs::read_link(place.upper("bin/link")).unwrap(), Path::new("/bin/tool"));
    let (tool, hard) = (fs::metadata(place.upper("bin/tool")).unwrap(), fs::metadata(place.upper("bin/hard")).unwrap());
    assert_eq!((tool.ino(), tool.mode() & 0o7777, tool.mtime()), (hard.ino(), 0o754, 1_000_000_000));
    assert!(fs::metadata(place.upper("fifo")).unwrap().file_type().is_fifo());
    assert_eq!(fs::metadata(place.upper("bin")).unwrap().mtime(), 1_000_000_000);
}

#[test]
fn a_later_member_replaces_an_earlier_one() {
    let place = Place::new();
    Archive::new()
        .file("a", "one")
        .file("a", "two")
        .dir("b")
        .file("b/inner", "")
        .file("b", "now a file")
        .symlink("c", "a")
        .file("c", "no link")
        .apply(&place.base())
        .unwrap();
    assert_eq!((read(&place.upper("a")).as_str(), read(&place.upper("b")).as_str()), ("two", "now a file"));
    assert!(!fs::symlink_metadata(place.upper("c")).unwrap().is_symlink());
    assert_eq!(read(&place.upper("a")), "two");
}

#[test]
fn no_name_leads_out() {
    let place = Place::new();
    let outside = place.dir.path().join("outside");
    let out = outside.to_str().unwrap().to_owned();
    Archive::new()
        .file("../../outside/one", "1")
        .file("/etc/two", "2")
        .symlink("absolute", &out)
        .dir(out.trim_start_matches('/'))
        .file("absolute/three", "3")
        .symlink("relative", "../outside")
        .dir("outside")
        .file("relative/four", "4")
        .apply(&place.base())
        .unwrap();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert_eq!(read(&place.upper("outside/one")), "1");
    assert_eq!(read(&place.upper("etc/two")), "2");
    assert_eq!(read(&place.upper(out.trim_start_matches('/')).join("three")), "3");
    assert_eq!(read(&place.upper("outside/four")), "4");
}

#[test]
fn a_hard_link_leads_to_nothing_outside() {
    let place = Place::new();
    fs::write(place.dir.path().join("outside/secret"), "secret").unwrap();
    let err =
        Archive::new().raw(b"steal", tar::EntryType::Link, "../outside/secret", b"").apply(&place.base()).unwrap_err();
    assert!(err.to_string().contains("steal"), "{err}");
    assert!(!place.upper("steal").exists());
}

#[test]
fn folders_that_the_archive_leaves_out_look_like_those_below() {
    let place = Place::new();
    let below = place.dir.path().join("lower/a/b");
    fs::create_dir_all(&below).unwrap();
    fs::set_permissions(&below, fs::Permissions::from_mode(0o1777)).unwrap();
    Archive::new().file("a/b/c/file", "").apply(&place.above()).unwrap();
    assert_eq!(fs::metadata(place.upper("a/b")).unwrap().mode() & 0o7777, 0o1777);
    assert_eq!(fs::metadata(place.upper("a/b/c")).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn whiteouts_of_the_first_layer_hide_nothing() {
    let place = Place::new();
    Archive::new().file("a", "kept").file(".wh.a", "").file(".wh..wh..opq", "").apply(&place.base()).unwrap();
    assert_eq!(read(&place.upper("a")), "kept");
    assert_eq!(fs::read_dir(place.upper("")).unwrap().count(), 1);
}

#[test]
#[ignore = "needs root"]
fn whiteouts_become_those_of_overlay() {
    let place = Place::new();
    let mut target = place.above();
    target.opaque_attribute = "trusted.overlay.opaque";
    Archive::new()
        .file("dir/.wh.gone", "")
        .file("dir/.wh.back", "")
        .dir("dir/back")
        .dir("full")
        .file("full/.wh..wh..opq", "")
        .file("mine", "kept")
        .file(".wh.mine", "")
        .apply(&target)
        .unwrap();
    let gone = fs::symlink_metadata(place.upper("dir/gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    let opaque = |name: &str| {
        let mut value = [0; 8];
        rustix::fs::getxattr(place.upper(name), "trusted.overlay.opaque", &mut value[..])
            .map(|len| value[..len].to_vec())
    };
    assert_eq!(opaque("full").unwrap(), b"y");
    assert_eq!(opaque("dir/back").unwrap(), b"y");
    assert!(opaque("dir").is_err());
    assert_eq!(read(&place.upper("mine")), "kept");
}

#[test]
fn whiteout_of_no_name_is_refused() {
    let place = Place::new();
    for name in [".wh.", ".wh..", ".wh..."] {
        let err = Archive::new().file(name, "").apply(&place.above()).unwrap_err();
        assert!(matches!(err, UntarError::Refused { .. }), "{name}: {err}");
    }
}

#[test]
fn endless_records_before_a_member_are_refused() {
    let place = Place::new();
    let long = vec![b'a'; 5 << 20];
    let err = Archive::new().raw(b"x", tar::EntryType::GNULongName, "", &long).file("a", "").apply(&place.base());
    assert!(matches!(err, Err(UntarError::Archive(_))));
}

#[test]
fn damaged_archives_are_refused() {
    let place = Place::new();
    for bytes in [vec![7; 1024], Archive::new().file("a", &"x".repeat(600)).0[..700].to_vec()] {
        assert!(matches!(
            apply(&mut bytes.as_slice(), &place.base()),
            Err(UntarError::Archive(_) | UntarError::Member { .. })
        ));
    }
}

#[test]
fn what_follows_the_end_of_the_archive_is_left_to_the_caller() {
    let place = Place::new();
    let mut bytes = Archive::new().file("a", "").0;
    bytes.resize(bytes.len() + 10_240, 0);
    let mut rest = bytes.as_slice();
    apply(&mut rest, &place.base()).unwrap();
    assert!(!rest.is_empty());
}

#[test]
fn links_cannot_stack_folders_beyond_the_length_of_a_path() {
    let place = Place::new();
    let deep = vec!["d".repeat(50); 30].join("/");
    fs::create_dir_all(place.upper(&deep)).unwrap();
    symlink(&deep, place.upper("l")).unwrap();
    fs::create_dir_all(place.upper("l").join(&deep)).unwrap();
    symlink(format!("../{deep}"), place.upper("l").join("m")).unwrap();
    let folder = format!("l/{deep}");
    fs::create_dir_all(place.upper(&folder).join("e".repeat(200))).unwrap();
    symlink(&folder, place.upper("n")).unwrap();
    // The target of `n` lies less than 4096 bytes deep and is taken; one step beyond is not.
    let mut archive = Archive::new();
    let mut last = String::from("n");
    for step in 0..20 {
        let next = format!("s{step}");
        archive =
            archive.dir(&format!("{last}/{}", "f".repeat(90))).symlink(&next, &format!("{last}/{}", "f".repeat(90)));
        last = next;
    }
    assert!(archive.file("s19/file", "").apply(&place.base()).is_err());
}
