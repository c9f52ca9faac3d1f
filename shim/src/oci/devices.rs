//! `linux.devices`: which are everybody's and which are the user's.

use serde_json::Value;

/// Devices that every container has (config-linux.md, "Default devices").
const DEFAULT: [&str; 9] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/console",
    "/dev/ptmx",
    "/dev/pts/ptmx",
];

/// Why the list cannot be taken, if it cannot.
pub(super) fn refusal(value: &Value, spec: &Value) -> Option<String> {
    if may_use_all(spec) {
        return None;
    }
    value.as_array()?.iter().find_map(|device| {
        let path = device.get("path").and_then(Value::as_str).unwrap_or("(a device without a path)");
        (!DEFAULT.contains(&path)).then(|| {
            format!("{path} cannot be given to a virtual machine: it has the devices of its image (remove --device)")
        })
    })
}

/// A privileged container may use all devices, and its spec lists those of the host: nobody has chosen them.
fn may_use_all(spec: &Value) -> bool {
    let rules = spec.pointer("/linux/resources/devices").and_then(Value::as_array);
    rules.into_iter().flatten().any(|rule| {
        let any = |name: &str| {
            rule.get(name).is_none_or(|value| value.is_null() || value == "" || value == "a" || value == -1)
        };
        rule.get("allow") == Some(&Value::Bool(true)) && any("type") && any("major") && any("minor")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(rules: &Value) -> Value {
        json!({"linux": {"resources": {"devices": rules}}})
    }

    #[test]
    fn refusal_names_a_chosen_device() {
        let rules = json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 3}]);
        let devices = json!([{"path": "/dev/null", "type": "c"}, {"path": "/dev/sdb", "type": "b"}]);
        assert!(refusal(&devices, &spec(&rules)).unwrap().starts_with("/dev/sdb "));
    }

    #[test]
    fn the_hosts_list_of_a_privileged_container_is_ignored() {
        let rules = json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]);
        assert_eq!(refusal(&json!([{"path": "/dev/sdb", "type": "b"}]), &spec(&rules)), None);
    }
}
