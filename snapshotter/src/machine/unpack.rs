//! Layers into block-stack form: from a blob of containerd's (`Apply`), or from what another differ or a container left
//! in a committed snapshot ([`finish`]). The formats are parsed by the sandboxed worker of `ovms_bundle`, never here.

use std::fs::{self, File};
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ovms_artifact::digest::Digest;
use ovms_artifact::manifest::{DiskFormat, Manifest, MAX_MANIFEST};
use ovms_artifact::media;
use ovms_bundle::layer as files;
use ovms_bundle::worker::{Job, Launcher, Outcome, Progress, Source, Unpacked};
use ovms_bundle::TopPaths;
use ovms_config::vm::MAX_LAYERS;
use ovms_disk::{Table, Top};

use super::tops::Tops;
use super::{disk_below, layer_dir, layers_below, write, Layer, LayerDisk, LAYER, MANIFEST, TABLE};
use crate::daemon::Daemon;
use crate::error::{Context, Error, Kind as ErrorKind, Result};
use crate::layout;
use crate::ordinary::Applied;
use crate::progress::Work;
use crate::store::{Chain, Content, Kind, Layer as State, Record};
use ovms_containerd::proto::types::Descriptor;
use ovms_containerd::Scope;

/// Says how far a long piece of work is.
pub type Tell<'a> = &'a (dyn Fn(String) + Send + Sync);

/// Unpacks the blob of a machine's layer into an active snapshot.
pub async fn apply(daemon: &Arc<Daemon>, scope: &Scope, of: &Descriptor, chain: &Chain) -> Result<Applied> {
    let digest: Digest = of.digest.parse().context_kind(ErrorKind::Invalid, || "the layer cannot be verified")?;
    let size = u64::try_from(of.size).context_kind(ErrorKind::Invalid, || "the layer has no size")?;
    // The table is merged from that of the layers below.
    finish_parents(daemon, chain, &|_| ()).await?;
    let (mut blob, _transfer) = daemon.containerd.read_blob(scope, &of.digest).await?;
    let (reader, mut writer) = io::pipe().context(|| "cannot make a pipe")?;
    let feeder = tokio::task::spawn_blocking(move || io::copy(&mut blob, &mut writer));
    let job = Input {
        name: of.digest.clone(),
        file: File::from(OwnedFd::from(reader)),
        source: Source::Layer {
            media_type: of.media_type.clone(),
            format: of.annotations.get(media::ANNOTATION_FORMAT).cloned(),
        },
        expect: Some((digest, size)),
    };
    let chain = chain.clone();
    let unpacked = daemon
        .blocking(move |daemon| {
            let made = tempfile::Builder::new().prefix("layer-").tempdir_in(daemon.layout.tmp());
            let made = made.context(|| "cannot make a directory for the layer")?;
            let unpacked = run(daemon, job, made.path(), &mut |_| ())?;
            let descriptor = unpacked.descriptor.as_deref();
            settle(daemon, &chain, made, &unpacked, Some(digest), descriptor)?;
            let ready = |record: &mut Record| record.content = Content::Machine(State::Ready);
            daemon.store.amend(chain.record.number, ready)?;
            Ok(unpacked)
        })
        .await;
    // What the feeder met is in the worker's answer, unless containerd broke off.
    let fed = feeder.await.context(|| "a worker thread of the snapshotter failed")?;
    let unpacked = match (unpacked, fed) {
        (Err(_), Err(err)) if err.kind() != io::ErrorKind::BrokenPipe => {
            return Err(err).context(|| format!("blob {} cannot be read from containerd's content store", of.digest));
        }
        (unpacked, _) => unpacked?,
    };
    let diff_id = unpacked.diff_id.ok_or_else(|| Error::internal("the worker does not say the layer's digest"))?;
    Ok(Applied { diff_id, size: unpacked.size })
}

