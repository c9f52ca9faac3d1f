//! From a mounted snapshot to a bundle that a machine can start from.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ovms_artifact::digest::Digest;
use ovms_artifact::manifest::{DiskFormat, Manifest};
use ovms_bundle::{create_top, layer as files, Disk, Record, TopPaths, RECORD_VERSION};

use super::unpack::{finish_parents, Tell};
use super::{copies, disk_below, image, layers_below, ReadyLayer};
use crate::containerd::Scope;
use crate::daemon::Daemon;
use crate::error::{Context, Error, Result};
use crate::layout;
use crate::store::{Chain, Content, Kind};

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

/// Makes the snapshot whose mount has this source ready to start from.
pub async fn resolve(
    daemon: &Arc<Daemon>,
    namespace: &str,
    container: &str,
    source: &Path,
    tell: Tell<'_>,
) -> Result<Resolved> {
    let scope = Scope::namespace(namespace)?;
    let chain = machine_of(daemon, source).await?;
    prepare(daemon, &scope, container, &chain, tell).await
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

/// Makes whatever a machine's snapshot still lacks; once it is all there, it stays as it is.
pub async fn prepare(
    daemon: &Arc<Daemon>,
    scope: &Scope,
    container: &str,
    chain: &Chain,
    tell: Tell<'_>,
) -> Result<Resolved> {
    let _alone = daemon.keyed.lock(format!("resolve {}", chain.record.number)).await;
    let dir = daemon.layout.snapshot(chain.record.number);
    let bundle = dir.join(BUNDLE);
    if bundle.exists() {
        let text = fs::read(dir.join(ARGS)).ok();
        return Ok(Resolved { bundle, args: text.and_then(|text| serde_json::from_slice(&text).ok()) });
    }
    finish_parents(daemon, chain, tell).await?;
    let at = chain.clone();
    let layers = daemon.blocking(move |daemon| layers_below(daemon, &at)).await?;
    let plan = plan(daemon, scope, container, chain, &layers).await?;
    let (boot, args) = tokio::join!(boot_files(daemon, scope, chain, &plan), async {
        match plan.args.clone() {
            Some(args) => Some(args),
            // Whatever tool wrote the image may have given it another Entrypoint than ours.
            None => image::args_of(&daemon.containerd, scope, container, chain_id(chain)).await,
        }
    });
    let [kernel, initrd] = boot?;
    let Plan { manifest, name, .. } = plan;
    let disk = disk_below(&layers).map(|(top, disk)| Disk {
        virtual_size: disk.virtual_size,
        table: top.table(),
        layers: layers.iter().filter(|l| l.info.disk.is_some()).map(|l| files::data_path(&l.dir)).collect(),
        frozen: Vec::new(),
        top: Some(TopPaths { data: "top/data".into(), map: "top/map".into() }),
        read_only: false,
    });
    let record = Record { version: RECORD_VERSION, image: name, manifest, kernel, initrd, disk, ram: None };
    let answer = args.clone();
    daemon.blocking(move |daemon| write_bundle(daemon, &dir, &record, answer.as_deref())).await?;
    Ok(Resolved { bundle, args })
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
    layers: &[ReadyLayer],
) -> Result<Plan> {
    let mut descriptor = None;
    for layer in layers.iter().rev() {
        if let Some(manifest) = layer.manifest()? {
            descriptor = Some(manifest);
            break;
        }
    }
    let parent = chain_id(chain);
    if let Some(manifest) = descriptor {
        let pinned = |field: &str, reference: Option<&ovms_artifact::manifest::Ref>| match reference {
            None => Ok(None),
            Some(reference) => reference.digest().map(Some).ok_or_else(|| {
                Error::invalid(format!("{field}: {reference} is no digest, and an image's descriptor names digests"))
            }),
        };
        let kernel = pinned("kernel.ref", manifest.kernel.as_ref().map(|kernel| &kernel.reference))?;
        let initrd = pinned("initrd.ref", manifest.initrd.as_ref().map(|initrd| &initrd.reference))?;
        let formats = manifest.disk_layers.iter().map(|disk| disk.format).collect::<Vec<_>>();
        check_disks(&formats, layers)?;
        return Ok(Plan { manifest, kernel, initrd, args: None, name: parent.map(str::to_owned) });
    }
    let image = image::of_container(&daemon.containerd, scope, container, parent).await?;
    check_places(&image.disks, layers)?;
    let formats = image.resolved.disks.iter().map(|disk| disk.format).collect::<Vec<_>>();
    check_disks(&formats, layers)?;
    Ok(Plan {
        kernel: image.resolved.kernel.map(|blob| blob.digest),
        initrd: image.resolved.initrd.map(|blob| blob.digest),
        manifest: image.resolved.manifest,
        args: Some(image.args),
        name: Some(image.name),
    })
}

/// The manifest lists the layers that are there, in formats that they have; only a top that became a layer is in no
/// manifest. Their digests are containerd's to check: it has verified the chain, and a layer that two images share may
/// have come under the other image's blob digest.
fn check_disks(formats: &[DiskFormat], layers: &[ReadyLayer]) -> Result<()> {
    let disks: Vec<_> = layers.iter().filter_map(|layer| layer.info.disk?.format).collect();
    if formats.len() != disks.len() {
        let (listed, found) = (formats.len(), disks.len());
        return Err(Error::invalid(format!(
            "diskLayers: the manifest lists {listed} disk layers, the image has {found}"
        )));
    }
    for (index, (listed, found)) in formats.iter().zip(&disks).enumerate() {
        if listed != found {
            let (listed, found) = (listed.name(), found.name());
            return Err(Error::invalid(format!("diskLayers[{index}].format: is {listed}, but the layer is {found}")));
        }
    }
    Ok(())
}

/// The layers that the image's manifest names as its disk are the ones that hold disks.
fn check_places(places: &[usize], layers: &[ReadyLayer]) -> Result<()> {
    let in_image = |layer: &ReadyLayer| layer.info.disk.is_some_and(|disk| disk.format.is_some());
    let found: Vec<usize> = layers.iter().enumerate().filter(|(_, l)| in_image(l)).map(|(at, _)| at).collect();
    if places == found {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "diskLayers: the manifest names layers {places:?} as disks, the image has disks in {found:?}"
    )))
}

