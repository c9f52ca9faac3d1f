//! The published schema, the reference schema and the code say the same of a manifest. `spec/` has the specification's
//! reference schema and example as they were published.

use std::path::{Path, PathBuf};

use ovms_artifact::manifest::Manifest;
use serde_json::{json, Value};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn ours() -> Value {
    read(&repository().join("config/schema/ovms-manifest.v1.schema.json"))
}

/// A reference file of the specification.
fn specification(name: &str) -> Value {
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/spec").join(name))
}

/// Resolves `{"$ref": "#/definitions/…"}`.
fn deref<'a>(schema: &'a Value, root: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(pointer) => root.pointer(pointer.trim_start_matches('#')).expect("a definition"),
        None => schema,
    }
}

/// Everything the reference says of a field, ours says too; ours may say more, but must not forbid or demand more.
fn compare(field: &str, reference: &Value, ours: &Value, root: &Value) {
    let ours = deref(ours, root);
    for key in ["type", "const", "enum", "default", "format"] {
        assert_eq!(reference[key], ours[key], "{field}: {key}");
    }
    let set = |schema: &Value| {
        let mut names: Vec<String> = serde_json::from_value(schema["required"].clone()).unwrap_or_default();
        names.sort();
        names
    };
    assert_eq!(set(reference), set(ours), "{field}: required");
    for forbidding in ["additionalProperties", "pattern", "minimum", "maximum", "minLength", "maxItems", "not"] {
        assert_eq!(reference[forbidding], ours[forbidding], "{field}: {forbidding}");
    }
    for (name, schema) in reference["properties"].as_object().into_iter().flatten() {
        compare(&format!("{field}.{name}"), schema, &ours["properties"][name], root);
    }
    if reference["items"].is_object() {
        compare(&format!("{field}[]"), &reference["items"], &ours["items"], root);
    }
}

#[test]
fn our_schema_contradicts_the_reference_nowhere() {
    let (reference, ours) = (specification("manifest.v1.schema.json"), ours());
    compare("manifest", &reference, &ours, &ours);
}

#[test]
fn our_schema_accepts_the_reference_example() {
    let example = specification("ubuntu-manifest.json");
    assert!(jsonschema::is_valid(&ours(), &example));
    // Its refs are placeholders; the code says so by field, and of nothing else.
    let errors = Manifest::parse(example.to_string().as_bytes()).unwrap().validate().unwrap_err();
    let fields: Vec<&str> = errors.0.iter().map(|e| e.field.as_str()).collect();
    assert_eq!(fields, ["kernel.ref", "initrd.ref", "ramSnapshot.ref", "diskLayers[0].ref", "diskLayers[1].ref"]);
}

#[test]
fn what_the_code_accepts_our_schema_accepts() {
    let path = repository().join("docs/examples/debian.manifest.json");
    let manifest = Manifest::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let written: Value = serde_json::from_slice(&manifest.to_bytes().unwrap()).unwrap();
    assert!(jsonschema::is_valid(&ours(), &written));
    let bare: Value = serde_json::to_value(Manifest::new("a", "1")).unwrap();
    assert!(jsonschema::is_valid(&ours(), &bare));
}

#[test]
fn what_our_schema_refuses_the_code_refuses() {
    let base = json!({
        "schemaVersion": 1, "mediaType": "application/vnd.ovms.manifest.v1+json", "name": "a", "version": "1",
        "kernel": { "ref": "vmlinuz" },
    });
    let schema = ours();
    assert!(jsonschema::is_valid(&schema, &base) && Manifest::from_slice(base.to_string().as_bytes()).is_ok());
    let changes = [
        ("schemaVersion", json!(2)),
        ("mediaType", json!("text/plain")),
        ("name", json!(7)),
        ("kernel", json!({})),
        ("kernel", json!({ "ref": "k", "args": ["a"] })),
        ("diskLayers", json!([{ "ref": "d" }])),
        ("diskLayers", json!([{ "ref": "d", "format": "vmdk" }])),
        ("ramSnapshot", json!({ "ref": "r", "preload_hint": 1 })),
        ("devices", json!([{ "type": "ivshmem" }])),
        ("metadata", json!({ "platform": { "uefi": "no" } })),
        ("runtimeHints", json!({ "coldStartTargetMs": "fast" })),
        ("containerMode", json!("yes")),
        ("io.ovms", json!({ "vcpus": 0 })),
        ("io.ovms", json!({ "memoryBytes": 1 })),
    ];
    for (field, value) in changes {
        let mut manifest = base.clone();
        manifest[field] = value.clone();
        assert!(!jsonschema::is_valid(&schema, &manifest), "schema accepts {field} = {value}");
        assert!(Manifest::from_slice(manifest.to_string().as_bytes()).is_err(), "code accepts {field} = {value}");
    }
}
