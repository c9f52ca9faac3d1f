//! Snapshots that belong to a machine: disk layers in block-stack form, descriptors, and tops.
//!
//! ```text
//!  Apply of ours ──worker──────────────────> layer/ ─┐
//!  Apply of another differ ──> fs/ovm/disk.*         │    Resolve: wait for every layer, find the descriptor, copy
//!       Commit: recognised, marked "unpacked"        ├──> kernel and initrd, make the top, write bundle.json
//!       beside the pull ──worker───────────> layer/ ─┤
//!  Commit of a container: its top ─────────> layer/ ─┘
//! ```
//! A layer's directory is made elsewhere and renamed, so it is there whole or not at all:
//!
//! | file | what |
//! | --- | --- |
//! | `layer.json` | [`Layer`]: what the layer is |
//! | `data`, `map` | the disk layer, if it holds one (`ovms_bundle::layer`) |
//! | `table` | the disk's table through this layer, if it holds a disk layer |
//! | `manifest.json` | the descriptor, if it holds one |

mod checkpoint;
mod commit;
mod copies;
mod diff;
mod fit;
mod image;
pub mod ram;
mod resolve;
mod resume;
mod tops;
pub mod unpack;

use std::fs;
use std::path::{Path, PathBuf};

use ovms_artifact::digest::Digest;
use ovms_artifact::manifest::{DiskFormat, Manifest};
use serde::{Deserialize, Serialize};

use crate::daemon::Daemon;
use crate::error::{Context, Error, Result};
use crate::store::{Chain, Record};

pub use commit::at_commit;
pub use diff::diff;
pub use resolve::{resolve, Wish};
pub use unpack::{apply, finish, resume};

/// Name of [`Layer`] in a layer's directory.
const LAYER: &str = "layer.json";
/// Name of the table in a layer's directory.
const TABLE: &str = "table";
/// Name of the descriptor in a layer's directory.
const MANIFEST: &str = "manifest.json";

/// What a layer is, as `layer.json` says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Layer {
    /// Digest of the decompressed layer, where we read it ourselves.
    diff_id: Option<Digest>,
    /// Digest of the blob that we read it from. Another image may have the same layer as another blob.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    blob: Option<Digest>,
    /// Its disk layer.
    disk: Option<LayerDisk>,
}

/// The disk layer of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct LayerDisk {
    /// The format it came in; none for a committed top, which never had one.
    format: Option<DiskFormat>,
    /// Size of the disk in bytes.
    virtual_size: u64,
}

/// A layer that is ready, and where it lies.
#[derive(Clone, Debug)]
struct ReadyLayer {
    dir: PathBuf,
    info: Layer,
    chain: Option<ChainId>,
}

/// The name of a layer's snapshot, where containerd gave it one that tells its content.
#[derive(Clone, Copy, Debug)]
struct ChainId {
    /// That of the layers below; none for a base.
    below: Option<Digest>,
    own: Digest,
}

impl ChainId {
    fn of(name: &str, parent: &str) -> Option<Self> {
        let digest = |name: &str| name.rsplit('/').next().and_then(|id| id.parse::<Digest>().ok());
        let below = if parent.is_empty() { None } else { Some(digest(parent)?) };
        Some(Self { below, own: digest(name)? })
    }
}

impl ReadyLayer {
    /// Whether this is the layer's diff_id; none if that is not known.
    fn is_diff_id(&self, digest: &Digest) -> Option<bool> {
        let by_chain = || self.chain.map(|chain| digest.chained_on(chain.below.as_ref()) == chain.own);
        self.info.diff_id.map(|diff_id| diff_id == *digest).or_else(by_chain)
    }

    fn table(&self) -> PathBuf {
        self.dir.join(TABLE)
    }

    /// The descriptor, if this layer holds one.
    fn manifest(&self) -> Result<Option<Manifest>> {
        let path = self.dir.join(MANIFEST);
        if !path.exists() {
            return Ok(None);
        }
        let failed = || format!("cannot use the descriptor {}", path.display());
        let bytes = fs::read(&path).context(failed)?;
        Manifest::from_slice(&bytes).context(failed).map(Some)
    }
}

/// The directory of a snapshot's layer.
fn layer_dir(daemon: &Daemon, number: u64) -> PathBuf {
    daemon.layout.snapshot(number).join("layer")
}

/// The ready layers of a chain's parents, base first. Snapshots that add nothing are left out.
fn layers_below(daemon: &Daemon, chain: &Chain) -> Result<Vec<ReadyLayer>> {
    // A snapshot's name is what its child calls its parent.
    let names = std::iter::once(&chain.record).chain(&chain.parents).map(|record| record.parent.as_str());
    let named: Vec<_> = chain.parents.iter().zip(names).collect();
    let layer = |(parent, name): (&Record, &str)| {
        let layer = layer_of(daemon, parent.number).transpose()?;
        Some(layer.map(|layer| ReadyLayer { chain: ChainId::of(name, &parent.parent), ..layer }))
    };
    named.into_iter().rev().filter_map(layer).collect()
}

fn layer_of(daemon: &Daemon, number: u64) -> Result<Option<ReadyLayer>> {
    let dir = layer_dir(daemon, number);
    let path = dir.join(LAYER);
    let text = match fs::read(&path) {
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        read => read.context(|| format!("cannot read {}", path.display()))?,
    };
    let info = serde_json::from_slice(&text).context(|| format!("the layer record {} is damaged", path.display()))?;
    Ok(Some(ReadyLayer { dir, info, chain: None }))
}

/// The topmost layer with a disk: its table is that of the whole disk.
fn disk_below(layers: &[ReadyLayer]) -> Option<(&ReadyLayer, LayerDisk)> {
    layers.iter().rev().find_map(|layer| layer.info.disk.map(|disk| (layer, disk)))
}

/// Writes a small file into a directory that is being made.
fn write(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(name);
    let write = || -> std::io::Result<()> {
        fs::write(&path, bytes)?;
        ovms_bundle::sync(&path)
    };
    write().context(|| format!("cannot write {}", path.display()))
}

/// What a layer or a descriptor of an image is refused with.
fn refused(what: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::invalid(what).because(source)
}
