//! From a mounted snapshot to a bundle that a machine can start from.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ovms_artifact::digest::Digest;
use ovms_artifact::manifest::Manifest;
use ovms_bundle::{create_top, layer as files, Disk, Record, TopPaths, RECORD_VERSION};

use super::checkpoint::{Checkpoint, MARK};
use super::fit::{check_disks, check_places, check_refs};
use super::tops::{self, Base};
use super::unpack::{finish_parents, Tell};
use super::{copies, disk_below, image, layer_of, layers_below, resume, ReadyLayer};
use crate::daemon::Daemon;
use crate::error::{Context, Error, Result};
use crate::layout;
use crate::store::{Chain, Content, Kind, Layer};
use ovms_containerd::Scope;

/// Name of the bundle record in a snapshot's directory.
pub const BUNDLE: &str = "bundle.json";
/// Name of the file beside it with the image's arguments, where its config was read.
const ARGS: &str = "args.json";

/// A machine that may start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The bundle record.
    pub bundle: PathBuf,
    /// Entrypoint and Cmd of the image's config, where it was read.
    pub args: Option<Vec<String>>,
}

/// What is to be resolved.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The container's id.
    pub container: &'a str,
    /// Source of the mount.
    pub source: &'a Path,
    /// Directory of a checkpoint to resume from.
    pub checkpoint: Option<&'a Path>,
}

/// Makes the snapshot whose mount has this source ready to start from.
pub async fn resolve(daemon: &Arc<Daemon>, wish: Wish<'_>, tell: Tell<'_>) -> Result<Resolved> {
    let scope = Scope::namespace(wish.namespace)?;
    let chain = machine_of(daemon, wish.source).await?;
    let checkpoint = match wish.checkpoint {
        Some(dir) => Some(Checkpoint::load(daemon, dir).await?),
        None => None,
    };
    let _alone = daemon.keyed.lock(format!("resolve {}", chain.record.number)).await;
    if let Some(resolved) = find(daemon, &chain) {
        resume::add_ram(daemon, &scope, &chain, &resolved.bundle, checkpoint.as_ref(), tell).await?;
        return Ok(resolved);
    }
    let order = Order { container: wish.container, checkpoint: checkpoint.as_ref(), with_ram: true };
    make(daemon, &scope, &chain, order, tell).await
}

/// The active snapshot of a machine behind a mount.
async fn machine_of(daemon: &Arc<Daemon>, source: &Path) -> Result<Chain> {
    let number = daemon.layout.number_of(source);
    let chain = match number {
        Some(number) => daemon.blocking(move |daemon| daemon.store.chain_of(number)).await?,
        None => None,
    };
    let Some(chain) = chain else {
        return Err(Error::invalid(format!(
            "the root file system {} was not made by the ovms snapshotter: add --snapshotter ovms, or set \
             CONTAINERD_SNAPSHOTTER=ovms, or snapshotter = \"ovms\" in nerdctl.toml",
            source.display()
        )));
    };
    if chain.record.content == Content::Files {
        return Err(Error::invalid(format!(
            "snapshot {} holds an ordinary container image, which this runtime does not run: use another runtime \
             (--runtime io.containerd.runc.v2), or an OVMS image",
            chain.key
        )));
    }
    if chain.record.kind != Kind::Active {
        return Err(Error::invalid(format!(
            "snapshot {} is read-only: a machine starts from a prepared one",
            chain.key
        )));
    }
    Ok(chain)
}

/// Makes whatever a machine's snapshot still lacks, but for RAM; once it is all there, it stays as it is.
pub async fn prepare(daemon: &Arc<Daemon>, scope: &Scope, container: &str, chain: &Chain) -> Result<Resolved> {
    let _alone = daemon.keyed.lock(format!("resolve {}", chain.record.number)).await;
    match find(daemon, chain) {
        Some(resolved) => Ok(resolved),
        None => make(daemon, scope, chain, Order { container, checkpoint: None, with_ram: false }, &|_| ()).await,
    }
}

/// The machine of a snapshot, if it was made.
fn find(daemon: &Daemon, chain: &Chain) -> Option<Resolved> {
    let dir = daemon.layout.snapshot(chain.record.number);
    let bundle = Some(dir.join(BUNDLE)).filter(|bundle| bundle.exists())?;
    let args = fs::read(dir.join(ARGS)).ok().and_then(|text| serde_json::from_slice(&text).ok());
    Some(Resolved { bundle, args })
}

/// How a machine is to be made.
#[derive(Clone, Copy)]
struct Order<'a> {
    container: &'a str,
    checkpoint: Option<&'a Checkpoint>,
    with_ram: bool,
}

