//! From a chain of RAM blobs to a memory file that can be mapped, in parallel.
//!
//! ```text
//!  Unpack::plan ── which blob has each chunk: the newest that stores it, else zero
//!  Unpack::work ── any number of threads: take a unit (4 chunks), read, decode, check, write what is not zero
//!  Unpack::finish ── all done? then the state file
//! ```
//! The memory file is sparse: pages of 4096 zeros are holes. Threads are the caller's, so that a jail that forbids new
//! ones can have made them before; [`unpack`] makes its own.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        Mutex, PoisonError,
    },
};

use crate::{
    index::{chunk_count, is_zero, Entry, Kind, CHUNK, PAGE},
    prefix::digest,
    Blob, Head, Result, SnapshotError, StateFile,
};

/// The most blobs in a chain: a whole one and 31 diffs.
pub const MAX_CHAIN: usize = 32;

/// Chunks that a thread takes at once: enough for long writes, few enough to stay in a core's cache.
const UNIT: usize = 4;

/// What unpacking may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most bytes of memory.
    pub memory: u64,
}

/// What was unpacked.
#[derive(Debug, Clone, PartialEq)]
pub struct Unpacked {
    /// The newest blob's head.
    pub head: Head,
    /// Bytes of memory that were written; the rest are holes.
    pub written: u64,
}

/// Where a chunk's bytes are: which blob of the chain, which entry of its index.
#[derive(Debug, Clone, Copy)]
struct Source {
    blob: u16,
    entry: u32,
}

const NOWHERE: Source = Source { blob: u16::MAX, entry: 0 };

/// An unpacking under way; shared by reference between the threads that work on it.
#[derive(Debug)]
pub struct Unpack {
    blobs: Vec<Blob>,
    indices: Vec<Vec<Entry>>,
    sources: Vec<Source>,
    memory: File,
    next: AtomicU64,
    done: AtomicU64,
    written: AtomicU64,
    stop: AtomicBool,
    failed: Mutex<Option<SnapshotError>>,
}

impl Unpack {
    /// Checks that the blobs, newest first, make a chain, reads their indices, and gives `memory`, an empty file, its
    /// length. `names` are the blobs' digests in the same order: each must be the parent that the one before it names.
    ///
    /// # Errors
    /// [`SnapshotError::Chain`], [`SnapshotError::TooLarge`], and what is wrong with an index.
    pub fn plan(blobs: Vec<Blob>, names: &[String], memory: File, limits: Limits) -> Result<Self> {
        let size = check_chain(&blobs, names)?;
        if size > limits.memory {
            return Err(SnapshotError::TooLarge { what: "memory", bytes: size, limit: limits.memory });
        }
        let failed = || SnapshotError::io("prepare the memory file");
        if memory.metadata().map_err(failed())?.len() != 0 {
            return Err(SnapshotError::Unwritable("the memory file is not empty".into()));
        }
        let indices = blobs.iter().map(Blob::index).collect::<Result<Vec<_>>>()?;
        let mut sources = vec![NOWHERE; usize::try_from(chunk_count(size)).unwrap_or_default()];
        // Oldest first: a newer blob's chunk takes the place of an older one's.
        for (blob, index) in indices.iter().enumerate().rev() {
            // Exact: a chain is short.
            let blob = blob as u16;
            for (number, entry) in (0_u32..).zip(index) {
                if let Some(source) = sources.get_mut(entry.chunk as usize) {
                    *source = Source { blob, entry: number };
                }
            }
        }
        memory.set_len(size).map_err(failed())?;
        Ok(Self {
            blobs,
            indices,
            sources,
            memory,
            next: AtomicU64::new(0),
            done: AtomicU64::new(0),
            written: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            failed: Mutex::new(None),
        })
    }

    /// Works until nothing is left to take, something failed or the work was cancelled. Any number of threads may be in
    /// here; what fails is told by [`Unpack::finish`].
    pub fn work(&self) {
        let mut worker = Worker::new(self);
        while !self.stop.load(Ordering::Relaxed) {
            let unit = self.next.fetch_add(1, Ordering::Relaxed);
            let start = usize::try_from(unit).unwrap_or(usize::MAX).saturating_mul(UNIT);
            if start >= self.sources.len() {
                return;
            }
            match worker.unit(start) {
                Ok(written) => {
                    self.written.fetch_add(written, Ordering::Relaxed);
                    self.done.fetch_add((UNIT * CHUNK) as u64, Ordering::Relaxed);
                }
                Err(error) => return self.fail(error),
            }
        }
    }

