use std::collections::BTreeSet;
use std::path::Path;

use ovms_engine::{BootChoice, CreateSpec, OnIncompatible, Stdio};
use serde_json::json;
use tempfile::TempDir;

use super::table::{Treatment, ROWS};
use super::*;
use crate::task::{check_args, spec_of, CreateRequest};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/oci-spec.md");

fn spec(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn minimal() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {"args": ["/ovm/boot"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "linux": {"namespaces": [{"type": "network"}]}
    })
}

fn plan_of(spec: &Value) -> Result<Plan> {
    plan(spec, Path::new("/bundle"))
}

/// Every field of the specification, down to those that have a row.
fn fields(path: &str, value: &Value, found: &mut BTreeSet<String>) {
    if table::find(path).is_some() {
        found.insert(path.to_owned());
        return;
    }
    let Value::Object(members) = value else {
        panic!("{path} is a field of the specification and has no row in the table");
    };
    for (name, member) in members {
        fields(&if path.is_empty() { name.clone() } else { format!("{path}.{name}") }, member, found);
    }
}

#[test]
fn every_field_of_the_specification_has_a_row_and_every_row_a_field() {
    let mut found = BTreeSet::new();
    fields("", &spec(include_str!("../../tests/specs/every-field.json")), &mut found);
    let rows: BTreeSet<String> = ROWS.iter().map(|row| row.field.to_owned()).collect();
    assert_eq!(found, rows);
    assert_eq!(ROWS.len(), rows.len(), "a field has two rows");
}

/// What is made of a spec, up to the engine's door.
struct Made {
    hooks: Hooks,
    args: Vec<String>,
    spec: CreateSpec,
    dir: TempDir,
}

impl Made {
    fn of(spec: &Value, dir: TempDir) -> Self {
        let plan = plan(spec, dir.path()).unwrap_or_else(|err| panic!("{}: {spec}", err.chain()));
        let (hooks, args) = (plan.hooks.clone(), plan.args.clone());
        let spec = spec_of(plan, &CreateRequest::default(), "default", Stdio::default());
        Self { hooks, args, spec, dir }
    }

    /// The state that a hook has read, if one has run.
    fn state(&self) -> Option<Value> {
        serde_json::from_slice(&std::fs::read(self.dir.path().join("state")).ok()?).ok()
    }
}

/// Hooks that leave the state that they read in the directory.
fn hook(dir: &Path) -> Value {
    json!([{"path": "/bin/sh", "args": ["sh", "-c", format!("/bin/cat >{}/state", dir.display())]}])
}

/// Whether a field with that value has had its effect. A row that is applied must have a line here.
fn has_effect(field: &str, value: &Value, made: &Made) -> bool {
    let (spec, limits, wishes) = (&made.spec, &made.spec.limits, &made.spec.wishes);
    let (number, text) = (value.as_i64(), value.as_str());
    match field {
        "ociVersion" => {
            made.hooks.create_runtime("vm1", 1).unwrap();
            made.state().is_some_and(|state| state["ociVersion"] == *value)
        }
        "root.readonly" => spec.read_only,
        "hostname" => Some(spec.hostname.as_str()) == text,
        "annotations" => {
            made.hooks.create_runtime("vm1", 1).unwrap();
            let sizes = (wishes.annotation_vcpus.as_deref(), wishes.annotation_memory.as_deref());
            let starts = (spec.boot, spec.on_incompatible);
            sizes == (Some("3"), Some("1G"))
                && spec.extra_kernel_args.as_deref() == Some("quiet")
                && starts == (BootChoice::Cold, OnIncompatible::Boot)
                && made.state().is_some_and(|state| state["annotations"] == *value)
        }
        "hooks.prestart" | "hooks.createRuntime" => {
            made.hooks.create_runtime("vm1", 1).unwrap();
            made.state().is_some_and(|state| state["status"] == "creating")
        }
        "hooks.poststart" => {
            made.hooks.poststart("vm1", 1);
            made.state().is_some_and(|state| state["status"] == "running")
        }
        "hooks.poststop" => {
            made.hooks.create_runtime("vm1", 1).unwrap();
            made.hooks.poststop("vm1");
            made.state().is_some_and(|state| state["status"] == "stopped")
        }
        // Those of the image are others.
        "process.args" => check_args(&made.args, &["/ovm/boot".into()]).is_err(),
        "process.oomScoreAdj" => spec.oom_score_adj.map(i64::from) == number,
        "linux.cgroupsPath" => spec.cgroups_path.as_deref() == text,
        "linux.resources.memory.limit" => [limits.memory, wishes.spec_memory] == [number; 2],
        "linux.resources.memory.reservation" => limits.memory_reservation == number,
        "linux.resources.memory.swap" => limits.memory_swap == number,
        "linux.resources.cpu.shares" => limits.cpu_shares == value.as_u64(),
        "linux.resources.cpu.quota" => [limits.cpu_quota, wishes.spec_cpu_quota] == [number; 2],
        "linux.resources.cpu.period" => [limits.cpu_period, wishes.spec_cpu_period] == [value.as_u64(); 2],
        "linux.resources.cpu.cpus" => limits.cpuset_cpus.as_deref() == text,
        "linux.resources.cpu.mems" => limits.cpuset_mems.as_deref() == text,
        "linux.resources.blockIO.weight" => limits.io_weight.map(i64::from) == number,
        "linux.resources.unified" => {
            let all = limits.unified.iter().map(|(file, text)| (file.clone(), json!(text))).collect();
            *value == Value::Object(all)
        }
        _ => panic!("{field} is applied, but nothing says by what that shows"),
    }
}

