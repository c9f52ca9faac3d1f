//! Images that went through other tools and a registry are still the images they were.
//!
//! Needs `docker-registry`, `skopeo` and `oras`; a test whose programs are missing says so and passes.

mod common;

use std::path::Path;

use common::{program, Parts, Registry};
use serde_json::{json, Value};

/// Copies with skopeo between a layout and the registry.
fn skopeo(parts: &Parts, skopeo: &Path, from: &str, to: &str, more: &[&str]) {
    let tls = ["--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", "-q"];
    parts.run(skopeo, &[&tls[..], more, &[from, to]].concat());
}

/// What must survive any copy: the manifest, its kernel, and every layer's content.
fn essence(image: &Value) -> Value {
    let layers: Vec<&Value> = image["layers"].as_array().unwrap().iter().map(|l| &l["diffId"]).collect();
    json!([image["manifest"], image["kernel"]["digest"], image["initrd"]["digest"], image["config"]["digest"], layers])
}

#[test]
fn skopeo_round_trip_recompresses_and_the_image_is_still_known() {
    let (Some(tool), Some(registry)) = (program("skopeo"), Registry::start()) else { return };
    let parts = Parts::new();
    parts.build("before", &[]);
    let remote = format!("docker://{}/demo/debian:13", registry.address);

    skopeo(&parts, &tool, "oci:before:13", &remote, &[]);
    skopeo(&parts, &tool, &remote, "oci:after:13", &[]);

    parts.ovm_ok(&["validate", "after"]);
    let (before, after) = (parts.inspect("before"), parts.inspect("after"));
    assert_eq!(essence(&after), essence(&before));
    assert_eq!(after["chainId"], before["chainId"]);
    // If this no longer holds, skopeo has learned to keep layers and the test above tests less than it says.
    assert_eq!(after["layers"][0]["compression"], "gzip");
}

#[test]
fn skopeo_preserving_digests_keeps_the_image_byte_for_byte() {
    let (Some(tool), Some(registry)) = (program("skopeo"), Registry::start()) else { return };
    let parts = Parts::new();
    let digest = parts.build("before", &["--raw-layers"]);
    let remote = format!("docker://{}/demo/debian:13", registry.address);

    skopeo(&parts, &tool, "oci:before:13", &remote, &["--preserve-digests"]);
    skopeo(&parts, &tool, &remote, "oci:after:13", &["--preserve-digests"]);

    assert!(parts.ovm_ok(&["validate", "after"]).contains(&digest));
}

#[test]
fn bare_disks_that_lost_their_annotation_are_refused_with_the_way_out() {
    let (Some(tool), Some(registry)) = (program("skopeo"), Registry::start()) else { return };
    let parts = Parts::new();
    parts.build("before", &["--raw-layers"]);
    let remote = format!("docker://{}/demo/debian:13", registry.address);
    skopeo(&parts, &tool, "oci:before:13", &remote, &[]);
    skopeo(&parts, &tool, &remote, "oci:after:13", &[]);

    let said = parts.ovm(&["validate", "after"]);

    assert_eq!(said.code, Some(65));
    assert!(said.err.contains("ovms.format") && said.err.contains("skopeo copy --preserve-digests"), "{}", said.err);
}

#[test]
fn skopeo_reads_the_tar_that_build_writes() {
    let Some(tool) = program("skopeo") else { return };
    let parts = Parts::new();
    let digest = parts.build("image.tar", &[]);

    skopeo(&parts, &tool, "oci-archive:image.tar:13", "oci:after:13", &["--preserve-digests"]);

    assert_eq!(parts.inspect("after")["image"]["digest"], digest);
}

/// An image of the same files, pushed by oras; returns the layout it is copied back into.
fn oras_push(parts: &Parts, registry: &Registry, oras: &Path, more: &[&str]) -> &'static str {
    let built = parts.inspect("before");
    let manifest = serde_json::to_vec(&built["manifest"]).unwrap();
    parts.write("ovms.json", &manifest);
    let reference = format!("{}/demo/oras:1", registry.address);
    let annotations = json!({ "base.qcow2": { "ovms.format": "qcow2" }, "diff.qcow2": { "ovms.format": "qcow2" } });
    parts.write("annotations.json", annotations.to_string().as_bytes());
    let tar = "application/vnd.oci.image.layer.v1.tar";
    let files = [
        "vmlinuz:application/vnd.ovms.kernel.v1".to_owned(),
        "initrd.img:application/vnd.ovms.initrd.v1".to_owned(),
        format!("base.qcow2:{tar}"),
        format!("diff.qcow2:{tar}"),
        "ovms.json:application/vnd.ovms.manifest.v1+json".to_owned(),
    ];
    let mut args = vec!["push", "--plain-http", "--annotation-file", "annotations.json"];
    args.extend(more);
    args.push(&reference);
    args.extend(files.iter().map(String::as_str));
    parts.run(oras, &args);
    parts.run(oras, &["copy", "--from-plain-http", &reference, "--to-oci-layout", "after:1"]);
    "after"
}

#[test]
fn image_pushed_by_oras_with_a_config_is_known_without_a_descriptor() {
    let (Some(oras), Some(registry)) = (program("oras"), Registry::start()) else { return };
    let parts = Parts::new();
    parts.build("before", &["--raw-layers"]);
    let built = parts.inspect("before");
    let diff_ids = [&built["layers"][0]["diffId"], &built["layers"][1]["diffId"]];
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Entrypoint": ["/vm"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    parts.write("config.json", config.to_string().as_bytes());

    let after =
        oras_push(&parts, &registry, &oras, &["--config", "config.json:application/vnd.oci.image.config.v1+json"]);

    parts.ovm_ok(&["validate", after]);
    let image = parts.inspect(after);
    assert_eq!(image["descriptor"], Value::Null);
    assert_eq!(image["manifest"], built["manifest"]);
    assert_eq!(image["layers"][1]["role"], "disk 1");
}

#[test]
fn pure_artifact_of_oras_is_refused_and_told_about_pull() {
    let (Some(oras), Some(registry)) = (program("oras"), Registry::start()) else { return };
    let parts = Parts::new();
    parts.build("before", &["--raw-layers"]);

    let artifact = ["--artifact-type", "application/vnd.ovms.manifest.v1+json"];
    let after = oras_push(&parts, &registry, &oras, &artifact);

    let said = parts.ovm(&["validate", after]);
    assert_eq!(said.code, Some(65));
    assert!(said.err.contains("`ovm pull` makes it a runnable image"), "{}", said.err);
}
