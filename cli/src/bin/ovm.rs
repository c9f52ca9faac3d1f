//! The program `ovm`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ovms_cli::ovm()
}
