//! `ovm validate`: judges a manifest, or reads every byte of an image in an OCI layout.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use ovms_artifact::image::Blob;
use ovms_artifact::layout::{Layout, Loaded};
use ovms_artifact::manifest::{Manifest, ManifestError, MAX_MANIFEST};

use crate::error::CliError;
use crate::progress::Steps;
use crate::text;

/// What `ovm validate` takes.
#[derive(Parser)]
pub struct Args {
    /// A manifest (.json), an OCI layout directory, or a tar of one
    path: PathBuf,
    /// Which image, if the layout has several
    #[arg(short, long, value_name = "TAG")]
    tag: Option<String>,
    /// Print nothing if all is well
    #[arg(short, long)]
    quiet: bool,
}

/// What a path holds, by its name and kind.
pub enum Input {
    /// An OVMS manifest.
    Manifest(Box<Manifest>),
    /// An OCI layout.
    Layout(Box<Layout>),
}

/// Opens a path as what it is: a file that ends in `.json` is a manifest, anything else a layout.
pub fn open(path: &Path) -> Result<Input, CliError> {
    let json = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json")) && !path.is_dir();
    if !json {
        return Ok(Input::Layout(Box::new(Layout::open(path)?)));
    }
    let named = |source| ovms_artifact::build::BuildError::Read { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(named)?.len();
    if size > MAX_MANIFEST {
        return Err(ManifestError::TooLarge(size).into());
    }
    let refused = |source| ovms_artifact::build::BuildError::Manifest { path: path.to_owned(), source };
    let manifest = Manifest::from_slice(&fs::read(path).map_err(named)?).map_err(refused)?;
    Ok(Input::Manifest(Box::new(manifest)))
}

/// Checks the path and prints what was found.
pub fn run(args: &Args) -> Result<(), CliError> {
    match open(&args.path)? {
        Input::Manifest(manifest) => {
            if !args.quiet {
                print_manifest(&args.path, &manifest);
            }
        }
        Input::Layout(layout) => {
            let loaded = layout.verify(args.tag.as_deref(), &Steps::new(args.quiet))?;
            if !args.quiet {
                print_image(&args.path, &loaded);
            }
        }
    }
    Ok(())
}

fn print_manifest(path: &Path, manifest: &Manifest) {
    println!("{}: a valid OVMS manifest, {} {}", path.display(), manifest.name, manifest.version);
    for (field, reference) in manifest.unpinned() {
        println!("  {field}: \"{reference}\" is no digest yet, ovm build pins it");
    }
}

fn print_image(path: &Path, image: &Loaded) {
    let manifest = &image.resolved.manifest;
    println!("{}: a valid image, {} {}", path.display(), manifest.name, manifest.version);
    println!("  image       {}", image.image.digest);
    let blob = |what: &str, blob: &Blob| println!("  {what:11} {} ({})", blob.digest, text::size(blob.size));
    image.resolved.kernel.iter().for_each(|b| blob("kernel", b));
    image.resolved.initrd.iter().for_each(|b| blob("initrd", b));
    image.resolved.ram_snapshot.iter().for_each(|b| blob("ram", b));
    for disk in &image.resolved.disks {
        blob(disk.format.name(), &disk.layer.blob);
    }
    match &image.descriptor {
        Some(digest) => println!("  descriptor  {digest}"),
        None => {
            println!("  descriptor  none: the manifest is a blob of its own, containerd's API resolves it at start")
        }
    }
    let checked = image.parts.plain_blobs().count() + image.parts.layers.len();
    println!("  {checked} blobs have the digests, diff_ids and structure they should");
}
