//! Unpacking a chain of RAM blobs in the worker, on several threads.
//!
//! ```text
//!  parent: make state, memory ──request + fds──> worker: start threads ─> jail ─> read heads and indices ─> hand the
//!  checks what is there, syncs <──progress, Ram──        plan to the threads: first compare digests, then decode
//! ```
//! The threads are made before the jail, which lets none be made. What is decoded before its blob's digest is known to
//! hold is thrown away if it does not.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc, Arc,
    },
    thread,
    time::Duration,
};

use ovms_artifact::digest::{Digest, Hasher};
use ovms_proto::chain;
use ovms_state::{Blob, Head, Limits, SnapshotError, StateFile, Unpack};

use super::{
    child::Teller,
    parent::{create, failed},
    wire::{RamBlobTask, Reply, Request, Task},
    Launcher, Progress,
};
use crate::{ram, Error, Result};

/// The most threads of a worker; more would wait for memory.
const MAX_THREADS: usize = 16;
/// Stack of a thread, whose buffers are on the heap.
const STACK: usize = 512 << 10;
/// How often the parent is told how far it is.
const EVERY: Duration = Duration::from_millis(100);
/// Bytes that are hashed at once.
const PIECE: usize = 1 << 20;

/// A RAM blob as a file that can be read at any offset.
#[derive(Debug)]
pub struct RamBlob {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// The blob.
    pub file: File,
    /// The caller has compared the file with the digest, and nobody can have changed it since; otherwise the worker does.
    pub verified: bool,
}

/// A RAM snapshot to unpack.
#[derive(Debug)]
pub struct RamJob<'a> {
    /// The blobs, newest first, each followed by its parent.
    pub blobs: Vec<RamBlob>,
    /// An existing directory of the caller's, without `state` and `memory`, which are made in it.
    pub dir: &'a Path,
    /// The most bytes of memory.
    pub max_memory: u64,
    /// How many threads decode, at most 16; 0: as many as there are processors.
    pub threads: usize,
}

impl Launcher {
    /// Unpacks a RAM snapshot; blocks until the worker is gone. Both files are durable then. On an error nothing is left
    /// in the directory. `progress` may give up by returning `false`.
    ///
    /// # Errors
    /// [`Error::Ram`] if the snapshot is not accepted or the worker failed, [`Error::Cancelled`], [`Error::Io`].
    pub fn unpack_ram(&self, job: RamJob<'_>, progress: &mut dyn FnMut(Progress) -> bool) -> Result<Head> {
        let dir = job.dir;
        let name = job.blobs.first().map_or_else(String::new, |blob| blob.digest.to_string());
        let result = self.run_ram(job, progress);
        if result.is_err() {
            for path in [ram::state_path(dir), ram::memory_path(dir)] {
                // The first error is the one that counts.
                let _ = fs::remove_file(path);
            }
        }
        result.map_err(|error| match error {
            Error::Refused { why, .. } => Error::Ram { name, why },
            Error::Worker { why, .. } => Error::Ram { name, why: format!("its worker failed: {why}") },
            other => other,
        })
    }

    fn run_ram(&self, job: RamJob<'_>, progress: &mut dyn FnMut(Progress) -> bool) -> Result<Head> {
        for blob in &job.blobs {
            check_file(blob)?;
        }
        let threads = match job.threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let (memory_path, state_path) = (ram::memory_path(job.dir), ram::state_path(job.dir));
        let (memory, state) = (create(&memory_path)?, create(&state_path)?);
        let request = Request {
            task: Task::Ram {
                blobs: job
                    .blobs
                    .iter()
                    .map(|blob| RamBlobTask { digest: blob.digest.to_string(), verify: !blob.verified })
                    .collect(),
                max_memory: job.max_memory,
                threads: threads.min(MAX_THREADS),
            },
            ids: self.ids(),
        };
        let files: Vec<_> = [&memory, &state].into_iter().chain(job.blobs.iter().map(|b| &b.file)).collect();
        let files: Vec<_> = files.into_iter().map(AsFd::as_fd).collect();
        if files.len() > super::wire::MAX_FILES {
            let count = job.blobs.len();
            return Err(refused(format!("its chain has {count} blobs, at most {} are read", ovms_state::MAX_CHAIN)));
        }
        match self.converse(&request, &files, progress)? {
            Reply::Ram => {}
            _ => return Err(failed("it answered what it was not asked".into())),
        }
        // The worker may have been taken over by what it read.
        let head = StateFile::head(&state).map_err(|error| failed(format!("its state file: {}", chain(&error))))?;
        let length = memory.metadata().map_err(Error::io("read", &memory_path))?.len();
        if length != head.memory || length > job.max_memory {
            return Err(failed(format!("its memory file has {length} bytes")));
        }
        memory.sync_all().map_err(Error::io("sync", memory_path))?;
        state.sync_all().map_err(Error::io("sync", state_path))?;
        Ok(head)
    }
}

fn refused(why: String) -> Error {
    Error::Refused { name: String::new(), why }
}

