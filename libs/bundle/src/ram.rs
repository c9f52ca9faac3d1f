//! RAM snapshots in their unpacked form, each once, in a directory of its own named by its blob's digest.
//!
//! ```text
//!  <root>/<hex>/state          head and sections (ovms_state::StateFile)
//!              /memory         the guest's memory, sparse
//!              /parents.json   digests of the blobs below it, the nearest first
//!              /working-set    recorded by the first machines that resume; missing until then
//!  <root>/.<hex>.new/          being made; its maker holds a lock on it
//! ```
//! A directory is made beside its place, synced and renamed. Whoever makes it holds a `flock` on it, which ends with the
//! process: so another waits for a maker that lives, and goes on in place of one that was killed.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use ovms_artifact::digest::Digest;
use ovms_state::Blob;
/// The most blobs that may lie on each other, for those who collect a chain themselves.
pub use ovms_state::MAX_CHAIN;
use rustix::fs::{flock, FlockOperation};

use crate::{
    publish::sync,
    worker::{Launcher, Progress, RamBlob, RamJob},
    Error, Ram, Result,
};

/// Name of the file of head and sections.
pub const STATE: &str = "state";
/// Name of the memory file.
pub const MEMORY: &str = "memory";
/// Name of the list of parents.
pub const PARENTS: &str = "parents.json";
/// Name of the working set.
pub const WORKING_SET: &str = "working-set";

/// The longest list of parents that is read, in bytes.
const MAX_PARENTS: u64 = 16 << 10;
/// How often a waiter looks whether another maker has finished.
const EVERY: Duration = Duration::from_millis(20);

/// The state file of the RAM snapshot in `dir`.
#[must_use]
pub fn state_path(dir: &Path) -> PathBuf {
    dir.join(STATE)
}

/// The memory file of the RAM snapshot in `dir`.
#[must_use]
pub fn memory_path(dir: &Path) -> PathBuf {
    dir.join(MEMORY)
}

/// What unpacking may cost.
#[derive(Debug, Clone)]
pub struct RamOptions {
    /// Starts the worker.
    pub launcher: Launcher,
    /// The most bytes of memory.
    pub max_memory: u64,
    /// How many threads decode; 0: as many as there are processors.
    pub threads: usize,
}

/// The unpacked RAM snapshot of this blob below `root`, if it is there. It is not locked: `mlock` is false.
///
/// # Errors
/// [`Error::Io`], [`Error::Record`].
pub fn find(root: &Path, digest: &Digest) -> Result<Option<Ram>> {
    let dir = root.join(digest.hex());
    if !dir.try_exists().map_err(Error::io("look for", &dir))? {
        return Ok(None);
    }
    let path = dir.join(PARENTS);
    let bad = |why: String| Error::Record { path: path.clone(), why };
    let length = fs::metadata(&path).map_err(Error::io("read", &path))?.len();
    if length > MAX_PARENTS {
        return Err(bad(format!("it has {length} bytes, more than {MAX_PARENTS}")));
    }
    let text = fs::read(&path).map_err(Error::io("read", &path))?;
    let parents = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    Ok(Some(Ram {
        digest: digest.to_string(),
        parents,
        state: state_path(&dir),
        memory: memory_path(&dir),
        working_set: dir.join(WORKING_SET),
        mlock: false,
    }))
}

/// A blob's file and its size in bytes; `None` for one that is not there.
pub type Opened = Result<Option<(File, u64)>>;

/// Collects the blobs of a chain, newest first, by the parent that each one's head names. What `open`
/// gives is compared with its digest when it is unpacked.
///
/// # Errors
/// [`Error::Ram`] names the blob that is missing or is no RAM snapshot; what `open` returns.
pub fn chain(newest: Digest, open: &mut dyn FnMut(&Digest) -> Opened) -> Result<Vec<RamBlob>> {
    let mut blobs: Vec<RamBlob> = Vec::new();
    let mut next = Some(newest);
    while let Some(digest) = next {
        let refused = |why: String| Error::Ram { name: newest.to_string(), why };
        if blobs.len() >= MAX_CHAIN {
            return Err(refused(format!("more than {MAX_CHAIN} blobs lie on each other")));
        }
        if blobs.iter().any(|blob| blob.digest == digest) {
            return Err(refused(format!("blob {digest} is its own parent")));
        }
        let (file, size) = open(&digest)?.ok_or_else(|| match blobs.last() {
            None => refused("the image does not have its blob".into()),
            Some(child) => refused(format!("the image lacks blob {digest}, the parent of {}", child.digest)),
        })?;
        next = parent_of(&file).map_err(|why| refused(format!("blob {digest}: {why}")))?;
        blobs.push(RamBlob { digest, size, file, verified: false });
    }
    Ok(blobs)
}

