//! `ovm snapshot`: an image of a running machine, from which any number of others resume.
//!
//! ```text
//!  machine ──machine.sock──> <state>/scratch/…/{ram, disk.qcow2, snapshot.json} ─────┐
//!  its image: a layout or the store, or containerd's content store ───────────────────┴─> image in the store (or -o) ─> push
//! ```
//! The base image is looked for before the machine is asked for anything, so that what cannot be made costs no pause.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Parser;
use ovms_artifact::build::{Built, ImageName, Snapshot};
use ovms_artifact::digest::Digest;
use ovms_artifact::layout::{DirSink, Layout, LayoutError, Loaded, Sink, Store};
use ovms_artifact::oci::Descriptor;
use ovms_bundle::{SnapshotRecord, SNAPSHOT_DISK, SNAPSHOT_RAM};
use ovms_config::Settings;
use ovms_engine::{Engine, ToMachine};

use crate::content;
use crate::error::CliError;
use crate::images::{self, Found};
use crate::machines::{self, Machine};
use crate::progress::Steps;
use crate::push;
use crate::run::instance::images_in_use;
use crate::scratch::{self, Scratch};
use crate::stop;
use crate::terminal::Signals;
use crate::text;

/// What `ovm snapshot` takes.
#[derive(Parser)]
#[command(
    after_help = "The guest stands still for milliseconds and goes on. The image has the base image's disk layers, a \
    layer of what was written since, and the memory. RAM holds secrets: whoever can pull the image can read them.\n\n\
    Example:\n  ovm snapshot web -t localhost:5000/demo/web:warm\n  ovm run localhost:5000/demo/web:warm"
)]
pub struct Args {
    /// A running machine, ID or NAMESPACE/ID
    #[arg(value_name = "ID")]
    id: String,
    /// The image's name; one that names a registry (HOST/NAME:TAG) is pushed there
    #[arg(short, long, value_name = "NAME[:TAG]")]
    tag: String,
    /// Store all of the memory, even if the machine itself was resumed and only what changed would do
    #[arg(long)]
    full: bool,
    /// End the machine once the image is made; its guest does not run on meanwhile
    #[arg(long)]
    stop: bool,
    /// Have hosts hold the memory in tmpfs
    #[arg(long)]
    preload: bool,
    /// Have hosts lock the memory in RAM
    #[arg(long)]
    mlock: bool,
    /// Write the image into an OCI layout instead of the local store, and push nothing
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Speak HTTP to the registry; it is always spoken to localhost
    #[arg(long)]
    plain_http: bool,
    /// Print nothing but the image's digest
    #[arg(short, long)]
    quiet: bool,
}

/// Takes the snapshot, makes the image, pushes it if its name says where.
pub fn run(args: &Args) -> Result<(), CliError> {
    let settings = Settings::load().map_err(CliError::invalid)?;
    let name = ImageName::parse(&args.tag)?;
    let machine = machines::find(&settings, &args.id)?;
    if !machine.lives() {
        return Err(CliError::not_now(format!("{} has ended: a snapshot is of a running machine", machine.name())));
    }
    let steps = Steps::new(args.quiet);
    let store = Store::open(&images::store_dir(&settings))?;
    clear_up(&settings, &store);
    // Held from here on, so that nothing of the base is removed meanwhile.
    let mut writer = store.writer()?;
    let base = base(&settings, &machine, &store, &mut writer, &steps)?;
    let loaded = base.layout.load_image(&base.image, &images::layers(&settings))?;
    let full =
        args.full || lacks_parents(&machine, &loaded.parts.ram_snapshots.iter().map(|b| b.digest).collect::<Vec<_>>());

    // For the engine, on the store's file system.
    let dir = Scratch::in_state(&settings.paths.state).map_err(CliError::io)?;
    take(&settings, &machine, &ToMachine::Snapshot { dir: dir.path().to_owned(), full, stop: args.stop }, args.quiet)?;
    let sink: Box<dyn Sink> = match &args.output {
        Some(dir) => Box::new(DirSink::create(dir)?),
        None => Box::new(writer),
    };
    let built = assemble(args, &settings, &name, dir.path(), (&base, &loaded), sink, &steps);
    if args.stop {
        match &built {
            Ok(_) => stop::kill(&settings, &machine)?,
            Err(_) => resume(&settings, &machine),
        }
    }
    let built = built?;
    text::print(&format!("{}\n", built.image.digest))?;
    if !args.quiet {
        eprintln!("{} ({})", name.full, text::size(built.size));
    }
    if args.output.is_none() && ovms_registry::names_registry(&args.tag) {
        let image = store.find(&name.full)?;
        let layout = store.layout()?;
        let pushed = push::push(&settings, &layout, &image, &name.full, args.plain_http, &steps)?;
        if !args.quiet {
            push::told(&name.full, &pushed);
        }
    }
    Ok(())
}

