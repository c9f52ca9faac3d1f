//! `ovm build`: files in, a runnable image in an OCI layout out.

use std::fs::File;
use std::path::{Path, PathBuf};

use clap::Parser;
use ovms_artifact::build::{BuildError, Built, ImageName, Options, Recipe};
use ovms_artifact::layout::{DirSink, Sink, TarSink};
use ovms_artifact::manifest::{
    Device, DiskFormat, Initrd, Kernel, MachineDefaults, Manifest, Metadata, RamCompression, RamSnapshot, Ref,
    RuntimeHints,
};
use ovms_config::size::parse_size;
use ovms_disk::layer::{probe, Format, Limits};
use serde_json::Map;

use crate::error::CliError;
use crate::progress::Steps;
use crate::text;

/// What `ovm build` takes.
#[derive(Parser)]
#[command(after_help = "Examples:\n  \
    ovm build --name demo/debian --version 13 --kernel vmlinuz --initrd initrd.img --args 'console=ttyS0' \\\n    \
    --disk base.qcow2 --disk diff.qcow2 --memory 1G -o debian.tar --tag localhost:5000/demo/debian:13\n  \
    ovm build -f manifest.json -o layout/")]
pub struct Args {
    /// A hand-written manifest; its refs are files relative to it. Other flags override and add to it
    #[arg(short = 'f', long = "file", value_name = "MANIFEST")]
    manifest: Option<PathBuf>,
    /// Where to write: a directory (an OCI layout there gets one more image), or a file that ends in .tar
    #[arg(short, long, value_name = "DIR|FILE.tar")]
    output: PathBuf,
    /// The image's name in registries and containerd; may be repeated. By default from name and version
    #[arg(short, long = "tag", value_name = "NAME[:TAG]", value_parser = parse_name)]
    tags: Vec<ImageName>,
    /// Write disk layers as the bare disk files: smaller steps for other tools, but skopeo strips what says what they are
    #[arg(long)]
    raw_layers: bool,
    /// Print nothing but the image's digest
    #[arg(short, long)]
    quiet: bool,

    /// The image's name
    #[arg(long, required_unless_present = "manifest")]
    name: Option<String>,
    /// The image's version
    #[arg(long, required_unless_present = "manifest")]
    version: Option<String>,
    /// The kernel, a bzImage or an x86-64 ELF file; an image without one is built, but this version cannot start it
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    args: Option<String>,
    /// A disk layer, base first; the format from .qcow2, .raw, .img or from format=
    #[arg(long = "disk", value_name = "FILE[,format=qcow2|raw]", value_parser = parse_disk)]
    disks: Vec<(PathBuf, DiskFormat)>,
    /// A device of shared memory; an image with one is built, but this version cannot start it
    #[arg(long = "device", value_name = "ivshmem,name=N,size=S[,addr=0x…]", value_parser = parse_device)]
    devices: Vec<Device>,
    /// vCPUs the machine gets unless somebody says otherwise
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    /// Memory the machine gets unless somebody says otherwise, as 512M or 2GiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Who made the image
    #[arg(long)]
    author: Option<String>,
    /// When it was made, RFC 3339; by default SOURCE_DATE_EPOCH, else nothing is written
    #[arg(long, value_name = "TIME")]
    created: Option<String>,
    /// A runtime the image prefers; may be repeated, best first
    #[arg(long = "preferred-runtime", value_name = "NAME")]
    preferred_runtimes: Vec<String>,
    /// The start the image hopes for, in milliseconds
    #[arg(long, value_name = "MS")]
    cold_start_target_ms: Option<u64>,
    /// A RAM snapshot, compressed as its name ends: .lz4 or .zst
    #[arg(long, value_name = "FILE", value_parser = parse_ram)]
    ram: Option<(PathBuf, RamCompression)>,
    /// Hold the RAM snapshot in tmpfs
    #[arg(long, requires = "ram")]
    ram_preload: bool,
    /// Lock the RAM snapshot in memory
    #[arg(long, requires = "ram")]
    ram_mlock: bool,
}

