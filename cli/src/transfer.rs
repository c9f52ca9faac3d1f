//! The way from `ovm` to `ovm-transfer`, the program with the network in it.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::{env, io};

use ovms_config::programs;

use crate::error::CliError;

const PROGRAM: &str = "ovm-transfer";

#[derive(Debug, thiserror::Error)]
#[error("{} cannot be executed", path.display())]
struct NotExecuted {
    path: PathBuf,
    source: io::Error,
}

/// Goes on as that program, with the same words; returns only if it cannot be executed.
pub fn become_it() -> CliError {
    let Some(path) = programs::find(PROGRAM) else {
        let message = format!("there is no program {PROGRAM} beside this one or in PATH: install it (make install)");
        return CliError::unavailable(message);
    };
    let mut words = env::args_os();
    let mut command = Command::new(&path);
    // It speaks of itself as the user does.
    if let Some(name) = words.next() {
        command.arg0(name);
    }
    let source = command.args(words).exec();
    CliError::io(NotExecuted { path, source })
}