/// Removes what killed snapshots have left, here and in the store: each may be a whole memory with its secrets.
fn clear_up(settings: &Settings, store: &Store) {
    scratch::sweep(&settings.paths.state);
    if let Err(err) = store.collect(&images_in_use(&settings.paths.state)) {
        eprintln!("ovm: the store is not cleared up: {}", CliError::from(err).chain());
    }
}

/// The image that the machine was made from. That of a machine of containerd's is copied into the store, without a name.
fn base(
    settings: &Settings,
    machine: &Machine,
    store: &Store,
    sink: &mut dyn Sink,
    steps: &Steps,
) -> Result<Found, CliError> {
    let Some(files) = &machine.files else {
        let image = content::fetch(settings, &machine.namespace, &machine.id, sink, steps)?;
        return Ok(Found { layout: store.layout()?, image });
    };
    let image: Descriptor = files.origin.image.clone();
    let missing = || {
        CliError::not_found(format!(
            "the image {} that {} was made from is no longer in {}: pull it again",
            files.origin.name,
            machine.name(),
            files.origin.layout.display()
        ))
    };
    let layout = Layout::open(&files.origin.layout).map_err(|_| missing())?;
    match layout.documents(&image) {
        Ok(_) => Ok(Found { layout, image }),
        Err(LayoutError::MissingBlob(_) | LayoutError::Io { .. }) => Err(missing()),
        Err(err) => Err(err.into()),
    }
}

/// Whether the base lacks RAM on which the machine's own would be a diff: it was booted from another image's disk.
fn lacks_parents(machine: &Machine, base: &[Digest]) -> bool {
    let bundle = machine.files.as_ref().and_then(|files| files.bundle());
    let Some(ram) = bundle.and_then(|bundle| bundle.ram) else { return false };
    let needed = std::iter::once(&ram.digest).chain(&ram.parents);
    !needed.into_iter().all(|digest| digest.parse().is_ok_and(|digest| base.contains(&digest)))
}

/// Has the machine's engine take the snapshot; a signal gives it up and the machine goes on.
fn take(settings: &Settings, machine: &Machine, request: &ToMachine, quiet: bool) -> Result<(), CliError> {
    let signals = Signals::hold().map_err(CliError::io)?;
    let remote = Engine::new(settings.clone()).remote(&machine.namespace, &machine.id)?;
    let canceller = remote.canceller()?;
    signals.watch(move || canceller.cancel()).map_err(CliError::io)?;
    let stood = remote.request(request, &mut |sentence| {
        if !quiet {
            eprintln!("{}", text::harmless(sentence));
        }
    })?;
    if !quiet {
        eprintln!("the guest stood still for {:.1} ms", stood as f64 / 1000.0);
    }
    Ok(())
}

fn assemble(
    args: &Args,
    settings: &Settings,
    name: &ImageName,
    dir: &Path,
    (base, loaded): (&Found, &Loaded),
    sink: Box<dyn Sink>,
    steps: &Steps,
) -> Result<Built, CliError> {
    let record = SnapshotRecord::load(dir)?;
    if record.manifest != loaded.resolved.manifest {
        return Err(CliError::invalid(format!(
            "{} was made from another image than its name leads to now: name that image again, by its digest",
            record.machine
        )));
    }
    let parents = record.ram.parents.iter().map(|parent| parent.parse());
    let snapshot = Snapshot {
        ram: dir.join(SNAPSHOT_RAM),
        parents: parents.collect::<Result<_, _>>().map_err(CliError::invalid)?,
        disk: record.disk.is_some().then(|| dir.join(SNAPSHOT_DISK)),
        vcpus: record.ram.vcpus,
        memory: record.ram.memory,
        preload_hint: args.preload,
        mlock_required: args.mlock,
        names: vec![name.clone()],
        epoch: SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs()),
    };
    let built = snapshot.build(&base.layout, &base.image, &images::layers(settings), sink, steps)?;
    // Gone before anything is pushed: it is the second copy of a whole memory.
    for name in [SNAPSHOT_RAM, SNAPSHOT_DISK] {
        let _ = fs::remove_file(dir.join(name));
    }
    Ok(built)
}

fn resume(settings: &Settings, machine: &Machine) {
    let engine = Engine::new(settings.clone());
    let resumed =
        engine.remote(&machine.namespace, &machine.id).and_then(|r| r.request(&ToMachine::Resume, &mut |_| ()));
    if let Err(err) = resumed {
        eprintln!("ovm: {} stays paused: {}", machine.name(), CliError::from(err).chain());
    }
}
