//! Copying: chunks out of guest memory into the blob, by the whole crew at once.
//!
//! ```text
//!  Round   before the instant, or while the guest stands: each pending chunk, once
//!  Sweep   behind the barrier: each pending unit is copied out, released, and only then compressed
//!  Staged  what was copied aside while the guest stood
//! ```
//! A chunk is first copied out of guest memory, then compressed: the guest may change it at any time.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ovms_state::{SnapshotWriter, CHUNK};

use super::barrier::Barrier;
use super::chunks::ChunkSet;
use super::crew::Task;
use super::view::View;
use super::TakeError;

/// Bytes that may wait, copied out because a writer waited for them, until the crew compresses them.
const STAGED_BYTES: usize = 16 << 20;

/// Where chunks go, and whether that still makes sense.
pub(super) struct Copier {
    pub view: View,
    pub writer: SnapshotWriter,
    /// The parent's memory, for a diff.
    parent: Option<Arc<File>>,
    cancelled: Arc<AtomicBool>,
    failed: AtomicBool,
    failure: Mutex<Option<TakeError>>,
}

impl Copier {
    pub(super) fn new(
        view: View,
        writer: SnapshotWriter,
        parent: Option<Arc<File>>,
        cancelled: Arc<AtomicBool>,
    ) -> Self {
        Self { view, writer, parent, cancelled, failed: AtomicBool::new(false), failure: Mutex::default() }
    }

    /// Nothing more needs to be copied.
    fn is_over(&self) -> bool {
        self.failed.load(Ordering::Relaxed) || self.cancelled.load(Ordering::Relaxed)
    }

    pub(super) fn fail(&self, err: TakeError) {
        lock(&self.failure).get_or_insert(err);
        self.failed.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// What has failed so far, once; that it was cancelled.
    pub(super) fn check(&self) -> Result<(), TakeError> {
        match lock(&self.failure).take() {
            Some(err) => Err(err),
            None if self.cancelled.load(Ordering::Relaxed) => Err(TakeError::Cancelled),
            None => Ok(()),
        }
    }

    /// Copies `chunk` out to the front of `buffer`; `None` after an error.
    fn copy_out<'a>(&self, chunk: u64, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
        match self.view.copy(chunk, buffer) {
            Ok(len) => buffer.get(..len),
            Err(err) => {
                self.fail(TakeError::Memory(err));
                None
            }
        }
    }

    fn put(&self, chunk: u64, data: &[u8]) {
        if self.is_over() {
            return;
        }
        // A chunk that was written and holds what it held before is the parent's.
        let stored = match self.is_parents(chunk, data) {
            true => self.writer.same_as_parent(chunk),
            false => self.writer.put(chunk, data).map(drop),
        };
        if let Err(err) = stored {
            self.fail(TakeError::Write(err));
        }
    }

    fn is_parents(&self, chunk: u64, data: &[u8]) -> bool {
        let Some(parent) = &self.parent else { return false };
        let mut old = vec![0; data.len()];
        // A chunk of the parent's that cannot be read is stored: more than needed, and right.
        parent.read_exact_at(&mut old, chunk * CHUNK as u64).is_ok() && old == data
    }
}

/// Copies each pending chunk and takes it from the set.
pub(super) struct Round {
    copier: Arc<Copier>,
    pending: Arc<ChunkSet>,
    cursor: AtomicU64,
}

impl Round {
    /// Chunks that a member takes at a time.
    const SHARE: u64 = 16;

    pub(super) fn new(copier: &Arc<Copier>, pending: &Arc<ChunkSet>) -> Self {
        Self { copier: Arc::clone(copier), pending: Arc::clone(pending), cursor: AtomicU64::new(0) }
    }
}

impl Task for Round {
    fn work(&self) {
        let mut buffer = vec![0; CHUNK];
        loop {
            let first = self.cursor.fetch_add(Self::SHARE, Ordering::Relaxed);
            if first >= self.pending.len() {
                return;
            }
            for chunk in first..first + Self::SHARE {
                if self.copier.is_over() {
                    return;
                }
                if self.pending.remove(chunk) {
                    if let Some(data) = self.copier.copy_out(chunk, &mut buffer) {
                        self.copier.put(chunk, data);
                    }
                }
            }
        }
    }

