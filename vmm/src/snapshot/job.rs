//! The thread that takes snapshots, one at a time. See the module above for the whole picture.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::AtomicBool;
use std::sync::{mpsc, Arc};

use ovms_disk::{Stack, TopFiles};
use ovms_proto::control::SnapshotReport;
use ovms_state::{Fingerprint, Section, SnapshotWriter, CHUNK};

use super::copy::{Copier, Round, Staged, Sweep};
use super::crew::{Crew, Task};
use super::plan::{Limits, Next, Plan};
use super::tracker::{Held, Host, Tracker};
use super::{Notice, TakeError};
use crate::mailbox::{Mail, Sender};
use crate::report;
use crate::wiring::FreezeError;

/// What the owner hands over at the instant.
pub(super) struct Taken {
    pub fingerprint: Fingerprint,
    pub sections: Vec<Section>,
    pub held: Held,
    /// Chunks that were not copied before.
    pub left: u64,
}

/// One snapshot.
pub(super) struct Job {
    pub blob: File,
    pub parent: Option<String>,
    pub vcpus: u32,
    pub disks: Vec<Arc<Stack>>,
    pub tracker: Arc<Tracker>,
    pub instant: mpsc::Receiver<Taken>,
    pub cancelled: Arc<AtomicBool>,
    pub standing: bool,
}

/// What the thread is told to do.
pub(super) enum Work {
    Take(Box<Job>),
    Freeze(Arc<Stack>, TopFiles),
    Flush(Vec<Arc<Stack>>),
}

/// The thread's own.
pub(super) struct Taker {
    pub crew: Crew,
    pub host: Host,
    pub mail: Sender,
}

impl Taker {
    /// Serves until nobody can ask any more.
    pub(super) fn serve(&self, jobs: &mpsc::Receiver<Work>) {
        while let Ok(work) = jobs.recv() {
            match work {
                Work::Take(job) => {
                    let tracker = Arc::clone(&job.tracker);
                    let result = guarded(|| self.take(*job));
                    tracker.end();
                    self.tell(Notice::Done(result));
                }
                Work::Freeze(disk, top) => {
                    self.tell(Notice::Frozen(guarded(|| disk.freeze(top).map_err(FreezeError::from))));
                }
                Work::Flush(disks) => {
                    for disk in disks.iter().filter(|disk| !disk.is_read_only()) {
                        if let Err(err) = guarded(|| disk.flush().map_err(TakeError::from)) {
                            tracing::error!("{err}");
                        }
                    }
                    self.tell(Notice::Flushed);
                }
            }
        }
    }

    fn tell(&self, notice: Notice) {
        self.mail.send(Mail::Snapshot(notice));
    }

    fn take(&self, job: Job) -> Result<SnapshotReport, TakeError> {
        let Job { blob, parent, vcpus, disks, tracker, instant, cancelled, standing } = job;
        let whole = parent.is_none();
        let writer = SnapshotWriter::create(blob, tracker.view().ram().size(), parent)?;
        let known = self.host.memory.as_ref().filter(|_| !whole).map(Arc::clone);
        let copier = Arc::new(Copier::new(tracker.view().clone(), writer, known, cancelled));
        // What is flushed now need not be after the instant.
        disks.iter().try_for_each(|disk| disk.flush())?;
        tracker.begin(&self.host, whole)?;
        let rounds = self.copy_before(&tracker, &copier, standing)?;
        self.tell(Notice::Ready);
        let Taken { fingerprint, sections, held, left } = instant.recv().map_err(|_| TakeError::Cancelled)?;
        match (held, tracker.barrier()) {
            (Held::Barrier, Some(barrier)) => self.sweep(&tracker, &copier, &barrier)?,
            (Held::Staged, _) => {
                let (chunks, bytes) = tracker.take_staged();
                self.work(Arc::new(Staged::new(&copier, chunks, bytes)), standing)?;
            }
            _ => {
                let standing = standing || held == Held::Standing;
                self.work(Arc::new(Round::new(&copier, tracker.pending())), standing)?;
            }
        }
        copier.check()?;
        if held == Held::Standing {
            self.tell(Notice::Copied);
        }
        tracker.end();
        disks.iter().try_for_each(|disk| disk.flush_frozen())?;
        let copier = Arc::into_inner(copier).ok_or(TakeError::Panicked)?;
        let summary = copier.writer.finish(vcpus, fingerprint, &sections)?;
        Ok(SnapshotReport {
            // The owner knows.
            stood_micros: 0,
            bytes: summary.bytes,
            content: summary.content,
            rounds,
            left_at_instant: left * CHUNK as u64,
            barrier: held == Held::Barrier,
        })
    }

    /// Copies in rounds until the instant may come; returns how many there were.
    fn copy_before(&self, tracker: &Tracker, copier: &Arc<Copier>, standing: bool) -> Result<u32, TakeError> {
        let barrier = tracker.make_ready(&self.host);
        let limits = if barrier { Limits::BARRIER } else { Limits::STANDING };
        let mut plan = Plan::new(limits, tracker.pending().count());
        loop {
            self.work(Arc::new(Round::new(copier, tracker.pending())), standing)?;
            copier.check()?;
            tracker.look()?;
            let left = tracker.pending().count();
            tracing::debug!(round = plan.rounds(), left, "copied a round");
            if plan.round_ended(left) == Next::Instant {
                return Ok(plan.rounds());
            }
        }
    }

    /// Copies what is behind the barrier, and serves who waits there.
    fn sweep(
        &self,
        tracker: &Tracker,
        copier: &Arc<Copier>,
        barrier: &Arc<super::barrier::Barrier>,
    ) -> Result<(), TakeError> {
        let sweep = Arc::new(Sweep::new(copier, tracker.pending(), barrier, tracker.unit()));
        let task: Arc<dyn Task> = Arc::clone(&sweep) as _;
        let mut busy = self.crew.give(&task);
        while busy > 0 {
            wait_readable(&[barrier.as_raw_fd(), self.crew.as_raw_fd()]).map_err(TakeError::Barrier)?;
            sweep.serve_waiting().map_err(TakeError::Barrier)?;
            busy = busy.saturating_sub(self.crew.finished());
        }
        sweep.put_held();
        Ok(())
    }

    /// Has the crew do `task`. It leaves one processor to the guest; while that stands, this thread takes a share.
    fn work(&self, task: Arc<dyn Task>, standing: bool) -> Result<(), TakeError> {
        let mut busy = self.crew.give(&task);
        if busy == 0 {
            return Err(TakeError::Panicked);
        }
        if standing && catch_unwind(AssertUnwindSafe(|| task.work())).is_err() {
            task.panicked();
        }
        drop(task);
        while busy > 0 {
            wait_readable(&[self.crew.as_raw_fd()]).map_err(TakeError::Barrier)?;
            busy = busy.saturating_sub(self.crew.finished());
        }
        Ok(())
    }
}

/// Does `work`; whatever comes of it, the thread lives.
fn guarded<T, E: std::error::Error + 'static>(work: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|err| report::chain(&err)),
        Err(_) => Err(report::chain(&TakeError::Panicked)),
    }
}

fn wait_readable(fds: &[RawFd]) -> io::Result<()> {
    let mut fds: Vec<_> = fds.iter().map(|fd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 }).collect();
    loop {
        // SAFETY: `fds` is an exclusive slice for as long as the call lasts; its length is passed along.
        if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) } >= 0 {
            return Ok(());
        }
        let err = io::Error::last_os_error();
        if err.kind() != io::ErrorKind::Interrupted {
            return Err(err);
        }
    }
}
