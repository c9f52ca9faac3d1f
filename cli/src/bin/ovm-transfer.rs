//! The program `ovm-transfer`: `ovm` where it speaks to registries or containerd.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ovms_cli::ovm_transfer()
}
