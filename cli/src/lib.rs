//! `ovm`: build, judge, look at and run OVMS images without a daemon.
//!
//! A file for each verb; each decodes its arguments, makes one call into the libraries and prints what came of it. An
//! error is printed once, here, as one line from the outermost cause to the innermost.
//!
//! ```text
//!  ovm (static, small) ──> build, run, ps, …
//!        └──pull, push, snapshot: execve──> ovm-transfer (registries, TLS, containerd)
//! ```
//! There are two programs, since a machine that resumes in milliseconds cannot wait for the loading of a TLS stack that
//! it does not use (docs/adr/0014-two-programs.md). A user knows one of them.
#![forbid(unsafe_code)]

mod build;
mod content;
mod error;
mod images;
mod inspect;
mod ls;
mod machines;
mod progress;
mod ps;
mod pull;
mod push;
mod run;
mod scratch;
mod snapshot;
mod stop;
mod terminal;
mod text;
mod transfer;
mod validate;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::CliError;

/// Build, validate, inspect and run OVMS virtual machine images.
#[derive(Parser)]
#[command(name = "ovm", version, arg_required_else_help = true, after_help = error::EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build an image from files into an OCI layout, a directory or a tar
    Build(Box<build::Args>),
    /// Check a manifest, or every byte of an image in an OCI layout
    Validate(validate::Args),
    /// Show what an image is made of, or what a machine is and how its start went
    Inspect(inspect::Args),
    /// Start an image from the local store or an OCI layout, attached to its console or in the background
    Run(run::Args),
    /// List the machines of this host
    Ps(ps::Args),
    /// Print what a machine in the background has written
    Logs(ps::LogsArgs),
    /// Press machines' power buttons; end by force what does not end
    Stop(stop::Args),
    /// Remove what is left of machines
    Rm(stop::RemoveArgs),
    /// Make an image of a running machine, from which others resume
    Snapshot(snapshot::Args),
    /// Fetch an image from a registry into the local store
    Pull(pull::Args),
    /// Send an image to a registry
    Push(push::Args),
    /// List the images of the local store
    Ls(ls::Args),
    /// Remove images from the local store
    Rmi(ls::RemoveArgs),
}

/// The program `ovm`.
#[must_use]
pub fn ovm() -> ExitCode {
    // Layers are read in a worker, which is this program started again.
    if let Some(code) = ovms_bundle::worker::intercept() {
        return code;
    }
    let success = |()| ExitCode::SUCCESS;
    close(match verb() {
        Verb::Build(args) => build::run(*args).map(success),
        Verb::Validate(args) => validate::run(&args).map(success),
        Verb::Inspect(args) => inspect::run(&args).map(success),
        Verb::Run(args) => run::run(args),
        Verb::Ps(args) => ps::run(&args).map(success),
        Verb::Logs(args) => ps::logs(&args).map(success),
        Verb::Stop(args) => stop::run(&args).map(success),
        Verb::Rm(args) => stop::remove(&args).map(success),
        Verb::Snapshot(_) | Verb::Pull(_) | Verb::Push(_) => Err(transfer::become_it()),
        Verb::Ls(args) => ls::run(&args).map(success),
        Verb::Rmi(args) => ls::remove(&args).map(success),
    })
}

/// The verb of the command line. A start does not wait for the words of all the others to be gathered; what `run` alone does
/// not understand, help among it, is told by the whole.
fn verb() -> Verb {
    let mut words = std::env::args_os().skip(1).peekable();
    let run = words.peek().is_some_and(|word| word == "run").then(|| run::Args::try_parse_from(words));
    match run {
        Some(Ok(args)) => Verb::Run(args),
        _ => Cli::parse().verb,
    }
}

/// The program `ovm-transfer`, which `ovm` becomes for the verbs that speak to registries or containerd.
#[must_use]
pub fn ovm_transfer() -> ExitCode {
    // It reads layers in a worker, too.
    if let Some(code) = ovms_bundle::worker::intercept() {
        return code;
    }
    let done = match Cli::parse().verb {
        Verb::Snapshot(args) => snapshot::run(&args),
        Verb::Pull(args) => pull::run(&args),
        Verb::Push(args) => push::run(&args),
        _ => Err(CliError::invalid("ovm-transfer is a part of ovm, for its verbs pull, push and snapshot: run ovm")),
    };
    close(done.map(|()| ExitCode::SUCCESS))
}

fn close(done: Result<ExitCode, CliError>) -> ExitCode {
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ovm: {}", text::harmless(&error.chain()));
            error.code()
        }
    }
}