fn write_bundle(daemon: &Daemon, dir: &Path, record: &Record, args: Option<&[String]>) -> Result<()> {
    let failed = || format!("cannot make the machine in {}", dir.display());
    let top = layout::top_dir(dir);
    if let (Some(disk), false) = (&record.disk, top.exists()) {
        let made = tempfile::Builder::new().prefix("top-").tempdir_in(daemon.layout.tmp()).context(failed)?;
        let paths = TopPaths { data: made.path().join("data"), map: made.path().join("map") };
        create_top(&paths, disk.virtual_size).context(failed)?;
        layout::publish(made.path(), &top).context(failed)?;
        let _renamed = made.keep();
    }
    if let Some(args) = args {
        let text = serde_json::to_vec(args).context(failed)?;
        super::write(dir, ARGS, &text)?;
    }
    // Last, and renamed into place: where it is, everything is.
    record.save(&dir.join(BUNDLE)).context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Layer, LayerDisk};

    fn layer(format: Option<DiskFormat>) -> ReadyLayer {
        let disk = format.map(|format| LayerDisk { format: Some(format), virtual_size: 512 });
        ReadyLayer { dir: "/none".into(), info: Layer { diff_id: None, disk } }
    }

    #[test]
    fn check_disks_names_what_does_not_fit() {
        let layers = [layer(Some(DiskFormat::Qcow2)), layer(None), layer(Some(DiskFormat::Raw))];
        assert!(check_disks(&[DiskFormat::Qcow2, DiskFormat::Raw], &layers).is_ok());
        let err = check_disks(&[DiskFormat::Qcow2], &layers).unwrap_err().chain();
        assert!(err.contains("lists 1 disk layers, the image has 2"), "{err}");
        let err = check_disks(&[DiskFormat::Qcow2, DiskFormat::Qcow2], &layers).unwrap_err().chain();
        assert!(err.contains("diskLayers[1].format: is qcow2, but the layer is raw"), "{err}");
    }

    #[test]
    fn check_places_wants_the_disks_where_the_image_says() {
        let layers = [layer(Some(DiskFormat::Qcow2)), layer(None), layer(Some(DiskFormat::Raw))];
        assert!(check_places(&[0, 2], &layers).is_ok());
        assert!(check_places(&[0, 1], &layers).is_err());
    }
}
