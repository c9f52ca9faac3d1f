//! `-info`: who this runtime is. containerd since 2.2 asks once for each runtime.

use std::io::{self, Write};

use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};

use crate::error::{Error, Result};

/// Writes a `RuntimeInfo` message to standard output. The options on standard input change nothing.
///
/// # Errors
/// When standard output is closed.
pub fn info() -> Result<()> {
    let bytes = message().write_to_bytes().map_err(|e| Error::caused("cannot encode the runtime's description", e))?;
    io::stdout().write_all(&bytes).map_err(|e| Error::caused("cannot write to stdout", e))
}

fn message() -> RuntimeInfo {
    RuntimeInfo {
        name: "io.containerd.ovms.v1".into(),
        version: MessageField::some(RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_names_the_runtime_and_its_version() {
        let bytes = message().write_to_bytes().unwrap();
        let read = RuntimeInfo::parse_from_bytes(&bytes).unwrap();
        assert_eq!(read.name, "io.containerd.ovms.v1");
        assert_eq!(read.version.version, env!("CARGO_PKG_VERSION"));
    }
}
