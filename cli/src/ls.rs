//! `ovm ls`: the images of the local store. `ovm rmi`: takes them away.

use clap::Parser;
use ovms_artifact::digest::Digest;
use ovms_artifact::image::Blob;
use ovms_artifact::layout::{Layout, LayoutError, Store};
use ovms_artifact::media::BlobKind;
use ovms_config::Settings;
use serde::Serialize;

use crate::error::CliError;
use crate::images;
use crate::run::{self, instance::images_in_use};
use crate::scratch;
use crate::text;

/// What `ovm ls` takes.
#[derive(Parser)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One image of the store.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    name: String,
    digest: Digest,
    /// Bytes of its blobs; images share blobs, so the sum over all may be more than the store has.
    size: u64,
    /// It carries RAM and resumes.
    ram: bool,
}

/// Lists the store.
pub fn run(args: &Args) -> Result<(), CliError> {
    let settings = Settings::load().map_err(CliError::invalid)?;
    let rows = match Store::existing(&images::store_dir(&settings), "") {
        Ok(store) => rows(&store)?,
        Err(LayoutError::UnknownName(_)) => Vec::new(),
        Err(err) => return Err(err.into()),
    };
    if args.json {
        return text::print(&(serde_json::to_string_pretty(&rows).map_err(CliError::invalid)? + "\n"));
    }
    let mut table = vec![["NAME", "DIGEST", "SIZE", "STARTS"].map(str::to_owned)];
    table.extend(rows.iter().map(|row| {
        let digest = row.digest.hex().chars().take(12).collect();
        let starts = if row.ram { "from RAM" } else { "by boot" };
        [row.name.clone(), digest, text::size(row.size), starts.to_owned()]
    }));
    text::print(&text::table(&table))
}

fn rows(store: &Store) -> Result<Vec<Row>, CliError> {
    let layout = store.layout()?;
    let mut rows = Vec::new();
    for entry in layout.entries()? {
        let (size, ram) = figures(store, &layout, &entry.digest)?;
        let name = entry.name.or(entry.tag).unwrap_or_default();
        rows.push(Row { name, digest: entry.digest, size, ram });
    }
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(rows)
}

fn figures(store: &Store, layout: &Layout, digest: &Digest) -> Result<(u64, bool), CliError> {
    let image = store.image(digest).ok_or(LayoutError::MissingBlob(*digest))?;
    let manifest = layout.documents(&image)?.manifest;
    let blobs: Vec<Blob> =
        manifest.layers().iter().chain([manifest.config()]).filter_map(|d| Blob::of(d).ok()).collect();
    let ram = blobs.iter().any(|blob| BlobKind::of(&blob.media_type) == BlobKind::RamSnapshot);
    Ok((blobs.iter().map(|blob| blob.size).sum::<u64>().saturating_add(image.size()), ram))
}

/// What `ovm rmi` takes.
#[derive(Parser)]
pub struct RemoveArgs {
    /// Images of the local store, by name or digest
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
}

/// Takes names away, and removes what no image needs any more.
pub fn remove(args: &RemoveArgs) -> Result<(), CliError> {
    let settings = Settings::load().map_err(CliError::invalid)?;
    scratch::sweep(&settings.paths.state);
    for text in &args.images {
        let store = Store::existing(&images::store_dir(&settings), text)?;
        let removed = store.remove(text, &images_in_use(&settings.paths.state))?;
        for name in &removed.names {
            text::print(&format!("{name}\n"))?;
        }
        run::forget(&settings, &removed.images)?;
        if removed.freed.is_none() {
            eprintln!("ovm: another ovm is adding an image: the next removal frees the space");
        }
    }
    Ok(())
}
