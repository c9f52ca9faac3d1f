use super::*;

/// The reference example of the specification with real digests in place of its placeholders.
fn example() -> Value {
    let digest = |what: &str| crate::digest::Digest::of(what.as_bytes()).to_string();
    serde_json::json!({
        "schemaVersion": 1,
        "mediaType": "application/vnd.ovms.manifest.v1+json",
        "name": "example/ubuntu-base",
        "version": "24.04",
        "kernel": { "ref": digest("kernel"), "args": "console=ttyS0 root=/dev/vda1 rw" },
        "initrd": { "ref": digest("initrd") },
        "diskLayers": [
            { "ref": digest("base"), "format": "qcow2", "size": 2147483648u64 },
            { "ref": digest("diff"), "format": "raw" }
        ],
        "ramSnapshot": { "ref": digest("ram"), "compression": "lz4", "preload_hint": true, "mlock_required": true },
        "devices": [{ "type": "ivshmem", "name": "mmio0", "size": 67108864, "mmio_addr": "0x10000000" }],
        "metadata": {
            "author": "ovms",
            "created": "2025-09-09T00:00:00Z",
            "platform": { "arch": "x86_64", "uefi": false }
        },
        "runtimeHints": { "preferredRuntime": ["generic"], "coldStartTargetMs": 10 },
        "containerMode": true,
        "io.ovms": { "vcpus": 2, "memoryBytes": 1073741824 }
    })
}

