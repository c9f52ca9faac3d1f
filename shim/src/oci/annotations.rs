//! `io.ovms.*`: what a user may say about a machine beyond the OCI specification.

use std::collections::BTreeMap;

use ovms_engine::sizing::{ANNOTATION_KERNEL_ARGS, ANNOTATION_MEMORY, ANNOTATION_VCPUS};
use ovms_engine::Wishes;
use serde_json::Value;

use super::field;
use crate::error::{Error, Kind, Result};

/// Prefix of all that are ours.
const PREFIX: &str = "io.ovms.";

/// Puts vCPUs and memory into `wishes` and gives the kernel arguments.
pub(super) fn read(spec: &Value, wishes: &mut Wishes) -> Result<Option<String>> {
    let all: BTreeMap<String, String> = field(spec, "/annotations")?.unwrap_or_default();
    let mut kernel_args = None;
    for (name, value) in all {
        match name.as_str() {
            ANNOTATION_VCPUS => wishes.annotation_vcpus = Some(value),
            ANNOTATION_MEMORY => wishes.annotation_memory = Some(value),
            ANNOTATION_KERNEL_ARGS => kernel_args = Some(value),
            _ if name.starts_with(PREFIX) => {
                return Err(Error::new(
                    Kind::Invalid,
                    format!(
                        "annotation {name} is not known: there are {ANNOTATION_VCPUS}, {ANNOTATION_MEMORY} and \
                         {ANNOTATION_KERNEL_ARGS}"
                    ),
                ));
            }
            _ => {}
        }
    }
    Ok(kernel_args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_three_are_read_and_strangers_pass() {
        let mut wishes = Wishes::default();
        let spec = json!({"annotations": {
            "io.ovms.vcpus": "2", "io.ovms.memory": "1G", "io.ovms.kernel-args": "quiet", "io.kubernetes.cri.x": "y"
        }});
        assert_eq!(read(&spec, &mut wishes).unwrap().as_deref(), Some("quiet"));
        assert_eq!((wishes.annotation_vcpus.as_deref(), wishes.annotation_memory.as_deref()), (Some("2"), Some("1G")));
    }

    #[test]
    fn read_unknown_of_ours_returns_its_name() {
        let err = read(&json!({"annotations": {"io.ovms.vcpu": "2"}}), &mut Wishes::default()).unwrap_err();
        assert!(err.chain().contains("io.ovms.vcpu "), "{}", err.chain());
    }
}