/// Each field that is applied has its effect, which is not there without it.
#[test]
fn each_applied_row_has_its_effect() {
    let every = spec(include_str!("../../tests/specs/every-field.json"));
    for row in ROWS.iter().filter(|row| matches!(row.treatment, Treatment::Applied)) {
        let pointer = format!("/{}", row.field.replace('.', "/"));
        let made = |with: bool| {
            let (mut spec, dir) = (minimal(), tempfile::tempdir().unwrap());
            let value = match row.field {
                "annotations" => json!({"io.ovms.vcpus": "3", "io.ovms.memory": "1G", "io.ovms.kernel-args": "quiet",
                    "io.ovms.boot": "cold", "io.ovms.on-incompatible": "boot", "else": "x"}),
                _ if row.field.starts_with("hooks.") => hook(dir.path()),
                _ => every.pointer(&pointer).unwrap().clone(),
            };
            if matches!(row.field, "annotations" | "ociVersion") {
                put(&mut spec, "/hooks/createRuntime", hook(dir.path()));
            }
            if with {
                put(&mut spec, &pointer, value.clone());
            }
            (value, Made::of(&spec, dir))
        };
        for with in [true, false] {
            let (value, made) = made(with);
            assert_eq!(has_effect(row.field, &value, &made), with, "{} with {value}", row.field);
        }
    }
}

/// Each refused field alone, in an otherwise good spec, fails by its name; every other field alone passes, with a warning
/// or without.
#[test]
fn each_row_is_obeyed() {
    let every = spec(include_str!("../../tests/specs/every-field.json"));
    for row in ROWS {
        let pointer = format!("/{}", row.field.replace('.', "/"));
        let mut spec = minimal();
        put(&mut spec, &pointer, every.pointer(&pointer).unwrap().clone());
        let result = plan_of(&spec);
        match row.treatment {
            Treatment::Refused(_) => {
                let err = result.expect_err(row.field);
                assert_eq!(err.kind(), Kind::Invalid, "{}", row.field);
                assert!(err.chain().starts_with(row.field), "{}: {}", row.field, err.chain());
            }
            Treatment::Warned(_) => assert_eq!(result.expect(row.field).warnings.len(), 1, "{}", row.field),
            Treatment::Applied | Treatment::Ignored => {
                assert!(result.expect(row.field).warnings.is_empty(), "{}", row.field);
            }
        }
    }
}

/// Sets a member, making the objects above it.
fn put(spec: &mut Value, pointer: &str, value: Value) {
    let mut at = spec;
    for name in pointer.split('/').skip(1) {
        at = &mut at[name];
    }
    *at = value;
}

