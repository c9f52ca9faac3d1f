//! Freezing a machine's disk, and taking its RAM snapshot.
//!
//! ```text
//!  new top ──record──> Snapshot ──> rounds of copying ──> the instant ──────────────────> the blob is complete
//!  (empty, locked)     │ refused or cancelled: the new     │ vCPUs saved, top frozen       │ disk.qcow2, digests,
//!                      └ top leaves the record             └                               └ snapshot.json: complete
//! ```
//! Whatever fails, the machine goes on, the directory is empty again, and the bundle's record says what is frozen.

mod writeback;

use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ovms_bundle::{
    Disk, NewTop, Record, SnapshotDir, SnapshotDisk, SnapshotRam, SnapshotRecord, SNAPSHOT_RAM, SNAPSHOT_VERSION,
};
use ovms_proto::control::{Answer, Command, SnapshotCommand, SnapshotReport};
use ovms_state::Blob;

use self::writeback::Writeback;
use crate::error::{Error, Kind, Result};
use crate::launch::bundle_kind;
use crate::machine::{answer_to, gone, refusal, Machine, State};
use crate::shared::{Inner, Shared};

/// How often somebody who waits looks whether he is still wanted.
const LOOK: Duration = Duration::from_millis(50);
/// How often he says that it goes on.
const TELL: Duration = Duration::from_secs(1);
/// How long a second one who wants the tops changed waits for the first.
const TURN: Duration = Duration::from_secs(60);

/// How a RAM snapshot is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotOptions {
    /// Write all of the memory, even if the machine was resumed from a RAM snapshot on which this one could be a diff.
    pub full: bool,
    /// Leave the vCPUs standing after the instant. If the snapshot fails they go on.
    pub stop: bool,
}

impl Machine {
    /// Freezes the disk's top and stacks a new one on it: what was written until now lies in the plain files that the
    /// bundle's record lists as frozen, and never changes again. No change if the guest has no disk that it may write.
    ///
    /// # Errors
    /// `NotFound` if it is gone, `FailedPrecondition` if its disk was frozen too often or a snapshot takes too long,
    /// `Unavailable` if the VMM hangs, `Internal`. The machine goes on as it was.
    pub fn freeze_disk(&self) -> Result<()> {
        let inner = &self.inner;
        if !inner.origin.writable {
            return Ok(());
        }
        let _turn = Turn::wait(inner)?;
        let Some(top) = new_top(inner)? else { return Ok(()) };
        let answer = self.ask(&Command::FreezeDisk { disk: 0 }, &[top.files.data.as_fd(), top.files.map.as_fd()]);
        if let Ok(Err(_)) = answer {
            take_back(inner, top);
        }
        answer?.map_err(refusal)?;
        inner.save();
        Ok(())
    }

    /// Takes a RAM snapshot into `dir`, an existing empty directory; [`SnapshotRecord`] says what is there afterwards. The
    /// guest stands still for milliseconds and goes on while the rest is written. `progress` gets a sentence now and then;
    /// `cancelled` is asked all the time.
    ///
    /// # Errors
    /// `NotFound` if it is gone or there is no such directory, `FailedPrecondition` if it was never started, a snapshot is
    /// being taken already, the directory is not empty, the disk was frozen too often or `cancelled` says so,
    /// `Unavailable` if the VMM hangs, `Internal`. The machine goes on as it was and the directory is empty.
    pub fn snapshot(
        &self,
        dir: &Path,
        options: SnapshotOptions,
        progress: &mut dyn FnMut(&str),
        cancelled: &(dyn Fn() -> bool + Sync),
    ) -> Result<SnapshotRecord> {
        self.started()?;
        let _one = One::take(&self.inner)?;
        let ran = self.inner.shared().state == State::Running;
        let taken =
            Taking { machine: self, dir, options, progress, cancelled, began: Instant::now(), settled: false }.take();
        if taken.is_err() && options.stop && ran && self.inner.shared().taken.is_some() {
            if let Err(err) = self.request(Command::Resume) {
                tracing::warn!(
                    id = self.inner.id,
                    err = err.chain(),
                    "the machine stays paused after a failed snapshot"
                );
            }
        }
        self.inner.save();
        taken
    }
}

/// One snapshot.
struct Taking<'a> {
    machine: &'a Machine,
    dir: &'a Path,
    options: SnapshotOptions,
    progress: &'a mut dyn FnMut(&str),
    cancelled: &'a (dyn Fn() -> bool + Sync),
    began: Instant,
    /// The VMM has given its answer.
    settled: bool,
}

/// What comes of a command that is under way.
enum Word {
    /// Its instant has passed.
    Taken(u64),
    /// Its answer.
    Answer(std::result::Result<Answer, String>),
    /// The machine is gone.
    Gone,
    /// Nobody wants it any more.
    Cancelled,
}

