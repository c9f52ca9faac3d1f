use std::fs;

use serde_json::Value;

use super::*;
use crate::layer::{self, Encoding, Limits};
use crate::layout::{DirSink, Layout, Quiet, Source, TarSink};
use crate::manifest::Kernel;

/// A boot sector that says bzImage.
fn bz_image() -> Vec<u8> {
    let mut kernel = vec![0; 4096];
    kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel
}

/// A qcow2 header, version 3, with no backing file.
fn qcow2_header() -> Vec<u8> {
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header
}

struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let files = Self { dir: tempfile::tempdir().unwrap() };
        files.write("vmlinuz", &bz_image());
        files.write("initrd", b"070701");
        files.write("base.qcow2", &qcow2_header());
        files.write("top.raw", &[7; 1000]);
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// A hand-written manifest of these files.
    fn manifest(&self, change: impl FnOnce(&mut Value)) -> PathBuf {
        let mut manifest = json!({
            "schemaVersion": 1, "mediaType": media::MANIFEST, "name": "demo/debian", "version": "13",
            "kernel": { "ref": "vmlinuz", "args": "console=ttyS0" },
            "initrd": { "ref": "./initrd" },
            "diskLayers": [{ "ref": "base.qcow2", "format": "qcow2" }, { "ref": "top.raw", "format": "raw" }],
            "metadata": { "author": "me" },
            "io.ovms": { "vcpus": 2, "memoryBytes": 1 << 30 },
        });
        change(&mut manifest);
        self.write("manifest.json", manifest.to_string().as_bytes());
        self.path("manifest.json")
    }

    fn recipe(&self) -> Recipe {
        Recipe::from_manifest(&self.manifest(|_| ())).unwrap()
    }

    fn build(&self, out: &str, options: Options) -> Built {
        let path = self.path(out);
        let sink: Box<dyn Sink> = match out.ends_with(".tar") {
            true => Box::new(TarSink::create(&path, options.epoch.unwrap_or_default()).unwrap()),
            false => Box::new(DirSink::create(&path).unwrap()),
        };
        self.recipe().build(sink, options, &Quiet).unwrap()
    }

    /// The first cause of a refused build.
    fn refused(&self, change: impl FnOnce(&mut Value)) -> String {
        let error = Recipe::from_manifest(&self.manifest(change)).and_then(|r| r.check()).unwrap_err();
        let mut text = error.to_string();
        let mut next = std::error::Error::source(&error);
        while let Some(error) = next {
            text = format!("{text}: {error}");
            next = error.source();
        }
        text
    }
}

#[test]
fn built_directory_and_tar_verify_and_are_the_same_image() {
    let files = Files::new();
    let dir = files.build("layout", Options::default());
    let tar = files.build("image.tar", Options::default());
    assert_eq!(dir.image, tar.image);

    for out in ["layout", "image.tar"] {
        let layout = Layout::open(&files.path(out)).unwrap();
        let image = layout.verify(None, &Quiet).unwrap();
        assert_eq!(image.resolved.manifest, dir.manifest);
        assert_eq!(image, {
            let mut loaded = layout.load(None).unwrap();
            for (layer, verified) in loaded.parts.layers.iter_mut().zip(&image.parts.layers) {
                layer.disk = verified.disk;
            }
            for (disk, verified) in loaded.resolved.disks.iter_mut().zip(&image.resolved.disks) {
                disk.layer.disk = verified.layer.disk;
            }
            loaded
        });
        assert_eq!(image.descriptor, image.parts.layers.last().map(|l| l.blob.digest));
        assert_eq!(image.resolved.kernel.unwrap().digest, Digest::of(&bz_image()));
        let formats: Vec<DiskFormat> = image.resolved.disks.iter().map(|d| d.format).collect();
        assert_eq!(formats, [DiskFormat::Qcow2, DiskFormat::Raw]);
        assert_eq!(layout.entries().unwrap()[0].name.as_deref(), Some("docker.io/demo/debian:13"));
    }
}

