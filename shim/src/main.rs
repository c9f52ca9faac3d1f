//! The program that containerd runs for `--runtime io.containerd.ovms.v1`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ovms_shim::main()
}
