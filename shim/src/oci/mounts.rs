//! `mounts`: which are everybody's and which are the user's.

use std::path::Path;

use oci_spec::runtime::Mount;
use serde::Deserialize;
use serde_json::Value;

/// File systems that every client mounts and every guest makes for itself.
const KERNEL_TYPES: [&str; 6] = ["proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2"];
/// Where clients mount a tmpfs by default.
const TMPFS: [&str; 3] = ["/dev", "/dev/shm", "/run"];
/// Host files that clients mount without being asked: ctr with --net-host, nerdctl, CRI.
const USUAL_BINDS: [&str; 8] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/hostname",
    "/dev/shm",
    "/dev/mqueue",
    "/dev/termination-log",
    "/var/run/secrets/kubernetes.io/serviceaccount",
    "/run/secrets/kubernetes.io/serviceaccount",
];

/// Why the list cannot be taken, if it cannot.
pub(super) fn refusal(value: &Value, _spec: &Value) -> Option<String> {
    for mount in value.as_array()? {
        let Ok(mount) = Mount::deserialize(mount) else {
            return Some(format!("an entry cannot be read: {mount}"));
        };
        if !is_usual(&mount) {
            return Some(format!(
                "{} would be missing in the virtual machine, whose image has no agent to mount it: put the files into \
                 a disk layer (remove --mount or -v)",
                mount.destination().display()
            ));
        }
    }
    None
}

fn is_usual(mount: &Mount) -> bool {
    let destination = mount.destination();
    let is_at = |places: &[&str]| places.iter().any(|place| destination == Path::new(place));
    let typ = mount.typ().as_deref().unwrap_or_default();
    let is_bind = typ == "bind" || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind");
    if is_bind {
        // Where the host's own /sys and cgroups are bound, as for rootless clients.
        return is_at(&USUAL_BINDS)
            || (destination.starts_with("/sys") && mount.source().as_deref() == Some(destination));
    }
    KERNEL_TYPES.contains(&typ) || (typ == "tmpfs" && is_at(&TMPFS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_defaults_of_clients_pass() {
        let mounts = json!([
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=65536k"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/x", "options": ["rbind", "ro"]},
            {"destination": "/dev/termination-log", "type": "bind", "source": "/var/lib/kubelet/x"}
        ]);
        assert_eq!(refusal(&mounts, &Value::Null), None);
    }

    #[test]
    fn refusal_names_the_users_mount() {
        for mount in [
            json!({"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind"]}),
            json!({"destination": "/data", "type": "none", "source": "/srv", "options": ["bind"]}),
            json!({"destination": "/data", "type": "tmpfs", "source": "tmpfs"}),
            json!({"destination": "/data", "type": "ext4", "source": "/dev/sdb"}),
        ] {
            let reason = refusal(&json!([mount]), &Value::Null).unwrap();
            assert!(reason.starts_with("/data "), "{reason}");
        }
    }
}