#[test]
fn built_disk_layer_holds_the_disk_file() {
    let files = Files::new();
    let built = files.build("layout", Options::default());
    let layout = Layout::open(&files.path("layout")).unwrap();
    let top = layout.load(None).unwrap().resolved.disks[1].layer.blob.clone();
    assert_eq!(built.manifest.disk_layers[1].size, Some(1000));
    assert_eq!(built.manifest.disk_layers[1].reference, Ref::Digest(top.digest));

    let encoding = Encoding::identify(&top.media_type, Some("raw")).unwrap();
    let mut content = Vec::new();
    let mut take = |disk: layer::DiskFile<'_>| {
        disk.reader.read_to_end(&mut content)?;
        Ok(())
    };
    layer::read(layout.blob(&top.digest, top.size).unwrap(), encoding, &Limits::default(), &mut take).unwrap();

    assert_eq!(content, [7; 1000]);
}

#[test]
fn same_recipe_gives_the_same_tree() {
    let files = Files::new();
    let tree = |out: &str| {
        files.build(out, Options { epoch: Some(1_700_000_000), ..Options::default() });
        let mut names: Vec<(PathBuf, Vec<u8>)> = Vec::new();
        for entry in fs::read_dir(files.path(out).join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            names.push((path.file_name().unwrap().into(), fs::read(&path).unwrap()));
        }
        names.sort();
        names.push(("index.json".into(), fs::read(files.path(out).join("index.json")).unwrap()));
        names
    };
    assert_eq!(tree("one"), tree("two"));
    files.build("one.tar", Options::default());
    files.build("two.tar", Options::default());
    assert_eq!(fs::read(files.path("one.tar")).unwrap(), fs::read(files.path("two.tar")).unwrap());
}

#[test]
fn epoch_dates_the_image() {
    let files = Files::new();
    let built = files.build("layout", Options { epoch: Some(0), ..Options::default() });
    assert_eq!(built.manifest.metadata.unwrap().created.as_deref(), Some("1970-01-01T00:00:00Z"));
}

#[test]
fn raw_layers_are_the_disk_files_themselves() {
    let files = Files::new();
    let built = files.build("layout", Options { raw_layers: true, ..Options::default() });
    assert_eq!(built.manifest.disk_layers[1].reference, Ref::Digest(Digest::of(&[7; 1000])));
    let image = Layout::open(&files.path("layout")).unwrap().verify(None, &Quiet).unwrap();
    assert!(image.resolved.disks.iter().all(|d| d.layer.disk.unwrap().bare));
}

#[test]
fn raw_layers_refuse_a_disk_that_begins_like_an_archive() {
    let files = Files::new();
    let archive = {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = crate::layout::header(4, 0, tar::EntryType::Regular);
        builder.append_data(&mut header, "bin/sh", &b"#!sh"[..]).unwrap();
        builder.into_inner().unwrap()
    };
    for disk in [archive, vec![0; 4096]] {
        files.write("top.raw", &disk);
        let sink = Box::new(DirSink::create(&files.path("raw")).unwrap());
        let options = Options { raw_layers: true, ..Options::default() };

        let error = files.recipe().build(sink, options, &Quiet).unwrap_err().to_string();

        assert!(error.contains("top.raw cannot be a disk layer") && error.contains("without --raw-layers"), "{error}");
        files.build("layout", Options::default());
        Layout::open(&files.path("layout")).unwrap().verify(None, &Quiet).unwrap();
    }
}

#[test]
fn second_build_into_a_layout_keeps_the_first_under_its_tag() {
    let files = Files::new();
    let named = |name: &str| Options { names: vec![ImageName::parse(name).unwrap()], ..Options::default() };
    files.build("layout", named("a:1"));
    files.build("layout", named("a:2"));
    files.build("layout", named("a:1"));

    let layout = Layout::open(&files.path("layout")).unwrap();

    let tags: Vec<String> = layout.entries().unwrap().into_iter().filter_map(|e| e.tag).collect();
    assert_eq!(tags, ["2", "1"]);
    assert!(layout.load(Some("2")).is_ok() && layout.load(Some("docker.io/library/a:1")).is_ok());
    assert!(layout.load(Some("3")).is_err());
}