    fn panicked(&self) {
        self.copier.fail(TakeError::Panicked);
    }
}

/// Chunks that were copied aside, one behind the other.
pub(super) struct Staged {
    copier: Arc<Copier>,
    chunks: Vec<u64>,
    bytes: Vec<u8>,
    cursor: AtomicU64,
}

impl Staged {
    /// `bytes` holds the chunks of `chunks` in order, each [`CHUNK`] bytes apart.
    pub(super) fn new(copier: &Arc<Copier>, chunks: Vec<u64>, bytes: Vec<u8>) -> Self {
        Self { copier: Arc::clone(copier), chunks, bytes, cursor: AtomicU64::new(0) }
    }
}

impl Task for Staged {
    fn work(&self) {
        loop {
            let at = self.cursor.fetch_add(1, Ordering::Relaxed) as usize;
            let Some(chunk) = self.chunks.get(at) else { return };
            let start = at * CHUNK;
            let Some(data) = self.bytes.get(start..start + self.copier.writer.chunk_len(*chunk)) else { return };
            self.copier.put(*chunk, data);
        }
    }

    fn panicked(&self) {
        self.copier.fail(TakeError::Panicked);
    }
}

// States of a unit.
const DONE: u8 = 0;
const PENDING: u8 = 1;
/// Somebody copies it out, and releases it afterwards.
const BUSY: u8 = 2;

/// A chunk that was copied out.
type Held = (u64, Vec<u8>);

/// Copies what is behind the barrier, unit by unit, those first to which somebody waits to write.
pub(super) struct Sweep {
    copier: Arc<Copier>,
    pending: Arc<ChunkSet>,
    barrier: Arc<Barrier>,
    /// Chunks in a unit: what is armed and released as one.
    unit: u64,
    states: Box<[AtomicU8]>,
    cursor: AtomicU64,
    held: Mutex<VecDeque<Held>>,
}

impl Sweep {
    pub(super) fn new(copier: &Arc<Copier>, pending: &Arc<ChunkSet>, barrier: &Arc<Barrier>, unit: u64) -> Self {
        let count = pending.len().div_ceil(unit);
        let state = |number: u64| {
            let inside = pending.next(number * unit).is_some_and(|chunk| chunk < (number + 1) * unit);
            AtomicU8::new(if inside { PENDING } else { DONE })
        };
        Self {
            copier: Arc::clone(copier),
            pending: Arc::clone(pending),
            barrier: Arc::clone(barrier),
            unit,
            states: (0..count).map(state).collect(),
            cursor: AtomicU64::new(0),
            held: Mutex::default(),
        }
    }

    fn claim(&self, number: u64) -> bool {
        let state = usize::try_from(number).ok().and_then(|at| self.states.get(at));
        state.is_some_and(|s| s.compare_exchange(PENDING, BUSY, Ordering::SeqCst, Ordering::SeqCst).is_ok())
    }

    fn chunks_of(&self, number: u64) -> Range<u64> {
        number * self.unit..((number + 1) * self.unit).min(self.pending.len())
    }

    /// Copies out what is pending of a unit that was claimed, and lets writers go on.
    fn take_unit(&self, number: u64, mut keep: impl FnMut(u64, &[u8])) {
        let mut buffer = [0; CHUNK];
        for chunk in self.chunks_of(number) {
            if self.pending.remove(chunk) {
                if let Some(data) = self.copier.copy_out(chunk, &mut buffer) {
                    keep(chunk, data);
                }
            }
        }
        if let Some(state) = self.states.get(number as usize) {
            state.store(DONE, Ordering::SeqCst);
        }
        self.release(number);
    }

    fn release(&self, number: u64) {
        for range in self.copier.view.host_ranges(self.chunks_of(number)) {
            if let Err(err) = self.barrier.release(range) {
                self.copier.fail(TakeError::Barrier(err));
            }
        }
    }

