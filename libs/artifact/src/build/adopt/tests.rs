use std::fs;
use std::path::Path;

use super::*;
use crate::layer::Limits;
use crate::layout::{DirSink, Loaded, Quiet};

const RAW: &[u8] = &[7; 1000];

/// Writes a layout whose one image is what `oras push` makes of these files.
fn artifact(dir: &Path, config: (&str, &[u8]), files: &[(&str, &str, &[u8])]) {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        digest
    };
    let layers: Vec<Value> = files
        .iter()
        .map(|(title, media_type, bytes)| {
            let annotations = if title.is_empty() { json!({}) } else { json!({ TITLE: title }) };
            json!({ "mediaType": media_type, "digest": put(bytes), "size": bytes.len(), "annotations": annotations })
        })
        .collect();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "artifactType": media::MANIFEST,
        "config": { "mediaType": config.0, "digest": put(config.1), "size": config.1.len() }, "layers": layers,
    });
    let manifest = manifest.to_string();
    let entry = json!({ "mediaType": media::OCI_MANIFEST, "digest": put(manifest.as_bytes()), "size": manifest.len() });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

fn ovms(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut manifest = json!({
        "schemaVersion": 1, "mediaType": media::MANIFEST, "name": "demo/debian", "version": "13",
        "kernel": { "ref": "vmlinuz" }, "diskLayers": [{ "ref": "base.raw", "format": "raw" }],
    });
    change(&mut manifest);
    manifest.to_string().into_bytes()
}

fn adopt(dir: &Path) -> Result<Loaded, String> {
    let layout = Layout::open(&dir.join("in")).unwrap();
    let image = layout.select(None).unwrap();
    assert!(is_pure_artifact(&layout, &image).unwrap());
    let sink = Box::new(DirSink::create(&dir.join("out")).unwrap());
    let names = vec![ImageName::parse("demo:1").unwrap()];
    match runnable(&layout, &image, names, &Limits::default(), sink, &Quiet) {
        Ok(_) => Ok(Layout::open(&dir.join("out")).unwrap().verify(None, &Quiet).unwrap()),
        Err(error) => {
            let mut text = error.to_string();
            let mut next = std::error::Error::source(&error);
            while let Some(error) = next {
                text = format!("{text}: {error}");
                next = error.source();
            }
            Err(text)
        }
    }
}

#[test]
fn artifact_with_titles_becomes_an_image_of_the_same_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let manifest =
        ovms(|m| m["diskLayers"] = json!([{ "ref": "./b.raw", "format": "raw" }, { "ref": "a.raw", "format": "raw" }]));
    let files: [(&str, &str, &[u8]); 4] = [
        ("vmlinuz", media::KERNEL, b"kernel"),
        ("a.raw", media::OCI_LAYER, RAW),
        ("b.raw", media::OCI_LAYER, &[8; 1000]),
        ("ovms.json", media::MANIFEST, &manifest),
    ];
    artifact(&dir.path().join("in"), (media::OCI_EMPTY, b"{}"), &files);

    let image = adopt(dir.path()).unwrap();

    let disks: Vec<_> = image.resolved.disks.iter().map(|disk| disk.layer.blob.digest).collect();
    assert_eq!(disks, [Digest::of(&[8; 1000]), Digest::of(RAW)]);
    assert_eq!(image.resolved.kernel.unwrap().digest, Digest::of(b"kernel"));
    assert!(image.descriptor.is_some() && image.resolved.manifest.unpinned().is_empty());
}

#[test]
fn artifact_with_its_manifest_in_the_configs_place_becomes_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = ovms(|m| m["kernel"]["ref"] = json!(Digest::of(b"kernel")));
    let files: [(&str, &str, &[u8]); 2] = [("", media::KERNEL, b"kernel"), ("", media::OCI_LAYER, RAW)];
    artifact(&dir.path().join("in"), (media::MANIFEST, &manifest), &files);

    assert_eq!(adopt(dir.path()).unwrap().resolved.disks.len(), 1);
}

#[test]
fn compressed_disk_gets_the_diff_id_of_what_it_holds() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(RAW).unwrap();
    let (gzip, manifest) = (gzip.finish().unwrap(), ovms(|_| ()));
    let files: [(&str, &str, &[u8]); 3] = [
        ("vmlinuz", media::KERNEL, b"kernel"),
        ("base.raw", media::OCI_LAYER_GZIP, &gzip),
        ("ovms.json", media::MANIFEST, &manifest),
    ];
    artifact(&dir.path().join("in"), (media::OCI_EMPTY, b"{}"), &files);

    assert_eq!(adopt(dir.path()).unwrap().parts.layers[0].diff_id, Digest::of(RAW));
}

#[test]
fn artifact_that_lacks_what_it_names_is_refused_by_field() {
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 2] = [
        (|m| m["kernel"]["ref"] = json!(Digest::of(b"other")), "kernel.ref: the image has no blob sha256:"),
        (|m| m["initrd"] = json!({ "ref": "initrd.img" }), "initrd.ref: \"initrd.img\" is not a digest"),
    ];
    for (change, wanted) in cases {
        let dir = tempfile::tempdir().unwrap();
        let manifest = ovms(change);
        let files: [(&str, &str, &[u8]); 3] = [
            ("vmlinuz", media::KERNEL, b"kernel"),
            ("base.raw", media::OCI_LAYER, RAW),
            ("ovms.json", media::MANIFEST, &manifest),
        ];
        artifact(&dir.path().join("in"), (media::OCI_EMPTY, b"{}"), &files);
        let error = adopt(dir.path()).unwrap_err();
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn artifact_without_a_manifest_is_told_to_be_no_ovms_image() {
    let dir = tempfile::tempdir().unwrap();
    artifact(&dir.path().join("in"), (media::OCI_EMPTY, b"{}"), &[("x", "text/plain", b"x")]);
    assert!(adopt(dir.path()).unwrap_err().contains("no OVMS image"));
}
