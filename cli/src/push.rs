//! `ovm push`: from the local store or a layout to a registry.

use clap::Parser;
use ovms_artifact::layout::Layout;
use ovms_artifact::layout::Store;
use ovms_artifact::oci::Descriptor;
use ovms_config::Settings;
use ovms_registry::{Pushed, Registry};

use crate::error::CliError;
use crate::images;
use crate::progress::Steps;
use crate::scratch;
use crate::text;

/// What `ovm push` takes.
#[derive(Parser)]
#[command(after_help = "Only blobs that the registry lacks are sent.\n\nExample:\n  \
    ovm push localhost:5000/demo/debian:13\n  ovm push ./layout localhost:5000/demo/debian:13")]
pub struct Args {
    /// An image of the local store, by its name or digest; or an OCI layout, a directory or a tar
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Where it goes: HOST/NAME[:TAG]; by default where IMAGE's own name says
    #[arg(value_name = "REF")]
    reference: Option<String>,
    /// Which image of the layout, if it holds several
    #[arg(short, long, value_name = "NAME")]
    tag: Option<String>,
    /// Speak HTTP to the registry; it is always spoken to localhost
    #[arg(long)]
    plain_http: bool,
    /// Print nothing but the image's digest
    #[arg(short, long)]
    quiet: bool,
}

/// Pushes the image and prints its digest.
pub fn run(args: &Args) -> Result<(), CliError> {
    let settings = Settings::load().map_err(CliError::invalid)?;
    scratch::sweep(&settings.paths.state);
    let found = images::find(&settings, &args.image, args.tag.as_deref())?;
    let reference = match &args.reference {
        Some(reference) => reference.clone(),
        None if ovms_registry::names_registry(&args.image) => args.image.clone(),
        None => {
            return Err(CliError::invalid(format!(
                "\"{}\" names no registry: say where it goes (ovm push {} HOST/NAME:TAG)",
                args.image, args.image
            )));
        }
    };
    let pushed = push(&settings, &found.layout, &found.image, &reference, args.plain_http, &Steps::new(args.quiet))?;
    text::print(&format!("{}\n", pushed.digest))?;
    if !args.quiet {
        told(&reference, &pushed);
    }
    Ok(())
}

/// Pushes an image of a layout to the place that `reference` names.
pub fn push(
    settings: &Settings,
    layout: &Layout,
    image: &Descriptor,
    reference: &str,
    plain_http: bool,
    steps: &Steps,
) -> Result<Pushed, CliError> {
    let registry = Registry::open(ovms_registry::parse(&images::name(reference)?.full)?, plain_http)?;
    let dir = images::store_dir(settings);
    let holders = match Store::existing(&dir, reference) {
        Ok(store) => images::holders(&store)?,
        Err(_) => Vec::new(),
    };
    Ok(registry.push(layout, image, &holders, steps)?)
}

/// Says what went over the network.
pub fn told(reference: &str, pushed: &Pushed) {
    let [sent, mounted, present] = [pushed.sent, pushed.mounted, pushed.present].map(text::size);
    eprintln!("{reference} ({sent} sent, {mounted} mounted, {present} were there)");
}