/// What a worker reads.
pub struct Input {
    /// What errors call it.
    pub name: String,
    /// The bytes.
    pub file: File,
    /// How they are read.
    pub source: Source,
    /// Digest and size, where the worker is to check them.
    pub expect: Option<(Digest, u64)>,
}

/// Runs a worker, which leaves a layer in `dir`.
pub fn run(daemon: &Daemon, input: Input, dir: &Path, tell: &mut dyn FnMut(Progress)) -> Result<Unpacked> {
    let Input { name, file, source, expect } = input;
    let limits = (&daemon.settings.limits).into();
    let job = Job { name: &name, input: file, source, expect, dir, limits };
    match Launcher::new().unpack(job, tell) {
        Ok(Outcome::Layer(unpacked)) => Ok(unpacked),
        Ok(Outcome::Ordinary { first }) => Err(Error::invalid(format!(
            "layer {name} is one of an ordinary image (first file {first:?}) among the layers of a machine: a \
             machine's image holds disk layers and descriptors only"
        ))),
        Err(err @ ovms_bundle::Error::Refused { .. }) => Err(super::refused("the layer cannot be used", err)),
        Err(err) => Err(err).context(|| "the layer cannot be unpacked"),
    }
}

/// Completes a layer's directory that holds the disk, if there is one: table, descriptor, record; then it takes its
/// place in the snapshot.
fn settle(
    daemon: &Daemon,
    chain: &Chain,
    made: tempfile::TempDir,
    unpacked: &Unpacked,
    blob: Option<Digest>,
    descriptor: Option<&str>,
) -> Result<()> {
    let dir = made.path();
    if let Some(text) = descriptor {
        Manifest::from_slice(text.as_bytes())
            .map_err(|err| super::refused("the layer's descriptor is refused", err))?;
        write(dir, MANIFEST, text.as_bytes())?;
    }
    let disk = unpacked.disk.as_ref();
    let disk = disk.map(|disk| LayerDisk { format: Some(disk.format), virtual_size: disk.virtual_size });
    finish_dir(daemon, chain, made, Layer { diff_id: unpacked.diff_id, blob, disk })
}

fn finish_dir(daemon: &Daemon, chain: &Chain, made: tempfile::TempDir, info: Layer) -> Result<()> {
    let dir = made.path();
    if info.disk.is_some() {
        let layers = layers_below(daemon, chain)?;
        let count = layers.iter().filter(|layer| layer.info.disk.is_some()).count();
        if count >= MAX_LAYERS {
            return Err(Error::invalid(format!("the disk has more than {MAX_LAYERS} layers")));
        }
        let map = files::load_map(dir).context(|| "the unpacked layer cannot be read")?;
        let failed = || "the disk's table cannot be made";
        let below = match disk_below(&layers) {
            Some((layer, _)) => Table::open(&File::open(layer.table()).context(failed)?).context(failed)?,
            None => Table::empty(map.virtual_size()).context(failed)?,
        };
        let table = below.overlay(&map).context(failed)?;
        let file = File::create_new(dir.join(TABLE)).context(failed)?;
        table.write_to(&file).context(failed)?;
        file.sync_all().context(failed)?;
    }
    let text = serde_json::to_vec(&info).context(|| "the layer's record cannot be written")?;
    write(dir, LAYER, &text)?;
    let place = layer_dir(daemon, chain.record.number);
    let failed = || format!("cannot put the layer into {}", place.display());
    // An earlier attempt may have left one; nobody uses it before the snapshot is ready.
    layout::remove(&place).context(failed)?;
    layout::publish(dir, &place).context(failed)?;
    let _renamed = made.keep();
    Ok(())
}

