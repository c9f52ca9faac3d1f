//! The program; all of it is in the library, whose message types its tests use.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ovms_snapshotter::main()
}