fn check_file(blob: &RamBlob) -> Result<()> {
    let found = blob.file.metadata().map_err(Error::io("read", blob.digest.to_string()))?;
    if !found.is_file() {
        return Err(refused(format!("blob {} is no file", blob.digest)));
    }
    if found.size() != blob.size {
        let (have, need) = (found.size(), blob.size);
        return Err(refused(format!("blob {} has {have} bytes, the image says {need}", blob.digest)));
    }
    Ok(())
}

/// Threads that wait for their work.
pub(super) struct Pool {
    jobs: Vec<mpsc::Sender<Arc<Job>>>,
    /// Disconnected when the last thread has ended.
    ended: mpsc::Receiver<()>,
}

/// What the threads do together.
struct Job {
    checks: Vec<(Arc<File>, Digest)>,
    next: AtomicUsize,
    unpack: Unpack,
}

impl Pool {
    /// Starts threads and waits until each has made all the system calls that only a beginning thread makes.
    pub fn start(threads: usize) -> std::result::Result<Self, String> {
        let (alive, ended) = mpsc::channel::<()>();
        let (ready, begun) = mpsc::channel();
        let mut jobs = Vec::new();
        for _ in 0..threads.clamp(1, MAX_THREADS) {
            let (give, take) = mpsc::channel::<Arc<Job>>();
            let (alive, ready) = (alive.clone(), ready.clone());
            let body = move || {
                let _ = ready.send(());
                drop(ready);
                if let Ok(job) = take.recv() {
                    job.work();
                }
                drop(alive);
            };
            let builder = thread::Builder::new().stack_size(STACK);
            builder.spawn(body).map_err(|e| format!("cannot start a thread: {e}"))?;
            jobs.push(give);
        }
        drop(ready);
        while begun.recv().is_ok() {}
        Ok(Self { jobs, ended })
    }

    /// Gives the job to all threads and waits for them.
    fn run(self, job: Job, mut tell: impl FnMut(u64, u64)) -> std::result::Result<Job, String> {
        let job = Arc::new(job);
        for give in self.jobs {
            let _ = give.send(Arc::clone(&job));
        }
        while self.ended.recv_timeout(EVERY) != Err(mpsc::RecvTimeoutError::Disconnected) {
            let (done, total) = job.unpack.progress();
            tell(done, total);
        }
        Arc::into_inner(job).ok_or_else(|| "a thread is still at work".into())
    }
}

impl Job {
    fn work(&self) {
        while let Some((file, digest)) = self.checks.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = self.check(file, digest) {
                return self.unpack.fail(error);
            }
        }
        self.unpack.work();
    }

    /// Compares a blob with its digest.
    fn check(&self, file: &File, expected: &Digest) -> std::result::Result<(), SnapshotError> {
        let failed = |error| SnapshotError::Io("read the blob", error);
        let (mut hasher, mut buffer) = (Hasher::new(), vec![0; PIECE]);
        loop {
            match file.read_at(&mut buffer, hasher.size()) {
                Ok(0) => break,
                Ok(n) => hasher.update(buffer.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
            if self.unpack.is_stopped() {
                return Err(SnapshotError::Cancelled);
            }
        }
        let found = hasher.finish();
        if found == *expected {
            Ok(())
        } else {
            Err(SnapshotError::Checksum(format!("the blob {expected}, whose bytes have the digest {found},")))
        }
    }
}

/// The worker's part, in the jail.
pub(super) fn unpack(
    pool: Pool,
    blobs: &[RamBlobTask],
    max_memory: u64,
    files: Vec<File>,
    tell: &mut Teller<'_>,
) -> Reply {
    match try_unpack(pool, blobs, max_memory, files, tell) {
        Ok(()) => Reply::Ram,
        Err(why) => Reply::Refused { why },
    }
}

fn try_unpack(
    pool: Pool,
    tasks: &[RamBlobTask],
    max_memory: u64,
    files: Vec<File>,
    tell: &mut Teller<'_>,
) -> std::result::Result<(), String> {
    let mut files = files.into_iter();
    let mut next = || files.next().ok_or("a descriptor is missing");
    let (memory, state) = (next()?, next()?);
    let (mut blobs, mut names, mut checks) = (Vec::new(), Vec::new(), Vec::new());
    for task in tasks {
        let (file, again) = (Arc::new(next()?), &task.digest);
        let digest: Digest = again.parse().map_err(|e: ovms_artifact::digest::DigestError| chain(&e))?;
        if task.verify {
            checks.push((Arc::clone(&file), digest));
        }
        blobs.push(Blob::open(file).map_err(|e| chain(&e))?);
        names.push(task.digest.clone());
    }
    let limits = Limits { memory: max_memory };
    let unpack = Unpack::plan(blobs, &names, memory, limits).map_err(|e| chain(&e))?;
    let job = Job { checks, next: AtomicUsize::new(0), unpack };
    let job = pool.run(job, |done, total| tell.progress(done, total))?;
    job.unpack.finish(&state).map_err(|e| chain(&e))?;
    Ok(())
}