    /// Bytes of memory done, and all of them.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        let total = self.size();
        (self.done.load(Ordering::Relaxed).min(total), total)
    }

    /// Makes all threads leave [`Unpack::work`] soon; [`Unpack::finish`] then says [`SnapshotError::Cancelled`].
    pub fn cancel(&self) {
        self.fail(SnapshotError::Cancelled);
    }

    /// Whether something failed or the work was cancelled.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Call when every thread has left [`Unpack::work`]: writes the newest blob's head and sections into `state`, an
    /// empty file. Neither file is synced.
    ///
    /// # Errors
    /// What went wrong first in any of the threads, or with the sections.
    pub fn finish(self, state: &File) -> Result<Unpacked> {
        let (done, total) = self.progress();
        if let Some(error) = self.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let newest = self.blobs.first().filter(|_| done == total).ok_or(SnapshotError::Cancelled)?;
        StateFile::write(state, newest.head(), &newest.sections()?)?;
        Ok(Unpacked { head: newest.head().clone(), written: self.written.into_inner() })
    }

    fn size(&self) -> u64 {
        self.blobs.first().map_or(0, |blob| blob.head().memory)
    }

    /// Makes all threads leave [`Unpack::work`] soon; [`Unpack::finish`] then gives this error, or an earlier one.
    pub fn fail(&self, error: SnapshotError) {
        self.stop.store(true, Ordering::Relaxed);
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.get_or_insert(error);
    }

    fn entry(&self, source: Source) -> Option<(&Blob, &Entry)> {
        let entry = self.indices.get(usize::from(source.blob))?.get(source.entry as usize)?;
        Some((self.blobs.get(usize::from(source.blob))?, entry))
    }
}

/// Checks that each blob is the parent of the one before it and returns the size of the memory.
fn check_chain(blobs: &[Blob], names: &[String]) -> Result<u64> {
    let wrong = |why: String| Err(SnapshotError::Chain(why));
    let Some(newest) = blobs.first() else { return wrong("there is no blob".into()) };
    if blobs.len() > MAX_CHAIN || blobs.len() != names.len() {
        return wrong(format!("there are {} blobs, at most {MAX_CHAIN} are read", blobs.len()));
    }
    let head = newest.head();
    for (number, blob) in blobs.iter().enumerate() {
        let found = blob.head();
        if found.memory != head.memory || found.arch != head.arch {
            return wrong(format!("one is of {} bytes of memory, another of {}", head.memory, found.memory));
        }
        let below = names.get(number.saturating_add(1));
        match (&found.parent, below) {
            (Some(parent), None) => return wrong(format!("the parent {parent} is missing")),
            (None, Some(below)) => return wrong(format!("{below} lies below one that is whole")),
            (Some(parent), Some(below)) if parent != below => {
                return wrong(format!("the parent {parent} is missing, {below} is in its place"));
            }
            _ => {}
        }
    }
    Ok(head.memory)
}

