//! `ovm pull`: from a registry into the local store.

use clap::Parser;
use ovms_artifact::build::{is_pure_artifact, runnable};
use ovms_artifact::layout::{Sink, Store};
use ovms_config::Settings;
use ovms_registry::Registry;

use crate::error::CliError;
use crate::images;
use crate::progress::Steps;
use crate::scratch;
use crate::text;

/// What `ovm pull` takes.
#[derive(Parser)]
#[command(
    after_help = "What oras push wrote without a config becomes a runnable image: its blobs stay, its manifest's \
    refs become digests.\n\nExample:\n  ovm pull localhost:5000/demo/debian:13"
)]
pub struct Args {
    /// The image in a registry: HOST/NAME[:TAG] or HOST/NAME@sha256:…
    #[arg(value_name = "REF")]
    reference: String,
    /// Speak HTTP to the registry; it is always spoken to localhost
    #[arg(long)]
    plain_http: bool,
    /// Print nothing but the image's digest
    #[arg(short, long)]
    quiet: bool,
}

/// Pulls the image and prints its digest.
pub fn run(args: &Args) -> Result<(), CliError> {
    let settings = Settings::load().map_err(CliError::invalid)?;
    scratch::sweep(&settings.paths.state);
    let name = images::name(&args.reference)?;
    let registry = Registry::open(ovms_registry::parse(&name.full)?, args.plain_http)?;
    let store = Store::open(&images::store_dir(&settings))?;
    let steps = Steps::new(args.quiet);
    let layers = images::layers(&settings);
    let mut sink = store.writer()?;
    let pulled = registry.pull(&mut sink, &steps)?;
    let digest = if is_pure_artifact(&store.layout()?, &pulled.image)? {
        runnable(&store.layout()?, &pulled.image, vec![name.clone()], &layers, Box::new(sink), &steps)?.image.digest
    } else {
        // What nothing can be run of has no place in the store.
        store.layout()?.load_image(&pulled.image, &layers)?;
        Box::new(sink).finish(vec![name.entry(&pulled.image)])?;
        images::digest(&pulled.image)?
    };
    text::print(&format!("{digest}\n"))?;
    if !args.quiet {
        eprintln!("{} ({} fetched, {} were here)", name.full, text::size(pulled.fetched), text::size(pulled.present));
    }
    Ok(())
}
