//! From an OCI image layout on disk to a bundle, without any daemon.
//!
//! ```text
//!  <cache>/layers/<diff_id>-<format>/{data,map}     each layer once, whichever images share it
//!  <cache>/tables/<digest of the list of layers>    each stack once
//!  <cache>/blobs/<digest>                           kernels and initial RAM disks
//!  <cache>/ram/<digest>/                            RAM snapshots, each once (crate::ram)
//!  <cache>/images/<digest>.json                     the template of an image whose every part is there; its time says
//!                                                   when it was last used
//!  <cache>/tmp/                                     what is being made
//!  <cache>/lock                                     shared: by who uses the cache   exclusive: by who removes from it
//! ```
//! Everything is made under `tmp`, synced and renamed, so the cache can be shared by processes and survives any crash.
//! An instance is a directory of its own with a record and a fresh top; it names the cache's files by their paths.

mod prune;
mod template;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use ovms_artifact::{
    digest::Digest,
    image::{Blob, Disk as ImageDisk},
    layout::Layout,
    oci::Descriptor,
};
use ovms_config::vm::MAX_LAYERS;
use ovms_disk::Table;

use crate::{
    layer,
    publish::{publish, write_new},
    ram,
    ram::RamOptions,
    record::{Disk, RECORD_VERSION},
    worker::{Job, Launcher, LayerReader, Limits, Outcome, Progress, Source, Unpacked},
    Error, Ram, Record, Result,
};

pub use template::instantiate;

/// Name of the record in an instance's directory.
pub const RECORD: &str = "bundle.json";

/// No unpacking takes longer.
const MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// A step of unpacking, for progress bars.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What is being made: `kernel`, `initrd`, `layer 2 of 3`.
    pub what: String,
    /// Bytes done.
    pub done: u64,
    /// All bytes; 0 while that is not known.
    pub total: u64,
}

/// How images are unpacked.
#[derive(Debug, Clone)]
pub struct Options {
    /// Starts the workers.
    pub launcher: Launcher,
    /// Caps on each layer.
    pub limits: Limits,
    /// The largest kernel or initial RAM disk in bytes.
    pub max_boot_file: u64,
    /// The most bytes of memory of a RAM snapshot; none: RAM that an image carries is left alone, and its machines boot.
    pub max_ram: Option<u64>,
}

/// A cache of unpacked images.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    options: Options,
}

/// Keeps what a cache has from being removed.
#[derive(Debug)]
pub struct Held {
    _lock: File,
}

