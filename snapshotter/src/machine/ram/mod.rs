//! RAM snapshots: from blobs in containerd's content store to files that a machine's memory is mapped from.
//!
//! ```text
//!  ramSnapshot.ref ─> blob ─parent─> blob ... ──sandboxed worker──> ram/<hex>/ (ovms_bundle::ram)
//!                       read through the content API, verified              │ preload_hint: copied to tmpfs
//!                       once for each digest                                │ mlock_required: locked by the daemon
//!                                                                           └─> Record.ram
//! ```
//! A digest is unpacked beside the pull, as soon as the snapshot of its descriptor is committed, at the latest when a
//! machine is resolved; never inside Prepare or Commit. It stays while a snapshot holds it: the image's topmost one and
//! those of the containers. The blobs themselves are not kept: after the unpack nobody needs them, not even after a reboot
//! (see [`preload`]).

pub mod locked;
pub mod preload;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ovms_artifact::digest::{Digest, VerifyingReader};
use ovms_artifact::manifest::Manifest;
use ovms_bundle::ram::{find, parent_of, unpack, RamOptions, MAX_CHAIN};
use ovms_bundle::worker::{Launcher, RamBlob};
use ovms_bundle::Ram;
use ovms_config::settings::RamPolicy;

use self::locked::Place;
use super::layer_of;
use super::unpack::{open_plain, telling, Tell};
use crate::daemon::Daemon;
use crate::error::{Context, Error, Kind as ErrorKind, Result};
use crate::progress::Work;
use crate::store::{Content, Kind, Layer};
use ovms_containerd::Scope;

/// What a blob may have beyond the memory in it: head, index and sections, and what does not compress.
const BLOB_EXTRA: u64 = 1 << 30;
/// How long the work beside a pull waits for blobs that are still under way.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
/// How often it looks.
const EVERY: Duration = Duration::from_secs(2);
/// How long it waits for the next layer of the image, above which another descriptor may lie.
const NEXT_LAYER: Duration = Duration::from_millis(500);

/// RAM that a machine resumes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The blob's digest.
    pub digest: Digest,
    /// Copy it to tmpfs.
    pub preload: bool,
    /// Lock it in memory.
    pub mlock: bool,
}

impl Wanted {
    /// What a manifest asks for; its reference must be a digest.
    pub fn of(manifest: &Manifest) -> Result<Option<Self>> {
        let Some(ram) = &manifest.ram_snapshot else { return Ok(None) };
        let digest = ram.reference.digest().ok_or_else(|| {
            let reference = &ram.reference;
            Error::invalid(format!(
                "ramSnapshot.ref: {reference} is no digest, and an image's descriptor names digests"
            ))
        })?;
        Ok(Some(Self::with(manifest, digest)))
    }

    /// Another blob, treated as a manifest asks.
    pub fn with(manifest: &Manifest, digest: Digest) -> Self {
        let hints = manifest.ram_snapshot.as_ref();
        Self {
            digest,
            preload: hints.is_some_and(|ram| ram.preload_hint),
            mlock: hints.is_some_and(|ram| ram.mlock_required),
        }
    }
}

/// The store's key by which snapshots hold an unpacked RAM snapshot.
pub fn key(hex: &str) -> String {
    key_of(&format!("sha256:{hex}"))
}

/// The same of a whole digest.
pub fn key_of(digest: &str) -> String {
    format!("ram {digest}")
}

/// Whether the operator lets machines resume from RAM that comes with an image. Where not, it is not even unpacked;
/// the engine says so to whoever starts a machine.
pub fn is_allowed(daemon: &Daemon) -> bool {
    daemon.settings.ram.policy == RamPolicy::Allow
}

/// Makes RAM ready for the machine of a container's snapshot, whose number is the first of `holders`: unpacked, on tmpfs
/// and locked as it asks. `blob` is the file of a checkpoint; else it comes from containerd.
pub async fn ready(
    daemon: &Arc<Daemon>,
    scope: &Scope,
    wanted: Wanted,
    blob: Option<&Path>,
    holders: &[u64],
    tell: Tell<'_>,
) -> Result<Ram> {
    let hex = wanted.digest.hex();
    hold(daemon, vec![key(&hex)], holders.to_vec()).await?;
    let mut ram = keep(daemon, scope, wanted.digest, blob, tell).await?;
    ram.mlock = wanted.mlock;
    if wanted.preload {
        ram.memory = preload(daemon, &hex, ram.memory, tell).await?;
    }
    if wanted.mlock {
        let place = Place::of(daemon, &ram);
        hold(daemon, vec![place.key()], holders.iter().take(1).copied().collect()).await?;
        lock(daemon, place, ram.memory.clone(), tell).await?;
    }
    Ok(ram)
}

