//! What is still to be copied: known to the thread that takes the snapshot and, at the instant, to the machine's owner.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ovms_state::CHUNK;

use super::barrier::Barrier;
use super::chunks::ChunkSet;
use super::log::{Log, LogError};
use super::pagemap;
use super::view::View;
use super::TakeError;
use crate::kvm::Vm;
use crate::memory::Ram;

/// Bytes that are copied aside at most while the guest stands: 3 to 5 ms.
const STAGING_BYTES: usize = 24 << 20;
/// Chunks of a huge page: what is armed and released as one where memory is huge, so that pages stay huge.
const HUGE_UNIT: u64 = 32;

/// What the host lends for snapshots, opened before the jail closed.
#[derive(Debug, Default)]
pub struct Host {
    /// `/proc/self/pagemap`; none: all of memory counts as touched.
    pub pagemap: Option<File>,
    /// `/dev/userfaultfd`; none: no barrier.
    pub userfault: Option<OwnedFd>,
    /// The memory file of the snapshot that the machine was restored from.
    pub memory: Option<Arc<File>>,
}

/// What became of the memory that was not copied before the instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// The barrier holds writers back from it: the guest may go on.
    Barrier,
    /// It was copied aside: the guest may go on.
    Staged,
    /// The guest must stand until it is copied.
    Standing,
}

/// Room for what is copied aside.
#[derive(Default)]
struct Staging {
    chunks: Vec<u64>,
    bytes: Vec<u8>,
}

/// The state of one snapshot's copying.
pub struct Tracker {
    view: View,
    log: Log,
    pending: Arc<ChunkSet>,
    unit: u64,
    is_on: AtomicBool,
    barrier: Mutex<Option<Arc<Barrier>>>,
    staging: Mutex<Staging>,
}

impl Tracker {
    pub(super) fn new(vm: Arc<Vm>, ram: &Ram, restored: bool) -> Self {
        let view = View::new(ram);
        Self {
            log: Log::new(vm, view.clone()),
            pending: Arc::new(ChunkSet::new(view.chunks())),
            view,
            unit: if restored { 1 } else { HUGE_UNIT },
            is_on: AtomicBool::new(false),
            barrier: Mutex::default(),
            staging: Mutex::default(),
        }
    }

    pub(super) fn view(&self) -> &View {
        &self.view
    }

    pub(super) fn pending(&self) -> &Arc<ChunkSet> {
        &self.pending
    }

    pub(super) fn unit(&self) -> u64 {
        self.unit
    }

    pub(super) fn barrier(&self) -> Option<Arc<Barrier>> {
        lock(&self.barrier).clone()
    }

    /// What was copied aside.
    pub(super) fn take_staged(&self) -> (Vec<u64>, Vec<u8>) {
        let Staging { chunks, bytes } = std::mem::take(&mut *lock(&self.staging));
        (chunks, bytes)
    }

    /// Begins to track writes, and finds what there is to copy: all that is the machine's own, and with `whole` what it
    /// shares with the file that it was restored from.
    pub(super) fn begin(&self, host: &Host, whole: bool) -> Result<(), TakeError> {
        self.view.ram().keep_discarded(true);
        self.is_on.store(true, Ordering::SeqCst);
        self.log.start()?;
        // After the log began: what is touched later is in the log.
        match &host.pagemap {
            Some(file) => {
                for region in self.view.regions() {
                    pagemap::own(file, region, &self.pending).map_err(TakeError::PageMap)?;
                }
            }
            None => self.pending.insert_range(0..self.view.chunks()),
        }
        if let (true, Some(file)) = (whole, &host.memory) {
            pagemap::data_of(file, 0..self.view.chunks(), &self.pending).map_err(TakeError::PageMap)?;
        }
        Ok(())
    }

    /// Chunks that are not copied.
    pub(super) fn left(&self) -> u64 {
        self.pending.count() + lock(&self.staging).chunks.len() as u64
    }

    /// Makes ready for the instant: a barrier, or room to copy aside. `true`: there is a barrier.
    pub(super) fn make_ready(&self, host: &Host) -> bool {
        let registered = host.userfault.as_ref().map(|device| Barrier::register(device, &self.view));
        match registered {
            Some(Ok(barrier)) => {
                *lock(&self.barrier) = Some(Arc::new(barrier));
                return true;
            }
            Some(Err(err)) => tracing::debug!(%err, "no barrier under this memory"),
            None => tracing::debug!("no barrier without userfaultfd"),
        }
        // Written to, so that the guest need not wait for the host to find it.
        let room = STAGING_BYTES.min(self.view.ram().size() as usize);
        lock(&self.staging).bytes = vec![0xff; room];
        false
    }

    /// Adds what was written since the last look.
    pub(super) fn look(&self) -> Result<(), LogError> {
        self.log.take(&self.pending)
    }

    /// The instant, for memory: nobody writes. Whatever is still pending is held as it is now.
    ///
    /// # Errors
    /// KVM does not say what was written.
    pub(super) fn close_in(&self) -> Result<Held, LogError> {
        self.log.take_last(&self.pending)?;
        if let Some(barrier) = self.barrier() {
            match self.arm(&barrier) {
                Ok(()) => return Ok(Held::Barrier),
                Err(err) => tracing::warn!(%err, "the barrier cannot be armed: the guest stands until it is copied"),
            }
        }
        Ok(self.stage())
    }

    fn arm(&self, barrier: &Barrier) -> io::Result<()> {
        // Fewer calls are worth more than a few pages that nobody waits for. Runs stay apart when they are widened to
        // whole units.
        for run in self.pending.runs(self.unit * 4) {
            let start = run.start / self.unit * self.unit;
            let end = run.end.next_multiple_of(self.unit).min(self.view.chunks());
            for range in self.view.host_ranges(start..end) {
                barrier.arm(range)?;
            }
        }
        Ok(())
    }

    fn stage(&self) -> Held {
        let mut staging = lock(&self.staging);
        let Staging { chunks, bytes } = &mut *staging;
        if self.pending.count() as usize > bytes.len() / CHUNK {
            return Held::Standing;
        }
        let mut from = 0;
        for part in bytes.chunks_exact_mut(CHUNK) {
            let Some(chunk) = self.pending.next(from) else { break };
            if self.view.copy(chunk, part).is_err() {
                // It stays pending, and is tried again with an error that somebody hears of.
                return Held::Standing;
            }
            chunks.push(chunk);
            from = chunk + 1;
        }
        for chunk in chunks.iter() {
            self.pending.remove(*chunk);
        }
        Held::Staged
    }

    /// Ends all tracking; who waits at the barrier goes on once nobody else refers to it.
    pub(super) fn end(&self) {
        *lock(&self.barrier) = None;
        *lock(&self.staging) = Staging::default();
        if self.is_on.swap(false, Ordering::SeqCst) {
            self.log.stop();
            self.view.ram().keep_discarded(false);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