impl Cache {
    /// Opens the cache in `root` and makes it, for its owner alone, if it is not there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(root: &Path, options: Options) -> Result<Cache> {
        let root = std::path::absolute(root).map_err(Error::io("open", root))?;
        // The last of them is there only if all are: a start from a prepared cache makes one system call here.
        if !root.join("tmp").exists() {
            for dir in ["layers", "tables", "blobs", "ram", "images", "tmp"] {
                let dir = root.join(dir);
                let mut private = fs::DirBuilder::new();
                private.recursive(true).mode(0o700).create(&dir).map_err(Error::io("create", &dir))?;
            }
        }
        Ok(Cache { root, options })
    }

    /// Nothing is removed from the cache as long as the answer lives; instances that are made meanwhile and handed to
    /// [`Cache::prune`] are safe afterwards, too.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn hold(&self) -> Result<Held> {
        let (path, lock) = self.lock_file()?;
        lock.lock_shared().map_err(Error::io("lock", path))?;
        Ok(Held { _lock: lock })
    }

    fn lock_file(&self) -> Result<(PathBuf, File)> {
        let path = self.root.join("lock");
        let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        Ok((path.clone(), open.map_err(Error::io("open", path))?))
    }

    /// Makes everything that the image of the layout (directory or tar) needs and is not there yet. Returns a template: a
    /// record without a top, for [`instantiate`]; [`Cache::template`] has it at once from then on.
    ///
    /// # Errors
    /// [`Error`] naming document, blob or layer; what was made whole before stays in the cache.
    pub fn unpack(&self, layout: &Layout, image: &Descriptor, tell: &mut dyn FnMut(Step)) -> Result<Record> {
        sweep(&self.root.join("tmp"));
        let layers = LayerReader { launcher: self.options.launcher.clone(), limits: self.options.limits };
        let image = layout.load_image(image, &layers).map_err(Error::Layout)?;
        let resolved = image.resolved;
        let mut boot =
            |what, blob: Option<&Blob>| blob.map(|blob| self.boot_file(layout, what, blob, tell)).transpose();
        let kernel = boot("kernel", resolved.kernel.as_ref())?;
        let initrd = boot("initrd", resolved.initrd.as_ref())?;
        let disk = match resolved.disks.as_slice() {
            [] => None,
            disks if disks.len() > MAX_LAYERS => {
                let count = disks.len();
                return Err(Error::Image(format!("the disk has {count} layers, at most {MAX_LAYERS} are supported")));
            }
            disks => Some(self.disk(layout, disks, tell)?),
        };
        let ram = match (&resolved.ram_snapshot, &self.options.max_ram) {
            (Some(newest), Some(max)) => {
                let others = image.parts.ram_snapshots.iter().chain(&image.parts.others);
                let blobs: Vec<_> = std::iter::once(newest).chain(others).collect();
                let mut ram = self.ram(layout, newest, &blobs, *max, tell)?;
                ram.mlock = resolved.manifest.ram_snapshot.as_ref().is_some_and(|ram| ram.mlock_required);
                Some(ram)
            }
            _ => None,
        };
        let record = Record {
            version: RECORD_VERSION,
            image: Some(image.image.digest.to_string()),
            manifest: resolved.manifest,
            kernel,
            initrd,
            disk,
            ram,
        };
        self.keep_template(&image.image.digest, &record)?;
        Ok(record)
    }

    /// The RAM snapshot with its chain; `blobs` are all that could be part of it.
    fn ram(
        &self,
        layout: &Layout,
        newest: &Blob,
        blobs: &[&Blob],
        max_memory: u64,
        tell: &mut dyn FnMut(Step),
    ) -> Result<Ram> {
        let root = self.root.join("ram");
        if let Some(ram) = ram::find(&root, &newest.digest)? {
            return Ok(ram);
        }
        let tmp = self.root.join("tmp");
        let chain = ram::chain(newest.digest, &mut |digest| {
            let Some(blob) = blobs.iter().find(|blob| blob.digest == *digest) else { return Ok(None) };
            Ok(Some((seekable(layout, blob, &tmp)?, blob.size)))
        })?;
        let launcher = self.options.launcher.clone();
        let options = RamOptions { launcher, max_memory, threads: 0 };
        ram::unpack(&root, chain, &options, &mut |p| {
            tell(Step { what: "RAM".into(), done: p.done, total: p.total });
            true
        })
    }

    fn boot_file(
        &self,
        layout: &Layout,
        what: &'static str,
        blob: &Blob,
        tell: &mut dyn FnMut(Step),
    ) -> Result<PathBuf> {
        let limit = self.options.max_boot_file;
        if blob.size > limit {
            let size = blob.size;
            return Err(Error::Image(format!("the {what} has {size} bytes, more than the {limit} allowed")));
        }
        let path = self.root.join("blobs").join(blob.digest.hex());
        if !path.exists() {
            let mut from = layout.blob(&blob.digest, blob.size).map_err(Error::Layout)?;
            write_new(&path, |file| {
                copy(&mut from, file, blob.size, &mut |done| {
                    tell(Step { what: what.into(), done, total: blob.size });
                })
                .map_err(Error::io("copy into", &path))
            })?;
        }
        Ok(path)
    }

    fn disk(&self, layout: &Layout, disks: &[ImageDisk], tell: &mut dyn FnMut(Step)) -> Result<Disk> {
        let count = disks.len();
        let mut names = String::new();
        let mut dirs = Vec::new();
        for (i, disk) in disks.iter().enumerate() {
            let name = format!("{}-{}", disk.layer.diff_id.hex(), disk.format.name());
            let dir = self.root.join("layers").join(&name);
            if !dir.exists() {
                let what = format!("layer {} of {count}", i + 1);
                self.layer(layout, disk, &dir, &mut |p: Progress| {
                    tell(Step { what: what.clone(), done: p.done, total: p.total });
                })?;
            }
            names.push_str(&name);
            names.push('\n');
            dirs.push(dir);
        }
        let table = self.root.join("tables").join(Digest::of(names.as_bytes()).hex());
        if !table.exists() {
            let maps = dirs.iter().map(|dir| layer::load_map(dir)).collect::<Result<Vec<_>>>()?;
            let merged = Table::merge(&maps).map_err(Error::disk(&table))?;
            write_new(&table, |file| merged.write_to(file).map_err(Error::disk(&table)))?;
        }
        let open = File::open(&table).map_err(Error::io("open", &table))?;
        let virtual_size = Table::open(&open).map_err(Error::disk(&table))?.virtual_size();
        let layers = dirs.iter().map(|dir| layer::data_path(dir)).collect();
        Ok(Disk { virtual_size, table, layers, frozen: Vec::new(), top: None, read_only: false })
    }

    fn layer(&self, layout: &Layout, disk: &ImageDisk, dir: &Path, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let blob = &disk.layer.blob;
        let name = blob.digest.to_string();
        let tmp = self.root.join("tmp");
        let made = tempfile::Builder::new().prefix("layer-").tempdir_in(&tmp).map_err(Error::io("use", &tmp))?;
        let (input, feeder) = open_blob(layout, blob)?;
        let job = Job {
            name: &name,
            input,
            source: Source::Layer {
                media_type: blob.media_type.clone(),
                format: disk.layer.encoding.annotated.map(|f| f.name().to_owned()),
            },
            expect: Some((blob.digest, blob.size)),
            dir: made.path(),
            limits: self.options.limits,
        };
        let outcome = self.options.launcher.unpack(job, progress);
        if let Some(feeder) = feeder {
            // It ends when the blob or the worker does; what it met is in the worker's answer.
            let _ = feeder.join();
        }
        match outcome? {
            Outcome::Layer(Unpacked { diff_id: Some(found), .. }) if found != disk.layer.diff_id => {
                Err(Error::DiffId { name, expected: disk.layer.diff_id, found })
            }
            Outcome::Layer(Unpacked { disk: Some(found), .. }) if found.format == disk.format => {
                publish(&made.keep(), dir)
            }
            Outcome::Layer(Unpacked { disk: Some(found), .. }) => {
                let (found, want) = (found.format.name(), disk.format.name());
                Err(Error::Refused { name, why: format!("it holds a {found} disk, the manifest says {want}") })
            }
            Outcome::Layer(_) | Outcome::Ordinary { .. } => Err(Error::NoDisk(name)),
        }
    }
}