async fn make(
    daemon: &Arc<Daemon>,
    scope: &Scope,
    chain: &Chain,
    order: Order<'_>,
    tell: Tell<'_>,
) -> Result<Resolved> {
    let Order { container, checkpoint, with_ram } = order;
    let dir = daemon.layout.snapshot(chain.record.number);
    let bundle = dir.join(BUNDLE);
    finish_parents(daemon, chain, tell).await?;
    let at = chain.clone();
    let (layers, own) = daemon.blocking(move |daemon| layers_of(daemon, &at)).await?;
    // A checkpoint's disk is all that its machine ever added to the image, as it was at the instant of its RAM.
    let own = own.filter(|_| checkpoint.is_none());
    let plan = plan(daemon, scope, container, chain, &layers, own.as_ref()).await?;
    let args = async {
        match plan.args.clone() {
            Some(args) => Some(args),
            // Whatever tool wrote the image may have given it another Entrypoint than ours.
            None => image::args_of(&daemon.containerd, scope, container, chain_id(chain)).await,
        }
    };
    let ram = async {
        match with_ram {
            true => resume::first(daemon, scope, chain, &plan.manifest, checkpoint, tell).await,
            false => Ok(None),
        }
    };
    let (boot, args, ram) = tokio::join!(boot_files(daemon, scope, chain, &plan), args, ram);
    let ([kernel, initrd], ram) = (boot?, ram?);
    let Plan { manifest, name, .. } = plan;
    let disk = disk_below(&layers).map(|(top, disk)| Disk {
        virtual_size: disk.virtual_size,
        table: top.table(),
        layers: layers.iter().filter(|l| l.info.disk.is_some()).map(|l| files::data_path(&l.dir)).collect(),
        frozen: Vec::new(),
        top: None,
        read_only: false,
    });
    let record = Record { version: RECORD_VERSION, image: name, manifest, kernel, initrd, disk, ram };
    let (answer, checkpoint) = (args.clone(), checkpoint.cloned());
    daemon
        .blocking(move |daemon| {
            let base = match (&checkpoint, &own) {
                (Some(checkpoint), _) => checkpoint.base(daemon, record.disk.as_ref().map(|disk| disk.virtual_size))?,
                (None, Some(own)) if own.info.disk.is_some() => Some(Base::of_layer(daemon, own)?),
                (None, _) => None,
            };
            write_bundle(daemon, &dir, record, base, answer.as_deref(), checkpoint.as_ref())
        })
        .await?;
    Ok(Resolved { bundle, args })
}

/// The layers below a container's snapshot, base first, and the one that was applied to it itself, as a restore does.
fn layers_of(daemon: &Daemon, chain: &Chain) -> Result<(Vec<ReadyLayer>, Option<ReadyLayer>)> {
    let own = match chain.record.content {
        Content::Machine(Layer::Ready) => layer_of(daemon, chain.record.number)?,
        _ => None,
    };
    Ok((layers_below(daemon, chain)?, own))
}

/// Copies of kernel and initial RAM disk, held by the snapshot and by the image that it stands on.
async fn boot_files(daemon: &Arc<Daemon>, scope: &Scope, chain: &Chain, plan: &Plan) -> Result<[Option<PathBuf>; 2]> {
    let mut holders = vec![chain.record.number];
    holders.extend(chain.parents.first().map(|parent| parent.number));
    let wanted = [("kernel.ref", plan.kernel), ("initrd.ref", plan.initrd)];
    let digests: Vec<_> = wanted.iter().filter_map(|(_, digest)| digest.map(|digest| digest.to_string())).collect();
    daemon.blocking(move |daemon| daemon.store.hold_blobs(&digests, &holders)).await?;
    let mut boot = [None, None];
    for (place, (field, digest)) in boot.iter_mut().zip(wanted) {
        if let Some(digest) = digest {
            *place = Some(copies::keep(daemon, scope, field, digest).await?);
        }
    }
    Ok(boot)
}

/// The chain id of the layers that a container's snapshot stands on: the last part of its parent's name.
fn chain_id(chain: &Chain) -> Option<&str> {
    chain.record.parent.rsplit('/').next().filter(|name| !name.is_empty())
}

/// What a machine is to be made of.
struct Plan {
    manifest: Manifest,
    kernel: Option<Digest>,
    initrd: Option<Digest>,
    args: Option<Vec<String>>,
    name: Option<String>,
}