#[test]
fn the_specs_that_clients_write_by_default_pass() {
    for (name, text, warnings) in [
        ("ctr 1.7", include_str!("../../tests/specs/ctr-1.7.json"), 0),
        ("ctr 2.4", include_str!("../../tests/specs/ctr-2.4.json"), 0),
        ("ctr --privileged --net-host", include_str!("../../tests/specs/ctr-privileged.json"), 1),
        ("nerdctl 2.0", include_str!("../../tests/specs/nerdctl.json"), 0),
        ("CRI", include_str!("../../tests/specs/cri.json"), 2),
    ] {
        let plan = plan_of(&spec(text)).unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
        assert_eq!(plan.args, ["/ovm/boot"], "{name}");
        assert_eq!(plan.warnings.len(), warnings, "{name}: {:?}", plan.warnings);
    }
}

#[test]
fn what_is_applied_is_read() {
    let plan = plan_of(&spec(include_str!("../../tests/specs/cri.json"))).unwrap();
    assert_eq!(plan.cgroups_path.as_deref(), Some("kubepods-burstable-pod5e9c6f6e.slice:cri-containerd:vm"));
    assert_eq!(plan.netns.as_deref(), Some(Path::new("/proc/4321/ns/net")));
    assert_eq!(plan.oom_score_adj, Some(1000));
    assert_eq!(plan.wishes.annotation_vcpus.as_deref(), Some("2"));
    assert_eq!((plan.wishes.spec_memory, plan.wishes.spec_cpu_quota), (Some(1 << 30), Some(200_000)));
    assert_eq!(plan.limits.unified, [("memory.oom.group".to_owned(), "1".to_owned())]);
    let warnings = plan.warnings.join("\n");
    assert!(warnings.contains("KUBERNETES_SERVICE_HOST") && !warnings.contains("10.96"), "names only: {warnings}");
}

#[test]
fn without_a_network_namespace_there_is_an_empty_one_and_a_warning() {
    let mut spec = minimal();
    spec["linux"]["namespaces"] = json!([{"type": "pid"}]);
    let plan = plan_of(&spec).unwrap();
    assert_eq!(plan.netns, None);
    assert!(plan.warnings[0].contains("host's network"), "{:?}", plan.warnings);
}

#[test]
fn a_field_of_a_newer_specification_is_ignored_with_a_warning() {
    let mut spec = minimal();
    spec["linux"]["teleport"] = json!({"to": ["mars"]});
    assert!(plan_of(&spec).unwrap().warnings[0].starts_with("linux.teleport.to "));
}

#[test]
fn read_of_a_broken_file_returns_invalid() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(read(dir.path()).unwrap_err().kind(), Kind::Internal);
    for text in ["{", r#"{"linux": {"resources": {"memory": {"limit": "much"}}}}"#, r#"{"annotations": {"a": 1}}"#] {
        std::fs::write(dir.path().join(CONFIG), text).unwrap();
        assert_eq!(read(dir.path()).unwrap_err().kind(), Kind::Invalid, "{text}");
    }
}

/// The table of the documentation is this table. `OVMS_UPDATE_DOCS=1` writes it.
#[test]
fn the_documentation_repeats_the_table() {
    const BEGIN: &str = "<!-- table: rendered from shim/src/oci/table.rs -->\n";
    const END: &str = "<!-- end of table -->";
    let text = std::fs::read_to_string(DOCUMENT).unwrap();
    let (head, rest) = text.split_once(BEGIN).unwrap();
    let (_, tail) = rest.split_once(END).unwrap();
    let mut table = String::from("| field | what becomes of it | how, or why not |\n| --- | --- | --- |\n");
    for row in ROWS {
        table.push_str(&format!("| `{}` | {} | {} |\n", row.field, row.treatment.word(), row.what));
    }
    let expected = format!("{head}{BEGIN}{table}{END}{tail}");
    if std::env::var_os("OVMS_UPDATE_DOCS").is_some() {
        std::fs::write(DOCUMENT, &expected).unwrap();
    }
    assert!(text == expected || std::env::var_os("OVMS_UPDATE_DOCS").is_some(), "run the test with OVMS_UPDATE_DOCS=1");
}