async fn hold(daemon: &Arc<Daemon>, keys: Vec<String>, holders: Vec<u64>) -> Result<()> {
    daemon.blocking(move |daemon| daemon.store.hold_blobs(&keys, &holders)).await
}

/// Copies memory to tmpfs, if there is room, and says where it is to be mapped from.
async fn preload(daemon: &Arc<Daemon>, hex: &str, memory: PathBuf, tell: Tell<'_>) -> Result<PathBuf> {
    let _alone = daemon.keyed.lock("preload".into()).await;
    let name = hex.to_owned();
    let (place, why) = daemon.blocking(move |daemon| preload::place(daemon, &name, &memory)).await?;
    if let Some(why) = why {
        tracing::warn!(digest = hex, "{why}");
        tell(why);
    }
    Ok(place)
}

async fn lock(daemon: &Arc<Daemon>, place: Place, memory: PathBuf, tell: Tell<'_>) -> Result<()> {
    tell("locking RAM in memory".into());
    let _alone = daemon.keyed.lock(place.key()).await;
    daemon.blocking(move |daemon| locked::lock(daemon, &place, &memory)).await
}

/// Makes sure that a digest is unpacked, which its snapshots hold already.
async fn keep(daemon: &Arc<Daemon>, scope: &Scope, digest: Digest, blob: Option<&Path>, tell: Tell<'_>) -> Result<Ram> {
    let work = Work::Ram(digest.hex());
    let _alone = telling(daemon, &work, tell, daemon.keyed.lock(key(&digest.hex()))).await;
    let found = daemon.blocking(move |daemon| find(&daemon.layout.ram(), &digest).context(unusable)).await?;
    if let Some(ram) = found {
        return Ok(ram);
    }
    tell(format!("unpacking RAM snapshot {digest}"));
    let started = std::time::Instant::now();
    let done = telling(daemon, &work, tell, async {
        let chain = fetch(daemon, scope, digest, blob).await?;
        let work = work.clone();
        daemon.blocking(move |daemon| unpack_chain(daemon, chain, &work)).await
    });
    let done = done.await;
    daemon.progress.forget(&work);
    let ram = done?;
    tracing::info!(%digest, took = ?started.elapsed(), "RAM snapshot unpacked");
    Ok(ram)
}

fn unusable() -> &'static str {
    "the image's RAM cannot be used"
}

fn unpack_chain(daemon: &Daemon, chain: Vec<RamBlob>, work: &Work) -> Result<Ram> {
    let max_memory = daemon.settings.ram.max_memory;
    let options = RamOptions { launcher: Launcher::new(), max_memory, threads: 0 };
    let unpacked = unpack(&daemon.layout.ram(), chain, &options, &mut |step| {
        daemon.progress.note(work, step);
        true
    });
    unpacked.map_err(|err| match err {
        err @ ovms_bundle::Error::Ram { .. } => super::refused(unusable(), err),
        err => Error::internal(unusable()).because(err),
    })
}

/// Fetches a blob and, as long as one names a parent, that one; newest first.
async fn fetch(daemon: &Arc<Daemon>, scope: &Scope, newest: Digest, blob: Option<&Path>) -> Result<Vec<RamBlob>> {
    let mut chain: Vec<RamBlob> = Vec::new();
    let mut next = Some(newest);
    while let Some(digest) = next {
        if chain.len() >= MAX_CHAIN {
            return Err(Error::invalid(format!(
                "RAM snapshot {newest}: more than {MAX_CHAIN} blobs lie on each other"
            )));
        }
        if chain.iter().any(|blob| blob.digest == digest) {
            return Err(Error::invalid(format!("RAM snapshot {newest}: blob {digest} is its own parent")));
        }
        let (file, size) = match blob {
            Some(path) if chain.is_empty() => copy(daemon, path.to_owned(), digest).await?,
            _ => receive(daemon, scope, digest).await?,
        };
        let parent = daemon.blocking(move |_| {
            let parent = parent_of(&file).map_err(|why| Error::invalid(format!("RAM snapshot {digest}: {why}")))?;
            Ok((RamBlob { digest, size, file, verified: true }, parent))
        });
        let (blob, parent) = parent.await?;
        chain.push(blob);
        next = parent;
    }
    Ok(chain)
}

/// Reads one blob out of containerd's content store into a file without a name.
async fn receive(daemon: &Arc<Daemon>, scope: &Scope, digest: Digest) -> Result<(File, u64)> {
    let named = |err: Error| {
        let message = match err.kind() {
            ErrorKind::NotFound => format!("ramSnapshot.ref: the image's blob {digest} is missing"),
            _ => format!("ramSnapshot.ref: blob {digest} cannot be read"),
        };
        Error::new(err.kind(), message).because(err)
    };
    let size = daemon.containerd.blob_size(scope, &digest.to_string()).await.map_err(|err| named(err.into()))?;
    let (reader, _transfer) =
        daemon.containerd.read_blob(scope, &digest.to_string()).await.map_err(|err| named(err.into()))?;
    daemon.blocking(move |daemon| spool(daemon, reader, digest, size)).await.map_err(named)
}

