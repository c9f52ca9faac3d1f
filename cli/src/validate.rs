//! `ovm validate`: judges a manifest, or reads every byte of an image in an OCI layout.
//!
//! Disk layers and RAM are unpacked as a start would do it, by the sandboxed worker and into a directory that is removed
//! afterwards, and what is compressed is decompressed by it: what is parsed here as root is JSON, and the headers of tars.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use ovms_artifact::image::Blob;
use ovms_artifact::layout::{Layout, Loaded};
use ovms_artifact::manifest::{Manifest, ManifestError, MAX_MANIFEST};
use ovms_artifact::oci::Descriptor;
use ovms_bundle::unpack::{Cache, Options};
use ovms_bundle::worker::Launcher;
use ovms_config::Settings;

use crate::error::CliError;
use crate::images;
use crate::progress::Steps;
use crate::scratch::Scratch;
use crate::text;

/// What `ovm validate` takes.
#[derive(Parser)]
#[command(
    after_help = "The image is unpacked into a directory below TMPDIR, which needs room for its disk and memory."
)]
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
    let (manifest, found) = match open(&args.path)? {
        Input::Manifest(manifest) => {
            let found = manifest_text(&args.path, &manifest);
            (*manifest, found)
        }
        Input::Layout(layout) => {
            let steps = Steps::new(args.quiet);
            let image = layout.select(args.tag.as_deref())?;
            let settings = Settings::load().map_err(CliError::invalid)?;
            let loaded = layout.verify_but_disks(&image, &images::layers(&settings), &steps)?;
            unpack(&settings, &layout, &image, &steps)?;
            let found = image_text(&args.path, &loaded);
            (loaded.resolved.manifest, found)
        }
    };
    if args.quiet {
        return Ok(());
    }
    text::warn_unsupported(&manifest);
    text::print(&found)
}

/// Has the worker parse everything that a machine would be given.
fn unpack(settings: &Settings, layout: &Layout, image: &Descriptor, steps: &Steps) -> Result<(), CliError> {
    let options = Options {
        launcher: Launcher::new(),
        limits: (&settings.limits).into(),
        max_boot_file: settings.limits.boot_file,
        max_ram: Some(settings.ram.max_memory),
    };
    let dir = Scratch::in_tmp().map_err(CliError::io)?;
    let cache = Cache::open(&dir.path().join("cache"), options)?;
    steps.following(|tell| cache.unpack(layout, image, tell))?;
    Ok(())
}

fn manifest_text(path: &Path, manifest: &Manifest) -> String {
    let mut out = format!("{}: a valid OVMS manifest, {} {}\n", path.display(), manifest.name, manifest.version);
    for (field, reference) in manifest.unpinned() {
        let reference = text::harmless(&reference.to_string());
        out += &format!("  {field}: \"{reference}\" is no digest yet, ovm build pins it\n");
    }
    out
}

fn image_text(path: &Path, image: &Loaded) -> String {
    let resolved = &image.resolved;
    let manifest = &resolved.manifest;
    let mut out = format!("{}: a valid image, {} {}\n", path.display(), manifest.name, manifest.version);
    let line = |what: &str, text: &str| format!("  {what:11} {text}\n");
    let blob = |what: &str, blob: &Blob| line(what, &format!("{} ({})", blob.digest, text::size(blob.size)));
    out += &line("image", &image.image.digest.to_string());
    out.extend(resolved.kernel.iter().map(|b| blob("kernel", b)));
    out.extend(resolved.initrd.iter().map(|b| blob("initrd", b)));
    out.extend(resolved.ram_snapshot.iter().map(|b| blob("ram", b)));
    out.extend(resolved.disks.iter().map(|disk| blob(disk.format.name(), &disk.layer.blob)));
    out += &match &image.descriptor {
        Some(digest) => line("descriptor", &digest.to_string()),
        None => line("descriptor", "none: the manifest is a blob of its own, containerd's API resolves it at start"),
    };
    let checked = image.parts.plain_blobs().count() + image.parts.layers.len();
    out + &format!("  {checked} blobs have the digests, diff_ids and structure they should\n")
}
