//! The verbs of `ovm`, as a user's shell sees them: output, error line, exit code.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::Parts;
use serde_json::json;

/// What a refused command says: one line, with this exit code.
#[track_caller]
fn refused(parts: &Parts, args: &[&str], code: i32, wanted: &str) {
    let said = parts.ovm(args);
    assert_eq!(said.code, Some(code), "{args:?}: {}", said.err);
    let last = said.err.lines().last().unwrap_or_default();
    assert!(last.starts_with("ovm: ") && last.contains(wanted), "{args:?}: {}", said.err);
    assert_eq!(said.err.matches("ovm: ").count(), 1, "the error is printed once: {}", said.err);
}

#[test]
fn build_validate_and_inspect_agree_on_the_image() {
    let parts = Parts::new();
    let digest = parts.build("layout", &["--author", "me", "--device", "ivshmem,name=shm0,size=1M,addr=0x4000000000"]);

    let validated = parts.ovm_ok(&["validate", "layout"]);
    let shown = parts.ovm_ok(&["inspect", "layout"]);
    let image = parts.inspect("layout");

    assert!(digest.starts_with("sha256:") && validated.contains(&digest) && shown.contains(&digest));
    assert_eq!(image["image"]["digest"], digest);
    assert_eq!(image["names"], json!([{ "tag": "13", "name": "docker.io/demo/debian:13" }]));
    assert_eq!(image["defaults"], json!({ "vcpus": 2, "memoryBytes": 1 << 30 }));
    assert_eq!(image["manifest"]["kernel"]["args"], "console=ttyS0");
    assert_eq!(image["manifest"]["devices"][0]["mmio_addr"], "0x4000000000");
    let roles: Vec<&str> = image["layers"].as_array().unwrap().iter().filter_map(|l| l["role"].as_str()).collect();
    assert_eq!(roles, ["disk 0", "disk 1", "descriptor"]);
    for (i, disk) in image["manifest"]["diskLayers"].as_array().unwrap().iter().enumerate() {
        assert_eq!(disk["ref"], image["layers"][i]["diffId"]);
        assert_eq!(disk["size"], 8192);
    }
}

#[test]
fn build_of_the_same_files_gives_the_same_bytes() {
    let parts = Parts::new();
    parts.build("one.tar", &[]);
    parts.build("two.tar", &[]);
    assert!(fs::read(parts.path("one.tar")).unwrap() == fs::read(parts.path("two.tar")).unwrap());
    assert_eq!(parts.build("dir", &[]), parts.build("three.tar", &[]));
}