/// Removes what crashed processes left long ago. Only a help: what cannot be removed stays.
fn sweep(tmp: &Path) {
    let long_ago = |entry: &fs::DirEntry| {
        let age = entry.metadata().and_then(|m| m.modified()).map(|at| at.elapsed().unwrap_or_default());
        age.is_ok_and(|age| age > MAX_AGE)
    };
    for entry in fs::read_dir(tmp).into_iter().flatten().flatten().filter(long_ago) {
        let path = entry.path();
        let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
    }
}

/// Opens a blob as a descriptor: the file itself, or a pipe that a thread fills from inside the tar.
fn open_blob(layout: &Layout, blob: &Blob) -> Result<(File, Option<thread::JoinHandle<()>>)> {
    if let Some(path) = layout.blob_path(&blob.digest) {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        return Ok((options.open(&path).map_err(Error::io("open", path))?, None));
    }
    let mut from = layout.blob(&blob.digest, blob.size).map_err(Error::Layout)?;
    let (reader, mut writer) = io::pipe().map_err(Error::io("make a pipe for", layout.path()))?;
    let feeder = thread::spawn(move || {
        // A pipe that breaks means that the worker has seen enough; a wrong blob it finds by its digest.
        let _ = io::copy(&mut from, &mut writer);
    });
    Ok((File::from(std::os::fd::OwnedFd::from(reader)), Some(feeder)))
}

/// Opens a blob as a file that can be read at any offset: itself, or a copy without a name of what lies inside a tar.
fn seekable(layout: &Layout, blob: &Blob, tmp: &Path) -> Result<File> {
    if layout.blob_path(&blob.digest).is_some() {
        return Ok(open_blob(layout, blob)?.0);
    }
    let mut from = layout.blob(&blob.digest, blob.size).map_err(Error::Layout)?;
    let mut file = tempfile::tempfile_in(tmp).map_err(Error::io("create a file in", tmp))?;
    copy(&mut from, &mut file, blob.size, &mut |_| ()).map_err(Error::io("copy from", layout.path()))?;
    Ok(file)
}

fn copy(from: &mut dyn Read, to: &mut File, size: u64, progress: &mut dyn FnMut(u64)) -> io::Result<()> {
    let mut buffer = vec![0_u8; 1 << 20];
    let mut done = 0_u64;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => {
                progress(size);
                return Ok(());
            }
            Ok(n) => {
                to.write_all(buffer.get(..n).unwrap_or_default())?;
                done = done.saturating_add(n as u64);
                progress(done);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