    /// Serves whoever waits to write: their units are copied out at once.
    pub(super) fn serve_waiting(&self) -> io::Result<()> {
        self.barrier.waiting(|address| {
            let Some(chunk) = self.copier.view.chunk_at(address) else { return };
            let number = chunk / self.unit;
            if self.claim(number) {
                self.take_unit(number, |chunk, data| {
                    let mut held = lock(&self.held);
                    if (held.len() + 1) * CHUNK <= STAGED_BYTES {
                        held.push_back((chunk, data.to_vec()));
                    } else {
                        // Too much waits: the writer waits until this is compressed too.
                        drop(held);
                        self.copier.put(chunk, data);
                    }
                });
            } else if self.states.get(number as usize).is_none_or(|state| state.load(Ordering::SeqCst) == DONE) {
                // Armed beside a unit that was pending, or copied since.
                self.release(number);
            }
        })
    }

    /// Compresses what was copied out for waiting writers.
    pub(super) fn put_held(&self) {
        loop {
            // The lock is let go of before the work.
            let next = lock(&self.held).pop_front();
            let Some((chunk, data)) = next else { return };
            self.copier.put(chunk, &data);
        }
    }
}

impl Task for Sweep {
    fn work(&self) {
        let mut copied: Vec<u8> = Vec::new();
        let mut chunks: Vec<(u64, Range<usize>)> = Vec::new();
        while !self.copier.is_over() {
            self.put_held();
            let number = self.cursor.fetch_add(1, Ordering::Relaxed);
            if number as usize >= self.states.len() {
                return;
            }
            if !self.claim(number) {
                continue;
            }
            copied.clear();
            chunks.clear();
            self.take_unit(number, |chunk, data| {
                chunks.push((chunk, copied.len()..copied.len() + data.len()));
                copied.extend_from_slice(data);
            });
            for (chunk, range) in &chunks {
                if let Some(data) = copied.get(range.clone()) {
                    self.copier.put(*chunk, data);
                }
            }
        }
    }

    fn panicked(&self) {
        self.copier.fail(TakeError::Panicked);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Ram;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn chunks_that_are_as_in_the_parent_are_left_out() {
        let ram = Ram::map(32 << 20).unwrap();
        let view = View::new(&ram);
        let parent = tempfile::tempfile().unwrap();
        parent.set_len(ram.size()).unwrap();
        parent.write_all_at(&[7; 3], 0).unwrap();
        ram.memory().write_slice(&[7; 3], GuestAddress(0)).unwrap();
        ram.memory().write_slice(&[8; 3], GuestAddress(CHUNK as u64)).unwrap();
        let digest = format!("sha256:{:064}", 1);
        let writer = SnapshotWriter::create(tempfile::tempfile().unwrap(), ram.size(), Some(digest)).unwrap();
        let copier = Arc::new(Copier::new(view.clone(), writer, Some(Arc::new(parent)), Arc::default()));
        let pending = Arc::new(ChunkSet::new(view.chunks()));
        pending.insert_range(0..3);
        Round::new(&copier, &pending).work();
        copier.check().unwrap();
        assert_eq!(pending.count(), 0);
        let copier = Arc::into_inner(copier).unwrap();
        let summary = copier.writer.finish(1, ovms_state::Fingerprint::default(), &[]).unwrap();
        assert_eq!((summary.chunks, summary.content), (1, CHUNK as u64));
    }

    #[test]
    fn cancelled_work_ends_and_says_so() {
        let ram = Ram::map(32 << 20).unwrap();
        let view = View::new(&ram);
        let writer = SnapshotWriter::create(tempfile::tempfile().unwrap(), ram.size(), None).unwrap();
        let copier = Arc::new(Copier::new(view.clone(), writer, None, Arc::new(AtomicBool::new(true))));
        let pending = Arc::new(ChunkSet::new(view.chunks()));
        pending.insert_range(0..view.chunks());
        Round::new(&copier, &pending).work();
        assert_eq!(pending.count(), view.chunks());
        assert!(matches!(copier.check(), Err(TakeError::Cancelled)));
    }
}
