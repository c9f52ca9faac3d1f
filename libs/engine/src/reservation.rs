//! What a machine has before anybody needs to know what it is made of: its name, its cgroup, and a VMM whose program
//! starts in it.
//!
//! ```text
//!  Engine::reserve ── name ── record ── cgroup ── VMM ──> Reservation ──┐
//!  its maker ──────── image, disk, console ─────────────> CreateSpec ───┴── Engine::create_in ──> Machine
//! ```
//! Dropped instead, it leaves nothing behind.

use std::path::Path;
use std::time::{Instant, SystemTime};

use ovms_proto::Channel;

use crate::ahead::Ahead;
use crate::cgroup::{self, Cgroup};
use crate::error::{Error, Kind, Result};
use crate::log::{self, LogPipe};
use crate::machine::{limit_sends, State};
use crate::process::{Cradle, Process};
use crate::record::{Record, Slot};
use crate::spec::CreateSpec;

/// A name that is taken, and a VMM in its cgroup that waits to be told what it is to be.
#[derive(Debug)]
pub struct Reservation {
    // In the order in which they go: a cgroup only when nobody is in it.
    pub(crate) born: Undone<Born>,
    pub(crate) cgroup: Undone<Cgroup>,
    pub(crate) slot: Undone<Slot>,
    pub(crate) ahead: Ahead,
    pub(crate) record: Record,
    /// Steps for the time line.
    pub(crate) passed: Vec<(String, Instant)>,
}

impl Reservation {
    /// Makes the cgroup and spawns the VMM under a name that was taken.
    pub(crate) fn make(spec: &CreateSpec, slot: Slot, cgroup: &Path, vmm: &Path, ahead: Ahead) -> Result<Self> {
        let slot = Undone::new(slot, release);
        let place = Cgroup::find(cgroup)?;
        let record = new_record(spec, &place);
        slot.get()?.write(&record)?;
        place.create()?;
        let cgroup = Undone::new(place, remove);
        let mut passed = vec![("cgroup".to_owned(), Instant::now())];
        let born = Undone::new(spawn(vmm, &spec.id, cgroup.get()?)?, end);
        passed.push(("spawned".to_owned(), Instant::now()));
        Ok(Self { born, cgroup, slot, ahead, record, passed })
    }
}

/// A VMM that was just spawned.
#[derive(Debug)]
pub(crate) struct Born {
    pub(crate) process: Process,
    pub(crate) channel: Channel,
    pub(crate) log: LogPipe,
}

fn spawn(vmm: &Path, id: &str, cgroup: &Cgroup) -> Result<Born> {
    let internal = |message: &str| Error::new(Kind::Internal, message);
    let (channel, theirs) = Channel::pair().map_err(|err| internal("a control socket cannot be made").because(err))?;
    limit_sends(&channel)?;
    let (log, log_end) = log::pipe(id).map_err(Error::io("a pipe for the VMM's log cannot be made"))?;
    let process = Process::spawn(Cradle {
        program: vmm,
        id,
        control: theirs.into(),
        log: log_end,
        birthplace: &cgroup.birthplace()?,
    })?;
    Ok(Born { process, channel, log })
}

/// The record of a machine that has a name and will have a cgroup: what is found if its engine dies now.
fn new_record(spec: &CreateSpec, cgroup: &Cgroup) -> Record {
    Record {
        id: spec.id.clone(),
        namespace: spec.namespace.clone(),
        state: State::Creating,
        created: SystemTime::now(),
        process: None,
        cgroup: cgroup.dirs(),
        uid: None,
        tops: Vec::new(),
        vcpus: 0,
        memory: 0,
        timeline: Vec::new(),
        exit: None,
        instance: spec.instance.clone(),
    }
}

/// Something that is undone unless it was taken out.
#[derive(Debug)]
pub(crate) struct Undone<T> {
    made: Option<T>,
    undo: fn(&T),
}

impl<T> Undone<T> {
    fn new(made: T, undo: fn(&T)) -> Self {
        Self { made: Some(made), undo }
    }

    pub(crate) fn get(&self) -> Result<&T> {
        self.made.as_ref().ok_or_else(taken)
    }

    pub(crate) fn take(mut self) -> Result<T> {
        self.made.take().ok_or_else(taken)
    }
}

impl<T> Drop for Undone<T> {
    fn drop(&mut self) {
        if let Some(made) = &self.made {
            (self.undo)(made);
        }
    }
}

fn taken() -> Error {
    Error::new(Kind::Internal, "a part of the machine was handed on twice")
}

/// Gives a name back.
fn release(slot: &Slot) {
    if let Err(err) = slot.remove() {
        tracing::error!(err = err.chain(), "a failed machine's directory is not removed");
    }
}

fn remove(cgroup: &Cgroup) {
    cgroup::remove(&cgroup.dirs());
}

/// Ends a VMM. If this process dies instead, the end of the control socket ends it.
fn end(born: &Born) {
    match born.process.kill() {
        Ok(()) => drop(born.process.reap()),
        Err(err) => tracing::error!(%err, "a VMM cannot be killed"),
    }
}