#[test]
fn images_of_one_tag_and_different_names_lie_side_by_side() {
    let files = Files::new();
    let named = |name: &str| Options { names: vec![ImageName::parse(name).unwrap()], ..Options::default() };
    let a = files.build("layout", named("a:1"));
    files.write("initrd", b"070702");
    let b = files.build("layout", named("demo/b:1"));
    let replaced = files.build("layout", named("demo/b:1"));
    assert_eq!(b.image, replaced.image);

    let layout = Layout::open(&files.path("layout")).unwrap();

    let names: Vec<String> = layout.entries().unwrap().into_iter().filter_map(|e| e.name).collect();
    assert_eq!(names, ["docker.io/library/a:1", "docker.io/demo/b:1"]);
    let selected = |tag: &str| layout.select(Some(tag)).unwrap().digest().to_string();
    assert_eq!(
        (selected("a:1"), selected("docker.io/demo/b:1")),
        (a.image.digest.to_string(), b.image.digest.to_string())
    );
    assert_eq!(selected(&a.image.digest.to_string()), a.image.digest.to_string());
    let error = layout.select(Some("1")).unwrap_err().to_string();
    assert_eq!(
        error,
        "the layout has several images with the tag 1, choose one by its tag, full name or digest: \
         docker.io/library/a:1, docker.io/demo/b:1"
    );
}

#[test]
fn directory_that_is_no_layout_is_left_alone() {
    let files = Files::new();
    fs::create_dir(files.path("home")).unwrap();
    files.write("home/letter.txt", b"dear");
    assert!(matches!(DirSink::create(&files.path("home")), Err(LayoutError::Occupied(_))));
    assert!(matches!(DirSink::create(&files.path("vmlinuz")), Err(LayoutError::Occupied(_))));
}

#[test]
fn zeros_of_a_disk_become_holes() {
    use std::os::unix::fs::MetadataExt;
    let files = Files::new();
    fs::File::create(files.path("top.raw")).unwrap().set_len(8 << 20).unwrap();
    let built = files.build("layout", Options { raw_layers: true, ..Options::default() });
    let digest = built.manifest.disk_layers[1].reference.digest().unwrap();
    let blob = fs::metadata(files.path("layout/blobs/sha256").join(digest.hex())).unwrap();
    assert_eq!((blob.len(), blob.blocks()), (8 << 20, 0));
}

#[test]
fn unusable_files_are_refused_by_name() {
    let files = Files::new();
    files.write("text", b"this is no kernel");
    files.write("arm", &{
        let mut image = vec![0; 64];
        image[56..60].copy_from_slice(b"ARMd");
        image
    });
    files.write("elf32", b"\x7fELF\x01\x01");
    files.write("backed.qcow2", &{
        let mut header = qcow2_header();
        (header[15], header[19]) = (104, 5);
        header
    });
    files.write("external.qcow2", &{
        let mut header = qcow2_header();
        header[79] = 4;
        header
    });
    let kernel = |name: &'static str| move |m: &mut Value| m["kernel"]["ref"] = name.into();
    let disk = |name: &'static str, format: &'static str| {
        move |m: &mut Value| m["diskLayers"][1] = json!({ "ref": name, "format": format })
    };

    assert!(files.refused(kernel("text")).contains("text is not a kernel"));
    assert!(files.refused(kernel("arm")).contains("it is a kernel for arm64"));
    assert!(files.refused(kernel("elf32")).contains("not for 64-bit x86"));
    let missing = files.refused(kernel("nowhere"));
    assert!(missing.contains("nowhere cannot be read: No such file"), "{missing}");
    assert!(files.refused(kernel(".")).contains("cannot be read"));
    assert!(files.refused(disk("backed.qcow2", "qcow2")).contains("qemu-img rebase"));
    assert!(files.refused(disk("external.qcow2", "qcow2")).contains("its data is in another file"));
    assert!(files.refused(disk("text", "qcow2")).contains("it is no qcow2 file"));
    assert!(files.refused(disk("base.qcow2", "raw")).contains("it is a qcow2 file"));
    let digest = Digest::of(b"x").to_string();
    let pinned = files.refused(move |m| m["kernel"]["ref"] = digest.into());
    assert!(pinned.contains("kernel.ref") && pinned.contains("a build takes files"), "{pinned}");
    assert!(files.refused(kernel("https://example.org/vmlinuz")).contains("is a URL"));
    assert!(files.refused(kernel("ghcr.io/x/y:1")).contains("is a registry reference"));
}