/// The error of the example with the value at `pointer` replaced (or added).
fn error_with(pointer: &str, value: impl Into<Value>) -> String {
    let mut json = example();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match json.pointer_mut(parent).unwrap() {
        Value::Array(items) => items[key.parse::<usize>().unwrap()] = value.into(),
        other => other[key] = value.into(),
    }
    let error = Manifest::from_slice(json.to_string().as_bytes()).unwrap_err();
    match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[test]
fn parse_of_every_field_gives_every_value() {
    let manifest = Manifest::from_slice(example().to_string().as_bytes()).unwrap();

    assert_eq!(manifest.cmdline(), "console=ttyS0 root=/dev/vda1 rw");
    assert_eq!(manifest.disk_layers[1].format, DiskFormat::Raw);
    assert_eq!((manifest.disk_layers[0].size, manifest.disk_layers[1].size), (Some(2 << 30), None));
    let ram = manifest.ram_snapshot.as_ref().unwrap();
    assert!(ram.preload_hint && ram.mlock_required && ram.compression == RamCompression::Lz4);
    assert_eq!(manifest.devices[0].address(), Ok(Some(0x1000_0000)));
    assert_eq!(manifest.metadata.as_ref().unwrap().created.as_deref(), Some("2025-09-09T00:00:00Z"));
    assert_eq!(manifest.runtime_hints.as_ref().unwrap().cold_start_target_ms, Some(10));
    assert!(manifest.container_mode);
    assert_eq!((manifest.vcpus(), manifest.memory_bytes()), (Some(2), Some(1 << 30)));
}

#[test]
fn written_manifest_has_the_same_values_as_the_one_read() {
    let manifest = Manifest::from_slice(example().to_string().as_bytes()).unwrap();

    let written: Value = serde_json::from_slice(&manifest.to_bytes().unwrap()).unwrap();

    assert_eq!(written, example());
}

#[test]
fn unknown_fields_are_kept_at_every_level() {
    let mut json = example();
    for pointer in ["", "/kernel", "/diskLayers/0", "/ramSnapshot", "/devices/0", "/metadata/platform", "/runtimeHints"]
    {
        json.pointer_mut(pointer).unwrap()["vendor.extension"] = Value::from(7);
    }
    let manifest = Manifest::from_slice(json.to_string().as_bytes()).unwrap();

    let written: Value = serde_json::from_slice(&manifest.to_bytes().unwrap()).unwrap();

    assert_eq!(written, json);
}

#[test]
fn wrong_values_are_refused_by_field() {
    let long = "x".repeat(2048);
    let cases: &[(&str, Value, &str)] = &[
        ("/schemaVersion", 2.into(), "schemaVersion: 2 is unknown"),
        ("/mediaType", "text/plain".into(), "mediaType: \"text/plain\" is not"),
        ("/name", "".into(), "name: must not be empty"),
        ("/version", "a\nb".into(), "version: must not hold control characters"),
        ("/kernel/ref", "sha256:kernel-digest".into(), "kernel.ref: \"sha256:kernel-digest\" is not a digest"),
        ("/kernel/args", long.into(), "kernel.args: the command line has 2048 bytes, a kernel takes 2047"),
        ("/kernel/args", "a\nb".into(), "kernel.args: the command line must not hold control characters"),
        ("/diskLayers/1/format", "ovfms".into(), "diskLayers[1].format: ovfms is not supported"),
        ("/diskLayers/1/size", 0.into(), "diskLayers[1].size: must not be 0"),
        ("/devices/0/type", "vfio".into(), "devices[0].type: this runtime has no device \"vfio\""),
        ("/devices/0/size", 3000.into(), "devices[0].size: 3000 is not a power of two"),
        ("/devices/0/size", Value::Null, "devices[0].size: missing"),
        ("/devices/0/mmio_addr", "10000000".into(), "devices[0].mmio_addr: \"10000000\" is not \"0x\""),
        ("/devices/0/mmio_addr", "0x+1".into(), "devices[0].mmio_addr: \"0x+1\" is not \"0x\""),
        ("/devices/0/mmio_addr", "0x10001000".into(), "devices[0].mmio_addr: 0x10001000 is not a multiple"),
        ("/devices/0/mmio_addr", "0xfffffffffc000000".into(), "devices[0].mmio_addr: 0xfffffffffc000000 is beyond"),
        ("/metadata/created", "yesterday".into(), "metadata.created: \"yesterday\" is not an RFC 3339 time"),
        ("/metadata/platform/arch", "arm64".into(), "metadata.platform.arch: arm64 is not supported"),
        ("/metadata/platform/uefi", true.into(), "metadata.platform.uefi: UEFI boot is not supported"),
        ("/io.ovms/vcpus", 33.into(), "io.ovms.vcpus: 33 is out of range"),
        ("/io.ovms/memoryBytes", 4096.into(), "io.ovms.memoryBytes: 4096 is too little"),
    ];
    for (pointer, value, wanted) in cases {
        let error = error_with(pointer, value.clone());
        assert!(error.contains(wanted), "{pointer}: {error}");
    }
}

#[test]
fn wrong_types_are_refused_by_field() {
    let cases: &[(&str, Value, &str)] = &[
        ("/schemaVersion", "1".into(), "schemaVersion cannot be read"),
        ("/diskLayers/1/format", "vmdk".into(), "diskLayers[1].format cannot be read"),
        ("/diskLayers/0/size", (-1).into(), "diskLayers[0].size cannot be read"),
        ("/ramSnapshot/compression", "gzip".into(), "ramSnapshot.compression cannot be read"),
        ("/metadata/platform/uefi", "no".into(), "metadata.platform.uefi cannot be read"),
        ("/kernel", "vmlinuz".into(), "kernel cannot be read"),
    ];
    for (pointer, value, wanted) in cases {
        let error = error_with(pointer, value.clone());
        assert!(error.contains(wanted), "{pointer}: {error}");
    }
}

#[test]
fn several_problems_are_all_named() {
    let mut json = example();
    json["schemaVersion"] = 2.into();
    json["metadata"]["platform"]["uefi"] = true.into();

    let Err(ManifestError::Invalid(errors)) = Manifest::from_slice(json.to_string().as_bytes()) else { panic!() };

    let fields: Vec<&str> = errors.0.iter().map(|e| e.field.as_str()).collect();
    assert_eq!(fields, ["schemaVersion", "metadata.platform.uefi"]);
}

#[test]
fn nothing_to_boot_is_refused() {
    let manifest = Manifest::new("empty", "1");
    assert!(manifest.validate().unwrap_err().to_string().starts_with("kernel: missing"));
}

#[test]
fn initrd_without_kernel_is_refused() {
    let mut json = example();
    json.as_object_mut().unwrap().remove("kernel");
    let manifest = Manifest::parse(json.to_string().as_bytes()).unwrap();
    assert!(manifest.validate().unwrap_err().to_string().starts_with("initrd: needs a kernel"));
}

#[test]
fn devices_overlapping_or_of_one_name_are_refused() {
    let mut json = example();
    let mut second = json["devices"][0].clone();
    second["mmio_addr"] = "0x10000000".into();
    json["devices"].as_array_mut().unwrap().push(second);

    let error = Manifest::parse(json.to_string().as_bytes()).unwrap().validate().unwrap_err().to_string();

    assert!(error.contains("devices[1].name: \"mmio0\" is used twice"), "{error}");
    assert!(error.contains("devices[1].mmio_addr: overlaps the memory of device \"mmio0\""), "{error}");
}

#[test]
fn old_media_type_is_read() {
    let mut json = example();
    json["mediaType"] = "application/vnd.hypr.ovms.manifest.v1+json".into();
    assert!(Manifest::from_slice(json.to_string().as_bytes()).is_ok());
}

#[test]
fn damaged_and_oversized_texts_are_refused() {
    assert!(matches!(Manifest::parse(b"{"), Err(ManifestError::Syntax { .. })));
    assert!(matches!(Manifest::parse(b"[]"), Err(ManifestError::Syntax { .. })));
    let doubled = format!("{}{}", example(), example());
    assert!(matches!(Manifest::parse(doubled.as_bytes()), Err(ManifestError::Syntax { .. })));
    let huge = vec![b' '; (MAX_MANIFEST + 1) as usize];
    assert!(matches!(Manifest::parse(&huge), Err(ManifestError::TooLarge(_))));
    let deep = "[".repeat(100_000);
    assert!(matches!(Manifest::parse(deep.as_bytes()), Err(ManifestError::Syntax { .. })));
}

proptest::proptest! {
    /// Whatever is in it, a manifest is parsed or refused; what is accepted is written and read as the same.
    #[test]
    fn any_json_value_in_any_field_never_panics(
        field in proptest::sample::select(&["/kernel/args", "/devices/0/mmio_addr", "/diskLayers/0/size", "/io.ovms/vcpus",
            "/metadata/created", "/name", "/ramSnapshot/ref", "/runtimeHints/coldStartTargetMs"][..]),
        text in "\\PC{0,40}",
        number in proptest::num::i64::ANY,
        pick in proptest::bool::ANY,
    ) {
        let mut json = example();
        *json.pointer_mut(field).unwrap() = if pick { text.into() } else { number.into() };
        if let Ok(manifest) = Manifest::from_slice(json.to_string().as_bytes()) {
            let again = Manifest::from_slice(&manifest.to_bytes().unwrap()).unwrap();
            proptest::prop_assert_eq!(manifest, again);
        }
    }
}
