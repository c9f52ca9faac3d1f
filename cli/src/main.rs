//! `ovm`: build, judge, look at and run OVMS images without a daemon.
//!
//! A file for each verb; each decodes its arguments, makes one call into the libraries and prints what came of it. An
//! error is printed once, here, as one line from the outermost cause to the innermost.
#![forbid(unsafe_code)]

mod build;
mod error;
mod inspect;
mod progress;
mod text;
mod validate;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    /// Show what an image is made of
    Inspect(inspect::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Build(args) => build::run(*args),
        Verb::Validate(args) => validate::run(&args),
        Verb::Inspect(args) => inspect::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ovm: {}", error.chain());
            error.code()
        }
    }
}