/// Brings the parents of a chain into block-stack form, base first; what runs already is waited for.
pub async fn finish_parents(daemon: &Arc<Daemon>, chain: &Chain, tell: Tell<'_>) -> Result<()> {
    let count = chain.parents.len();
    for (index, parent) in chain.parents.iter().rev().enumerate() {
        if matches!(&parent.content, Content::Machine(State::Unpacked | State::Failed(_))) {
            tell(format!("waiting for layer {} of {count} to be converted", index + 1));
            one(daemon, parent.number, tell).await?;
        }
    }
    Ok(())
}

/// Brings a committed snapshot, and everything below it, into block-stack form.
pub async fn finish(daemon: &Arc<Daemon>, number: u64, tell: Tell<'_>) -> Result<()> {
    let Some(chain) = daemon.blocking(move |daemon| daemon.store.chain_of(number)).await? else { return Ok(()) };
    finish_parents(daemon, &chain, tell).await?;
    one(daemon, number, tell).await
}

/// Name of the lock under which a snapshot's layer is converted.
pub fn key(number: u64) -> String {
    format!("convert {number}")
}

/// Converts one snapshot whose parents are ready.
async fn one(daemon: &Arc<Daemon>, number: u64, tell: Tell<'_>) -> Result<()> {
    let work = Work::Layer(number);
    let _alone = telling(daemon, &work, tell, daemon.keyed.lock(key(number))).await;
    let Some(chain) = daemon.blocking(move |daemon| daemon.store.chain_of(number)).await? else {
        return Err(Error::not_found(format!("snapshot {number} is gone")));
    };
    if !matches!(&chain.record.content, Content::Machine(State::Unpacked | State::Failed(_))) {
        return Ok(());
    }
    tell(format!("converting the layer of snapshot {}", chain.key));
    let started = std::time::Instant::now();
    let result = telling(daemon, &work, tell, daemon.blocking(move |daemon| convert(daemon, &chain))).await;
    daemon.progress.forget(&work);
    let state = match &result {
        Ok(()) => State::Ready,
        Err(err) => State::Failed(err.chain()),
    };
    daemon
        .blocking(move |daemon| {
            daemon.store.amend(number, |record| record.content = Content::Machine(state))?;
            clear(daemon, number)
        })
        .await?;
    match &result {
        Ok(()) => tracing::info!(number, took = ?started.elapsed(), "layer converted beside the pull"),
        Err(err) => tracing::warn!(number, error = err.chain(), "a layer cannot be converted"),
    }
    result
}

/// Awaits work and says every second how far it is, whoever does it.
pub async fn telling<T>(daemon: &Daemon, of: &Work, tell: Tell<'_>, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    loop {
        match tokio::time::timeout(Duration::from_secs(1), &mut work).await {
            Ok(done) => return done,
            Err(_) => tell(daemon.progress.sentence(of)),
        }
    }
}

/// Turns what lies in a committed snapshot into its layer.
fn convert(daemon: &Daemon, chain: &Chain) -> Result<()> {
    let dir = daemon.layout.snapshot(chain.record.number);
    let made = tempfile::Builder::new().prefix("layer-").tempdir_in(daemon.layout.tmp());
    let made = made.context(|| "cannot make a directory for the layer")?;
    if layout::top_dir(&dir).exists() {
        if let Some(tops) = Tops::find(&dir)? {
            return convert_tops(daemon, chain, &tops, made);
        }
    }
    let fs = dir.join("fs");
    let descriptor = read_descriptor(&fs)?;
    let mut found = None;
    for format in [DiskFormat::Qcow2, DiskFormat::Raw] {
        let Some(file) = format.member().and_then(|member| open_plain(&fs.join(member)).transpose()) else { continue };
        let file = file.context(|| "the disk that another differ unpacked cannot be opened")?;
        if found.replace((format, file)).is_some() {
            return Err(Error::invalid("the layer holds both ovm/disk.qcow2 and ovm/disk.raw, it may hold one"));
        }
    }
    let unpacked = match found {
        Some((format, file)) => {
            let work = Work::Layer(chain.record.number);
            let input = Input { name: chain.key.clone(), file, source: Source::Disk { format }, expect: None };
            run(daemon, input, made.path(), &mut |step| daemon.progress.note(&work, step))?
        }
        None => Unpacked { diff_id: None, size: 0, disk: None, descriptor: None },
    };
    settle(daemon, chain, made, &unpacked, None, descriptor.as_deref())
}

