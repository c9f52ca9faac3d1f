//! The bundle's `config.json`, field by field.
//!
//! ```text
//!  config.json ──walk along the table──> refused by name │ ignored (log) │ applied ──> Plan ──> Order
//! ```
//! [`table`] says of every field what becomes of it, the walk obeys it, and `docs/oci-spec.md` is rendered from it; the
//! modules beside it read the fields that are applied.

mod annotations;
mod devices;
pub mod hooks;
mod mounts;
pub mod resources;
mod table;
mod walk;

use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};
use ovms_engine::{Limits, Wishes};
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::hooks::Hooks;
use crate::error::{Error, Kind, Result};

/// What a `config.json` asks for, as far as it is applied.
#[derive(Debug, Default)]
pub struct Plan {
    /// vCPUs and memory.
    pub wishes: Wishes,
    /// Limits of the VMM's control group.
    pub limits: Limits,
    /// Where that group is.
    pub cgroups_path: Option<String>,
    /// Appended to the kernel's command line.
    pub kernel_args: Option<String>,
    /// Boot, whatever RAM the image carries.
    pub cold: bool,
    /// Boot if this host cannot resume the image's RAM.
    pub boot_if_incompatible: bool,
    /// The guest may not write to its disks.
    pub read_only: bool,
    /// Name of the VMM's UTS namespace.
    pub hostname: String,
    /// Network namespace to join; none: an empty one.
    pub netns: Option<PathBuf>,
    /// Score of the VMM for the kernel's OOM killer.
    pub oom_score_adj: Option<i32>,
    /// Arguments of the process, to be compared with the image's.
    pub args: Vec<String>,
    /// Programs to run along the way.
    pub hooks: Hooks,
    /// Sentences for the log: what the user may miss.
    pub warnings: Vec<String>,
}

/// File name of the spec in a bundle.
const CONFIG: &str = "config.json";

/// Reads a bundle's spec.
///
/// # Errors
/// [`Kind::Invalid`] naming the field that is refused or makes no sense; [`Kind::Internal`] if there is no such file.
pub fn read(bundle: &Path) -> Result<Plan> {
    let path = bundle.join(CONFIG);
    let bytes = fs::read(&path).map_err(|e| Error::caused(format!("cannot read {}", path.display()), e))?;
    let spec: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Error::caused(format!("{} is not JSON", path.display()), e).of_kind(Kind::Invalid))?;
    plan(&spec, bundle)
}

/// Reads only the hooks that `delete` needs; none if the file is gone or unreadable.
pub fn read_hooks(bundle: &Path) -> Hooks {
    let spec = fs::read(bundle.join(CONFIG)).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    spec.and_then(|spec| Hooks::read(&spec, bundle).ok()).unwrap_or_default()
}

/// Walks along the table, then reads what is applied.
fn plan(spec: &Value, bundle: &Path) -> Result<Plan> {
    let mut warnings = walk::check(spec)?;
    let (size, limits) = resources::read(spec)?;
    let mut wishes = size;
    let annotations = annotations::read(spec, &mut wishes)?;
    let netns = network_namespace(spec, &mut warnings)?;
    Ok(Plan {
        wishes,
        limits,
        cgroups_path: field::<String>(spec, "/linux/cgroupsPath")?.filter(|path| !path.is_empty()),
        kernel_args: annotations.kernel_args,
        cold: annotations.cold,
        boot_if_incompatible: annotations.boot_if_incompatible,
        read_only: field(spec, "/root/readonly")?.unwrap_or_default(),
        hostname: field(spec, "/hostname")?.unwrap_or_default(),
        netns,
        oom_score_adj: field(spec, "/process/oomScoreAdj")?,
        args: field(spec, "/process/args")?.unwrap_or_default(),
        hooks: Hooks::read(spec, bundle)?,
        warnings,
    })
}

/// No entry is the host's network for a container; a machine never gets that.
fn network_namespace(spec: &Value, warnings: &mut Vec<String>) -> Result<Option<PathBuf>> {
    let all: Vec<Value> = field(spec, "/linux/namespaces")?.unwrap_or_default();
    // Namespaces of other types may be newer than the library's list.
    let network = all.into_iter().find(|namespace| namespace.get("type").is_some_and(|name| name == "network"));
    let Some(network) = network else {
        warnings.push(
            "the spec asks for the host's network, which a virtual machine cannot share: it gets an empty network \
             namespace of its own"
                .into(),
        );
        return Ok(None);
    };
    let network: LinuxNamespace = serde_json::from_value(network).map_err(|e| invalid("linux.namespaces", e))?;
    debug_assert_eq!(network.typ(), LinuxNamespaceType::Network);
    Ok(network.path().clone().filter(|path| !path.as_os_str().is_empty()))
}

/// One field by its JSON pointer; missing and null are none.
fn field<T: DeserializeOwned>(spec: &Value, pointer: &str) -> Result<Option<T>> {
    match spec.pointer(pointer) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            T::deserialize(value).map(Some).map_err(|e| invalid(&pointer.trim_start_matches('/').replace('/', "."), e))
        }
    }
}

fn invalid(field: &str, source: serde_json::Error) -> Error {
    Error::caused(format!("{field} of the container's spec cannot be read"), source).of_kind(Kind::Invalid)
}

#[cfg(test)]
mod tests;