impl Taking<'_> {
    fn take(mut self) -> Result<SnapshotRecord> {
        let inner = &self.machine.inner;
        let dir = SnapshotDir::begin(self.dir).map_err(bundle_error)?;
        let blob = dir.create_ram().map_err(bundle_error)?;
        let ram = inner.origin.ram.as_ref().filter(|_| !self.options.full);
        let command = SnapshotCommand { parent: ram.map(|ram| ram.digest.clone()), stop: self.options.stop };

        let turn = Turn::wait(inner)?;
        let top = if inner.origin.writable { new_top(inner)? } else { None };
        let record = Record::load(&inner.origin.bundle).map_err(bundle_error)?;
        let mut fds = vec![blob.as_fd()];
        fds.extend(top.iter().flat_map(|top| [top.files.data.as_fd(), top.files.map.as_fd()]));
        inner.shared().taken = None;
        let sent = self.machine.send(&Command::Snapshot(command), &fds);
        let writeback = Writeback::of(&blob);
        let instant = sent.and_then(|id| self.instant(id).map(|stood| (id, stood)));
        if let (Err(_), Some(top)) = (&instant, top) {
            // Where the VMM gave no answer nobody knows, and a new top that is empty does no harm.
            if self.settled && inner.shared().taken.is_none() {
                take_back(inner, top);
            }
        }
        let (id, stood_micros) = instant?;
        (self.progress)(&format!("the guest stood still for {stood_micros} µs"));
        let report = self.completion(id)?;
        drop((turn, writeback));

        (self.progress)("the memory is written; disk and digests follow");
        let cancelled = self.cancelled;
        let (ram, disk) = thread::scope(|scope| {
            let ram = scope.spawn(|| dir.seal_ram(&blob, cancelled));
            let disk = record
                .disk
                .clone()
                .map(|disk| frozen(disk, inner))
                .map(|disk| dir.write_disk(&disk, cancelled))
                .transpose();
            (ram.join(), disk)
        });
        let ram = ram.unwrap_or(Err(ovms_bundle::Error::Cancelled)).map_err(bundle_error)?;
        let record = self.describe(ram, record, &report, disk.map_err(bundle_error)?)?;
        dir.finish(&record).map_err(bundle_error)?;
        let elapsed = self.began.elapsed();
        tracing::info!(id = inner.id, ?report, ?elapsed, digest = record.ram.digest, "a RAM snapshot was taken");
        Ok(record)
    }

    /// Waits until the guest's state is saved and the top frozen.
    fn instant(&mut self, id: u64) -> Result<u64> {
        match self.next(id, true) {
            Word::Taken(stood_micros) => Ok(stood_micros),
            Word::Answer(Err(message)) => Err(refusal(message)),
            Word::Answer(Ok(_)) => Err(protocol(&self.machine.inner, "completed a snapshot before its instant")),
            Word::Gone => Err(gone(&self.machine.inner)),
            Word::Cancelled => {
                self.give_up(id);
                Err(was_cancelled())
            }
        }
    }

    /// Waits until the blob is complete.
    fn completion(&mut self, id: u64) -> Result<SnapshotReport> {
        match self.next(id, false) {
            Word::Answer(Ok(Answer::Snapshot(report))) => Ok(report),
            Word::Answer(Err(message)) => Err(refusal(message)),
            Word::Answer(Ok(_)) | Word::Taken(_) => Err(protocol(&self.machine.inner, "answered something else")),
            Word::Gone => Err(gone(&self.machine.inner)),
            Word::Cancelled => {
                self.give_up(id);
                Err(was_cancelled())
            }
        }
    }

    fn next(&mut self, id: u64, before_instant: bool) -> Word {
        let word = |shared: &mut Shared| match shared.taken.filter(|_| before_instant) {
            Some(stood_micros) => Some(Word::Taken(stood_micros)),
            None => answer_to(shared, id).map(|answer| answer.map_or(Word::Gone, Word::Answer)),
        };
        let mut told = Instant::now();
        loop {
            if let Some(word) = self.machine.inner.wait_for(LOOK, word) {
                self.settled = matches!(word, Word::Answer(_));
                return word;
            }
            if (self.cancelled)() {
                return Word::Cancelled;
            }
            if told.elapsed() >= TELL {
                told = Instant::now();
                let size = std::fs::metadata(self.dir.join(SNAPSHOT_RAM)).map_or(0, |meta| meta.len());
                (self.progress)(&format!("{} MiB of memory written", size >> 20));
            }
        }
    }

    /// Has the VMM give the snapshot up, and waits until it has.
    fn give_up(&mut self, id: u64) {
        let (machine, inner) = (self.machine, &self.machine.inner);
        let cancel = Command::CancelSnapshot;
        let over = machine.request(cancel.clone()).and_then(|_| machine.answer(id, &cancel));
        match over {
            Ok(answer) => self.settled = answer.is_some(),
            Err(err) => tracing::warn!(id = inner.id, err = err.chain(), "a snapshot could not be cancelled"),
        }
    }

    /// What was taken, from the files alone: the VMM is in its guest's reach.
    fn describe(
        &self,
        (digest, size): (String, u64),
        record: Record,
        report: &SnapshotReport,
        disk: Option<SnapshotDisk>,
    ) -> Result<SnapshotRecord> {
        let inner = &self.machine.inner;
        let unusable = || "the RAM snapshot that the VMM wrote cannot be used";
        let blob = std::fs::File::open(self.dir.join(SNAPSHOT_RAM)).map_err(Error::io(unusable()))?;
        let blob = Blob::open(blob).map_err(|err| Error::new(Kind::Internal, unusable()).because(err))?;
        let head = blob.head();
        let ram = inner.origin.ram.as_ref().filter(|_| head.parent.is_some());
        if head.memory != inner.memory || ram.map(|ram| &ram.digest) != head.parent.as_ref() {
            return Err(Error::new(Kind::Internal, unusable()).because("it is of another machine"));
        }
        let parents = ram.into_iter().flat_map(|ram| std::iter::once(&ram.digest).chain(&ram.parents)).cloned();
        let ram = SnapshotRam {
            digest,
            size,
            parents: parents.collect(),
            vcpus: head.vcpus,
            memory: head.memory,
            stood_micros: report.stood_micros,
        };
        let machine = format!("{}/{}", inner.namespace, inner.id);
        let (image, manifest) = (record.image, record.manifest);
        Ok(SnapshotRecord { version: SNAPSHOT_VERSION, machine, image, manifest, ram, disk })
    }
}