/// Builds the image and prints its digest and names.
pub fn run(args: Args) -> Result<(), CliError> {
    let epoch = source_date_epoch()?;
    let output = args.output.clone();
    let options = Options { names: args.tags.clone(), raw_layers: args.raw_layers, epoch };
    let quiet = args.quiet;
    let recipe = recipe(args)?;
    recipe.check()?;
    probe_disks(&recipe)?;
    let sink = sink(&output, epoch.unwrap_or_default())?;
    let built = recipe.build(sink, options, &Steps::new(quiet))?;
    if !quiet {
        text::warn_unsupported(&built.manifest);
    }
    print(&built, &output, quiet)
}

fn print(built: &Built, output: &Path, quiet: bool) -> Result<(), CliError> {
    text::print(&format!("{}\n", built.image.digest))?;
    for name in built.names.iter().filter(|_| !quiet) {
        eprintln!("{} in {} ({})", name.full, output.display(), text::size(built.size));
    }
    Ok(())
}

/// A disk whose header the block stack refuses.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be a disk layer", path.display())]
struct DiskRefused {
    path: PathBuf,
    source: ovms_disk::Error,
}

/// Has each disk's header read by the code that unpacks it when the image is pulled.
fn probe_disks(recipe: &Recipe) -> Result<(), CliError> {
    for (path, layer) in recipe.disks.iter().zip(&recipe.manifest.disk_layers) {
        let format = if layer.format == DiskFormat::Qcow2 { Format::Qcow2 } else { Format::Raw };
        let read = |source| BuildError::Read { path: path.clone(), source };
        let file = File::open(path).map_err(read)?;
        let refused = |source| CliError::invalid(DiskRefused { path: path.clone(), source });
        probe(&file, format, &Limits::default()).map_err(refused)?;
    }
    Ok(())
}

/// A directory, or a tar by its name.
fn sink(output: &Path, mtime: u64) -> Result<Box<dyn Sink>, CliError> {
    let tar = output.extension().is_some_and(|e| e.eq_ignore_ascii_case("tar")) && !output.is_dir();
    Ok(if tar { Box::new(TarSink::create(output, mtime)?) } else { Box::new(DirSink::create(output)?) })
}

/// The manifest and files that the arguments describe, on top of those of `-f`.
fn recipe(args: Args) -> Result<Recipe, CliError> {
    let mut recipe = match &args.manifest {
        Some(path) => Recipe::from_manifest(path)?,
        None => {
            let manifest = Manifest::new(String::new(), String::new());
            Recipe { manifest, kernel: None, initrd: None, disks: Vec::new(), ram_snapshot: None }
        }
    };
    for (path, format) in args.disks {
        recipe.push_disk(path, format);
    }
    let manifest = &mut recipe.manifest;
    set(&mut manifest.name, args.name);
    set(&mut manifest.version, args.version);
    manifest.devices.extend(args.devices);
    if let Some(path) = args.kernel {
        let reference = Ref::File(path.clone());
        let old = manifest.kernel.take().and_then(|k| k.args);
        manifest.kernel = Some(Kernel { reference, args: old, extra: Map::new() });
        recipe.kernel = Some(path);
    }
    match (&mut manifest.kernel, args.args) {
        (Some(kernel), Some(text)) => kernel.args = Some(text),
        (None, Some(_)) => return Err(CliError::invalid("--args is for a kernel, and the image has none")),
        (_, None) => {}
    }
    if let Some(path) = args.initrd {
        manifest.initrd = Some(Initrd { reference: Ref::File(path.clone()), extra: Map::new() });
        recipe.initrd = Some(path);
    }
    if let Some((path, compression)) = args.ram {
        let reference = Ref::File(path.clone());
        let (preload_hint, mlock_required) = (args.ram_preload, args.ram_mlock);
        manifest.ram_snapshot =
            Some(RamSnapshot { reference, compression, preload_hint, mlock_required, extra: Map::new() });
        recipe.ram_snapshot = Some(path);
    }
    if args.vcpus.is_some() || args.memory.is_some() {
        let defaults = manifest.defaults.get_or_insert_with(MachineDefaults::default);
        defaults.vcpus = args.vcpus.or(defaults.vcpus);
        defaults.memory_bytes = args.memory.or(defaults.memory_bytes);
    }
    if args.author.is_some() || args.created.is_some() {
        let metadata = manifest.metadata.get_or_insert_with(Metadata::default);
        metadata.author = args.author.or(metadata.author.take());
        metadata.created = args.created.or(metadata.created.take());
    }
    if !args.preferred_runtimes.is_empty() || args.cold_start_target_ms.is_some() {
        let hints = manifest.runtime_hints.get_or_insert_with(RuntimeHints::default);
        hints.preferred_runtime.extend(args.preferred_runtimes);
        hints.cold_start_target_ms = args.cold_start_target_ms.or(hints.cold_start_target_ms);
    }
    Ok(recipe)
}