#[test]
fn wrong_manifest_names_its_file_and_field() {
    let error = Files::new().refused(|m| m["schemaVersion"] = 2.into());
    assert!(
        error.contains("manifest.json is refused: the manifest is not valid: schemaVersion: 2 is unknown"),
        "{error}"
    );
}

#[test]
fn names_are_spelled_out_as_containerd_clients_do() {
    for (text, full) in [
        ("debian", "docker.io/library/debian:latest"),
        ("demo/debian:13", "docker.io/demo/debian:13"),
        ("localhost:5000/demo/debian", "localhost:5000/demo/debian:latest"),
        ("localhost/vm:1.0-rc_2", "localhost/vm:1.0-rc_2"),
        ("ghcr.io/a/b/c:v1", "ghcr.io/a/b/c:v1"),
    ] {
        assert_eq!(ImageName::parse(text).unwrap().full, full);
    }
    for text in ["", ":1", "A/b", "a//b", "a:", "a:.x", "a@sha256:00", "a b", "../a", "localhost:5000/"] {
        assert!(ImageName::parse(text).is_err(), "{text}");
    }
}

#[test]
fn name_of_any_manifest_is_a_name() {
    for (name, version) in [("Example/Ubuntu Base", "24.04 (LTS)"), ("///", ""), ("ä", "ö"), ("-a-", "-1")] {
        let spelled = ImageName::of_manifest(name, version);
        assert_eq!(ImageName::parse(&spelled.full).unwrap(), spelled, "{name} {version}");
    }
}

#[test]
fn image_without_a_kernel_builds_from_its_disk_alone() {
    let files = Files::new();
    let mut recipe = Recipe {
        manifest: Manifest::new("disk", "1"),
        kernel: None,
        initrd: None,
        disks: Vec::new(),
        ram_snapshot: None,
    };
    recipe.push_disk(files.path("base.qcow2"), DiskFormat::Qcow2);
    let sink = Box::new(DirSink::create(&files.path("layout")).unwrap());

    recipe.build(sink, Options::default(), &Quiet).unwrap();

    let image = Layout::open(&files.path("layout")).unwrap().verify(None, &Quiet).unwrap();
    assert!(image.resolved.kernel.is_none() && image.resolved.disks.len() == 1);
}

#[test]
fn ram_snapshot_goes_in_under_the_type_of_its_compression() {
    let files = Files::new();
    files.write("ram.zst", b"frames");
    let path = files.manifest(|m| m["ramSnapshot"] = json!({ "ref": "ram.zst", "compression": "zstd" }));
    let recipe = Recipe::from_manifest(&path).unwrap();
    let sink = Box::new(DirSink::create(&files.path("layout")).unwrap());

    recipe.build(sink, Options::default(), &Quiet).unwrap();

    let image = Layout::open(&files.path("layout")).unwrap().load(None).unwrap();
    assert_eq!(image.resolved.ram_snapshot.unwrap().media_type, media::RAM_SNAPSHOT_ZSTD);
}

#[test]
fn disk_beyond_the_octal_size_field_has_a_header_that_says_its_size() {
    // 8 GiB is what eleven octal digits hold (POSIX ustar).
    let disk = Plain { path: "/dev/null".into(), size: 9 << 30 };
    let wrapped = Wrapped::new(disk, media::MEMBER_RAW, 0).unwrap();
    let mut head = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(wrapped.open().unwrap(), 1024), &mut head).unwrap();
    let mut walker = crate::archive::Walker::new(head.as_slice());
    assert_eq!(walker.next().unwrap().unwrap().path, "ovm");
    let member = walker.next().unwrap().unwrap();
    assert_eq!((member.path.as_str(), member.size, member.offset), (media::MEMBER_RAW, 9 << 30, 1024));
}

#[test]
fn kernel_args_without_kernel_field_stay_out() {
    let mut manifest = Manifest::new("a", "1");
    manifest.kernel = Some(Kernel { reference: Ref::File("k".into()), args: None, extra: Default::default() });
    assert_eq!(manifest.cmdline(), "");
}
