//! Images that went through other tools and a registry are still the images they were.
//!
//! Needs `docker-registry`, `skopeo` and `oras`.

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
    let (tool, registry) = (program("skopeo"), Registry::start());
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
    let (tool, registry) = (program("skopeo"), Registry::start());
    let parts = Parts::new();
    let digest = parts.build("before", &["--raw-layers"]);
    let remote = format!("docker://{}/demo/debian:13", registry.address);

    skopeo(&parts, &tool, "oci:before:13", &remote, &["--preserve-digests"]);
    skopeo(&parts, &tool, &remote, "oci:after:13", &["--preserve-digests"]);

    assert!(parts.ovm_ok(&["validate", "after"]).contains(&digest));
}

#[test]
fn bare_disks_that_lost_their_annotation_are_refused_with_the_way_out() {
    let (tool, registry) = (program("skopeo"), Registry::start());
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
    let tool = program("skopeo");
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
    let (oras, registry) = (program("oras"), Registry::start());
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
fn pure_artifact_of_oras_is_refused_and_pull_makes_it_a_runnable_image() {
    let (oras, registry) = (program("oras"), Registry::start());
    let parts = Parts::new();
    parts.build("before", &["--raw-layers"]);

    let artifact = ["--artifact-type", "application/vnd.ovms.manifest.v1+json"];
    let after = oras_push(&parts, &registry, &oras, &artifact);

    let said = parts.ovm(&["validate", after]);
    assert_eq!(said.code, Some(65));
    assert!(said.err.contains("`ovm pull` makes it a runnable image"), "{}", said.err);

    let name = format!("{}/demo/oras:1", registry.address);
    parts.ovm_ok(&["pull", &name]);
    parts.ovm_ok(&["validate", "state/store"]);
    let (before, pulled) = (parts.inspect("before"), parts.inspect("state/store"));
    assert_eq!(pulled["manifest"], before["manifest"]);
    assert_eq!(pulled["layers"][1], before["layers"][1]);
    // It goes back as an image that any containerd runs.
    parts.ovm_ok(&["push", &name]);
    assert_eq!(parts.ovm_ok(&["pull", &name]).trim(), pulled["image"]["digest"]);
}

/// What `ovm push` says of bytes: (sent, mounted, there).
fn told(said: &common::Said) -> [String; 3] {
    let line = said.err.lines().last().unwrap_or_default();
    let inner = line.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or_default();
    let words = ["sent", "mounted", "were there"];
    let parts: Vec<&str> = inner.split(", ").collect();
    std::array::from_fn(|i| parts.get(i).and_then(|part| part.strip_suffix(words[i])).unwrap_or("?").trim().to_owned())
}

#[test]
fn push_and_pull_keep_the_image_and_send_only_what_is_lacking() {
    let registry = Registry::start();
    let parts = Parts::new();
    let digest = parts.build("layout", &[]);
    let (name, other) =
        (format!("{}/demo/debian:13", registry.address), format!("{}/other/debian:13", registry.address));

    let first = parts.ovm(&["push", "layout", &name]);
    assert_eq!((first.code, first.out.trim()), (Some(0), digest.as_str()), "{}", first.err);
    let [sent, mounted, there] = told(&first);
    assert!(sent != "0 B" && mounted == "0 B" && there == "0 B", "{}", first.err);
    let again = told(&parts.ovm(&["push", "layout", &name]));
    assert_eq!([&again[0], &again[1], &again[2]], ["0 B", "0 B", sent.as_str()]);

    assert_eq!(parts.ovm_ok(&["pull", &name]).trim(), digest);
    parts.ovm_ok(&["validate", "state/store"]);
    // The store knows now which repository has the blobs.
    let mounted = told(&parts.ovm(&["push", &digest, &other]));
    assert_eq!([&mounted[0], &mounted[1], &mounted[2]], ["0 B", sent.as_str(), "0 B"]);
    assert_eq!(parts.ovm_ok(&["pull", "-q", &format!("{}/other/debian@{digest}", registry.address)]).trim(), digest);

    let listed = parts.ovm_ok(&["ls"]);
    assert!(listed.contains(&name) && listed.contains(&digest[7..19]) && listed.contains("by boot"), "{listed}");
    parts.ovm_ok(&["rmi", &digest]);
    assert_eq!(parts.ovm_ok(&["ls", "--json"]).trim(), "[]");
    assert_eq!(std::fs::read_dir(parts.path("state/store/blobs/sha256")).unwrap().count(), 0);
}

#[test]
fn pull_of_an_index_takes_the_manifest_for_linux_amd64() {
    let (oras, registry) = (program("oras"), Registry::start());
    let parts = Parts::new();
    let digest = parts.build("layout", &[]);
    let name = format!("{}/demo/debian:13", registry.address);
    parts.ovm_ok(&["push", "-q", "layout", &name]);
    let size = parts.inspect("layout")["image"]["size"].clone();
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": size,
            "platform": { "os": "linux", "architecture": "amd64" },
        }],
    });
    parts.write("index.json", index.to_string().as_bytes());
    let many = format!("{}/demo/debian:many", registry.address);
    let media_type = "application/vnd.oci.image.index.v1+json";
    parts.run(&oras, &["manifest", "push", "--plain-http", "--media-type", media_type, &many, "index.json"]);

    assert_eq!(parts.ovm_ok(&["pull", "-q", &many]).trim(), digest);
}

#[test]
fn what_a_registry_does_not_have_or_is_not_is_told_by_message_and_code() {
    let registry = Registry::start();
    let parts = Parts::new();
    let missing = format!("{}/no/such:1", registry.address);
    let cases = [
        (vec!["pull", &missing], 66, "the registry has no image"),
        (vec!["pull", "localhost:1/no/registry:1"], 69, "Connection refused"),
        (vec!["push", "debian:13"], 66, "the store has no image \"debian:13\""),
        (vec!["pull", "UPPER:1"], 65, "UPPER:1"),
    ];
    for (args, code, message) in cases {
        let said = parts.ovm(&args);
        assert_eq!(said.code, Some(code), "{args:?}: {}", said.err);
        assert!(said.err.contains(message), "{args:?}: {}", said.err);
    }
}

#[test]
fn a_blob_that_is_not_what_the_manifest_says_never_reaches_the_store() {
    let registry = Registry::start();
    let parts = Parts::new();
    parts.build("layout", &[]);
    let name = format!("{}/demo/debian:13", registry.address);
    parts.ovm_ok(&["push", "-q", "layout", &name]);
    let initrd = parts.inspect("layout")["initrd"]["digest"].as_str().unwrap()[7..].to_owned();
    let data = registry.data().join("docker/registry/v2/blobs/sha256").join(&initrd[..2]).join(&initrd).join("data");
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[0] ^= 1;
    std::fs::write(&data, bytes).unwrap();

    let said = parts.ovm(&["pull", &name]);

    assert_eq!(said.code, Some(65), "{}", said.err);
    assert!(said.err.contains("wrong digest") && said.err.contains(&initrd), "{}", said.err);
    assert_eq!(parts.ovm_ok(&["ls", "--json"]).trim(), "[]");
}