/// A container's top is a layer already, but for the form of its map; several are merged into one.
fn convert_tops(daemon: &Daemon, chain: &Chain, tops: &Tops, made: tempfile::TempDir) -> Result<()> {
    let failed = || "the container's disk cannot become a layer";
    let to = files::data_path(made.path());
    let map = match tops.only() {
        Some(TopPaths { data, map }) => {
            let top = Top::open(File::open(data).context(failed)?, File::open(map).context(failed)?).context(failed)?;
            fs::hard_link(data, to).context(failed)?;
            top.to_layer_map().context(failed)?
        }
        None => {
            let data = File::options().read(true).write(true).create_new(true).open(to).context(failed)?;
            let map = tops.open()?.tops_to_layer(&data).context(failed)?;
            data.sync_all().context(failed)?;
            map
        }
    };
    let file = File::create_new(files::map_path(made.path())).context(failed)?;
    map.write_to(&file).context(failed)?;
    file.sync_all().context(failed)?;
    let disk = Some(LayerDisk { format: None, virtual_size: map.virtual_size() });
    finish_dir(daemon, chain, made, Layer { disk, ..Layer::default() })
}

/// Removes what a layer was made of, once it is ready.
fn clear(daemon: &Daemon, number: u64) -> Result<()> {
    let Some(chain) = daemon.store.chain_of(number)? else { return Ok(()) };
    let record = &chain.record;
    if record.kind != Kind::Committed || record.content != Content::Machine(State::Ready) {
        return Ok(());
    }
    let dir = daemon.layout.snapshot(number);
    for left in
        [dir.join("fs").join(media::MEMBER_QCOW2), dir.join("fs").join(media::MEMBER_RAW), layout::top_dir(&dir)]
    {
        layout::remove(&left).context(|| format!("cannot remove {}", left.display()))?;
    }
    Ok(())
}

/// Takes up after a start what an earlier daemon left undone.
pub async fn resume(daemon: Arc<Daemon>) {
    let all = daemon.blocking(|daemon| daemon.store.list()).await;
    let numbers = all.map(|all| {
        let unfinished =
            |record: &Record| matches!(record.content, Content::Machine(_)) && record.kind == Kind::Committed;
        all.into_iter().filter(|(_, record)| unfinished(record)).map(|(_, record)| record.number).collect::<Vec<_>>()
    });
    for number in numbers.unwrap_or_default() {
        let cleared = daemon.blocking(move |daemon| clear(daemon, number)).await;
        if let Err(err) = finish(&daemon, number, &|_| ()).await.and(cleared) {
            tracing::warn!(number, error = err.chain(), "a snapshot stays unfinished");
        }
        tokio::spawn(super::ram::ahead(Arc::clone(&daemon), number));
    }
}

fn read_descriptor(fs: &Path) -> Result<Option<String>> {
    let failed = || "the descriptor that another differ unpacked cannot be read";
    let Some(file) = open_plain(&fs.join(media::MEMBER_MANIFEST)).context(failed)? else { return Ok(None) };
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(file, MAX_MANIFEST.saturating_add(1)), &mut text)
        .context_kind(ErrorKind::Invalid, failed)?;
    Ok(Some(text))
}

/// Opens a plain file that somebody else made; `None` if it is not there.
pub fn open_plain(path: &Path) -> io::Result<Option<File>> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let opened = File::options().read(true).custom_flags(flags.bits() as i32).open(path);
    match opened {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err),
        Ok(file) if file.metadata()?.is_file() => Ok(Some(file)),
        Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no plain file")),
    }
}
