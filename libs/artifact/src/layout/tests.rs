use std::fs;
use std::io::Read;

use serde_json::{json, Value};

use super::*;
use crate::manifest::{DiskFormat, DiskLayer, Kernel, Manifest, Ref};

/// A layout written by hand, as other tools write it or as nobody should.
struct Hand {
    dir: tempfile::TempDir,
}

impl Hand {
    fn new() -> Self {
        let hand = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir_all(hand.dir.path().join("blobs/sha256")).unwrap();
        hand.write("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        hand
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.dir.path().join(name), bytes).unwrap();
    }

    fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        self.write(&format!("blobs/sha256/{}", digest.hex()), bytes);
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    fn json(&self, media_type: &str, value: &Value) -> Value {
        self.blob(media_type, value.to_string().as_bytes())
    }

    /// An image as `oras push --config` writes it: kernel, bare disk, OVMS manifest; no descriptor layer.
    fn image(&self, arch: &str) -> Value {
        let kernel = self.blob(media::KERNEL, b"kernel");
        let mut disk = self.blob(media::OCI_LAYER, b"disk");
        disk["annotations"] = json!({ media::ANNOTATION_FORMAT: "raw" });
        let mut manifest = Manifest::new("hand", "1");
        let reference = Ref::Digest(Digest::of(b"kernel"));
        manifest.kernel = Some(Kernel { reference, args: None, extra: Default::default() });
        let reference = Ref::Digest(Digest::of(b"disk"));
        manifest.disk_layers.push(DiskLayer {
            reference,
            format: DiskFormat::Raw,
            size: None,
            extra: Default::default(),
        });
        let ovms = self.blob("application/vnd.hypr.ovms.manifest.v1+json", &manifest.to_bytes().unwrap());
        let config = json!({
            "architecture": arch, "os": "linux",
            "rootfs": { "type": "layers", "diff_ids": [disk["digest"]] },
        });
        let config = self.json(media::OCI_CONFIG, &config);
        let image = json!({ "schemaVersion": 2, "config": config, "layers": [kernel, disk, ovms] });
        self.json(media::OCI_MANIFEST, &image)
    }

    fn index(&self, manifests: Value) -> &Self {
        self.write("index.json", json!({ "schemaVersion": 2, "manifests": manifests }).to_string().as_bytes());
        self
    }

    fn open(&self) -> Result<Layout, LayoutError> {
        Layout::open(self.dir.path())
    }

    /// The same layout as a tar.
    fn tar(&self) -> PathBuf {
        let path = self.dir.path().with_extension("tar");
        let mut builder = tar::Builder::new(fs::File::create(&path).unwrap());
        builder.append_dir_all(".", self.dir.path()).unwrap();
        builder.finish().unwrap();
        path
    }
}