fn set(field: &mut String, value: Option<String>) {
    if let Some(value) = value {
        *field = value;
    }
}

/// `SOURCE_DATE_EPOCH`, if it is set (reproducible-builds.org): seconds since 1970.
fn source_date_epoch() -> Result<Option<u64>, CliError> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Err(_) => Ok(None),
        Ok(text) => match text.parse() {
            Ok(seconds) => Ok(Some(seconds)),
            Err(_) => Err(CliError::invalid(format!("SOURCE_DATE_EPOCH is \"{text}\", not a number of seconds"))),
        },
    }
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|e| e.to_string())
}

fn parse_name(text: &str) -> Result<ImageName, String> {
    ImageName::parse(text).map_err(|e| e.to_string())
}

fn parse_disk(text: &str) -> Result<(PathBuf, DiskFormat), String> {
    let (path, format) = match text.rsplit_once(",format=") {
        Some((path, format)) => (path, DiskFormat::from_name(format)),
        None => {
            let extension = Path::new(text).extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
            let format = match extension.as_deref() {
                Some("qcow2") => Some(DiskFormat::Qcow2),
                Some("raw" | "img") => Some(DiskFormat::Raw),
                _ => None,
            };
            (text, format)
        }
    };
    match format {
        Some(format @ (DiskFormat::Qcow2 | DiskFormat::Raw)) => Ok((PathBuf::from(path), format)),
        _ => Err("the format is not clear: add ,format=qcow2 or ,format=raw".to_owned()),
    }
}

fn parse_ram(text: &str) -> Result<(PathBuf, RamCompression), String> {
    match Path::new(text).extension().and_then(|e| e.to_str()) {
        Some("lz4") => Ok((PathBuf::from(text), RamCompression::Lz4)),
        Some("zst") => Ok((PathBuf::from(text), RamCompression::Zstd)),
        _ => Err("a RAM snapshot's name ends in .lz4 or .zst".to_owned()),
    }
}

fn parse_device(text: &str) -> Result<Device, String> {
    let mut parts = text.split(',');
    let kind = parts.next().unwrap_or_default().to_owned();
    let mut device = Device { kind, name: String::new(), size: None, mmio_addr: None, extra: Map::new() };
    for part in parts {
        match part.split_once('=') {
            Some(("name", name)) => device.name = name.to_owned(),
            Some(("size", text)) => device.size = Some(size(text)?),
            Some(("addr", addr)) => device.mmio_addr = Some(addr.to_owned()),
            _ => return Err(format!("\"{part}\" is none of name=, size=, addr=")),
        }
    }
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_disk_takes_the_format_from_name_or_flag() {
        assert_eq!(parse_disk("a/b.qcow2").unwrap(), (PathBuf::from("a/b.qcow2"), DiskFormat::Qcow2));
        assert_eq!(parse_disk("b.img").unwrap().1, DiskFormat::Raw);
        assert_eq!(parse_disk("b.disk,format=raw").unwrap(), (PathBuf::from("b.disk"), DiskFormat::Raw));
    }

    #[test]
    fn parse_disk_unclear_format_returns_the_way_out() {
        for text in ["disk", "disk.vmdk", "disk.raw,format=ovfms", "disk,format=vdi"] {
            assert!(parse_disk(text).unwrap_err().contains("format=qcow2"), "{text}");
        }
    }

    #[test]
    fn parse_device_reads_every_key() {
        let device = parse_device("ivshmem,name=shm0,size=64M,addr=0x10000000").unwrap();
        assert_eq!((device.kind.as_str(), device.name.as_str()), ("ivshmem", "shm0"));
        assert_eq!((device.size, device.address()), (Some(64 << 20), Ok(Some(0x1000_0000))));
        assert!(parse_device("ivshmem,bus=1").unwrap_err().contains("bus=1"));
    }
}