/// Copies a checkpoint's file, which belongs to somebody else, into one without a name.
async fn copy(daemon: &Arc<Daemon>, path: PathBuf, digest: Digest) -> Result<(File, u64)> {
    daemon
        .blocking(move |daemon| {
            let failed = || format!("cannot read {}", path.display());
            let file = open_plain(&path).context(failed)?;
            let file = file.ok_or_else(|| Error::invalid(format!("the checkpoint lacks {}", path.display())))?;
            let size = file.metadata().context(failed)?.len();
            spool(daemon, file, digest, size)
        })
        .await
}

/// Copies and verifies.
fn spool(daemon: &Daemon, from: impl io::Read, digest: Digest, size: u64) -> Result<(File, u64)> {
    let most = daemon.settings.ram.max_memory.saturating_add(BLOB_EXTRA);
    if size > most {
        return Err(Error::invalid(format!(
            "blob {digest} has {size} bytes, more than the {most} allowed (ram.max_memory)"
        )));
    }
    let mut file = tempfile::tempfile_in(daemon.layout.tmp()).context(|| "cannot make a file")?;
    let mut reader = io::BufReader::with_capacity(1 << 20, VerifyingReader::new(from, digest, size));
    io::copy(&mut reader, &mut file).context_kind(ErrorKind::Invalid, || "the blob is refused")?;
    Ok((file, size))
}

/// Unpacks the RAM of an image beside its pull, once the snapshot of its descriptor is committed; its blobs may still be
/// on their way. What goes wrong is told to whoever starts a machine of it.
pub async fn ahead(daemon: Arc<Daemon>, number: u64) {
    if let Err(err) = try_ahead(&daemon, number).await {
        tracing::warn!(number, error = err.chain(), "RAM is not unpacked ahead of the first machine");
    }
}

async fn try_ahead(daemon: &Arc<Daemon>, number: u64) -> Result<()> {
    if !is_allowed(daemon) {
        return Ok(());
    }
    tokio::time::sleep(NEXT_LAYER).await;
    let found = daemon.blocking(move |daemon| {
        // A snapshot of a clone is an image with several descriptors, of which the topmost counts; and what a container
        // stands on is unpacked when that is resolved.
        if daemon.store.has_children(number)? {
            return Ok(None);
        }
        let Some(chain) = daemon.store.chain_of(number)? else { return Ok(None) };
        if chain.record.kind != Kind::Committed || chain.record.content != Content::Machine(Layer::Ready) {
            return Ok(None);
        }
        let manifest = layer_of(daemon, number)?.map(|layer| layer.manifest()).transpose()?.flatten();
        let wanted = manifest.map(|manifest| Wanted::of(&manifest)).transpose()?.flatten();
        Ok(wanted.map(|wanted| (chain.key, wanted)))
    });
    let Some((name, wanted)) = found.await? else { return Ok(()) };
    let scope = Scope::namespace(name.split('/').next().unwrap_or_default())?;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        // It fails, and this ends, when the snapshot is gone.
        hold(daemon, vec![key(&wanted.digest.hex())], vec![number]).await?;
        match keep(daemon, &scope, wanted.digest, None, &|_| ()).await {
            Err(err)
                if matches!(err.kind(), ErrorKind::NotFound | ErrorKind::Unavailable)
                    && tokio::time::Instant::now() < deadline =>
            {
                tokio::time::sleep(EVERY).await;
            }
            Ok(ram) if wanted.preload => {
                return preload(daemon, &wanted.digest.hex(), ram.memory, &|_| ()).await.map(drop);
            }
            kept => return kept.map(drop),
        }
    }
}

/// Locks again after a start what the machines that run need locked.
pub async fn relock(daemon: Arc<Daemon>) {
    let held = daemon.blocking(|daemon| daemon.store.held()).await;
    let held = held.unwrap_or_else(|err| {
        tracing::warn!(error = err.chain(), "RAM that must be locked in memory may not be");
        Default::default()
    });
    for place in held.iter().filter_map(|key| Place::of_key(key)) {
        let Some(memory) = place.memory(&daemon) else { continue };
        let key = place.key();
        if let Err(err) = lock(&daemon, place, memory, &|_| ()).await {
            tracing::warn!(key, error = err.chain(), "RAM that must be locked is not, until its next machine starts");
        }
    }
}
