use serde_json::json;

use super::*;
use crate::manifest::{DiskLayer, Kernel};

fn digest(what: &str) -> Digest {
    Digest::of(what.as_bytes())
}

fn blob(media_type: &str, what: &str) -> serde_json::Value {
    json!({ "mediaType": media_type, "digest": digest(what), "size": 1 })
}

fn image(layers: Vec<serde_json::Value>) -> oci::ImageManifest {
    let config = blob(media::OCI_CONFIG, "config");
    serde_json::from_value(json!({ "schemaVersion": 2, "config": config, "layers": layers })).unwrap()
}

fn config(diff_ids: &[&str]) -> Vec<u8> {
    let diff_ids: Vec<Digest> = diff_ids.iter().map(|d| digest(d)).collect();
    json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": diff_ids } })
        .to_string()
        .into_bytes()
}

/// An OVMS manifest of a kernel and disks by these refs.
fn manifest(kernel: &str, disks: &[&str]) -> Manifest {
    let mut manifest = Manifest::new("a", "1");
    manifest.kernel = Some(Kernel { reference: Ref::parse(kernel), args: None, extra: Default::default() });
    for disk in disks {
        let reference = Ref::parse(disk);
        manifest.disk_layers.push(DiskLayer {
            reference,
            format: DiskFormat::Raw,
            size: None,
            extra: Default::default(),
        });
    }
    manifest
}

#[test]
fn resolve_finds_kernel_and_disks_by_blob_digest() {
    let image = image(vec![blob(media::KERNEL, "k"), blob(media::OCI_LAYER, "d0"), blob(media::OCI_LAYER, "desc")]);
    let parts = Parts::new(&image, &config(&["d0", "desc"])).unwrap();

    let resolved = parts.resolve(manifest(&digest("k").to_string(), &[&digest("d0").to_string()])).unwrap();

    assert_eq!(resolved.kernel.unwrap().digest, digest("k"));
    assert_eq!(resolved.disks[0].layer.diff_id, digest("d0"));
    let (d0, desc) = (digest("d0"), digest("desc"));
    assert_eq!(parts.chain_id(), Some(Digest::of(format!("{d0} {desc}").as_bytes())));
}

#[test]
fn resolve_finds_a_recompressed_layer_by_its_diff_id() {
    let layers = vec![blob(media::KERNEL, "k"), blob(media::OCI_LAYER_GZIP, "d0 gzipped")];
    let parts = Parts::new(&image(layers), &config(&["d0"])).unwrap();

    let resolved = parts.resolve(manifest(&digest("k").to_string(), &[&digest("d0").to_string()])).unwrap();

    assert_eq!(resolved.disks[0].layer.blob.digest, digest("d0 gzipped"));
}

#[test]
fn resolve_finds_a_disk_by_the_digest_of_its_file() {
    let layers = vec![blob(media::KERNEL, "k"), blob(media::OCI_LAYER, "layer")];
    let mut parts = Parts::new(&image(layers), &config(&["layer"])).unwrap();
    let disk = DiskSummary { format: DiskFormat::Raw, size: 1, digest: Some(digest("disk")), bare: false };
    parts.layers[0].disk = Some(disk);

    let resolved = parts.resolve(manifest(&digest("k").to_string(), &[&digest("disk").to_string()])).unwrap();

    assert_eq!(resolved.disks[0].layer.diff_id, digest("layer"));
}

#[test]
fn resolve_without_digests_takes_the_only_blob_of_the_type() {
    let layers = vec![blob("application/vnd.hypr.ovms.kernel.v1", "k"), blob(media::OCI_LAYER, "d0")];
    let parts = Parts::new(&image(layers), &config(&["d0"])).unwrap();

    let resolved = parts.resolve(manifest("vmlinuz", &["base.raw"])).unwrap();

    assert_eq!(resolved.kernel.unwrap().digest, digest("k"));
    assert_eq!(resolved.disks.len(), 1);
}