/// The parent that a blob's head names.
///
/// # Errors
/// Why it is no RAM snapshot.
pub fn parent_of(blob: &File) -> std::result::Result<Option<Digest>, String> {
    let blob = blob.try_clone().map_err(|e| e.to_string())?;
    let blob = Blob::open(blob).map_err(|e| ovms_proto::chain(&e))?;
    if !blob.has_memory() {
        return Err("it holds no memory, only the state of a machine".into());
    }
    // The head's own check lets nothing else through.
    Ok(blob.head().parent.as_ref().and_then(|parent| parent.parse().ok()))
}

/// Makes sure that a RAM snapshot lies unpacked below `root`, an existing directory on the file system that is to hold it,
/// and returns it. `progress` is told bytes done and all bytes (0: another process does the work) and may give up by
/// returning `false`.
///
/// # Errors
/// [`Error::Ram`] if the snapshot is not accepted, [`Error::Cancelled`], [`Error::Io`].
pub fn unpack(
    root: &Path,
    blobs: Vec<RamBlob>,
    options: &RamOptions,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Ram> {
    let Some(newest) = blobs.first() else { return Err(Error::Image("there is no RAM blob to unpack".into())) };
    let digest = newest.digest;
    let place = root.join(digest.hex());
    let made = root.join(format!(".{}.new", digest.hex()));
    loop {
        if let Some(ram) = find(root, &digest)? {
            return Ok(ram);
        }
        let Some(lock) = claim(&made)? else {
            if !progress(Progress { done: 0, total: 0 }) {
                return Err(Error::Cancelled);
            }
            thread::sleep(EVERY);
            continue;
        };
        // Another may have finished between the look and the lock.
        if !place.exists() {
            sweep(root);
            make(&made, blobs, options, progress)?;
            fs::rename(&made, &place).map_err(Error::io("rename into", &place))?;
            sync(root).map_err(Error::io("sync", root))?;
        } else {
            fs::remove_dir_all(&made).map_err(Error::io("remove", &made))?;
        }
        drop(lock);
        return find(root, &digest)?.ok_or_else(|| Error::io("find", place)(io::ErrorKind::NotFound.into()));
    }
}

/// Makes and locks a directory, empty; `None` if another process has it.
fn claim(dir: &Path) -> Result<Option<File>> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(Error::io("create", dir)(e)),
        _ => {}
    }
    let Some(lock) = try_lock(dir).map_err(Error::io("lock", dir))? else { return Ok(None) };
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let path = entry.map_err(Error::io("read", dir))?.path();
        fs::remove_file(&path).map_err(Error::io("remove", path))?;
    }
    Ok(Some(lock))
}

/// Locks a directory that is still where it was; `None` if it is locked, or gone meanwhile.
fn try_lock(dir: &Path) -> io::Result<Option<File>> {
    let same = |file: &File| -> io::Result<bool> {
        let (ours, theirs) = (file.metadata()?, fs::metadata(dir)?);
        Ok((ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()))
    };
    let locked = File::open(dir).and_then(|file| {
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(same(&file)?.then_some(file))
    });
    match locked {
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::NotFound) => Ok(None),
        other => other,
    }
}

/// Removes what killed makers left. Only a help: what cannot be removed stays.
fn sweep(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_new = name.to_str().is_some_and(|name| name.starts_with('.') && name.ends_with(".new"));
        if is_new {
            if let Ok(Some(_lock)) = try_lock(&entry.path()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

fn make(
    dir: &Path,
    blobs: Vec<RamBlob>,
    options: &RamOptions,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<()> {
    let parents: Vec<_> = blobs.iter().skip(1).map(|blob| blob.digest.to_string()).collect();
    let made = fill(dir, blobs, &parents, options, progress);
    if made.is_err() {
        // The first error is the one that counts.
        let _ = fs::remove_dir_all(dir);
    }
    made
}

fn fill(
    dir: &Path,
    blobs: Vec<RamBlob>,
    parents: &[String],
    options: &RamOptions,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<()> {
    let job = RamJob { blobs, dir, max_memory: options.max_memory, threads: options.threads };
    options.launcher.unpack_ram(job, progress)?;
    let path = dir.join(PARENTS);
    let text = serde_json::to_vec(parents).map_err(|e| Error::Record { path: path.clone(), why: e.to_string() })?;
    let failed = || Error::io("write", &path);
    let mut file = File::create_new(&path).map_err(failed())?;
    file.write_all(&text).and_then(|()| file.sync_all()).map_err(failed())?;
    sync(dir).map_err(Error::io("sync", dir))
}
