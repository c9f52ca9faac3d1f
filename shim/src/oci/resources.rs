//! `linux.resources`: limits of the control group, and from them the machine's size.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory};
use ovms_engine::{Limits, Wishes};
use serde::Deserialize;
use serde_json::Value;

use super::invalid;
use crate::error::{Error, Kind, Result};

/// Size and limits of a whole spec.
pub(super) fn read(spec: &Value) -> Result<(Wishes, Limits)> {
    let limits = limits(spec.pointer("/linux/resources").unwrap_or(&Value::Null))?;
    let wishes = Wishes {
        spec_memory: limits.memory,
        spec_cpu_quota: limits.cpu_quota,
        spec_cpu_period: limits.cpu_period,
        ..Wishes::default()
    };
    Ok((wishes, limits))
}

/// Reads what Update sends.
///
/// # Errors
/// [`Kind::Invalid`].
pub fn parse_update(json: &[u8]) -> Result<Limits> {
    let resources: Value = serde_json::from_slice(json)
        .map_err(|e| Error::caused("the resources of the update are not JSON", e).of_kind(Kind::Invalid))?;
    limits(&resources)
}

fn limits(resources: &Value) -> Result<Limits> {
    let memory: LinuxMemory = part(resources, "memory")?;
    let cpu: LinuxCpu = part(resources, "cpu")?;
    let io: LinuxBlockIo = part(resources, "blockIO")?;
    let unified: std::collections::BTreeMap<String, String> = part(resources, "unified")?;
    Ok(Limits {
        memory: memory.limit(),
        memory_reservation: memory.reservation(),
        memory_swap: memory.swap(),
        cpu_shares: cpu.shares(),
        cpu_quota: cpu.quota(),
        cpu_period: cpu.period(),
        cpuset_cpus: cpu.cpus().clone().filter(|list| !list.is_empty()),
        cpuset_mems: cpu.mems().clone().filter(|list| !list.is_empty()),
        io_weight: io.weight(),
        unified: unified.into_iter().collect(),
    })
}

/// One member; missing and null are its default.
fn part<T: for<'a> Deserialize<'a> + Default>(resources: &Value, name: &str) -> Result<T> {
    match resources.get(name) {
        None | Some(Value::Null) => Ok(T::default()),
        Some(value) => T::deserialize(value).map_err(|e| invalid(&format!("linux.resources.{name}"), e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_from_what_clients_send() {
        let json = br#"{"memory": {"limit": 268435456, "swap": 536870912}, "cpu": {"shares": 512, "quota": 150000,
            "period": 100000, "cpus": "0-1"}, "pids": {"limit": 10}, "devices": [{"allow": false, "access": "rwm"}]}"#;
        let limits = parse_update(json).unwrap();
        assert_eq!((limits.memory, limits.memory_swap), (Some(256 << 20), Some(512 << 20)));
        assert_eq!((limits.cpu_shares, limits.cpu_quota), (Some(512), Some(150_000)));
        assert_eq!((limits.cpuset_cpus.as_deref(), limits.cpuset_mems), (Some("0-1"), None));
    }

    #[test]
    fn parse_update_of_nonsense_returns_invalid() {
        for json in [&b"not json"[..], br#"{"memory": {"limit": "much"}}"#] {
            assert_eq!(parse_update(json).unwrap_err().kind(), Kind::Invalid);
        }
    }
}
