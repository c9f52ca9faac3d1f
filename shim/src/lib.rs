//! `containerd-shim-ovms-v1`: the shim between containerd and virtual machines.
//!
//! ```text
//!  containerd ──start, delete, -info──> bootstrap
//!             ──ttrpc──> service ──> task (state, order of events) ──> instance ──> machine ──> engine
//!                                      │ oci: config.json along one table
//!                                      │ stdio: fifos, loggers, files
//!             <──events── events <─────┘
//! ```
//! `docs/runtime.md` tells users what to expect of it, `docs/oci-spec.md` what becomes of each field of a spec.
#![deny(unsafe_code)]

mod bootstrap;
mod cli;
mod error;
mod events;
mod instance;
mod log;
mod machine;
mod metrics;
mod oci;
mod resolve;
mod serve;
mod service;
mod status;
mod stdio;
#[allow(unsafe_code, reason = "two system calls that no library offers safely")]
mod sys;
mod task;

use std::env;
use std::process::ExitCode;
use std::sync::Arc;

use ovms_config::Settings;

use self::cli::{Action, Args};
use self::error::{Error, Kind, Result};
use self::machine::EngineMaker;

/// The program.
pub fn main() -> ExitCode {
    match cli::parse(env::args_os().skip(1)).and_then(|args| run(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", error.chain());
            eprintln!("{}", error.chain());
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    match args.action {
        Action::Start => {
            // An operator's mistake should be read by the user who starts a container, not by nobody.
            bootstrap::start(args, &settings()?)
        }
        Action::Serve => serve::serve(args, Arc::new(EngineMaker::new(settings()?))),
        Action::Delete => bootstrap::delete(args, settings()),
        Action::Info => bootstrap::info(),
        Action::Version => {
            println!("containerd-shim-ovms-v1 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    }
}

fn settings() -> Result<Settings> {
    Settings::load().map_err(|e| Error::caused("ovms.toml cannot be used", e).of_kind(Kind::Invalid))
}
