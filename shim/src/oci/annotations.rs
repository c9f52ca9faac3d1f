//! `io.ovms.*`: what a user may say about a machine beyond the OCI specification.

use std::collections::BTreeMap;

use ovms_engine::sizing::{ANNOTATION_KERNEL_ARGS, ANNOTATION_MEMORY, ANNOTATION_VCPUS};
use ovms_engine::Wishes;
use serde_json::Value;

use super::field;
use crate::error::{Error, Kind, Result};

/// Prefix of all that are ours.
const PREFIX: &str = "io.ovms.";
/// Annotation that has an image booted which carries RAM.
const BOOT: &str = "io.ovms.boot";
/// Annotation that says what becomes of RAM that cannot go on on this host.
const ON_INCOMPATIBLE: &str = "io.ovms.on-incompatible";

/// What they say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Annotations {
    /// Appended to the kernel's command line.
    pub(super) kernel_args: Option<String>,
    /// Boot, whatever RAM the image carries.
    pub(super) cold: bool,
    /// Boot if this host cannot resume the image's RAM.
    pub(super) boot_if_incompatible: bool,
}

/// Reads them; vCPUs and memory go into `wishes`.
pub(super) fn read(spec: &Value, wishes: &mut Wishes) -> Result<Annotations> {
    let all: BTreeMap<String, String> = field(spec, "/annotations")?.unwrap_or_default();
    let mut read = Annotations::default();
    for (name, value) in all {
        match name.as_str() {
            ANNOTATION_VCPUS => wishes.annotation_vcpus = Some(value),
            ANNOTATION_MEMORY => wishes.annotation_memory = Some(value),
            ANNOTATION_KERNEL_ARGS => read.kernel_args = Some(value),
            BOOT => read.cold = only(BOOT, &value, "cold")?,
            ON_INCOMPATIBLE => read.boot_if_incompatible = only(ON_INCOMPATIBLE, &value, "boot")?,
            _ if name.starts_with(PREFIX) => {
                return Err(Error::new(
                    Kind::Invalid,
                    format!(
                        "annotation {name} is not known: there are {ANNOTATION_VCPUS}, {ANNOTATION_MEMORY}, \
                         {ANNOTATION_KERNEL_ARGS}, {BOOT} and {ON_INCOMPATIBLE}"
                    ),
                ));
            }
            _ => {}
        }
    }
    Ok(read)
}

/// The annotation has one value that means something.
fn only(name: &str, value: &str, known: &str) -> Result<bool> {
    if value == known {
        return Ok(true);
    }
    Err(Error::new(Kind::Invalid, format!("annotation {name}={value} is not known: there is {name}={known}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn all_are_read_and_strangers_pass() {
        let mut wishes = Wishes::default();
        let spec = json!({"annotations": {
            "io.ovms.vcpus": "2", "io.ovms.memory": "1G", "io.ovms.kernel-args": "quiet", "io.ovms.boot": "cold",
            "io.ovms.on-incompatible": "boot", "io.kubernetes.cri.x": "y"
        }});
        let expected = Annotations { kernel_args: Some("quiet".into()), cold: true, boot_if_incompatible: true };
        assert_eq!(read(&spec, &mut wishes).unwrap(), expected);
        assert_eq!((wishes.annotation_vcpus.as_deref(), wishes.annotation_memory.as_deref()), (Some("2"), Some("1G")));
    }

    #[test]
    fn read_unknown_of_ours_returns_its_name() {
        let err = read(&json!({"annotations": {"io.ovms.vcpu": "2"}}), &mut Wishes::default()).unwrap_err();
        assert!(err.chain().contains("io.ovms.vcpu "), "{}", err.chain());
    }

    #[test]
    fn read_unknown_value_returns_the_one_that_is() {
        for (name, value, known) in [(BOOT, "warm", "cold"), (ON_INCOMPATIBLE, "", "boot")] {
            let err = read(&json!({"annotations": {name: value}}), &mut Wishes::default()).unwrap_err();
            assert_eq!(err.kind(), Kind::Invalid);
            assert!(err.chain().contains(&format!("{name}={value} is not known: there is {name}={known}")));
        }
    }
}