#[test]
fn build_dates_the_image_by_source_date_epoch() {
    let parts = Parts::new();
    let dated = |epoch: &str| {
        let args = ["build", "--name", "a", "--version", "1", "--kernel", "vmlinuz", "-o", "layout"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovm"));
        command.args(args).current_dir(parts.path("")).env("SOURCE_DATE_EPOCH", epoch).output().unwrap()
    };
    assert!(dated("86400").status.success());
    assert_eq!(parts.inspect("layout")["manifest"]["metadata"]["created"], "1970-01-02T00:00:00Z");
    assert_eq!(dated("yesterday").status.code(), Some(65));
}

#[test]
fn build_from_the_documented_example_gives_a_valid_image() {
    let parts = Parts::new();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples/debian.manifest.json");
    parts.write("debian.manifest.json", &fs::read(example).unwrap());

    let validated = parts.ovm_ok(&["validate", "debian.manifest.json"]);
    parts.ovm_ok(&["build", "-f", "debian.manifest.json", "-o", "layout"]);

    assert!(validated.contains("kernel.ref: \"vmlinuz\" is no digest yet"), "{validated}");
    assert!(parts.ovm_ok(&["validate", "layout"]).contains("6 blobs"));
    assert_eq!(parts.inspect("layout")["defaults"], json!({ "vcpus": 2, "memoryBytes": 512 << 20 }));
}

#[test]
fn flags_beside_a_manifest_override_it() {
    let parts = Parts::new();
    let manifest = json!({
        "schemaVersion": 1, "mediaType": "application/vnd.ovms.manifest.v1+json", "name": "a", "version": "1",
        "kernel": { "ref": "vmlinuz", "args": "quiet" }, "io.ovms": { "vcpus": 1, "memoryBytes": 64 << 20 },
    });
    fs::create_dir(parts.path("below")).unwrap();
    parts.write("below/vmlinuz", &fs::read(parts.path("vmlinuz")).unwrap());
    parts.write("below/manifest.json", manifest.to_string().as_bytes());

    let flags = ["--version", "2", "--disk", "base.qcow2", "--memory", "1G", "-o", "layout"];
    parts.ovm_ok(&[&["build", "-f", "below/manifest.json"], &flags[..]].concat());

    let image = parts.inspect("layout");
    assert_eq!(image["names"][0]["name"], "docker.io/library/a:2");
    assert_eq!(image["defaults"], json!({ "vcpus": 1, "memoryBytes": 1 << 30 }));
    assert_eq!(image["manifest"]["kernel"]["args"], "quiet");
    assert_eq!(image["layers"][0]["role"], "disk 0");
}

#[test]
fn tags_name_the_image() {
    let parts = Parts::new();
    parts.build("layout", &["--tag", "localhost:5000/vm:a", "--tag", "localhost:5000/vm:b"]);
    let names = parts.inspect("layout")["names"].clone();
    assert_eq!(names[0], json!({ "tag": "a", "name": "localhost:5000/vm:a" }));
    assert_eq!(names[1], json!({ "tag": "b", "name": "localhost:5000/vm:b" }));
}

#[test]
fn what_this_version_cannot_start_is_built_with_a_warning() {
    let parts = Parts::new();
    let manifest = |more: serde_json::Value| {
        let mut manifest = json!({
            "schemaVersion": 1, "mediaType": "application/vnd.ovms.manifest.v1+json", "name": "a", "version": "1",
        });
        manifest.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        parts.write("manifest.json", manifest.to_string().as_bytes());
    };
    let kernel = json!({ "ref": "vmlinuz" });
    let disks = json!([{ "ref": "base.qcow2", "format": "qcow2" }]);
    let device = json!([{ "type": "ivshmem", "name": "shm0", "size": 4096 }]);
    for (more, wanted) in [
        (
            json!({ "kernel": kernel, "devices": device }),
            "devices[0]: this version has no device of type ivshmem (\"shm0\")",
        ),
        (json!({ "diskLayers": disks }), "kernel: missing, and this version does not boot firmware from a disk"),
        (json!({ "kernel": kernel, "containerMode": true }), "containerMode: this version has no container mode"),
    ] {
        manifest(more);
        let warning = format!("ovm: warning: no machine of this image can be started: {wanted}\n");

        let built = parts.ovm(&["build", "-f", "manifest.json", "-o", "layout"]);

        assert_eq!((built.code, built.err.matches(&warning).count()), (Some(0), 1), "{}", built.err);
        for path in ["layout", "manifest.json"] {
            let validated = parts.ovm(&["validate", path]);
            assert_eq!(
                (validated.code, validated.err.matches(&warning).count()),
                (Some(0), 1),
                "{path}: {}",
                validated.err
            );
            assert!(parts.ovm_ok(&["inspect", path]).contains(wanted));
        }
        assert_eq!(parts.ovm(&["build", "-q", "-f", "manifest.json", "-o", "layout"]).err, "");
        fs::remove_dir_all(parts.path("layout")).unwrap();
    }
    manifest(json!({ "kernel": kernel }));
    assert!(!parts.ovm(&["build", "-f", "manifest.json", "-o", "layout"]).err.contains("warning"));
}

#[test]
fn every_hint_of_the_command_line_goes_into_the_manifest() {
    let parts = Parts::new();
    parts.write("ram.lz4", b"blocks");
    let hints = ["--preferred-runtime", "ovms", "--preferred-runtime", "other", "--cold-start-target-ms", "250"];
    let ram = ["--ram", "ram.lz4", "--ram-preload", "--ram-mlock"];

    parts.build("layout", &[&hints[..], &ram, &["--created", "2026-02-03T04:05:06Z", "--author", "me"]].concat());

    let manifest = parts.inspect("layout")["manifest"].clone();
    assert_eq!(manifest["runtimeHints"], json!({ "preferredRuntime": ["ovms", "other"], "coldStartTargetMs": 250 }));
    assert_eq!(manifest["metadata"]["created"], "2026-02-03T04:05:06Z");
    assert_eq!(manifest["metadata"]["author"], "me");
    let ram = &manifest["ramSnapshot"];
    assert_eq!(
        (&ram["compression"], &ram["preload_hint"], &ram["mlock_required"]),
        (&json!("lz4"), &json!(true), &json!(true))
    );
    parts.build("plain", &["--ram", "ram.lz4"]);
    let ram = parts.inspect("plain")["manifest"]["ramSnapshot"].clone();
    assert_eq!((&ram["preload_hint"], &ram["mlock_required"]), (&json!(false), &json!(false)));
    for alone in ["--ram-preload", "--ram-mlock"] {
        let args = ["build", "--name", "a", "--version", "1", "--kernel", "vmlinuz", "-o", "x", alone];
        assert_eq!(parts.ovm(&args).code, Some(2), "{alone}");
    }
    refused(
        &parts,
        &["build", "--name", "a", "--version", "1", "--kernel", "vmlinuz", "-o", "x", "--created", "today"],
        65,
        "metadata.created",
    );
}

#[test]
fn quiet_build_prints_nothing_but_the_digest() {
    let parts = Parts::new();
    let args = ["build", "-q", "--name", "a", "--version", "1", "--kernel", "vmlinuz", "-o", "layout"];
    let said = parts.ovm(&args);
    assert_eq!((said.out.lines().count(), said.err.as_str()), (1, ""));
}

#[test]
fn wrong_usage_returns_2() {
    let parts = Parts::new();
    for args in [
        &["build"][..],
        &["build", "-o", "x", "--kernel", "vmlinuz"],
        &["build", "-o", "x", "--name", "a", "--version", "1", "--disk", "disk.vmdk"],
        &["build", "-o", "x", "--name", "a", "--version", "1", "--memory", "lots"],
        &["build", "-o", "x", "--name", "a", "--version", "1", "--tag", "UPPER"],
        &["fly"],
        &[],
    ] {
        assert_eq!(parts.ovm(args).code, Some(2), "{args:?}");
    }
}

#[test]
fn bad_input_returns_65_and_leaves_nothing() {
    let parts = Parts::new();
    parts.write("text", b"this is no kernel");
    let mut huge_clusters = fs::read(parts.path("base.qcow2")).unwrap();
    huge_clusters[23] = 40;
    parts.write("askew.qcow2", &huge_clusters);
    let base = ["build", "-o", "out", "--name", "a", "--version", "1"];
    let long = "x".repeat(3000);
    for (flags, wanted) in [
        (&["--kernel", "text"][..], "text is not a kernel"),
        (&["--kernel", "vmlinuz", "--args", &long], "kernel.args: the command line has 3000 bytes"),
        (&["--kernel", "vmlinuz", "--device", "gpu,name=g"], "devices[0].type: this runtime has no device \"gpu\""),
        (&["--kernel", "vmlinuz", "--vcpus", "99"], "io.ovms.vcpus: 99 is out of range"),
        (&["--disk", "text,format=qcow2"], "text cannot be a disk layer"),
        (&["--disk", "askew.qcow2"], "askew.qcow2 cannot be a disk layer: "),
        (&["--initrd", "initrd.img", "--disk", "base.qcow2"], "initrd: needs a kernel"),
        (&["--args", "quiet", "--disk", "base.qcow2"], "--args is for a kernel"),
        (&[], "kernel: missing, and there is no disk layer to boot from"),
    ] {
        refused(&parts, &[&base[..], flags].concat(), 65, wanted);
        assert!(!parts.path("out").exists(), "{flags:?} leaves something half-made");
    }
}

#[test]
fn missing_files_return_66() {
    let parts = Parts::new();
    let build = ["build", "-o", "out", "--name", "a", "--version", "1", "--kernel", "nowhere"];
    refused(&parts, &build, 66, "nowhere cannot be read: No such file");
    refused(&parts, &["validate", "nowhere"], 66, "nowhere cannot be read");
    refused(&parts, &["inspect", "nowhere.json"], 66, "nowhere.json cannot be read");
    refused(&parts, &["inspect", "nowhere"], 66, "nowhere is no machine, no image of the store and no file");
    refused(&parts, &["inspect", "nowhere:1"], 66, "the store has no image \"nowhere:1\"");
    refused(&parts, &["snapshot", "nowhere", "-t", "x:1"], 66, "there is no machine nowhere: ovm ps lists them");
    refused(&parts, &["build", "-f", "nowhere.json", "-o", "out"], 66, "nowhere.json cannot be read");
}

#[test]
fn occupied_output_returns_73() {
    let parts = Parts::new();
    fs::create_dir(parts.path("home")).unwrap();
    parts.write("home/letter", b"dear");
    let args = ["build", "-o", "home", "--name", "a", "--version", "1", "--kernel", "vmlinuz"];
    refused(&parts, &args, 73, "home exists and is no OCI image layout");
    assert_eq!(fs::read_dir(parts.path("home")).unwrap().count(), 1);
}

#[test]
fn validate_names_the_blob_that_was_changed() {
    let parts = Parts::new();
    parts.build("layout", &[]);
    let disk = parts.inspect("layout")["layers"][0]["digest"].as_str().unwrap().to_owned();
    let path = parts.path(&format!("layout/blobs/sha256/{}", disk.trim_start_matches("sha256:")));
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();

    refused(&parts, &["validate", "layout"], 65, &format!("blob {disk} has the wrong digest: expected {disk}, found"));
}

#[test]
fn validate_finds_a_cut_tar() {
    let parts = Parts::new();
    parts.build("image.tar", &[]);
    let bytes = fs::read(parts.path("image.tar")).unwrap();
    parts.write("cut.tar", &bytes[..bytes.len() / 2]);
    assert_eq!(parts.ovm(&["validate", "cut.tar"]).code, Some(65));
    parts.write("text.tar", b"no tar at all");
    refused(&parts, &["validate", "text.tar"], 65, "not a tar archive");
}

#[test]
fn validate_names_every_wrong_field_of_a_manifest() {
    let parts = Parts::new();
    let manifest = json!({
        "schemaVersion": 3, "mediaType": "application/vnd.ovms.manifest.v1+json", "name": "a", "version": "1",
        "kernel": { "ref": "vmlinuz" }, "metadata": { "platform": { "arch": "arm64", "uefi": true } },
        "diskLayers": [{ "ref": "d", "format": "ovfms" }],
    });
    parts.write("bad.json", manifest.to_string().as_bytes());
    for field in ["schemaVersion: 3", "metadata.platform.arch: arm64", "metadata.platform.uefi", "diskLayers[0].format"]
    {
        refused(&parts, &["validate", "bad.json"], 65, field);
    }
}

#[test]
fn inspect_of_a_hostile_name_does_not_drive_the_terminal() {
    let parts = Parts::new();
    parts.build("layout", &["--author", "\u{1b}[2Jnobody"]);
    let shown = parts.ovm_ok(&["inspect", "layout"]);
    assert!(shown.contains("?[2Jnobody") && !shown.contains('\u{1b}'), "{shown}");

    parts.write("bad.json", br#"{"schemaVersion":1,"mediaType":"\u001b[2J","name":"a","version":"1"}"#);
    let said = parts.ovm(&["validate", "bad.json"]);
    assert!(said.err.contains("?[2J") && !said.err.contains('\u{1b}'), "{}", said.err);
}

#[test]
fn inspect_into_a_closed_pipe_is_no_error() {
    let parts = Parts::new();
    parts.build("layout", &[]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_ovm"));
    let said = command.args(["inspect", "layout"]).current_dir(parts.path("")).stdout(writer).output().unwrap();
    assert!(said.status.success() && said.stderr.is_empty(), "{said:?}");
}

#[test]
fn validate_unpacks_disks_and_ram_as_a_start_would() {
    let parts = Parts::new();
    // A header that holds, and behind it a table that leads far out of the file.
    let mut disk = vec![0; 0x20000];
    disk[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    (disk[23], disk[99], disk[103]) = (16, 4, 104);
    disk[24..32].copy_from_slice(&0x10_0000_u64.to_be_bytes());
    disk[36..40].copy_from_slice(&1_u32.to_be_bytes());
    disk[40..48].copy_from_slice(&0x1_0000_u64.to_be_bytes());
    disk[0x1_0000..0x1_0008].copy_from_slice(&(1_u64 << 40 | 1 << 63).to_be_bytes());
    parts.write("bad.qcow2", &disk);
    parts.write("bad.lz4", b"no RAM snapshot at all");
    let build = |out: &str, more: &[&str]| {
        let base = ["build", "-q", "--name", "a", "--version", "1", "--kernel", "vmlinuz", "-o", out];
        parts.ovm_ok(&[&base[..], more].concat());
    };
    build("disk", &["--disk", "bad.qcow2"]);
    build("ram", &["--disk", "base.qcow2", "--ram", "bad.lz4"]);

    refused(&parts, &["validate", "-q", "disk"], 65, "layer sha256:");
    refused(&parts, &["validate", "-q", "ram"], 65, "RAM");
}
