//! Taking RAM snapshots of a machine that runs on.
//!
//! ```text
//!  owner                         taker thread                      crew (copy0, copy1, …)
//!    Command::Snapshot ──Job──>  log on, find what is there
//!    serves commands             rounds ─────────────────────────> copy, compress, write
//!    instant()         <──Ready─ little is left
//!      devices idle, processors stand, last look, state saved,
//!      tops frozen, barrier armed, processors go on
//!                      ──Taken─> sweep: who waits first ─────────> copy, release, compress, write
//!    reply             <──Done── log off, tops durable, blob complete
//! ```
//!
//! What is in the blob is the machine at the instant. What the guest writes before is copied again ([`log`]); what it
//! writes afterwards waits until the old content is copied ([`barrier`]), or the old content was copied aside while it
//! stood, or it stands a little longer ([`tracker::Held`]). ADR 0012 says why it is so.
//!
//! The taker and its crew are started with the machine, since the walls forbid threads later. They sleep otherwise, but for
//! the one chore that the taker does beside the machine's making ([`Threads::first`]).

mod barrier;
mod chunks;
mod copy;
mod crew;
mod job;
mod log;
mod pagemap;
mod plan;
mod tracker;
mod view;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{mpsc, Arc};
use std::thread::Builder;

use ovms_disk::{Stack, TopFiles};
use ovms_proto::control::SnapshotReport;
use ovms_state::{Fingerprint, Section};
use thiserror::Error;
use vm_memory::GuestMemoryError;

use crate::kvm::Vm;
use crate::mailbox::Sender;
use crate::memory::Ram;
use crew::Crew;
use job::{Job, Taken, Taker, Work};
use log::LogError;
use tracker::Tracker;

pub use tracker::{Held, Host};

/// Threads that copy, at most: four compress faster than a disk takes it.
const MAX_CREW: usize = 4;
/// Bytes of stack of the taker; it copies one chunk at a time there.
const STACK_BYTES: usize = 512 << 10;