/// A thread's buffers.
struct Worker<'a> {
    job: &'a Unpack,
    packed: Vec<u8>,
    plain: Vec<u8>,
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl<'a> Worker<'a> {
    fn new(job: &'a Unpack) -> Self {
        Self { job, packed: vec![0; CHUNK], plain: vec![0; UNIT * CHUNK], zstd: None }
    }

    /// Decodes the chunks from `start` on and writes them; returns the bytes written.
    fn unit(&mut self, start: usize) -> Result<u64> {
        let sources = self.job.sources.get(start..).unwrap_or_default();
        let mut stored = false;
        let mut plain = std::mem::take(&mut self.plain);
        for (source, out) in sources.iter().zip(plain.chunks_mut(CHUNK)) {
            match self.job.entry(*source) {
                Some((blob, entry)) if entry.kind != Kind::Zero => {
                    self.chunk(blob, entry, out)?;
                    stored = true;
                }
                // Of what an earlier unit left there.
                _ => out.fill(0),
            }
        }
        let offset = (start as u64).saturating_mul(CHUNK as u64);
        let length = self.job.size().saturating_sub(offset).min(plain.len() as u64);
        let written = match plain.get(..usize::try_from(length).unwrap_or_default()) {
            Some(data) if stored => write_sparse(&self.job.memory, data, offset)?,
            _ => 0,
        };
        self.plain = plain;
        Ok(written)
    }

    /// Decodes one chunk into `out`, which is a whole one; bytes behind the end of the last chunk stay as they are.
    fn chunk(&mut self, blob: &Blob, entry: &Entry, out: &mut [u8]) -> Result<()> {
        let chunk = u64::from(entry.chunk);
        let refused = |why: &str| SnapshotError::Chunk { chunk, why: why.into() };
        let failed = || SnapshotError::io("read a chunk of the RAM snapshot");
        let whole = crate::chunk_len(blob.head().memory, chunk);
        let out = out.get_mut(..whole).ok_or_else(|| refused("it is longer than a chunk"))?;
        if entry.kind == Kind::Raw {
            blob.file().read_exact_at(out, entry.offset).map_err(failed())?;
        } else {
            // The index's check bounds the length by a chunk's.
            let packed = self.packed.get_mut(..entry.length as usize).ok_or_else(|| refused("it is too long"))?;
            blob.file().read_exact_at(packed, entry.offset).map_err(failed())?;
            let length = match entry.kind {
                Kind::Zstd => {
                    let decoder = match &mut self.zstd {
                        Some(decoder) => decoder,
                        none => none.insert(zstd::bulk::Decompressor::new().map_err(failed())?),
                    };
                    decoder
                        .decompress_to_buffer(packed, out)
                        .map_err(|_| refused("it is no zstd frame of its length"))?
                }
                _ => lz4_flex::block::decompress_into(packed, out)
                    .map_err(|_| refused("it is no lz4 block of its length"))?,
            };
            if length != whole {
                return Err(refused("it decodes to fewer bytes than it stands for"));
            }
        }
        if digest(out) != entry.digest {
            return Err(SnapshotError::Checksum(format!("chunk {chunk} of the memory")));
        }
        Ok(())
    }
}

/// Writes what is not zero, page by page, each run of pages at once. Returns the bytes written.
fn write_sparse(file: &File, data: &[u8], offset: u64) -> Result<u64> {
    let mut written = 0_u64;
    let (mut run, mut at) = (0_usize, 0_usize);
    let mut flush = |from: usize, to: usize| -> Result<()> {
        let Some(bytes) = data.get(from..to).filter(|bytes| !bytes.is_empty()) else { return Ok(()) };
        written = written.saturating_add(bytes.len() as u64);
        let place = offset.saturating_add(from as u64);
        file.write_all_at(bytes, place).map_err(SnapshotError::io("write the memory file"))
    };
    for page in data.chunks(PAGE) {
        let end = at.saturating_add(page.len());
        if is_zero(page) {
            flush(run, at)?;
            run = end;
        }
        at = end;
    }
    flush(run, at)?;
    Ok(written)
}

/// Unpacks a chain of blobs, newest first, with `threads` threads of its own. `memory` and `state` are empty files and
/// durable afterwards. `progress` is told bytes done and all bytes, some times a second, and may end the work by
/// returning `false`.
///
/// # Errors
/// As [`Unpack::plan`] and [`Unpack::finish`].
pub fn unpack(
    blobs: Vec<Blob>,
    names: &[String],
    (memory, state): (&File, &File),
    threads: usize,
    limits: Limits,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Unpacked> {
    let failed = || SnapshotError::io("use the memory file");
    let job = Unpack::plan(blobs, names, memory.try_clone().map_err(failed())?, limits)?;
    let threads = threads.max(1);
    std::thread::scope(|scope| {
        let (alive, ended) = std::sync::mpsc::channel::<()>();
        for _ in 0..threads {
            let (job, alive) = (&job, alive.clone());
            scope.spawn(move || {
                job.work();
                drop(alive);
            });
        }
        drop(alive);
        loop {
            let timeout = ended.recv_timeout(std::time::Duration::from_millis(100));
            let (done, total) = job.progress();
            if !progress(done, total) && done < total {
                job.cancel();
            }
            if timeout == Err(std::sync::mpsc::RecvTimeoutError::Disconnected) {
                break;
            }
        }
    });
    let unpacked = job.finish(state)?;
    let synced = memory.sync_all().and_then(|()| state.sync_all());
    synced.map_err(SnapshotError::io("sync the unpacked RAM snapshot"))?;
    Ok(unpacked)
}
