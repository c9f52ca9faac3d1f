//! `ovm inspect`: what an image is made of, or what a machine is and how its start went, for people or as JSON.

use std::path::Path;

use clap::Parser;
use ovms_artifact::image::{Blob, Layer};
use ovms_artifact::layout::{Entry, Layout, Loaded};
use ovms_artifact::manifest::Manifest;
use ovms_artifact::media::Compression;
use ovms_artifact::oci::Descriptor;
use ovms_config::Settings;
use serde_json::{json, Value};

use crate::error::CliError;
use crate::images;
use crate::machines::{self, Machine};
use crate::ps;
use crate::text;
use crate::validate::{open, Input};

/// What `ovm inspect` takes.
#[derive(Parser)]
pub struct Args {
    /// A machine (ID or NAMESPACE/ID), an image of the local store, or a path: a manifest (.json), an OCI layout
    /// directory, or a tar of one
    #[arg(value_name = "ID|IMAGE|PATH")]
    what: String,
    /// Which image, if the layout has several
    #[arg(short, long, value_name = "TAG")]
    tag: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Prints what it is.
pub fn run(args: &Args) -> Result<(), CliError> {
    let path = Path::new(&args.what);
    let shown = if images::is_path(&args.what) || args.tag.is_some() {
        match open(path)? {
            Input::Manifest(manifest) if args.json => document(&json!({ "manifest": manifest }))?,
            Input::Manifest(manifest) => manifest_text(&manifest),
            Input::Layout(layout) => image(args, &layout, &layout.select(args.tag.as_deref())?)?,
        }
    } else {
        let settings = Settings::load().map_err(CliError::invalid)?;
        match machines::find(&settings, &args.what) {
            Ok(machine) => self::machine(args, &machine)?,
            Err(_) => match images::find(&settings, &args.what, None) {
                Ok(found) => image(args, &found.layout, &found.image)?,
                Err(err) if args.what.contains([':', '@']) => return Err(err),
                Err(_) => {
                    let what = &args.what;
                    return Err(CliError::not_found(format!(
                        "{what} is no machine, no image of the store and no file"
                    )));
                }
            },
        }
    };
    text::print(&shown)
}

fn image(args: &Args, layout: &Layout, image: &Descriptor) -> Result<String, CliError> {
    let settings = Settings::load().map_err(CliError::invalid)?;
    let image = layout.load_image(image, &images::layers(&settings))?;
    let names = names(layout, &image)?;
    match args.json {
        true => document(&image_json(&image, &names)),
        false => Ok(image_text(&image, &names)),
    }
}

/// A machine; the steps of its start in microseconds since the one who asked for it began.
fn machine(args: &Args, machine: &Machine) -> Result<String, CliError> {
    let mut row = ps::row(machine);
    let timeline = machine.record.as_ref().map(|record| record.timeline.clone()).unwrap_or_default();
    if args.json {
        row["timeline"] = timeline.iter().map(|(step, at)| json!({ "step": step, "micros": at })).collect();
        return document(&row);
    }
    let mut out = format!("{}\n", machine.name());
    let figure = |key: &str| row[key].as_str().map_or_else(|| row[key].to_string(), str::to_owned);
    for key in ["state", "image", "imageDigest", "vcpus", "pid", "created"] {
        if !row[key].is_null() {
            out += &line(key, &figure(key));
        }
    }
    out += &line("memory", &text::size(machine.size().1));
    if let Some(exit) = machine.exit() {
        out += &line("exit", &format!("{} ({:?})", exit.status, exit.reason));
    }
    let mut before = 0;
    for (step, at) in &timeline {
        out += &format!("  {:>10.3} ms  {:>+9.3}  {}\n", ms(*at), ms(at.saturating_sub(before)), text::harmless(step));
        before = *at;
    }
    Ok(out)
}

fn ms(micros: u64) -> f64 {
    micros as f64 / 1000.0
}

fn document(value: &Value) -> Result<String, CliError> {
    serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(CliError::invalid)
}

/// The index entries that lead to the image.
fn names(layout: &Layout, image: &Loaded) -> Result<Vec<Entry>, CliError> {
    let mut entries = layout.entries()?;
    // An entry may be an index around the image; without one of the image's own, all names are its.
    if entries.iter().any(|e| e.digest == image.image.digest) {
        entries.retain(|e| e.digest == image.image.digest);
    }
    Ok(entries)
}

fn image_json(image: &Loaded, names: &[Entry]) -> Value {
    let blob = |b: &Blob| json!({ "digest": b.digest, "size": b.size, "mediaType": b.media_type });
    let layer = |l: &Layer| {
        let mut value = blob(&l.blob);
        value["diffId"] = json!(l.diff_id);
        value["compression"] = json!(compression(l.encoding.compression));
        value["role"] = json!(role(image, l));
        value
    };
    let resolved = &image.resolved;
    json!({
        "names": names.iter().map(|e| json!({ "tag": e.tag, "name": e.name })).collect::<Vec<_>>(),
        "image": blob(&image.image),
        "config": blob(&image.config),
        "chainId": image.parts.chain_id(),
        "descriptor": image.descriptor,
        "manifest": resolved.manifest,
        "defaults": { "vcpus": resolved.manifest.vcpus(), "memoryBytes": resolved.manifest.memory_bytes() },
        "kernel": resolved.kernel.as_ref().map(blob),
        "initrd": resolved.initrd.as_ref().map(blob),
        "ramSnapshot": resolved.ram_snapshot.as_ref().map(blob),
        "layers": image.parts.layers.iter().map(layer).collect::<Vec<_>>(),
    })
}

fn image_text(image: &Loaded, names: &[Entry]) -> String {
    let mut out = manifest_text(&image.resolved.manifest);
    for entry in names {
        out += &line("name", entry.name.as_deref().or(entry.tag.as_deref()).unwrap_or("-"));
    }
    out += &line("image", &image.image.digest.to_string());
    let blob = |what: &str, b: &Blob| line(what, &format!("{}  {}", b.digest, text::size(b.size)));
    let resolved = &image.resolved;
    out.extend(resolved.kernel.iter().map(|b| blob("kernel blob", b)));
    out.extend(resolved.initrd.iter().map(|b| blob("initrd blob", b)));
    out.extend(resolved.ram_snapshot.iter().map(|b| blob("ram blob", b)));
    for (i, layer) in image.parts.layers.iter().enumerate() {
        let packed = match layer.encoding.compression {
            Compression::None => String::new(),
            other => format!(", {}", compression(other)),
        };
        let what = format!("{}  {}{packed}  {}", layer.blob.digest, text::size(layer.blob.size), role(image, layer));
        out += &line(&format!("layer {i}"), &what);
    }
    out
}

fn manifest_text(manifest: &Manifest) -> String {
    let mut out = format!("{} {}\n", manifest.name, manifest.version);
    if let Some(kernel) = &manifest.kernel {
        out += &line("kernel", &kernel.reference.to_string());
        out.extend(kernel.args.iter().map(|args| line("args", args)));
    } else {
        out += &line("kernel", "none");
    }
    out.extend(manifest.initrd.iter().map(|i| line("initrd", &i.reference.to_string())));
    for disk in &manifest.disk_layers {
        let size = disk.size.map(|s| format!("  {}", text::size(s))).unwrap_or_default();
        out += &line("disk", &format!("{}  {}{size}", disk.reference, disk.format.name()));
    }
    out.extend(manifest.ram_snapshot.iter().map(|r| line("ram", &r.reference.to_string())));
    for device in &manifest.devices {
        let size = device.size.map(text::size).unwrap_or_default();
        let addr = device.mmio_addr.as_deref().unwrap_or("anywhere");
        out += &line("device", &format!("{} {} {size} at {addr}", device.kind, device.name));
    }
    out.extend(manifest.vcpus().map(|n| line("vcpus", &n.to_string())));
    out.extend(manifest.memory_bytes().map(|n| line("memory", &text::size(n))));
    if let Some(metadata) = &manifest.metadata {
        out.extend(metadata.author.iter().map(|a| line("author", a)));
        out.extend(metadata.created.iter().map(|c| line("created", c)));
    }
    if let Some(hints) = &manifest.runtime_hints {
        if !hints.preferred_runtime.is_empty() {
            out += &line("prefers", &hints.preferred_runtime.join(", "));
        }
        out.extend(hints.cold_start_target_ms.map(|ms| line("start goal", &format!("{ms} ms"))));
    }
    if manifest.container_mode {
        out += &line("mode", "container");
    }
    for problem in manifest.unsupported() {
        out += &line("not started", &problem.to_string());
    }
    out
}

fn line(key: &str, value: &str) -> String {
    format!("  {key:11} {}\n", text::harmless(value))
}

fn role(image: &Loaded, layer: &Layer) -> String {
    let disk = image.resolved.disks.iter().position(|d| d.layer.diff_id == layer.diff_id);
    match (disk, image.descriptor == Some(layer.blob.digest)) {
        (Some(i), false) => format!("disk {i}"),
        (Some(i), true) => format!("disk {i} and descriptor"),
        (None, true) => "descriptor".to_owned(),
        (None, false) => "not used".to_owned(),
    }
}

fn compression(compression: Compression) -> &'static str {
    match compression {
        Compression::None => "none",
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
    }
}