/// The disk whose tops nobody writes any more: the record's is the new one, or that of a guest that may not write.
fn frozen(mut disk: Disk, inner: &Inner) -> Disk {
    let top = disk.top.take();
    if !inner.origin.writable {
        disk.frozen.extend(top);
    }
    disk
}

fn new_top(inner: &Inner) -> Result<Option<NewTop>> {
    let top = NewTop::make(&inner.origin.bundle, &inner.origin.holder).map_err(bundle_error)?;
    if let Some(top) = &top {
        inner.note_top(top.paths.data.clone(), true);
    }
    Ok(top)
}

/// Removes a top that the VMM does not use; if that fails it stays, empty, which reads the same.
fn take_back(inner: &Inner, top: NewTop) {
    let data = top.paths.data.clone();
    match top.undo() {
        Ok(()) => inner.note_top(data, false),
        Err(err) => {
            let err = Error::new(Kind::Internal, "it cannot be removed").because(err);
            tracing::warn!(id = inner.id, err = err.chain(), "a disk keeps an empty top that its machine does not use");
        }
    }
}

fn bundle_error(err: ovms_bundle::Error) -> Error {
    Error::new(bundle_kind(&err), "the snapshot's files cannot be written").because(err)
}

fn was_cancelled() -> Error {
    bundle_error(ovms_bundle::Error::Cancelled)
}

fn protocol(inner: &Inner, what: &str) -> Error {
    let message = format!("the VMM broke the control protocol: it {what}");
    inner.fault(&message);
    Error::new(Kind::Internal, message)
}

/// The right to change the tops of a machine's disk.
struct Turn<'a>(&'a Inner);

impl<'a> Turn<'a> {
    fn wait(inner: &'a Inner) -> Result<Self> {
        let free = |shared: &mut Shared| {
            let free = !std::mem::replace(&mut shared.freezing, true);
            (free || shared.exit.is_some()).then_some(free)
        };
        match inner.wait_for(TURN, free) {
            Some(true) => Ok(Self(inner)),
            Some(false) => Err(gone(inner)),
            None => {
                let message = format!("the disk of machine {} is being frozen by a snapshot that takes long", inner.id);
                Err(Error::new(Kind::FailedPrecondition, message))
            }
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.change(|shared| shared.freezing = false);
    }
}

/// The right to take a snapshot.
struct One<'a>(&'a Inner);

impl<'a> One<'a> {
    fn take(inner: &'a Inner) -> Result<Self> {
        if std::mem::replace(&mut inner.shared().snapshotting, true) {
            let message = format!("a snapshot of machine {} is being taken already", inner.id);
            return Err(Error::new(Kind::FailedPrecondition, message));
        }
        Ok(Self(inner))
    }
}

impl Drop for One<'_> {
    fn drop(&mut self) {
        self.0.change(|shared| shared.snapshotting = false);
    }
}

#[cfg(test)]
mod tests;