#[test]
fn resolve_without_digests_and_two_kernels_names_the_field() {
    let layers = vec![blob(media::KERNEL, "k"), blob(media::KERNEL, "l")];
    let parts = Parts::new(&image(layers), &config(&[])).unwrap();
    let error = parts.resolve(manifest("vmlinuz", &[])).unwrap_err().to_string();
    assert_eq!(error, "kernel.ref: \"vmlinuz\" is not a digest, and the image has 2 blobs it could be");
}

#[test]
fn resolve_missing_blob_names_field_and_digest() {
    let parts = Parts::new(&image(vec![blob(media::KERNEL, "k")]), &config(&[])).unwrap();
    let (k, gone) = (digest("k").to_string(), digest("gone").to_string());

    let kernel = parts.resolve(manifest(&gone, &[])).unwrap_err().to_string();
    let disk = parts.resolve(manifest(&k, &[&gone])).unwrap_err().to_string();

    assert_eq!(kernel, format!("kernel.ref: the image has no blob {gone}"));
    assert_eq!(disk, format!("diskLayers[0].ref: the image has no blob {gone}"));
}

#[test]
fn resolve_takes_one_content_several_times_but_in_order() {
    let layer = |what| blob(media::OCI_LAYER, what);
    let parts = Parts::new(
        &image(vec![blob(media::KERNEL, "k"), layer("a"), layer("b"), layer("b")]),
        &config(&["a", "b", "b"]),
    )
    .unwrap();
    let [k, a, b] = ["k", "a", "b"].map(|w| digest(w).to_string());

    assert_eq!(parts.resolve(manifest(&k, &[&a, &b, &b])).unwrap().disks.len(), 3);
    let error = parts.resolve(manifest(&k, &[&b, &a])).unwrap_err();
    assert!(matches!(error, ImageError::DiskOrder(field) if field == "diskLayers[1].ref"));
}

#[test]
fn resolve_manifest_and_annotation_must_agree_on_the_format() {
    let mut layer = blob(media::OCI_LAYER, "d0");
    layer["annotations"] = json!({ media::ANNOTATION_FORMAT: "qcow2" });
    let parts = Parts::new(&image(vec![blob(media::KERNEL, "k"), layer]), &config(&["d0"])).unwrap();
    let error = parts.resolve(manifest("vmlinuz", &[&digest("d0").to_string()])).unwrap_err().to_string();
    assert_eq!(error, "diskLayers[0].format: is raw, but the layer is qcow2");
}

#[test]
fn new_pure_artifact_says_that_pull_makes_it_runnable() {
    let config = blob(media::OCI_EMPTY, "{}");
    let image = serde_json::from_value(json!({ "schemaVersion": 2, "config": config, "layers": [] })).unwrap();
    let error = Parts::new(&image, b"{}").unwrap_err().to_string();
    assert!(error.contains("ovm pull"), "{error}");
}

#[test]
fn new_other_platform_is_refused() {
    let config = br#"{ "architecture": "arm64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] } }"#;
    let error = Parts::new(&image(vec![]), config).unwrap_err().to_string();
    assert_eq!(error, "the image is for linux/arm64, this runtime runs linux/amd64");
}

#[test]
fn new_wrong_number_of_diff_ids_is_refused() {
    let image = image(vec![blob(media::OCI_LAYER, "a")]);
    assert!(matches!(Parts::new(&image, &config(&[])), Err(ImageError::DiffIds { layers: 1, diff_ids: 0 })));
}

#[test]
fn new_digest_of_another_algorithm_is_refused() {
    let mut layer = blob(media::OCI_LAYER, "a");
    layer["digest"] = json!(format!("sha512:{}", "0".repeat(128)));
    assert!(matches!(Parts::new(&image(vec![layer]), &config(&["a"])), Err(ImageError::Digest { .. })));
}