fn with_platform(mut descriptor: Value, arch: &str) -> Value {
    descriptor["platform"] = json!({ "architecture": arch, "os": "linux" });
    descriptor
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

#[test]
fn image_without_descriptor_is_known_by_its_manifest_blob() {
    let hand = Hand::new();
    let image = hand.index(json!([hand.image("amd64")])).open().unwrap().verify(None, &Quiet).unwrap();
    assert_eq!(image.descriptor, None);
    assert_eq!(image.resolved.kernel.unwrap().digest, Digest::of(b"kernel"));
    assert_eq!(image.resolved.disks[0].format, DiskFormat::Raw);
}

#[test]
fn tar_of_a_layout_reads_as_the_layout() {
    let hand = Hand::new();
    let dir = hand.index(json!([hand.image("amd64")])).open().unwrap().verify(None, &Quiet).unwrap();
    let path = hand.tar();
    let tar = Layout::open(&path).unwrap();
    assert_eq!(tar.verify(None, &Quiet).unwrap(), dir);
    let mut bytes = Vec::new();
    tar.blob(&Digest::of(b"disk"), 4).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!((bytes.as_slice(), tar.blob_path(&Digest::of(b"disk"))), (&b"disk"[..], None));
    fs::remove_file(path).unwrap();
}

#[test]
fn linux_amd64_is_taken_from_nested_indexes() {
    let hand = Hand::new();
    let (ours, other) = (hand.image("amd64"), hand.image("arm64"));
    let mut unknown = hand.blob(media::OCI_MANIFEST, b"says no platform, and something else does say ours");
    unknown["annotations"] = json!({ "vnd.docker.reference.type": "attestation-manifest" });
    let platforms = json!([unknown, with_platform(other, "arm64"), with_platform(ours.clone(), "amd64")]);
    let inner = hand.json(media::OCI_INDEX, &json!({ "schemaVersion": 2, "manifests": platforms }));
    let outer = hand.json(media::DOCKER_INDEX, &json!({ "schemaVersion": 2, "manifests": [inner] }));

    let selected = hand.index(json!([outer])).open().unwrap().select(None).unwrap();

    assert_eq!(selected.digest().to_string(), ours["digest"].as_str().unwrap());
}

#[test]
fn indexes_nested_without_end_are_refused() {
    let hand = Hand::new();
    let mut inner = hand.image("amd64");
    for _ in 0..=MAX_INDEX_DEPTH {
        inner = hand.json(media::OCI_INDEX, &json!({ "schemaVersion": 2, "manifests": [inner] }));
    }
    assert!(matches!(hand.index(json!([inner])).open().unwrap().select(None), Err(LayoutError::Depth)));
}

#[test]
fn layout_without_our_platform_is_refused() {
    let hand = Hand::new();
    let layout = hand.index(json!([with_platform(hand.image("arm64"), "arm64")])).open().unwrap();
    assert!(matches!(layout.load(None), Err(LayoutError::NoImage { .. })));
}

#[test]
fn several_images_need_a_tag() {
    let hand = Hand::new();
    let mut one = hand.image("amd64");
    one["annotations"] = json!({ media::ANNOTATION_REF_NAME: "1" });
    let mut two = hand.json(media::OCI_MANIFEST, &json!({ "schemaVersion": 2, "config": one, "layers": [] }));
    two["annotations"] = json!({ media::ANNOTATION_REF_NAME: "2" });
    let layout = hand.index(json!([one, two])).open().unwrap();

    assert!(matches!(layout.select(None), Err(LayoutError::Ambiguous { names, .. }) if names == "1, 2"));
    assert!(layout.load(Some("1")).is_ok());
}

#[test]
fn changed_blob_is_found_and_named() {
    let hand = Hand::new();
    let layout = hand.index(json!([hand.image("amd64")])).open().unwrap();
    let digest = Digest::of(b"disk");
    hand.write(&format!("blobs/sha256/{}", digest.hex()), b"dusk");

    let error = layout.verify(None, &Quiet).unwrap_err();

    let text = chain(&error);
    assert!(text.contains(&format!("blob {digest} has the wrong digest")), "{text}");
}

#[test]
fn missing_blob_is_named() {
    let hand = Hand::new();
    let layout = hand.index(json!([hand.image("amd64")])).open().unwrap();
    let digest = Digest::of(b"kernel");
    fs::remove_file(hand.dir.path().join(format!("blobs/sha256/{}", digest.hex()))).unwrap();
    assert!(matches!(layout.verify(None, &Quiet), Err(LayoutError::MissingBlob(d)) if d == digest));
}

#[test]
fn blob_that_is_a_link_is_refused() {
    let hand = Hand::new();
    let layout = hand.index(json!([hand.image("amd64")])).open().unwrap();
    let path = hand.dir.path().join(format!("blobs/sha256/{}", Digest::of(b"kernel").hex()));
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    assert!(matches!(layout.verify(None, &Quiet), Err(LayoutError::Io { .. })));
}

#[test]
fn wrong_diff_id_is_found() {
    let hand = Hand::new();
    let mut disk = hand.blob(media::OCI_LAYER, b"disk");
    disk["annotations"] = json!({ media::ANNOTATION_FORMAT: "raw" });
    let diff_id = Digest::of(b"another");
    let config = json!({
        "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [diff_id] },
    });
    let config = hand.json(media::OCI_CONFIG, &config);
    let image = hand.json(media::OCI_MANIFEST, &json!({ "schemaVersion": 2, "config": config, "layers": [disk] }));
    let layout = hand.index(json!([image])).open().unwrap();
    assert!(matches!(layout.verify(None, &Quiet), Err(LayoutError::DiffId { expected, .. }) if expected == diff_id));
}

#[test]
fn ordinary_image_is_told_to_be_no_ovms_image() {
    let hand = Hand::new();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = header(2, 0, tar::EntryType::Regular);
    builder.append_data(&mut header, "bin/sh", &b"sh"[..]).unwrap();
    let layer = hand.blob(media::OCI_LAYER, &builder.into_inner().unwrap());
    let config = json!({
        "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = hand.json(media::OCI_CONFIG, &config);
    let image = hand.json(media::OCI_MANIFEST, &json!({ "schemaVersion": 2, "config": config, "layers": [layer] }));
    let layout = hand.index(json!([image])).open().unwrap();
    assert!(matches!(layout.load(None), Err(LayoutError::Image(ImageError::NotOvms))));
}

#[test]
fn what_is_no_layout_is_told() {
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(Layout::open(empty.path()), Err(LayoutError::NotLayout { .. })));
    let hand = Hand::new();
    assert!(matches!(hand.open(), Err(LayoutError::NotLayout { .. })));
    hand.write("index.json", b"{}");
    assert!(matches!(hand.open(), Err(LayoutError::Document(..))));
    hand.write("oci-layout", br#"{"imageLayoutVersion":"9"}"#);
    assert!(matches!(hand.open(), Err(LayoutError::NotLayout { .. })));
    let file = hand.dir.path().join("file");
    fs::write(&file, vec![1; 4096]).unwrap();
    assert!(matches!(Layout::open(&file), Err(LayoutError::Archive { .. })));
}

#[test]
fn documents_beyond_the_limit_are_not_read() {
    let hand = Hand::new();
    hand.write("index.json", &vec![b' '; (MAX_DOCUMENT + 1) as usize]);
    assert!(matches!(hand.open(), Err(LayoutError::TooLarge { .. })));

    let hand = Hand::new();
    let mut image = hand.image("amd64");
    image["size"] = json!(u64::MAX);
    assert!(matches!(hand.index(json!([image])).open().unwrap().load(None), Err(LayoutError::TooLarge { .. })));
}