async fn plan(
    daemon: &Arc<Daemon>,
    scope: &Scope,
    container: &str,
    chain: &Chain,
    below: &[ReadyLayer],
    own: Option<&ReadyLayer>,
) -> Result<Plan> {
    let layers: Vec<_> = below.iter().chain(own).cloned().collect();
    let parent = chain_id(chain);
    let mut plan = match find_descriptor(&layers)? {
        Some(manifest) => of_descriptor(manifest, &layers, parent)?,
        None => {
            let image = image::of_container(&daemon.containerd, scope, container, parent).await?;
            of_image(image, &layers)?
        }
    };
    // The record's layers are those below; what lies in the snapshot itself becomes a top.
    if own.is_some_and(|own| own.info.disk.is_some_and(|disk| disk.format.is_some())) {
        plan.manifest.disk_layers.pop();
    }
    Ok(plan)
}

/// The topmost descriptor. Its RAM belongs to the disk as it was then, so with another disk layer above it goes.
fn find_descriptor(layers: &[ReadyLayer]) -> Result<Option<Manifest>> {
    let mut disk_above = false;
    for layer in layers.iter().rev() {
        if let Some(mut manifest) = layer.manifest()? {
            if disk_above && manifest.ram_snapshot.take().is_some() {
                tracing::info!("the image's RAM is older than its disk, so machines of it boot");
            }
            return Ok(Some(manifest));
        }
        disk_above |= layer.info.disk.is_some();
    }
    Ok(None)
}

fn of_descriptor(manifest: Manifest, layers: &[ReadyLayer], name: Option<&str>) -> Result<Plan> {
    let pinned = |field: &str, reference: Option<&ovms_artifact::manifest::Ref>| match reference {
        None => Ok(None),
        Some(reference) => reference.digest().map(Some).ok_or_else(|| {
            Error::invalid(format!("{field}: {reference} is no digest, and an image's descriptor names digests"))
        }),
    };
    let kernel = pinned("kernel.ref", manifest.kernel.as_ref().map(|kernel| &kernel.reference))?;
    let initrd = pinned("initrd.ref", manifest.initrd.as_ref().map(|initrd| &initrd.reference))?;
    pinned("ramSnapshot.ref", manifest.ram_snapshot.as_ref().map(|ram| &ram.reference))?;
    let formats = manifest.disk_layers.iter().map(|disk| disk.format).collect::<Vec<_>>();
    check_disks(&formats, layers)?;
    let refs = manifest.disk_layers.iter().map(|disk| disk.reference.digest()).collect::<Vec<_>>();
    check_refs(&refs, layers)?;
    Ok(Plan { manifest, kernel, initrd, args: None, name: name.map(str::to_owned) })
}

fn of_image(image: image::Image, layers: &[ReadyLayer]) -> Result<Plan> {
    check_places(&image.disks, layers)?;
    let ovms_artifact::image::Resolved { mut manifest, kernel, initrd, ram_snapshot, disks } = image.resolved;
    let formats = disks.iter().map(|disk| disk.format).collect::<Vec<_>>();
    check_disks(&formats, layers)?;
    if let (Some(ram), Some(blob)) = (&mut manifest.ram_snapshot, ram_snapshot) {
        ram.reference = blob.digest.into();
    }
    Ok(Plan {
        kernel: kernel.map(|blob| blob.digest),
        initrd: initrd.map(|blob| blob.digest),
        manifest,
        args: Some(image.args),
        name: Some(image.name),
    })
}

fn write_bundle(
    daemon: &Daemon,
    dir: &Path,
    mut record: Record,
    base: Option<Base>,
    args: Option<&[String]>,
    checkpoint: Option<&Checkpoint>,
) -> Result<()> {
    let failed = || format!("cannot make the machine in {}", dir.display());
    if let Some(disk) = &mut record.disk {
        let made = match base {
            Some(Base { made, virtual_size }) => {
                disk.virtual_size = virtual_size;
                disk.frozen.push(tops::base_paths(Path::new("top")));
                made
            }
            None => tops::new_dir(daemon)?,
        };
        let paths = TopPaths { data: made.path().join("data"), map: made.path().join("map") };
        create_top(&paths, disk.virtual_size).context(failed)?;
        disk.top = Some(TopPaths { data: "top/data".into(), map: "top/map".into() });
        let top = layout::top_dir(dir);
        // A crash may have left one that no record names.
        layout::remove(&top).context(failed)?;
        layout::publish(made.path(), &top).context(failed)?;
        let _renamed = made.keep();
    }
    if let Some(args) = args {
        let text = serde_json::to_vec(args).context(failed)?;
        super::write(dir, ARGS, &text)?;
    }
    if let Some(checkpoint) = checkpoint {
        let text = serde_json::to_vec(checkpoint.mark()).context(failed)?;
        super::write(dir, MARK, &text)?;
    }
    // Last, and renamed into place: where it is, everything is.
    record.save(&dir.join(BUNDLE)).context(failed)
}