/// Why a snapshot comes to nothing. The machine goes on.
#[derive(Debug, Error)]
pub enum TakeError {
    /// Somebody wanted it no more.
    #[error("the snapshot was cancelled")]
    Cancelled,
    /// The blob cannot be written.
    #[error("the RAM snapshot cannot be written")]
    Write(#[from] ovms_state::SnapshotError),
    /// The disks cannot be flushed.
    #[error("what the guest wrote to its disks cannot be made durable")]
    Disk(#[from] ovms_disk::Error),
    /// KVM does not say what was written.
    #[error("the guest's writes cannot be followed")]
    #[allow(private_interfaces, reason = "printed, never matched")]
    Log(#[from] LogError),
    /// The kernel does not say which pages there are.
    #[error("the machine's page table cannot be read")]
    PageMap(#[source] io::Error),
    /// Guest memory cannot be read: a defect of ours.
    #[error("the guest's memory cannot be read")]
    Memory(#[source] GuestMemoryError),
    /// The barrier fails.
    #[error("the guest's writes cannot be held back")]
    Barrier(#[source] io::Error),
    /// A defect of ours.
    #[error("the thread that takes snapshots panicked")]
    Panicked,
}

/// What the owner hears of a snapshot that is being taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Notice {
    /// The instant may come.
    Ready,
    /// What was left is copied: a guest that stands for it may go on.
    Copied,
    /// It is over; the owner fills in how long the guest stood.
    Done(Result<SnapshotReport, String>),
    /// The disk of [`Snapshots::freeze`] is frozen, or is as it was.
    Frozen(Result<(), String>),
    /// The disks of [`Snapshots::flush`] are flushed, as far as they can be.
    Flushed,
}

/// What a snapshot is to be made of.
pub struct Order {
    /// The blob's file, empty.
    pub blob: File,
    /// Digest of the blob that the machine was restored from, for a diff.
    pub parent: Option<String>,
    /// Processors of the machine.
    pub vcpus: u32,
    /// The disks whose tops are frozen at the instant.
    pub disks: Vec<Arc<Stack>>,
    /// The guest stands anyway, so its processors are free for the copy.
    pub standing: bool,
}

/// What a thread does once, before it is behind its filter.
pub type Chore = Box<dyn FnOnce() + Send>;

/// The threads that will take snapshots of one machine.
pub struct Threads {
    jobs: mpsc::Sender<Work>,
    first: mpsc::Sender<Chore>,
    ready: mpsc::Receiver<io::Result<()>>,
    restored: bool,
}

impl Threads {
    /// Starts them; after [`Threads::first`] each calls `enter`, which puts it behind its filter.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(host: Host, mail: Sender, enter: Arc<dyn Fn() + Send + Sync>) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let (first, chore) = mpsc::channel::<Chore>();
        let (is_ready, ready) = mpsc::channel();
        let restored = host.memory.is_some();
        // It starts the crew itself, beside the rest of the machine's start.
        Builder::new().name("snapshot".into()).stack_size(STACK_BYTES).spawn(move || {
            if let Ok(chore) = chore.recv() {
                chore();
            }
            let crew = Crew::start(crew_size(), &enter);
            enter();
            match crew {
                Ok(crew) => {
                    let _ = is_ready.send(Ok(()));
                    Taker { crew, host, mail }.serve(&queue);
                }
                Err(err) => {
                    let _ = is_ready.send(Err(err));
                }
            }
        })?;
        Ok(Self { jobs, first, ready, restored })
    }

    /// How they are given what is to be done beside the machine's making: they wait for that, and take one.
    pub fn first(&self) -> impl Fn(Chore) + 'static {
        let first = self.first.clone();
        // The thread lives as long as the process.
        move |chore| drop(first.send(chore))
    }
}

/// Takes snapshots of one machine.
pub struct Snapshots {
    threads: Threads,
    vm: Arc<Vm>,
    ram: Ram,
}

impl Snapshots {
    /// Snapshots of the machine that `vm` and `ram` are of.
    pub fn new(threads: Threads, vm: Arc<Vm>, ram: Ram) -> Self {
        Self { threads, vm, ram }
    }

    /// Waits until the threads stand behind their walls: before a guest runs.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn wait_ready(&self) -> io::Result<()> {
        self.threads.ready.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }

    /// Whether the machine was restored from a snapshot that a diff can be made on.
    pub fn has_parent(&self) -> bool {
        self.threads.restored
    }

    /// Begins to take one. The one before must be over.
    pub fn begin(&self, order: Order) -> Taking {
        let Order { blob, parent, vcpus, disks, standing } = order;
        let tracker = Arc::new(Tracker::new(Arc::clone(&self.vm), &self.ram, self.threads.restored));
        let (taken, instant) = mpsc::channel();
        let cancelled = Arc::new(AtomicBool::new(false));
        let job = Job {
            blob,
            parent,
            vcpus,
            disks,
            tracker: Arc::clone(&tracker),
            instant,
            cancelled: Arc::clone(&cancelled),
            standing,
        };
        // The thread lives as long as the process; were it gone, nobody would ever be ready.
        let _ = self.threads.jobs.send(Work::Take(Box::new(job)));
        Taking { tracker, taken: Some(taken), cancelled }
    }

    /// Freezes a disk, after all that was begun before; [`Notice::Frozen`] tells. Here, since its thread may wait.
    /// `false`: there is no thread any more.
    #[must_use]
    pub fn freeze(&self, disk: Arc<Stack>, top: TopFiles) -> bool {
        self.threads.jobs.send(Work::Freeze(disk, top)).is_ok()
    }

    /// Flushes the disks that the guest may write, after all that was begun before; [`Notice::Flushed`] tells. `false`:
    /// there is no thread any more.
    #[must_use]
    pub fn flush(&self, disks: Vec<Arc<Stack>>) -> bool {
        self.threads.jobs.send(Work::Flush(disks)).is_ok()
    }
}

/// A snapshot that is being taken, as the owner sees it.
pub struct Taking {
    tracker: Arc<Tracker>,
    taken: Option<mpsc::Sender<Taken>>,
    cancelled: Arc<AtomicBool>,
}

impl Taking {
    /// The instant, for memory. Nobody writes to it.
    ///
    /// # Errors
    /// [`TakeError::Log`].
    pub fn hold_memory(&self) -> Result<(Held, u64), TakeError> {
        let held = self.tracker.close_in()?;
        Ok((held, self.tracker.left()))
    }

    /// The instant has passed; what was saved goes into the blob.
    pub fn took(&mut self, fingerprint: Fingerprint, sections: Vec<Section>, (held, left): (Held, u64)) {
        if let Some(taken) = self.taken.take() {
            // If the taker has failed meanwhile, its notice is on its way.
            let _ = taken.send(Taken { fingerprint, sections, held, left });
        }
    }

    /// Wants it no more. Its notice comes as soon as the threads have noticed.
    pub fn cancel(&mut self) {
        self.cancelled.store(true, Ordering::SeqCst);
        self.taken = None;
    }

    /// Whether [`Taking::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }
}

/// One for each processor that this process may use but one, which is left to the guest, up to [`MAX_CREW`]. Every
/// member is a thread that each start pays for.
fn crew_size() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| processors.get() - 1).clamp(1, MAX_CREW)
}
